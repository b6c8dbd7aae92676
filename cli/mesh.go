package cli

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"

	"github.com/mistnet/mistnet/cli/cluster"
	"github.com/mistnet/mistnet/cli/install"
	"github.com/mistnet/mistnet/manifests"
)

// meshFlags are the flags of all commands that render charts.
type meshFlags struct {
	in     install.Input
	charts string
}

func (m *meshFlags) bind(f *pflag.FlagSet) {
	f.StringVar(&m.in.Profile, "profile", "", "one of "+strings.Join(install.Profiles(), ", ")+" (default ambient)")
	f.StringArrayVarP(&m.in.Files, "values", "f", nil, "YAML file of values; may be given several times, later ones win")
	f.StringArrayVarP(&m.in.Sets, "set", "s", nil, "value, as COMPONENT.KEY=VALUE or global.KEY=VALUE; may be given several times")
	f.StringVar(&m.charts, "charts", "", "folder that holds charts/ (default: the charts built into mistctl)")
}

func (m *meshFlags) load() (*install.Charts, error) {
	var files fs.FS = manifests.Files
	if m.charts != "" {
		files = os.DirFS(m.charts)
	}
	return install.LoadCharts(files)
}

// open loads the charts and connects to the cluster.
func (m *meshFlags) open(o cluster.Options) (*install.Charts, *cluster.Cluster, error) {
	charts, err := m.load()
	if err != nil {
		return nil, nil, err
	}
	c, err := cluster.Connect(o)
	return charts, c, err
}

// installer connects to the cluster and makes an Installer of the flags.
func (m *meshFlags) installer(o cluster.Options, in install.Installer) (*install.Installer, error) {
	charts, c, err := m.open(o)
	if err != nil {
		return nil, err
	}
	in.Cluster, in.Charts = c, charts
	return &in, nil
}

func installerFlags(f *pflag.FlagSet, in *install.Installer) {
	f.BoolVar(&in.DryRun, "dry-run", false, "say what would change, change nothing")
	f.DurationVar(&in.Timeout, "timeout", 5*time.Minute, "how long to wait for each component")
}

func installCommand(out io.Writer) *cobra.Command {
	var (
		o  cluster.Options
		m  meshFlags
		in = install.Installer{Out: out}
	)
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Install the mesh into a cluster, or complete and repair an installation",
		Example: `  mistctl install
  mistctl install --profile demo --set global.hub=registry.example/mistnet
  mistctl install --set ztunnel.logLevel=debug --set meshConfig.accessLogFile=/dev/stdout`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			i, err := m.installer(o, in)
			if err != nil {
				return err
			}
			return i.Install(cmd.Context(), m.in)
		},
	}
	o.Bind(cmd.Flags())
	m.bind(cmd.Flags())
	installerFlags(cmd.Flags(), &in)
	cmd.Flags().BoolVar(&in.Force, "force", false, "install beside or over another mesh, and take over objects of the same names")
	completeProfiles(cmd)
	return cmd
}

func upgradeCommand(out io.Writer) *cobra.Command {
	var (
		o  cluster.Options
		m  meshFlags
		in = install.Installer{Out: out}
	)
	cmd := &cobra.Command{
		Use:   "upgrade",
		Short: "Bring the mesh of a cluster to this version, one component at a time",
		Long: `Bring the mesh of a cluster to this version: istiod first, then the node agent, then the node proxy, each when the one
before it is ready. The profile and the values given at installation stay; --set and -f change them.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			i, err := m.installer(o, in)
			if err != nil {
				return err
			}
			return i.Upgrade(cmd.Context(), m.in)
		},
	}
	o.Bind(cmd.Flags())
	m.bind(cmd.Flags())
	installerFlags(cmd.Flags(), &in)
	cmd.Flags().BoolVar(&in.Force, "force", false, "take over objects of the same names that mistctl did not make")
	completeProfiles(cmd)
	return cmd
}

func uninstallCommand(out io.Writer) *cobra.Command {
	var (
		o     cluster.Options
		m     meshFlags
		purge bool
		in    = install.Installer{Out: out}
	)
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Remove from a cluster what mistctl installed",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			i, err := m.installer(o, in)
			if err != nil {
				return err
			}
			return i.Uninstall(cmd.Context(), purge)
		},
	}
	o.Bind(cmd.Flags())
	installerFlags(cmd.Flags(), &in)
	cmd.Flags().BoolVar(&purge, "purge", false, "remove the custom resource definitions too, with every object of their kinds, and the CA's key")
	return cmd
}

func manifestCommand(out io.Writer) *cobra.Command {
	var (
		m      meshFlags
		target = install.Target{}
	)
	generate := &cobra.Command{
		Use:   "generate",
		Short: "Print the objects that install would apply, in its order",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			charts, err := m.load()
			if err != nil {
				return err
			}
			settings, err := charts.Settle(m.in, nil)
			if err != nil {
				return err
			}
			objects, err := charts.Render(settings, target)
			if err != nil {
				return err
			}
			return printObjects(out, target.Namespace, objects)
		},
	}
	m.bind(generate.Flags())
	generate.Flags().StringVarP(&target.Namespace, "istio-namespace", "i", "istio-system", "namespace of the control plane")
	generate.Flags().StringVar(&target.KubeVersion, "kube-version", "", "Kubernetes version to render for (default: one the charts support)")
	completeProfiles(generate)
	cmd := &cobra.Command{Use: "manifest", Short: "Work with the mesh's objects without a cluster", Args: cobra.NoArgs}
	cmd.AddCommand(generate)
	return cmd
}

// printObjects prints what kubectl can apply: the namespace comes first, which install makes by itself.
func printObjects(out io.Writer, namespace string, objects []install.Object) error {
	if len(objects) > 0 {
		if _, err := fmt.Fprintf(out, "---\napiVersion: v1\nkind: Namespace\nmetadata:\n  name: %s\n", namespace); err != nil {
			return err
		}
	}
	for _, o := range objects {
		b, err := yaml.Marshal(o.Object)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(out, "---\n%s", b); err != nil {
			return err
		}
	}
	return nil
}

func completeProfiles(cmd *cobra.Command) {
	err := cmd.RegisterFlagCompletionFunc("profile", cobra.FixedCompletions(install.Profiles(), cobra.ShellCompDirectiveNoFileComp))
	if err != nil {
		panic(err) // the flag is bound beside every call
	}
}
