// Package cli is mistctl, the command line of the mesh.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/mistnet/mistnet/cli/demo"
	"github.com/mistnet/mistnet/cli/install"
)

// Main runs mistctl with these arguments and returns the exit status.
func Main(ctx context.Context, args []string, out, errOut io.Writer) int {
	root := &cobra.Command{
		Use:           "mistctl",
		Short:         "mistctl installs and inspects a Mistnet mesh",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(errOut)
	root.AddCommand(installCommand(out), upgradeCommand(out), uninstallCommand(out), manifestCommand(out),
		ztunnelConfigCommand(out), proxyStatusCommand(out), waypointCommand(out), checkCommand(out))
	root.AddCommand(analyzeCommand(out), explainCommand(out), demoCommand(out), versionCommand(out), bugReportCommand(out))
	beHelpful(root)
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(errOut, "mistctl:", strings.Join(strings.Fields(err.Error()), " "))
		return 1
	}
	return 0
}

// istioctls are commands of istioctl that have another name here, or no meaning.
var istioctls = map[string]string{
	"proxy-config": noSidecars, "pc": noSidecars,
	"kube-inject": "nothing is injected: label the namespace istio.io/dataplane-mode=ambient",
	"validate":    "see mistctl analyze", "x": "see mistctl --help", "experimental": "see mistctl --help",
	"describe": "see mistctl explain, which tells what becomes of a request",
	"tag":      "a revision's tags are istiod's chart value revisionTags",
}

const noSidecars = "there are no sidecars; see mistctl ztunnel-config for node proxies, mistctl waypoint and explain for waypoints"

// beHelpful has every command refuse a wrong word or flag by name, with the nearest that there is.
func beHelpful(cmd *cobra.Command) {
	cmd.DisableSuggestions = true // these are ours
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		var unknown *pflag.NotExistError
		if !errors.As(err, &unknown) || unknown.GetSpecifiedShortnames() != "" {
			return err
		}
		var flags []string
		cmd.Flags().VisitAll(func(f *pflag.Flag) { flags = append(flags, "--"+f.Name) })
		return fmt.Errorf("%w%s", err, install.DidYouMean("--"+unknown.GetSpecifiedName(), flags))
	})
	if !cmd.HasSubCommands() {
		return
	}
	if cmd.RunE == nil {
		cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	}
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		var commands []string
		for _, c := range cmd.Commands() {
			commands = append(commands, c.Name())
		}
		if instead, ok := istioctls[args[0]]; ok && !cmd.HasParent() {
			return fmt.Errorf("unknown command %q for %q: %s", args[0], cmd.CommandPath(), instead)
		}
		return fmt.Errorf("unknown command %q for %q%s", args[0], cmd.CommandPath(), install.DidYouMean(args[0], commands))
	}
	for _, c := range cmd.Commands() {
		beHelpful(c)
	}
}

func demoCommand(out io.Writer) *cobra.Command {
	o := demo.Options{Out: out}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show a mesh at work on this machine, without Kubernetes",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return errors.New("the demo needs root: it makes network namespaces and redirects traffic in them")
			}
			if o.Bin == "" {
				self, err := os.Executable()
				if err != nil {
					return err
				}
				o.Bin = filepath.Dir(self)
			}
			return demo.Run(cmd.Context(), o)
		},
	}
	cmd.Flags().StringVar(&o.Bin, "bin", "", "folder of the mesh's programs (default: where mistctl is)")
	cmd.Flags().BoolVar(&o.Keep, "keep", false, "leave the mesh up until Ctrl-C, and print what to try")
	return cmd
}
