package peers

import (
	"context"
	"fmt"
)

// Rust is the ztunnel written in Rust, when ZTUNNEL_BIN names one.
type Rust struct{}

// Name implements Contender.
func (Rust) Name() string { return "zt-rust" }

// Start implements Contender.
func (Rust) Start(_ context.Context, env *Env) (*Running, error) {
	if env.ZTunnelBin == "" {
		return nil, fmt.Errorf("zt-rust: %w (set ZTUNNEL_BIN)", ErrAbsent)
	}
	return nil, fmt.Errorf("zt-rust: %w", ErrAbsent)
}
