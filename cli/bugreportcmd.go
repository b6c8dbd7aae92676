package cli

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/mistnet/mistnet/cli/bugreport"
	"github.com/mistnet/mistnet/cli/cluster"
)

func bugReportCommand(out io.Writer) *cobra.Command {
	var (
		o     cluster.Options
		m     meshFlags
		file  string
		since time.Duration
	)
	cmd := &cobra.Command{
		Use: "bug-report", Args: cobra.NoArgs,
		Short: "Collect objects, state and logs of the mesh into an archive, without secrets",
		RunE: func(cmd *cobra.Command, _ []string) error {
			charts, c, err := m.open(o)
			if err != nil {
				return err
			}
			f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
			if err != nil {
				return fmt.Errorf("write the report: %w", err)
			}
			err = errors.Join(bugreport.Write(cmd.Context(), f, bugreport.Options{
				Cluster: c, Version: charts.Version(), Since: since, Now: time.Now(),
				Say: func(format string, args ...any) { fmt.Fprintf(out, "collecting "+format+"\n", args...) },
			}), f.Close())
			if err != nil {
				return errors.Join(fmt.Errorf("write the report: %w", err), os.Remove(file))
			}
			fmt.Fprintf(out, "%s is written: it holds no Secrets, but read it before you send it to anybody\n", file)
			return nil
		},
	}
	o.Bind(cmd.Flags())
	cmd.Flags().StringVar(&file, "archive", "mistnet-bug-report.tar.gz", "where to write it")
	cmd.Flags().DurationVar(&since, "since", 0, "only logs as young as this (default: all there are)")
	return cmd
}
