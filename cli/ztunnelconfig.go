package cli

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mistnet/mistnet/cli/cluster"
	"github.com/mistnet/mistnet/cli/inspect"
	"github.com/mistnet/mistnet/internal/mesh"
)

// source says where the dump of a ztunnel comes from.
type source struct {
	cluster   cluster.Options
	pod       string // of ztunnel, NAME or NAME.NAMESPACE
	node      string
	file      string
	adminAddr string
	adminPort int
}

// named is one answer and who gave it.
type named struct {
	name string
	body []byte
}

func ztunnelConfigCommand(out io.Writer) *cobra.Command {
	cmd := &cobra.Command{
		Use: "ztunnel-config", Aliases: []string{"zc"},
		Short: "Show what a ztunnel knows: workloads, services, policies, certificates, connections",
		Args:  cobra.NoArgs,
	}
	for _, p := range []struct {
		name, short string
		aliases     []string
	}{
		{"workload", "Workloads: where each is and how it is reached", []string{"workloads", "w"}},
		{"service", "Services, their addresses and healthy endpoints", []string{"services", "svc", "s"}},
		{"policy", "Authorization policies", []string{"policies", "p"}},
		{"certificate", "Certificates and their validity", []string{"certificates", "cert", "certs"}},
		{"connections", "Open connections of the pods", []string{"connection", "cons"}},
		{"all", "Everything", nil},
	} {
		cmd.AddCommand(ztunnelPartCommand(out, p.name, p.short, p.aliases))
	}
	return cmd
}

func ztunnelPartCommand(out io.Writer, part, short string, aliases []string) *cobra.Command {
	var (
		from   source
		filter inspect.Filter
		format string
	)
	cmd := &cobra.Command{
		Use: part + " [ZTUNNEL-POD[.NAMESPACE]]", Short: short, Aliases: aliases, Args: cobra.MaximumNArgs(1),
		Example: "  mistctl ztunnel-config " + part + "\n  mistctl ztunnel-config " + part + " --node worker-1 -o json\n" +
			"  mistctl ztunnel-config " + part + " --admin-addr 127.0.0.1:15000   # on this machine, without Kubernetes",
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				from.pod = args[0]
			}
			if !slices.Contains([]string{"short", "json", "yaml"}, format) {
				return fmt.Errorf("there is no output format %q; there are short, json, yaml", format)
			}
			everyNode := part == "certificate" || part == "connections" || part == "all"
			dumps, err := from.dumps(cmd.Context(), everyNode)
			if err != nil {
				return err
			}
			return printDumps(out, dumps, part, format, filter)
		},
	}
	f := cmd.Flags()
	from.cluster.Bind(f)
	f.StringVar(&from.node, "node", "", "only the ztunnel of this node")
	f.StringVarP(&from.file, "file", "f", "", "read a saved /config_dump instead; - is standard input")
	f.StringVar(&from.adminAddr, "admin-addr", "", "ask the ztunnel whose admin page is at this HOST:PORT, without Kubernetes")
	f.IntVar(&from.adminPort, "proxy-admin-port", mesh.PortAdmin, "port of ztunnel's admin page")
	f.StringVarP(&format, "output", "o", "short", "short, json or yaml")
	f.StringVarP(&filter.Namespace, "namespace", "n", "", "only what is in this namespace")
	if part == "workload" {
		f.StringVar(&filter.Namespace, "workload-namespace", "", "only workloads of this namespace")
		f.StringVar(&filter.Node, "workload-node", "", "only workloads on this node")
	}
	if part == "service" {
		f.StringVar(&filter.Namespace, "service-namespace", "", "only services of this namespace")
	}
	cmd.MarkFlagsMutuallyExclusive("file", "admin-addr", "node")
	return cmd
}

func printDumps(out io.Writer, dumps []named, part, format string, filter inspect.Filter) error {
	for i, n := range dumps {
		d, err := inspect.ReadDump(n.body)
		if err != nil {
			return fmt.Errorf("%s: %w", n.name, err)
		}
		if format != "short" {
			if err := d.PrintRaw(out, part, format); err != nil {
				return err
			}
			continue
		}
		if len(dumps) > 1 {
			fmt.Fprintf(out, "%s# %s\n", strings.Repeat("\n", min(i, 1)), n.name)
		}
		if err := d.Print(out, part, filter, time.Now()); err != nil {
			return err
		}
	}
	return nil
}

// dumps reads the chosen ztunnel's dump; those of all nodes when none is chosen and all is set, else any one's.
func (s *source) dumps(ctx context.Context, all bool) ([]named, error) {
	switch {
	case s.file == "-":
		b, err := io.ReadAll(os.Stdin)
		return []named{{"standard input", b}}, err
	case s.file != "":
		b, err := os.ReadFile(s.file)
		return []named{{s.file, b}}, err
	case s.adminAddr != "":
		b, err := cluster.Page(ctx, "http://"+s.adminAddr+"/config_dump")
		if err != nil {
			return nil, fmt.Errorf("ask ztunnel: %w", err)
		}
		return []named{{s.adminAddr, b}}, nil
	}
	c, err := cluster.Connect(s.cluster)
	if err != nil {
		return nil, err
	}
	pods, err := s.pods(ctx, c)
	if err != nil {
		return nil, err
	}
	if !all {
		pods = pods[:1]
	}
	var (
		got  []named
		errs []error
	)
	for _, p := range pods {
		b, err := c.PodPage(ctx, p.Namespace, p.Name, s.adminPort, "/config_dump")
		if err != nil {
			errs = append(errs, err)
			continue
		}
		got = append(got, named{p.Name + " on " + p.Spec.NodeName, b})
	}
	if len(got) == 0 {
		return nil, errors.Join(errs...)
	}
	return got, nil
}

// pods are the running ztunnels that were asked for, at least one.
func (s *source) pods(ctx context.Context, c *cluster.Cluster) ([]corev1.Pod, error) {
	all, err := podsOf(ctx, c, "app=ztunnel")
	if err != nil {
		return nil, err
	}
	name, namespace, _ := strings.Cut(s.pod, ".")
	pods := slices.DeleteFunc(slices.Clone(all), func(p corev1.Pod) bool {
		return s.node != "" && p.Spec.NodeName != s.node || s.pod != "" && p.Name != name || namespace != "" && p.Namespace != namespace ||
			p.Status.Phase != "" && p.Status.Phase != corev1.PodRunning
	})
	switch {
	case len(pods) > 0:
		return pods, nil
	case len(all) == 0:
		return nil, fmt.Errorf("no ztunnel runs in namespace %s: is the mesh installed (mistctl check), or in another namespace (-i)?", c.Namespace)
	}
	var have []string
	for _, p := range all {
		have = append(have, p.Name+" on "+p.Spec.NodeName)
	}
	return nil, fmt.Errorf("no such ztunnel runs; there are %s", strings.Join(have, ", "))
}

// podsOf lists pods of the control plane's namespace, sorted by node.
func podsOf(ctx context.Context, c *cluster.Cluster, selector string) ([]corev1.Pod, error) {
	list, err := c.Kube.CoreV1().Pods(c.Namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return nil, cluster.Explain(fmt.Errorf("list pods of namespace %s: %w", c.Namespace, err))
	}
	slices.SortFunc(list.Items, func(a, b corev1.Pod) int {
		return cmp.Or(cmp.Compare(a.Spec.NodeName, b.Spec.NodeName), cmp.Compare(a.Name, b.Name))
	})
	return list.Items, nil
}

func proxyStatusCommand(out io.Writer) *cobra.Command {
	var (
		o      cluster.Options
		addr   string
		format string
	)
	cmd := &cobra.Command{
		Use: "proxy-status", Aliases: []string{"ps"}, Args: cobra.NoArgs,
		Short: "Show the clients of istiod and whether each has the newest configuration",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != "short" && format != "json" {
				return fmt.Errorf("there is no output format %q; there are short, json", format)
			}
			pages, err := istiodPages(cmd.Context(), o, addr, "/debug/xds")
			if err != nil {
				return err
			}
			all := []inspect.Client{}
			for _, page := range pages {
				clients, err := inspect.ReadClients(page.body, page.name)
				if err != nil {
					return err
				}
				all = append(all, clients...)
			}
			if format == "json" {
				b, err := json.MarshalIndent(all, "", "  ")
				if err != nil {
					return err
				}
				_, err = out.Write(append(bytes.TrimSpace(b), '\n'))
				return err
			}
			return inspect.PrintClients(out, all)
		},
	}
	o.Bind(cmd.Flags())
	cmd.Flags().StringVar(&addr, "istiod-addr", "", "ask the istiod whose debug page is at this HOST:PORT, without Kubernetes")
	cmd.Flags().StringVarP(&format, "output", "o", "short", "short or json")
	return cmd
}

// istiodPages reads a page of every replica of istiod.
func istiodPages(ctx context.Context, o cluster.Options, addr, path string) ([]named, error) {
	if addr != "" {
		b, err := cluster.Page(ctx, "http://"+addr+path)
		if err != nil {
			return nil, fmt.Errorf("ask istiod: %w", err)
		}
		return []named{{"istiod", b}}, nil
	}
	c, err := cluster.Connect(o)
	if err != nil {
		return nil, err
	}
	pods, err := podsOf(ctx, c, "app=istiod")
	if err != nil {
		return nil, err
	}
	var got []named
	for _, p := range pods {
		if p.Status.Phase != corev1.PodRunning {
			continue
		}
		b, err := c.PodPage(ctx, p.Namespace, p.Name, istiodDebugPort, path)
		if err != nil {
			return nil, err
		}
		got = append(got, named{p.Name, b})
	}
	if len(got) == 0 {
		return nil, fmt.Errorf("no istiod runs in namespace %s: is the mesh installed (mistctl check), or in another namespace (-i)?", c.Namespace)
	}
	return got, nil
}

// istiodDebugPort is where istiod serves its debug pages to its own loopback.
const istiodDebugPort = 15014
