package xds_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/metadata"

	"github.com/mistnet/mistnet/internal/xds"
)

const secret = "type.googleapis.com/test.Secret"

// byToken is who a caller says it is.
func byToken(ctx context.Context) (string, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	if got := md.Get("authorization"); len(got) == 1 {
		return strings.TrimPrefix(got[0], "Bearer "), nil
	}
	return "", errors.New("no token")
}

// TestPrivateResourcesGoToTheirReaders: nobody else gets them, is told their names, or hears of their end; by a wildcard or by name,
// when they come, change hands and go, and over reconnects.
func TestPrivateResourcesGoToTheirReaders(t *testing.T) {
	t.Parallel()
	s := startServer(t, xds.ServerConfig{Authenticate: byToken})
	mine := xds.Resource{Name: "shop/cert", Body: []byte("key"), Private: true, Readers: []string{"shop/gate"}}
	s.Publish(secret, []xds.Resource{mine, {Name: "nobody", Body: []byte("x"), Private: true}}, nil)
	as := func(who string, names ...string) *proxy {
		p := newProxy()
		cfg := p.config(s.addr)
		cfg.Token = func(context.Context) (string, error) { return who, nil }
		cfg.Subscriptions = []xds.Subscription{{TypeURL: secret, Wildcard: len(names) == 0}}
		p.start(t, cfg)
		for _, n := range names {
			go func() { _ = p.Resolve(t.Context(), secret, n) }()
		}
		return p
	}
	gate, other := as("shop/gate@n1"), as("shop/other@n1")
	alike, named := as("shop/gate-2@n1"), as("shop/other@n2", "shop/cert", "public-1")
	everybody := []*proxy{gate, other, alike, named}
	public := map[string]string{}
	// settle publishes what all see, after which they have seen what there was before.
	settle := func(private map[string]string) {
		t.Helper()
		name := "public-1"
		public[name] += "."
		s.Publish(secret, []xds.Resource{{Name: name, Body: []byte(public[name])}}, nil)
		for _, p := range everybody {
			want := map[string]string{name: public[name]}
			if p == gate {
				for k, v := range private {
					want[k] = v
				}
			}
			p.await(t, secret, want)
		}
	}
	settle(map[string]string{"shop/cert": "key"})

	mine.Body = []byte("another key")
	s.Publish(secret, []xds.Resource{mine}, nil)
	settle(map[string]string{"shop/cert": "another key"})

	mine.Readers = []string{"shop/else"} // it is taken away from who had it
	s.Publish(secret, []xds.Resource{mine}, nil)
	settle(nil)
	mine.Readers = []string{"shop/else", "shop/gate"}
	s.Publish(secret, []xds.Resource{mine}, nil)
	settle(map[string]string{"shop/cert": "another key"})
	s.Publish(secret, nil, []string{"shop/cert", "nobody"})
	settle(nil)

	for i, p := range everybody[1:3] {
		p.mu.Lock()
		for _, u := range p.updates {
			if len(u.Removes) > 0 || slices.ContainsFunc(u.Upserts, func(r xds.Resource) bool { return r.Name != "public-1" }) {
				t.Errorf("stranger %d was told %+v", i, u)
			}
		}
		p.mu.Unlock()
	}
}

// TestAPrivateResourceOfBeforeIsTakenBack: who has one from an earlier stream, and may no longer, is told so.
func TestAPrivateResourceOfBeforeIsTakenBack(t *testing.T) {
	t.Parallel()
	s := startServer(t, xds.ServerConfig{Authenticate: byToken})
	mine := xds.Resource{Name: "shop/cert", Body: []byte("key"), Private: true, Readers: []string{"shop/gate"}}
	s.Publish(secret, []xds.Resource{mine}, nil)
	p := newProxy()
	cfg := p.config(s.addr)
	cfg.Token = func(context.Context) (string, error) { return "shop/gate@n1", nil }
	cfg.Subscriptions = []xds.Subscription{{TypeURL: secret, Wildcard: true}}
	p.start(t, cfg)
	p.await(t, secret, map[string]string{"shop/cert": "key"})
	s.close()

	again := startServerAt(t, s.addr, xds.ServerConfig{Authenticate: byToken})
	mine.Readers = nil
	again.Publish(secret, []xds.Resource{mine, {Name: "public", Body: []byte("1")}}, nil)
	p.await(t, secret, map[string]string{"public": "1"})
}
