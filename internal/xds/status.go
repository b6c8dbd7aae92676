package xds

import (
	"maps"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/genproto/googleapis/rpc/status"
)

// ClientStatus is what the server knows of one connected client, for debugging.
type ClientStatus struct {
	Peer      string       `json:"peer"`    // who it is, as Authenticate said
	Address   string       `json:"address"` // where it connects from
	Node      string       `json:"node"`    // the id it gives itself
	Connected time.Time    `json:"connected"`
	Types     []TypeStatus `json:"types"` // in the order they are sent
}

// TypeStatus is the state of one type of one client. Counts are of responses on this stream.
type TypeStatus struct {
	TypeURL       string            `json:"typeUrl"`
	Wildcard      bool              `json:"wildcard"`
	Names         int               `json:"names"` // subscribed by name
	Sent          uint64            `json:"sent"`
	Acked         uint64            `json:"acked"`
	Nacked        uint64            `json:"nacked"`
	SentResources uint64            `json:"sentResources"`
	InFlight      bool              `json:"inFlight"` // a response waits for its answer
	Behind        uint64            `json:"behind"`   // changes of the type since the last response
	LastSent      time.Time         `json:"lastSent"`
	LastAnswer    time.Time         `json:"lastAnswer"`
	Rejected      map[string]string `json:"rejected,omitempty"` // resource → why, until it is sent again
}

// Totals counts the responses of one type, to all clients since the server was made.
type Totals struct{ Sent, Nacked uint64 }

// Totals are those of every type that was ever published or asked for.
func (s *Server) Totals() map[string]Totals {
	s.mu.RLock()
	defer s.mu.RUnlock()
	all := make(map[string]Totals, len(s.stores))
	for typeURL, st := range s.stores {
		all[typeURL] = Totals{Sent: st.sent.Load(), Nacked: st.nacked.Load()}
	}
	return all
}

// Clients returns the state of every connected client, in the order they came.
func (s *Server) Clients() []ClientStatus {
	s.mu.RLock()
	streams := make([]*stream, 0, len(s.streams))
	for _, id := range sortedIDs(s.streams) {
		streams = append(streams, s.streams[id])
	}
	s.mu.RUnlock()
	all := make([]ClientStatus, 0, len(streams))
	for _, st := range streams {
		all = append(all, st.describe())
	}
	return all
}

func (st *stream) describe() ClientStatus {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.server.mu.RLock()
	defer st.server.mu.RUnlock()
	c := ClientStatus{Peer: st.peer, Address: st.address, Node: st.node.GetId(), Connected: st.connected}
	for _, w := range st.watches {
		t := w.status
		t.Wildcard, t.Names, t.InFlight = w.wildcard, len(w.names), w.nonce != ""
		t.Behind = w.store.seq - w.cursor
		t.Rejected = maps.Clone(w.rejected)
		c.Types = append(c.Types, t)
	}
	return c
}

// acknowledged takes in the answer to the response in flight. It reports whether it was one.
func (w *watch) acknowledged(req *discovery.DeltaDiscoveryRequest, now time.Time) bool {
	if req.GetResponseNonce() == "" || req.GetResponseNonce() != w.nonce {
		return false
	}
	w.nonce = ""
	w.status.LastAnswer = now
	if req.GetErrorDetail() == nil {
		w.status.Acked++
		return true
	}
	w.status.Nacked++
	w.store.nacked.Add(1)
	for name, reason := range reasons(req.GetErrorDetail()) {
		if len(w.rejected) < maxRejections || w.rejected[name] != "" {
			w.rejected[name] = reason
		}
	}
	return true
}

// reasons reads why a response was refused, by resource; of a client that does not say which, under "".
func reasons(st *status.Status) map[string]string {
	for _, packed := range st.GetDetails() {
		var detail errdetails.BadRequest
		if packed.UnmarshalTo(&detail) != nil || len(detail.GetFieldViolations()) == 0 {
			continue
		}
		why := make(map[string]string)
		for _, v := range detail.GetFieldViolations() {
			why[v.GetField()] = v.GetDescription()
		}
		return why
	}
	return map[string]string{"": st.GetMessage()}
}
