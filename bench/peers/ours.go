package peers

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
)

// Ours is two ztunnels with pods enrolled in the mesh, steered by istiod.
type Ours struct{}

// Name implements Contender.
func (Ours) Name() string { return "ours" }

// Start implements Contender.
func (Ours) Start(_ context.Context, env *Env) (*Running, error) {
	for _, bin := range []string{"istiod", "ztunnel", "cni-agent", "cni-plugin"} {
		if _, err := os.Stat(filepath.Join(env.OursDir, bin)); err != nil {
			return nil, fmt.Errorf("%s: %w (make build, or -bin DIR)", filepath.Join(env.OursDir, bin), ErrAbsent)
		}
	}
	return nil, fmt.Errorf("bringing up the mesh: %w", ErrAbsent)
}
