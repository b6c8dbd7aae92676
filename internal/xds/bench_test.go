package xds

import (
	"fmt"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
)

func populated(n int) *Server {
	s := NewServer(ServerConfig{Order: []string{"T"}})
	body := make([]byte, 300)
	list := make([]Resource, 0, n)
	for i := range n {
		list = append(list, Resource{
			Name: fmt.Sprintf("Kubernetes//Pod/namespace/pod-%d", i), Body: body, Aliases: []string{fmt.Sprintf("/10.%d", i)},
		})
	}
	s.Publish("T", list, nil)
	return s
}

// BenchmarkFirstSync is what one more client costs the server: every response of a first sync of 10 000 resources,
// encoded.
func BenchmarkFirstSync(b *testing.B) {
	s := populated(10_000)
	b.ReportAllocs()
	for b.Loop() {
		st := newStream(s, nil, 1, "", "")
		if err := st.handle(&discovery.DeltaDiscoveryRequest{
			TypeUrl: "T", Node: &core.Node{ClientFeatures: []string{featureChunks}},
		}); err != nil {
			b.Fatal(err)
		}
		drain(b, s, st)
		s.leave(st)
	}
}

// BenchmarkOneChange is one change told to 500 clients.
func BenchmarkOneChange(b *testing.B) {
	s := populated(10_000)
	var clients []*stream
	for i := range 500 {
		st := newStream(s, nil, uint64(i), "", "")
		if err := st.handle(&discovery.DeltaDiscoveryRequest{TypeUrl: "T"}); err != nil {
			b.Fatal(err)
		}
		drain(b, s, st)
		clients = append(clients, st)
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		s.Publish("T", []Resource{{Name: "Kubernetes//Pod/namespace/pod-7", Body: []byte(fmt.Sprint(i))}}, nil)
		for _, st := range clients {
			drain(b, s, st)
		}
	}
}

func drain(b *testing.B, s *Server, st *stream) {
	b.Helper()
	for {
		resp := st.next(time.Now())
		if resp == nil {
			return
		}
		if _, err := proto.Marshal(resp); err != nil {
			b.Fatal(err)
		}
		if err := st.handle(&discovery.DeltaDiscoveryRequest{TypeUrl: "T", ResponseNonce: resp.GetNonce()}); err != nil {
			b.Fatal(err)
		}
	}
}
