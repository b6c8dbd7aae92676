package cli

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/mistnet/mistnet/cli/check"
	"github.com/mistnet/mistnet/cli/cluster"
)

func checkCommand(out io.Writer) *cobra.Command {
	var (
		o    cluster.Options
		m    meshFlags
		pre  bool
		wait time.Duration
	)
	cmd := &cobra.Command{
		Use: "check", Args: cobra.NoArgs,
		Short: "Say whether the mesh works, or with --pre whether it would",
		RunE: func(cmd *cobra.Command, _ []string) error {
			charts, c, err := m.open(o)
			if err != nil {
				return err
			}
			ch := &check.Checker{Cluster: c, Version: charts.Version()}
			run := ch.After
			if pre {
				run = ch.Before
			}
			deadline := time.After(wait)
			tick := time.NewTicker(2 * time.Second)
			defer tick.Stop()
			for {
				var text strings.Builder
				good := check.Print(&text, run(cmd.Context()))
				if !good && wait > 0 {
					select {
					case <-tick.C:
						continue
					case <-deadline:
					case <-cmd.Context().Done():
					}
				}
				fmt.Fprint(out, text.String())
				if !good {
					return errors.New("not everything is well")
				}
				return nil
			}
		},
	}
	o.Bind(cmd.Flags())
	cmd.Flags().BoolVar(&pre, "pre", false, "before an installation")
	cmd.Flags().DurationVar(&wait, "wait", 0, "look again until everything is well, at most this long")
	return cmd
}
