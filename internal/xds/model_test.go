package xds

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"github.com/mistnet/mistnet/internal/mesh"
)

// model is a server and one client without a network: two queues of messages that are delivered, or lost with their
// stream, in whatever order the test's dice say. It reaches states a real connection seldom does.
type model struct {
	t        *testing.T
	r        *rand.Rand
	server   *Server
	stream   *stream
	types    []*subscription
	toClient []*discovery.DeltaDiscoveryResponse
	toServer []*discovery.DeltaDiscoveryRequest
	chunks   bool

	state  map[string]map[string]string // the client's: type → name → version
	refuse func(name, version string) bool
	check  func() // after each update
}

func newModel(t *testing.T, r *rand.Rand, wildcardAddresses bool) *model {
	m := &model{
		t: t, r: r, server: NewServer(ServerConfig{}), refuse: func(string, string) bool { return false }, check: func() {},
		chunks: r.IntN(2) == 0,
		types: []*subscription{
			newSubscription(mesh.TypeAuthorization, true), newSubscription(mesh.TypeAddress, wildcardAddresses),
		},
		state: map[string]map[string]string{mesh.TypeAuthorization: {}, mesh.TypeAddress: {}},
	}
	return m
}

func (m *model) connect() {
	m.disconnect()
	m.stream = newStream(m.server, nil, 1, "model", "")
	m.server.mu.Lock()
	m.server.streams[1] = m.stream
	m.server.mu.Unlock()
	node := &core.Node{Id: "model"}
	if m.chunks {
		node.ClientFeatures = []string{featureChunks}
	}
	for i, s := range m.types {
		req := s.open(nil)
		if i == 0 {
			req.Node = node
		}
		m.send(req)
	}
}

func (m *model) disconnect() {
	if m.stream == nil {
		return
	}
	m.server.leave(m.stream)
	for _, s := range m.types {
		s.closed()
	}
	m.stream, m.toClient, m.toServer = nil, nil, nil
}

// send queues a request as the server will read it.
func (m *model) send(req *discovery.DeltaDiscoveryRequest) {
	m.toServer = append(m.toServer, overWire(m.t, req, &discovery.DeltaDiscoveryRequest{}))
}

func overWire[M proto.Message](t testing.TB, m, into M) M {
	t.Helper()
	body, err := proto.Marshal(m)
	if err == nil {
		err = proto.Unmarshal(body, into)
	}
	if err != nil {
		t.Fatal(err)
	}
	return into
}

// serverStep lets the server read a request, if there is one, and say what it has to say.
func (m *model) serverStep() (progress bool) {
	if m.stream == nil {
		return false
	}
	if len(m.toServer) > 0 {
		req := m.toServer[0]
		m.toServer = m.toServer[1:]
		if err := m.stream.handle(req); err != nil {
			m.t.Fatalf("server refused %v: %v", req, err)
		}
		progress = true
	}
	for {
		resp := m.stream.next(time.Time{})
		if resp == nil {
			return progress
		}
		m.toClient = append(m.toClient, overWire(m.t, resp, &discovery.DeltaDiscoveryResponse{}))
		progress = true
	}
}

func (m *model) clientStep() (progress bool) {
	if m.stream == nil {
		return false
	}
	for _, s := range m.types {
		if req := s.next(); req != nil {
			m.send(req)
			progress = true
		}
	}
	if len(m.toClient) == 0 {
		return progress
	}
	resp := m.toClient[0]
	m.toClient = m.toClient[1:]
	for _, s := range m.types {
		if s.typeURL == resp.GetTypeUrl() {
			m.apply(s, resp)
		}
	}
	return true
}

func (m *model) apply(s *subscription, resp *discovery.DeltaDiscoveryResponse) {
	u, rejected := s.receive(resp)
	state := m.state[s.typeURL]
	for _, name := range u.Removes {
		delete(state, name)
	}
	for _, r := range u.Upserts {
		if m.refuse(r.Name, string(r.Body)) {
			rejected = append(rejected, Rejection{r.Name, errors.New("no")})
			state[r.Name] = "stand-in"
			continue
		}
		state[r.Name] = string(r.Body)
	}
	ack, _ := s.applied(resp, u, rejected)
	m.send(ack)
	m.check()
}

// settle delivers everything until both sides are silent.
func (m *model) settle() {
	if m.stream == nil {
		m.connect()
	}
	for i := 0; ; i++ {
		a, b := m.serverStep(), m.clientStep()
		if !a && !b {
			return
		}
		if i > 100_000 {
			m.t.Fatal("server and client never fall silent")
		}
	}
}

// bodies is what the server has of a type.
func (m *model) bodies(typeURL string) map[string]string {
	all := make(map[string]string)
	if s := m.server.stores[typeURL]; s != nil {
		for name, e := range s.entries {
			if !e.removed() {
				all[name] = bodyOf(m.t, e)
			}
		}
	}
	return all
}

func bodyOf(t *testing.T, e *entry) string {
	var resp discovery.DeltaDiscoveryResponse
	if err := proto.Unmarshal(e.wire, &resp); err != nil {
		t.Fatal(err)
	}
	return string(resp.GetResources()[0].GetResource().GetValue())
}

// step does something at random.
func (m *model) step(publish func()) {
	switch m.r.IntN(12) {
	case 0, 1, 2, 3:
		publish()
	case 4:
		if m.r.IntN(4) == 0 {
			m.connect()
		}
	case 5:
		if m.r.IntN(8) == 0 {
			m.disconnect()
		}
	case 6, 7, 8:
		m.serverStep()
	default:
		m.clientStep()
	}
}

func TestWhateverHappensAWildcardClientEndsUpEqual(t *testing.T) {
	t.Parallel()
	for seed := range uint64(100) {
		r := rand.New(rand.NewPCG(seed, 1))
		m := newModel(t, r, true)
		m.refuse = func(name, body string) bool { return strings.HasSuffix(body, "bad") }
		for range 400 {
			m.step(func() { m.server.PublishAll(randomChanges(r)) })
		}
		m.settle()
		for _, typeURL := range []string{mesh.TypeAuthorization, mesh.TypeAddress} {
			want := m.bodies(typeURL)
			for name, body := range want {
				if m.refuse(name, body) {
					want[name] = "stand-in"
				}
			}
			if diff := cmp.Diff(want, m.state[typeURL]); diff != "" {
				t.Fatalf("seed %d: the client's %s differ (-server +client):\n%s", seed, typeURL, diff)
			}
		}
		if s := m.server.stores[mesh.TypeAddress]; s != nil && len(s.log) > 2*s.live+2*compactSlack {
			t.Fatalf("seed %d: %d changes kept for %d resources", seed, len(s.log), s.live)
		}
	}
}

func randomChanges(r *rand.Rand) []Change {
	var changes []Change
	for _, typeURL := range []string{mesh.TypeAddress, mesh.TypeAuthorization} {
		c := Change{TypeURL: typeURL}
		for range r.IntN(4) {
			name := fmt.Sprintf("n%d", r.IntN(12))
			if r.IntN(3) == 0 {
				c.Removes = append(c.Removes, name)
				continue
			}
			body := fmt.Sprintf("%d", r.IntN(3)) // few contents, so that old ones come back
			if r.IntN(6) == 0 {
				body = "bad"
			}
			c.Upserts = append(c.Upserts, Resource{Name: name, Body: []byte(body)})
		}
		changes = append(changes, c)
	}
	return changes
}

func TestWhateverHappensAnOnDemandClientEndsUpWithWhatItAskedFor(t *testing.T) {
	t.Parallel()
	for seed := range uint64(100) {
		r := rand.New(rand.NewPCG(seed, 2))
		m := newModel(t, r, false)
		s := m.types[1]
		ask := func() { _, _ = s.want([]string{"svc", "ip", "n"}[r.IntN(3)] + fmt.Sprint(r.IntN(6))) }
		for range 400 {
			if r.IntN(10) == 0 {
				ask()
			}
			m.step(func() { m.server.Publish(mesh.TypeAddress, randomNamed(r), randomRemoves(r)) })
		}
		ask()
		m.settle()
		server := m.bodies(mesh.TypeAddress)
		client := m.state[mesh.TypeAddress]
		for name, body := range client {
			if server[name] != body {
				t.Fatalf("seed %d: the client has %s = %q, the server %q", seed, name, body, server[name])
			}
		}
		for name, w := range s.wanted {
			if !w.answered {
				t.Fatalf("seed %d: %s was never answered", seed, name)
			}
			for _, e := range m.server.stores[mesh.TypeAddress].lookup(name) {
				if _, ok := client[e.name]; !ok {
					t.Fatalf("seed %d: %s stands for %s, which the client lacks", seed, name, e.name)
				}
			}
		}
	}
}

// randomNamed are workloads (n) with an address as an alias, that follow a service, and services.
func randomNamed(r *rand.Rand) []Resource {
	var list []Resource
	for range r.IntN(3) {
		res := Resource{Body: []byte(fmt.Sprint(r.IntN(3)))}
		if r.IntN(3) == 0 {
			res.Name = fmt.Sprintf("svc%d", r.IntN(4))
		} else {
			res.Name = fmt.Sprintf("n%d", r.IntN(6))
			res.Aliases = []string{fmt.Sprintf("ip%d", r.IntN(6))}
			res.Follows = []string{fmt.Sprintf("svc%d", r.IntN(4))}
		}
		list = append(list, res)
	}
	return list
}

func randomRemoves(r *rand.Rand) []string {
	if r.IntN(2) == 0 {
		return nil
	}
	return []string{[]string{"svc", "n"}[r.IntN(2)] + fmt.Sprint(r.IntN(6))}
}

// Every workload names a policy that exists on the server at that moment. Whatever the timing, the same must hold on
// the client after every single update.
func TestAPolicyIsThereAsLongAsAWorkloadNamesIt(t *testing.T) {
	t.Parallel()
	for seed := range uint64(100) {
		r := rand.New(rand.NewPCG(seed, 3))
		m := newModel(t, r, true)
		m.check = func() {
			for name, p := range m.state[mesh.TypeAddress] {
				if _, ok := m.state[mesh.TypeAuthorization][p]; !ok {
					t.Fatalf("seed %d: %s names policy %s, which the client does not have", seed, name, p)
				}
			}
		}
		workloads, policies := map[string]string{}, map[string]bool{}
		for range 400 {
			m.step(func() { m.server.PublishAll(randomReferences(r, workloads, policies)) })
		}
		m.settle()
		if diff := cmp.Diff(workloads, m.state[mesh.TypeAddress]); diff != "" {
			t.Fatalf("seed %d: workloads differ (-server +client):\n%s", seed, diff)
		}
		if len(policies) != len(m.state[mesh.TypeAuthorization]) {
			t.Fatalf("seed %d: policies are %v, want %v", seed, m.state[mesh.TypeAuthorization], policies)
		}
	}
}

// randomReferences repoints some workloads, adds the policies they need and drops those that nobody names any more.
func randomReferences(r *rand.Rand, workloads map[string]string, policies map[string]bool) []Change {
	addresses, authorizations := Change{TypeURL: mesh.TypeAddress}, Change{TypeURL: mesh.TypeAuthorization}
	for range 1 + r.IntN(3) {
		name, p := fmt.Sprintf("w%d", r.IntN(8)), fmt.Sprintf("p%d", r.IntN(8))
		if r.IntN(4) == 0 {
			delete(workloads, name)
			addresses.Removes = append(addresses.Removes, name)
			continue
		}
		workloads[name] = p
		addresses.Upserts = append(addresses.Upserts, Resource{Name: name, Body: []byte(p)})
		if !policies[p] {
			policies[p] = true
		}
	}
	// A name may have been both set and dropped above: say each only once, as it stands.
	addresses = Change{TypeURL: mesh.TypeAddress, Removes: gone(addresses, workloads), Upserts: standing(addresses, workloads)}
	used := make(map[string]bool)
	for _, p := range workloads {
		used[p] = true
	}
	for p := range maps.Clone(policies) {
		if used[p] {
			authorizations.Upserts = append(authorizations.Upserts, Resource{Name: p, Body: []byte("rules")})
			continue
		}
		delete(policies, p)
		authorizations.Removes = append(authorizations.Removes, p)
	}
	return []Change{addresses, authorizations}
}

func gone(c Change, workloads map[string]string) []string {
	var names []string
	for _, name := range c.Removes {
		if _, ok := workloads[name]; !ok {
			names = append(names, name)
		}
	}
	return names
}

func standing(c Change, workloads map[string]string) []Resource {
	var list []Resource
	for _, res := range c.Upserts {
		if p, ok := workloads[res.Name]; ok {
			list = append(list, Resource{Name: res.Name, Body: []byte(p)})
		}
	}
	return list
}
