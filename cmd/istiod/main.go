// Command istiod is the control plane of the mesh.
package main

import (
	"context"
	"os"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/istiod"
	"github.com/mistnet/mistnet/waypoint/route"
)

func main() {
	if code, handled := istiod.Secrets(os.Args[1:], os.Stdout, os.Stderr); handled {
		os.Exit(code)
	}
	cfg := istiod.Config{Hidden: route.HiddenRules}
	daemon.Main("istiod", &cfg, func(ctx context.Context, env *daemon.Env) error {
		d, err := istiod.New(ctx, cfg, env)
		if err != nil {
			return err
		}
		return d.Run(ctx)
	})
}
