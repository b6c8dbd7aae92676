package xds

import (
	"errors"
	"fmt"
	"strings"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"
)

// maxRejections bounds how many rejected resources one NACK names.
const maxRejections = 100

// subscription is what a client knows of one type and what it must say next. It is pure: every event is a method, every
// method returns the message to send, if any. It outlives streams.
//
//	open    a stream began         → the first request
//	want    a name is asked for    → (sent by next)
//	next    nothing is in the way  → the request for names not asked yet
//	receive a response came        → what to apply
//	applied it was applied         → ACK or NACK, and the names that are answered now
type subscription struct {
	typeURL  string
	wildcard bool

	// held are the resources the client has, with their versions. A rejected one has the version "": the client may
	// hold an older content of it or a stand-in, so the server must tell of its removal and send whatever is current.
	held   map[string]string
	wanted map[string]*want // on-demand names
	opened bool             // a stream is open
	synced bool             // a whole first answer was applied
	seen   bool             // any response was
}

type want struct {
	sent     bool  // on the present stream
	answered bool  // present or negative, on any stream
	err      error // why the resource it leads to was rejected
}

func newSubscription(typeURL string, wildcard bool) *subscription {
	return &subscription{
		typeURL: typeURL, wildcard: wildcard, held: make(map[string]string), wanted: make(map[string]*want),
	}
}

// open returns the first request of a stream. It says what the client has, so that only the difference comes. On-demand
// it subscribes to everything and takes that back in one message, which is how xDS spells "to nothing yet".
func (s *subscription) open(node *core.Node) *discovery.DeltaDiscoveryRequest {
	s.opened = true
	req := &discovery.DeltaDiscoveryRequest{
		Node: node, TypeUrl: s.typeURL, InitialResourceVersions: make(map[string]string, len(s.held)),
	}
	for name, v := range s.held {
		req.InitialResourceVersions[name] = v
	}
	if s.wildcard {
		return req
	}
	req.ResourceNamesSubscribe = append([]string{Wildcard}, sortedKeys(s.wanted)...)
	req.ResourceNamesUnsubscribe = []string{Wildcard}
	for name, w := range s.wanted {
		w.sent = true
		if !w.answered {
			req.InitialResourceVersions[name] = "" // even if held by another name: somebody waits for the answer
		}
	}
	return req
}

// closed notes that the stream is gone.
func (s *subscription) closed() {
	s.opened = false
	for _, w := range s.wanted {
		w.sent = false
	}
}

// want asks for a name, and reports whether the answer is known already.
func (s *subscription) want(name string) (answered bool, err error) {
	if s.wildcard {
		return s.synced, nil
	}
	w := s.wanted[name]
	if w == nil {
		w = &want{}
		s.wanted[name] = w
	}
	return w.answered, w.err
}

// next returns the request for the names that this stream has not asked for yet, or nil.
func (s *subscription) next() *discovery.DeltaDiscoveryRequest {
	if !s.opened {
		return nil
	}
	var names []string
	for _, name := range sortedKeys(s.wanted) {
		if w := s.wanted[name]; !w.sent {
			w.sent = true
			names = append(names, name)
		}
	}
	if names == nil {
		return nil
	}
	return &discovery.DeltaDiscoveryRequest{TypeUrl: s.typeURL, ResourceNamesSubscribe: names}
}

// receive reads a response into what must be applied. Resources that cannot even be handed on are rejected here. Where
// a response names a resource twice the last one counts, and an upsert counts over a removal.
func (s *subscription) receive(resp *discovery.DeltaDiscoveryResponse) (Update, []Rejection) {
	u := Update{TypeURL: s.typeURL, First: !s.seen}
	s.seen = true
	var bad []Rejection
	at := make(map[string]int, len(resp.GetResources()))
	for _, r := range resp.GetResources() {
		if err := s.acceptable(r); err != nil {
			bad = append(bad, Rejection{Name: r.GetName(), Err: err})
			continue
		}
		res := Resource{
			Name: r.GetName(), Version: r.GetVersion(), Aliases: r.GetAliases(), Body: r.GetResource().GetValue(),
		}
		if i, again := at[res.Name]; again {
			u.Upserts[i] = res
			continue
		}
		at[res.Name] = len(u.Upserts)
		u.Upserts = append(u.Upserts, res)
	}
	for _, name := range resp.GetRemovedResources() {
		if _, upserted := at[name]; !upserted {
			u.Removes = append(u.Removes, name)
		}
	}
	return u, bad
}

func (s *subscription) acceptable(r *discovery.Resource) error {
	switch {
	case r.GetName() == "":
		return errors.New("resource has no name")
	case r.GetResource() == nil:
		return errors.New("resource has no content")
	case r.GetResource().GetTypeUrl() != s.typeURL:
		return fmt.Errorf("resource is a %s", r.GetResource().GetTypeUrl())
	}
	return nil
}

// applied records that u was applied but for the rejected resources, and returns the ACK, or the NACK that names them.
// answered are the on-demand names that are settled by it.
func (s *subscription) applied(
	resp *discovery.DeltaDiscoveryResponse, u Update, rejected []Rejection,
) (ack *discovery.DeltaDiscoveryRequest, answered []string) {
	for _, name := range u.Removes {
		delete(s.held, name)
		answered = s.settle(answered, name, nil)
	}
	why := make(map[string]error, len(rejected))
	for _, r := range rejected {
		why[r.Name] = r.Err
		if r.Name != "" {
			s.held[r.Name] = ""
			answered = s.settle(answered, r.Name, r.Err)
		}
	}
	for _, r := range u.Upserts {
		if why[r.Name] == nil {
			s.held[r.Name] = r.Version
		}
		answered = s.settle(answered, r.Name, why[r.Name])
		for _, alias := range r.Aliases {
			answered = s.settle(answered, alias, why[r.Name])
		}
	}
	if resp.GetSystemVersionInfo() != partial {
		s.synced = true
	}
	ack = &discovery.DeltaDiscoveryRequest{TypeUrl: s.typeURL, ResponseNonce: resp.GetNonce()}
	if len(rejected) > 0 {
		ack.ErrorDetail = describe(rejected)
	}
	return ack, answered
}

func (s *subscription) settle(answered []string, name string, err error) []string {
	w := s.wanted[name]
	if w == nil {
		return answered
	}
	w.answered, w.err = true, err
	return append(answered, name)
}

// describe is the error of a NACK: one sentence for people, and a violation per resource for programs.
func describe(rejected []Rejection) *status.Status {
	var text strings.Builder
	detail := &errdetails.BadRequest{}
	for i, r := range rejected {
		if i == maxRejections {
			fmt.Fprintf(&text, "; and %d more", len(rejected)-i)
			break
		}
		if i > 0 {
			text.WriteString("; ")
		}
		reason := strings.ToValidUTF8(r.Err.Error(), "\uFFFD")
		fmt.Fprintf(&text, "%s: %s", r.Name, reason)
		detail.FieldViolations = append(detail.FieldViolations,
			&errdetails.BadRequest_FieldViolation{Field: r.Name, Description: reason})
	}
	st := &status.Status{Code: int32(codes.InvalidArgument), Message: text.String()}
	if packed, err := anypb.New(detail); err == nil {
		st.Details = []*anypb.Any{packed}
	}
	return st
}
