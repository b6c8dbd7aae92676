package demo

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// act is one part of the demo: a title and the checks under it.
type act struct {
	title string
	play  func(ctx context.Context, w *world, c *checks)
}

var acts = []act{
	{"1. pods call each other; the application knows nothing of it", reach},
	{"2. what a wire between the nodes shows", wire},
	{"3. who talks to whom", identities},
	{"4. an AuthorizationPolicy takes effect, also on connections that are open", deny},
	{"5. PeerAuthentication: STRICT refuses who PERMISSIVE admits", strict},
	{"6. a waypoint routes, retries, limits and judges requests", requests},
	{"7. ztunnel dies and comes back", crash},
	{"8. the namespace leaves the mesh", leave},
}

// VIP is the address of service shop/cart.
const serviceVIP = "10.96.0.10:80"

func reach(ctx context.Context, w *world, c *checks) {
	for _, tt := range []struct {
		what, addr, answer string
	}{
		{"web → cart-1, same node, by pod IP", w.at("shop/cart-1"), "cart-1"},
		{"web → cart-2, other node, by pod IP", w.at("shop/cart-2"), "cart-2"},
		{"web → cart-2, other node, by IPv6", w.at6("shop/cart-2"), "cart-2"},
	} {
		c.check(tt.what, func() (string, error) {
			greeting, err := w.call(ctx, "shop/web", tt.addr, "hello")
			if err == nil && !strings.HasPrefix(greeting, tt.answer+" ") {
				err = fmt.Errorf("%q answered", greeting)
			}
			if err != nil {
				return "", err
			}
			return w.how(ctx, "web", tt.addr)
		})
	}
	c.check("web → service cart by its VIP reaches both pods", func() (string, error) {
		seen := make(map[string]int)
		for range 40 {
			greeting, err := w.call(ctx, "shop/web", serviceVIP, "hello")
			if err != nil {
				return "", err
			}
			name, _, _ := strings.Cut(greeting, " ")
			seen[name]++
		}
		if seen["cart-1"] == 0 || seen["cart-2"] == 0 {
			return "", fmt.Errorf("40 calls went to %v only", seen)
		}
		return fmt.Sprintf("40 calls: cart-1 %d, cart-2 %d", seen["cart-1"], seen["cart-2"]), nil
	})
}

const secret = "card 4929-1234-5678-9012"

func wire(ctx context.Context, w *world, c *checks) {
	c.check("outside the mesh the capture shows the payload", func() (string, error) {
		seen, err := w.capture(ctx, func() error {
			_, err := w.call(ctx, "legacy/old", w.at("legacy/print"), secret)
			return err
		})
		if err == nil && !seen.plain {
			err = errors.New("the payload is not in the capture: the capture proves nothing")
		}
		return seen.String(), err
	})
	c.check("in the mesh it shows ciphertext to port 15008, and no payload", func() (string, error) {
		seen, err := w.capture(ctx, func() error {
			_, err := w.call(ctx, "shop/web", w.at("shop/cart-2"), secret)
			return err
		})
		switch {
		case err != nil:
		case seen.plain:
			err = errors.New("the payload was on the wire")
		case !seen.hbone || !seen.tls:
			err = errors.New("no TLS records to port 15008 in the capture")
		}
		return seen.String(), err
	})
}

func identities(ctx context.Context, w *world, c *checks) {
	web := w.pods["shop/web"].ip
	c.check("cart-2 sees web's own address", func() (string, error) {
		greeting, err := w.call(ctx, "shop/web", w.at("shop/cart-2"), "who am I")
		if want := "cart-2 sees " + web.String(); err == nil && greeting != want {
			err = fmt.Errorf("%q, want %q", greeting, want)
		}
		return greeting, err
	})
	const webID, cartID = "spiffe://cluster.local/ns/shop/sa/web", "spiffe://cluster.local/ns/shop/sa/cart"
	for _, side := range []struct{ what, node, direction string }{
		{"web's node", "node1", "outbound"}, {"cart-2's node", "node2", "inbound"},
	} {
		c.check(side.what+" logs both identities", func() (string, error) {
			_, err := eventually(ctx, 3*time.Second, func() error {
				return w.logged(side.node, `direction="`+side.direction+`"`, `src.identity="`+webID+`"`,
					`dst.identity="`+cartID+`"`, `dst.workload="cart-2"`)
			})
			return side.direction + ": " + webID + " → " + cartID, err
		})
	}
}

func deny(ctx context.Context, w *world, c *checks) {
	held, err := w.hold(ctx, "shop/web", w.at("shop/cart-2"))
	if err != nil {
		c.check("a connection is held open", func() (string, error) { return "", err })
		return
	}
	defer held.stop()
	applied := time.Now()
	w.apply(c, "deny.yaml")
	c.check("new connections are refused", func() (string, error) {
		took, err := eventually(ctx, 5*time.Second, func() error { return w.refused(ctx, "shop/web", w.at("shop/cart-2")) })
		return millis(took) + " after the file was written", err
	})
	c.check("the open connection was cut", func() (string, error) {
		at, err := held.ended(ctx, 5*time.Second)
		if err != nil {
			return "", err
		}
		return millis(at.Sub(applied)) + " after the file was written", nil
	})
	c.check("cart's node says which policy it was", func() (string, error) {
		_, err := eventually(ctx, 3*time.Second, func() error {
			return w.logged("node2", `direction="inbound"`, "policy changed", "shop/no-web")
		})
		return "policy changed: shop/no-web", err
	})
	w.withdraw(c, "deny.yaml")
	c.check("without the policy calls pass again", func() (string, error) {
		took, err := eventually(ctx, 5*time.Second, func() error { return w.answers(ctx, "shop/web", w.at("shop/cart-2")) })
		return millis(took), err
	})
}

func strict(ctx context.Context, w *world, c *checks) {
	cart := w.at("shop/cart-2")
	c.check("PERMISSIVE: a caller outside the mesh is admitted in plaintext", func() (string, error) {
		return w.call(ctx, "legacy/old", cart, "hello")
	})
	w.apply(c, "strict.yaml")
	c.check("STRICT: the same caller is refused", func() (string, error) {
		took, err := eventually(ctx, 5*time.Second, func() error { return w.refused(ctx, "legacy/old", cart) })
		return millis(took) + " after the file was written", err
	})
	c.check("STRICT: callers in the mesh are not", func() (string, error) {
		return w.call(ctx, "shop/web", cart, "hello")
	})
	w.withdraw(c, "strict.yaml")
	c.check("PERMISSIVE again", func() (string, error) {
		took, err := eventually(ctx, 5*time.Second, func() error { return w.answers(ctx, "legacy/old", cart) })
		return millis(took), err
	})
}

func crash(ctx context.Context, w *world, c *checks) {
	cart := w.at("shop/cart-2")
	seen, err := w.capture(ctx, func() error {
		w.kill("ztunnel-node1")
		c.check("ztunnel of node1 killed with -9: web cannot call, and does not fall back to plaintext", func() (string, error) {
			return "", w.refused(ctx, "shop/web", cart)
		})
		restarted := time.Now()
		if err := w.startZtunnel(ctx, "node1"); err != nil {
			return err
		}
		c.check("restarted: new connections work again", func() (string, error) {
			_, err := eventually(ctx, 10*time.Second, func() error { return w.carries(ctx, "shop/web", cart, secret) })
			return millis(time.Since(restarted)) + " after the start of the process", err
		})
		return nil
	})
	c.check("no byte of it went out in plaintext", func() (string, error) {
		if err == nil && seen.plain {
			err = errors.New("the payload was on the wire")
		}
		if err == nil && !seen.hbone {
			err = errors.New("the capture saw nothing at all")
		}
		return seen.String(), err
	})
}

func leave(ctx context.Context, w *world, c *checks) {
	cart := w.at("shop/cart-2")
	w.relabel(c, false)
	c.check("the label is gone: calls still pass", func() (string, error) {
		_, err := eventually(ctx, 5*time.Second, func() error { return w.outsideMesh(ctx) })
		if err != nil {
			return "", err
		}
		return w.call(ctx, "shop/web", cart, "hello")
	})
	c.check("and are plain on the wire", func() (string, error) {
		seen, err := w.capture(ctx, func() error {
			_, err := w.call(ctx, "shop/web", cart, secret)
			return err
		})
		if err == nil && (!seen.plain || seen.hbone) {
			err = errors.New("the payload is not plain in the capture")
		}
		return seen.String(), err
	})
	w.relabel(c, true)
	c.check("the label is back: they are encrypted, and no pod restarted", func() (string, error) {
		took, err := eventually(ctx, 10*time.Second, func() error { return w.encrypted(ctx, cart) })
		return millis(took), err
	})
}

// addrOf joins an address and the demo server's port.
func addrOf(a netip.Addr) string { return netip.AddrPortFrom(a, 8080).String() }
