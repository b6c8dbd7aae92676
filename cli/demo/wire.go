package demo

import (
	"context"
	"errors"
	"fmt"

	"github.com/mistnet/mistnet/internal/mesh"
)

// seen is what a capture on the wire between the nodes holds.
type seen struct {
	frames    int
	plain     bool // the secret
	hbone     bool // data to or from port 15008
	tls       bool // TLS records of application data
	tunnelled int  // bytes to and from port 15008
}

func (s seen) String() string {
	payload := "no payload"
	if s.plain {
		payload = "payload readable"
	}
	return fmt.Sprintf("%d frames, %d bytes to and from port %d, %s", s.frames, s.tunnelled, mesh.PortHBONE, payload)
}

// capture records the wire between the nodes while f runs.
func (w *world) capture(ctx context.Context, f func() error) (seen, error) {
	c, err := w.lab.Capture(ctx)
	if err != nil {
		return seen{}, err
	}
	err = f()
	err = errors.Join(err, c.Stop())
	s := seen{frames: c.Frames(), plain: c.Contains([]byte(secret)), tls: c.Contains([]byte{0x17, 0x03, 0x03})}
	for _, flow := range c.Flows() {
		if flow.Payload > 0 && (flow.Dst.Port() == mesh.PortHBONE || flow.Src.Port() == mesh.PortHBONE) {
			s.hbone = true
			s.tunnelled += flow.Payload
		}
	}
	return s, err
}

// encrypted checks that a call from web is carried in a tunnel.
func (w *world) encrypted(ctx context.Context, addr string) error {
	s, err := w.capture(ctx, func() error { return w.carries(ctx, "shop/web", addr, secret) })
	switch {
	case err != nil:
		return err
	case s.plain || !s.hbone:
		return fmt.Errorf("not in a tunnel: %s", s)
	}
	return nil
}
