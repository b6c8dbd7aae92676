// Command cni-agent is the node agent that enrols pods in the mesh; see package cni.
package main

import (
	"context"

	"github.com/mistnet/mistnet/cni"
	"github.com/mistnet/mistnet/internal/daemon"
)

func main() {
	var cfg cni.Config
	daemon.Main("cni-agent", &cfg, func(ctx context.Context, env *daemon.Env) error {
		return cni.Main(ctx, cfg, env)
	})
}
