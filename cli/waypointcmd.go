package cli

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/mistnet/mistnet/cli/cluster"
	"github.com/mistnet/mistnet/cli/waypoint"
)

const waypointTimeout = 90 * time.Second

// waypointFlags are the flags of istioctl waypoint.
type waypointFlags struct {
	cluster   cluster.Options
	namespace string
	all       bool // namespaces
	gateway   waypoint.Gateway
}

func (f *waypointFlags) open(out io.Writer) (*waypoint.Waypoints, string, error) {
	c, err := cluster.Connect(f.cluster)
	if err != nil {
		return nil, "", err
	}
	namespace := cmp.Or(f.namespace, c.Current)
	if f.all {
		namespace = ""
	}
	return &waypoint.Waypoints{Cluster: c, Out: out}, namespace, nil
}

func waypointCommand(out io.Writer) *cobra.Command {
	var f waypointFlags
	cmd := &cobra.Command{
		Use: "waypoint", Short: "Make, list and remove waypoints, the mesh's L7 proxies",
		Example: `  mistctl waypoint apply -n shop --enroll-namespace --wait
  mistctl waypoint generate -n shop --for all
  mistctl waypoint list -A`,
	}
	cmd.AddCommand(waypointApply(out, &f), waypointGenerate(out, &f), waypointList(out, &f), waypointStatus(out, &f), waypointDelete(out, &f))
	f.cluster.Bind(cmd.PersistentFlags())
	cmd.PersistentFlags().StringVarP(&f.namespace, "namespace", "n", "", "namespace of the waypoint (default: that of the kubeconfig's context)")
	cmd.PersistentFlags().StringVar(&f.gateway.Name, "name", "waypoint", "name of the waypoint; of list and status: only this one")
	return cmd
}

// noNames refuses arguments, which istioctl overlooks: somebody meant a name by them.
func noNames(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return fmt.Errorf("%s takes no arguments: a waypoint is named with --name %s", cmd.CommandPath(), args[0])
}

// named is the waypoint that --name asks for; "": it was not said.
func (f *waypointFlags) named(cmd *cobra.Command) string {
	if !cmd.Flags().Changed("name") {
		return ""
	}
	return f.gateway.Name
}

// gatewayFlags are those that say what is written.
func (f *waypointFlags) gatewayFlags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.gateway.For, "for", "", "traffic it is for: "+strings.Join(waypoint.Traffic, ", ")+" (default: service)")
	cmd.Flags().StringVarP(&f.gateway.Revision, "revision", "r", "", "label it istio.io/rev: the control plane of that revision, or tag, runs it (default: its namespace's label says)")
}

func waypointApply(out io.Writer, f *waypointFlags) *cobra.Command {
	var o waypoint.ApplyOptions
	cmd := &cobra.Command{
		Use: "apply", Args: noNames, Short: "Make a waypoint, or change it",
		RunE: func(cmd *cobra.Command, _ []string) error {
			w, namespace, err := f.open(out)
			if err != nil {
				return err
			}
			f.gateway.Namespace = namespace
			return w.Apply(cmd.Context(), f.gateway, o)
		},
	}
	f.gatewayFlags(cmd)
	cmd.Flags().BoolVar(&o.Enroll, "enroll-namespace", false, "have the namespace use it")
	cmd.Flags().BoolVar(&o.Overwrite, "overwrite", false, "with --enroll-namespace: even if the namespace uses another one")
	cmd.Flags().BoolVarP(&o.Wait, "wait", "w", false, "wait until it serves")
	cmd.Flags().DurationVar(&o.Timeout, "waypoint-timeout", waypointTimeout, "how long to wait")
	return cmd
}

func waypointGenerate(out io.Writer, f *waypointFlags) *cobra.Command {
	cmd := &cobra.Command{
		Use: "generate", Args: noNames, Short: "Print what apply would apply",
		RunE: func(*cobra.Command, []string) error {
			f.gateway.Namespace = f.namespace
			return f.gateway.Generate(out)
		},
	}
	f.gatewayFlags(cmd)
	return cmd
}

func waypointList(out io.Writer, f *waypointFlags) *cobra.Command {
	cmd := &cobra.Command{
		Use: "list", Args: noNames, Short: "List waypoints",
		RunE: func(cmd *cobra.Command, _ []string) error {
			w, namespace, err := f.open(out)
			if err != nil {
				return err
			}
			w.Only = f.named(cmd)
			return w.List(cmd.Context(), namespace)
		},
	}
	cmd.Flags().BoolVarP(&f.all, "all-namespaces", "A", false, "of all namespaces")
	return cmd
}

func waypointStatus(out io.Writer, f *waypointFlags) *cobra.Command {
	var wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "status", Args: noNames, Short: "Say whether waypoints serve, and if not, why",
		RunE: func(cmd *cobra.Command, _ []string) error {
			w, namespace, err := f.open(out)
			if err != nil {
				return err
			}
			if !wait {
				timeout = 0
			}
			w.Only = f.named(cmd)
			return w.Status(cmd.Context(), namespace, timeout)
		},
	}
	cmd.Flags().BoolVarP(&f.all, "all-namespaces", "A", false, "of all namespaces")
	cmd.Flags().BoolVarP(&wait, "wait", "w", true, "wait until they serve")
	cmd.Flags().DurationVar(&timeout, "waypoint-timeout", waypointTimeout, "how long to wait for each")
	return cmd
}

func waypointDelete(out io.Writer, f *waypointFlags) *cobra.Command {
	var all bool
	var revision string
	cmd := &cobra.Command{
		Use: "delete [NAME...]", Args: cobra.ArbitraryArgs, Short: "Remove waypoints; what uses them goes on without",
		RunE: func(cmd *cobra.Command, args []string) error {
			if name := f.named(cmd); name != "" {
				args = append(args, name)
			}
			every := all || revision != ""
			switch {
			case every && len(args) > 0:
				return errors.New("give the names of waypoints, or --all or --revision, not both")
			case !every && len(args) == 0:
				return errors.New("give the names of waypoints, or --all, or --revision")
			}
			w, namespace, err := f.open(out)
			if err != nil {
				return err
			}
			if err := w.Delete(cmd.Context(), namespace, args, revision); err != nil {
				return fmt.Errorf("not everything was removed: %w", err)
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "all of the namespace")
	cmd.Flags().StringVarP(&revision, "revision", "r", "", "those of the namespace that have this revision")
	return cmd
}
