// Command waypoint is the L7 proxy of a namespace or service of the mesh.
package main

import (
	"context"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/waypoint"
)

func main() {
	cfg := new(waypoint.Config)
	daemon.Main("waypoint", cfg, func(ctx context.Context, env *daemon.Env) error {
		w, err := waypoint.New(cfg, env)
		if err != nil {
			return err
		}
		return w.Run(ctx)
	})
}
