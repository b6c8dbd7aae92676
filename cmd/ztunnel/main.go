// Command ztunnel is the node proxy of the mesh.
package main

import (
	"context"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/ztunnel"
)

func main() {
	cfg := new(ztunnel.Config)
	daemon.Main("ztunnel", cfg, func(ctx context.Context, env *daemon.Env) error {
		z, err := ztunnel.New(cfg, env)
		if err != nil {
			return err
		}
		return z.Run(ctx)
	})
}
