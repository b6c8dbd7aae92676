package xds

import (
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/anypb"
)

type (
	request  = discovery.DeltaDiscoveryRequest
	response = discovery.DeltaDiscoveryResponse
)

func wantRequest(t *testing.T, when string, want, got *request) {
	t.Helper()
	if diff := cmp.Diff(want, got, protocmp.Transform(), protocmp.IgnoreDefaultScalars()); diff != "" {
		t.Errorf("%s: request differs (-want +got):\n%s", when, diff)
	}
}

func wantNone(t *testing.T, when string, got *request) {
	t.Helper()
	if got != nil {
		t.Errorf("%s: request %v, want none", when, got)
	}
}

func resource(name, version string, aliases ...string) *discovery.Resource {
	return &discovery.Resource{
		Name: name, Version: version, Aliases: aliases, Resource: &anypb.Any{TypeUrl: "T", Value: []byte(name + version)},
	}
}

// answer runs a response through the state machine and returns the answer to it.
func answer(s *subscription, resp *response, rejected ...Rejection) (Update, *request, []string) {
	u, bad := s.receive(resp)
	ack, names := s.applied(resp, u, append(bad, rejected...))
	return u, ack, names
}

func TestWildcardSubscription(t *testing.T) {
	t.Parallel()
	s := newSubscription("T", true)
	node := &core.Node{Id: "n"}
	wantRequest(t, "first stream", &request{TypeUrl: "T", Node: node}, s.open(node))
	wantNone(t, "a wildcard has nothing more to ask", s.next())

	u, ack, _ := answer(s, &response{Nonce: "1", Resources: []*discovery.Resource{resource("a", "1"), resource("b", "1")}})
	wantRequest(t, "all good", &request{TypeUrl: "T", ResponseNonce: "1"}, ack)
	want := Update{TypeURL: "T", First: true, Upserts: []Resource{
		{Name: "a", Version: "1", Body: []byte("a1")}, {Name: "b", Version: "1", Body: []byte("b1")},
	}}
	if diff := cmp.Diff(want, u, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("update (-want +got):\n%s", diff)
	}

	u, ack, _ = answer(s, &response{Nonce: "2", Resources: []*discovery.Resource{resource("a", "2"), resource("c", "1")}},
		Rejection{"a", errors.New("bad")})
	if u.First {
		t.Error("the second response is called the first")
	}
	if e := ack.GetErrorDetail(); ack.GetResponseNonce() != "2" || e.GetCode() != 3 || e.GetMessage() != "a: bad" {
		t.Errorf("answer to a bad resource = %v, want a NACK of 2 that says a: bad", ack)
	}
	if diff := cmp.Diff(map[string]string{"a": "bad"}, reasons(ack.GetErrorDetail())); diff != "" {
		t.Errorf("the server does not read the reasons (-want +got):\n%s", diff)
	}

	_, ack, _ = answer(s, &response{Nonce: "3", RemovedResources: []string{"b", "unknown"}})
	wantRequest(t, "a removal", &request{TypeUrl: "T", ResponseNonce: "3"}, ack)

	s.closed()
	wantRequest(t, "reconnect: the rejected one without a version, the removed one not at all", &request{
		TypeUrl: "T", InitialResourceVersions: map[string]string{"a": "", "c": "1"},
	}, s.open(nil))
}

func TestOnDemandSubscription(t *testing.T) {
	t.Parallel()
	s := newSubscription("T", false)
	if answered, _ := s.want("early"); answered {
		t.Error("a name is answered before anybody was asked")
	}
	wantNone(t, "no stream yet", s.next())
	wantRequest(t, "first stream", &request{
		TypeUrl: "T", ResourceNamesSubscribe: []string{"*", "early"}, ResourceNamesUnsubscribe: []string{"*"},
		InitialResourceVersions: map[string]string{"early": ""},
	}, s.open(nil))
	wantNone(t, "already asked", s.next())

	s.want("ip")
	s.want("absent")
	wantRequest(t, "later names", &request{TypeUrl: "T", ResourceNamesSubscribe: []string{"absent", "ip"}}, s.next())
	wantNone(t, "asked once", s.next())

	_, _, names := answer(s, &response{
		Nonce: "1", Resources: []*discovery.Resource{resource("uid", "1", "ip")}, RemovedResources: []string{"absent"},
	})
	if diff := cmp.Diff([]string{"absent", "ip"}, names); diff != "" {
		t.Errorf("answered names (-want +got):\n%s", diff)
	}
	for name, want := range map[string]bool{"ip": true, "absent": true, "early": false} {
		if answered, err := s.want(name); answered != want || err != nil {
			t.Errorf("want(%q) = %v, %v, want %v", name, answered, err, want)
		}
	}

	s.closed()
	wantRequest(t, "reconnect", &request{
		TypeUrl: "T", ResourceNamesSubscribe: []string{"*", "absent", "early", "ip"}, ResourceNamesUnsubscribe: []string{"*"},
		InitialResourceVersions: map[string]string{"uid": "1", "early": ""},
	}, s.open(nil))
	no := errors.New("no")
	answer(s, &response{Nonce: "1", Resources: []*discovery.Resource{resource("x", "1", "early")}}, Rejection{"x", no})
	if answered, err := s.want("early"); !answered || !errors.Is(err, no) {
		t.Errorf("want(early) = %v, %v, want it answered with why its resource was rejected", answered, err)
	}
}

func TestResourcesThatCannotBeHandedOnAreRejected(t *testing.T) {
	t.Parallel()
	s := newSubscription("T", true)
	s.open(nil)
	foreign := resource("f", "1")
	foreign.Resource.TypeUrl = "U"
	u, ack, _ := answer(s, &response{Nonce: "1", RemovedResources: []string{"twice"}, Resources: []*discovery.Resource{
		nil, {Name: "empty"}, foreign, resource("", "1"), resource("twice", "1"), resource("twice", "2"),
	}})
	if len(u.Upserts) != 1 || u.Upserts[0].Version != "2" || len(u.Removes) != 0 {
		t.Errorf("update = %+v, want the last of twice and no removal", u)
	}
	why := reasons(ack.GetErrorDetail())
	if len(why) != 3 || why["empty"] == "" || why["f"] != "resource is a U" || why[""] == "" {
		t.Errorf("rejected %v, want empty, f and the nameless", why)
	}
}

func TestNackIsBounded(t *testing.T) {
	t.Parallel()
	var rejected []Rejection
	for range 5000 {
		rejected = append(rejected, Rejection{"name", errors.New("not UTF-8: \xff")})
	}
	st := describe(rejected)
	if size := proto.Size(st); size > 20_000 || !strings.HasSuffix(st.GetMessage(), "; and 4900 more") {
		t.Errorf("%d bytes, ending in %q, want few and a count", size, st.GetMessage()[len(st.GetMessage())-40:])
	}
	if _, err := proto.Marshal(st); err != nil {
		t.Errorf("cannot be sent: %v", err)
	}
}

func TestBackoff(t *testing.T) {
	t.Parallel()
	var b backoff
	r := rand.New(rand.NewPCG(1, 1))
	for i := range 20 {
		full := min(10*time.Millisecond<<i, 15*time.Second)
		if got := b.next(r); got < full/2 || got > full {
			t.Fatalf("wait %d is %v, want between %v and %v", i, got, full/2, full)
		}
	}
	b.reset()
	if got := b.next(r); got > 10*time.Millisecond {
		t.Errorf("wait after a healthy stream is %v, want at most 10ms", got)
	}
}

func FuzzResponse(f *testing.F) {
	seed := &response{TypeUrl: "T", Nonce: "1", RemovedResources: []string{"x"}, Resources: []*discovery.Resource{
		resource("a", "1", "b"), {Name: "c"}, resource("a", "2"),
	}}
	body, err := proto.Marshal(seed)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(body, true)
	f.Add(body, false)
	f.Fuzz(func(t *testing.T, body []byte, wildcard bool) {
		var resp response
		if proto.Unmarshal(body, &resp) != nil {
			return
		}
		s := newSubscription("T", wildcard)
		s.want("a")
		s.open(nil)
		u, bad := s.receive(&resp)
		seen := map[string]bool{"": true}
		for _, r := range u.Upserts {
			if seen[r.Name] {
				t.Fatalf("%q is upserted twice, or nameless", r.Name)
			}
			seen[r.Name] = true
		}
		for _, name := range u.Removes {
			if name != "" && seen[name] {
				t.Fatalf("%q is both upserted and removed", name)
			}
		}
		if len(u.Upserts) > 0 {
			bad = append(bad, Rejection{u.Upserts[0].Name, errors.New("no")})
		}
		ack, _ := s.applied(&resp, u, bad)
		if ack.GetResponseNonce() != resp.GetNonce() || (ack.GetErrorDetail() != nil) != (len(bad) > 0) {
			t.Fatalf("answer %v to nonce %q with %d bad", ack, resp.GetNonce(), len(bad))
		}
		for _, req := range []*request{ack, s.open(nil)} {
			if _, err := proto.Marshal(req); err != nil {
				t.Fatalf("cannot be sent: %v", err)
			}
		}
	})
}

func FuzzRequests(f *testing.F) {
	for _, req := range []*request{
		{TypeUrl: "T"},
		{TypeUrl: "T", ResourceNamesSubscribe: []string{"*", "a", "alias"}, ResourceNamesUnsubscribe: []string{"*"},
			InitialResourceVersions: map[string]string{"a": "x", "gone": "1", "alias": ""}},
	} {
		first, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		second, err := proto.Marshal(&request{TypeUrl: "T", ResponseNonce: "1", ResourceNamesSubscribe: []string{"b"}})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(first, second)
	}
	f.Fuzz(func(t *testing.T, first, second []byte) {
		s := NewServer(ServerConfig{Order: []string{"T"}})
		s.Publish("T", []Resource{
			{Name: "a", Body: []byte("1"), Aliases: []string{"alias"}}, {Name: "b", Follows: []string{"a", "b"}},
		}, nil)
		st := newStream(s, nil, 1, "", "")
		for i, body := range [][]byte{first, second} {
			var req request
			if proto.Unmarshal(body, &req) != nil || st.handle(&req) != nil {
				return
			}
			s.Publish("T", []Resource{{Name: "c", Body: []byte{byte(i)}}}, []string{"b"})
			for sent := 0; ; sent++ {
				resp := st.next(time.Now())
				if resp == nil {
					break
				}
				if sent > 2*len(st.watches) {
					t.Fatalf("a second response of a type before the first was answered: %v", resp)
				}
				overWire(t, resp, &response{})
			}
		}
	})
}
