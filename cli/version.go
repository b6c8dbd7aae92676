package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mistnet/mistnet/cli/check"
	"github.com/mistnet/mistnet/cli/cluster"
	"github.com/mistnet/mistnet/cli/install"
	"github.com/mistnet/mistnet/internal/daemon"
)

// versions is what `mistctl version -o json` prints.
type versions struct {
	Client     string           `json:"client"`
	Charts     string           `json:"charts"`
	Installed  string           `json:"installed,omitempty"` // as mistctl recorded it
	Kubernetes string           `json:"kubernetes,omitempty"`
	Components []componentCount `json:"components,omitempty"`
	Cluster    string           `json:"cluster,omitempty"` // why it is not known
}

type componentCount struct {
	Component string `json:"component"`
	Version   string `json:"version"`
	Pods      int    `json:"pods"`
}

func versionCommand(out io.Writer) *cobra.Command {
	var (
		o      cluster.Options
		m      meshFlags
		remote bool
		format string
	)
	cmd := &cobra.Command{
		Use: "version", Short: "Print the versions of mistctl and of what is in the cluster", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != "short" && format != "json" {
				return fmt.Errorf("there is no output format %q; there are short, json", format)
			}
			charts, err := m.load()
			if err != nil {
				return err
			}
			v := versions{Client: daemon.Version(), Charts: charts.Version()}
			if remote {
				c, err := cluster.Connect(o)
				if err == nil {
					err = v.ask(cmd.Context(), c)
				}
				if err != nil { // one's own version is an answer all the same
					v.Cluster = "not reached: " + strings.Join(strings.Fields(err.Error()), " ")
				}
			}
			return v.print(out, format)
		},
	}
	o.Bind(cmd.Flags())
	cmd.Flags().BoolVar(&remote, "remote", true, "ask the cluster too")
	cmd.Flags().StringVarP(&format, "output", "o", "short", "short or json")
	return cmd
}

func (v *versions) ask(ctx context.Context, c *cluster.Cluster) error {
	v.Kubernetes = c.Version.GitVersion
	inv, err := install.ReadInventory(ctx, c)
	if err != nil {
		return err
	}
	if inv != nil {
		v.Installed = inv.Version
	}
	pods, err := c.Kube.CoreV1().Pods(c.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return cluster.Explain(fmt.Errorf("list pods of namespace %s: %w", c.Namespace, err))
	}
	counts := make(map[[2]string]int)
	for _, p := range pods.Items {
		if !check.Component(p.Labels) || len(p.Spec.Containers) == 0 {
			continue
		}
		name := p.Labels["app"]
		if name != "istiod" && name != "ztunnel" {
			name = "cni"
		}
		counts[[2]string{name, check.Tag(p.Spec.Containers[0].Image)}]++
	}
	keys := slices.SortedFunc(maps.Keys(counts), func(a, b [2]string) int { return slices.Compare(a[:], b[:]) })
	for _, k := range keys {
		v.Components = append(v.Components, componentCount{k[0], k[1], counts[k]})
	}
	return nil
}

func (v *versions) print(out io.Writer, format string) error {
	if format == "json" {
		b, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			return err
		}
		_, err = out.Write(append(b, '\n'))
		return err
	}
	line := func(what, version string) {
		if version != "" {
			fmt.Fprintf(out, "%-12s %s\n", what+":", version)
		}
	}
	line("client", v.Client)
	line("charts", v.Charts)
	line("cluster", v.Cluster)
	line("kubernetes", v.Kubernetes)
	line("installed", v.Installed)
	for _, c := range v.Components {
		line(c.Component, fmt.Sprintf("%s (%d pods)", c.Version, c.Pods))
	}
	return nil
}
