// Command mistctl is the command line of the mesh.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/mistnet/mistnet/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	status := cli.Main(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(status)
}
