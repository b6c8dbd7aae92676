package istiod_test

import (
	"context"
	"slices"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/xds"
)

// TestWaypointsHearOfEveryType: a waypoint is not ready before it was told of every type, even that there is nothing of it.
func TestWaypointsHearOfEveryType(t *testing.T) {
	l := newLab(t)
	l.start()
	token := l.token("-node", "n1")
	types := []string{mesh.TypeAuthorization, mesh.TypeTrafficPolicy, mesh.TypeRoute, mesh.TypeAddress}
	var subscriptions []xds.Subscription
	for _, typeURL := range types {
		subscriptions = append(subscriptions, xds.Subscription{TypeURL: typeURL, Wildcard: true})
	}
	heard := make(chan string, 100)
	c := xds.NewClient(xds.ClientConfig{
		Target: l.d.XDSAddr().String(), TLS: l.tls(), Token: func(context.Context) (string, error) { return token, nil },
		Node: &core.Node{Id: "ztunnel~10.0.0.1~ztunnel-n1.istio-system~istio-system.svc.cluster.local"}, Subscriptions: subscriptions,
		Apply: func(_ context.Context, u xds.Update) []xds.Rejection { heard <- u.TypeURL; return nil },
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	defer func() { cancel(); <-done }()
	var got []string
	for len(got) < len(types) {
		select {
		case typeURL := <-heard:
			got = append(got, typeURL)
		case <-time.After(wait):
			t.Fatalf("heard of %q only", got)
		}
	}
	if !slices.Equal(got, types) {
		t.Errorf("types = %q, want %q", got, types)
	}
}
