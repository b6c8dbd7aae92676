package wds

import (
	"fmt"
	"strings"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Named is one resource as it came: its name and the bytes of its message.
type Named struct {
	Name string
	Body []byte
}

// Delta says what a batch of resources of one type changes in current (nil: nothing is known yet), and which resources
// are rejected and why, by name.
//
// A rejected Address changes nothing: the last good one stays. A rejected Authorization becomes a policy that denies:
// in the scope it states if that is legible, else in that of the last good one, else in its whole namespace, or in the
// whole mesh if that is the root namespace, whose policies reach everywhere. A resource whose content names something
// else than the resource is rejected, since it could never be removed.
func Delta(current *mesh.Snapshot, typeURL string, upserts []Named, removes []string) (mesh.Delta, map[string]error) {
	return delta(decoder{}, current, typeURL, upserts, removes)
}

// DeltaL4 is Delta without what only proxies of requests look at: the labels of workloads, which would be a quarter of what
// they take in memory (3.3 of 12 MB for 10 000 pods with six labels each).
func DeltaL4(current *mesh.Snapshot, typeURL string, upserts []Named, removes []string) (mesh.Delta, map[string]error) {
	return delta(decoder{withoutLabels: true}, current, typeURL, upserts, removes)
}

func delta(d decoder, current *mesh.Snapshot, typeURL string, upserts []Named, removes []string) (mesh.Delta, map[string]error) {
	if current == nil {
		current = &mesh.Snapshot{}
	}
	d.known = make(map[string]string)
	b := batch{current: current, rejected: make(map[string]error), decoder: d}
	upsert, remove := b.address, b.removeAddress
	switch typeURL {
	case mesh.TypeAddress:
	case mesh.TypeAuthorization:
		upsert, remove = b.policy, b.removePolicy
	default:
		for _, u := range upserts {
			b.rejected[u.Name] = fmt.Errorf("type %s is not known", typeURL)
		}
		return b.delta, b.rejected
	}
	for _, name := range removes {
		remove(name)
	}
	for _, u := range upserts {
		upsert(u)
	}
	return b.delta, b.rejected
}

type batch struct {
	decoder  decoder
	current  *mesh.Snapshot
	delta    mesh.Delta
	rejected map[string]error
}

func (b *batch) address(u Named) {
	a, err := b.decoder.address(u.Body)
	if err != nil {
		b.rejected[u.Name] = err
		return
	}
	if w := a.Workload; w != nil {
		if w.UID != u.Name {
			b.rejected[u.Name] = fmt.Errorf("decode workload: uid %q is not the resource's name", w.UID)
			return
		}
		b.delta.Workloads = append(b.delta.Workloads, w)
		if b.current.Service(u.Name) != nil { // the name has changed hands
			b.delta.RemoveServices = append(b.delta.RemoveServices, u.Name)
		}
		return
	}
	if key := a.Service.Key(); key != u.Name {
		b.rejected[u.Name] = fmt.Errorf("decode service: %q is not the resource's name", key)
		return
	}
	b.delta.Services = append(b.delta.Services, a.Service)
	if b.current.Workload(u.Name) != nil {
		b.delta.RemoveWorkloads = append(b.delta.RemoveWorkloads, u.Name)
	}
}

func (b *batch) removeAddress(name string) {
	if b.current.Workload(name) != nil {
		b.delta.RemoveWorkloads = append(b.delta.RemoveWorkloads, name)
	}
	if b.current.Service(name) != nil {
		b.delta.RemoveServices = append(b.delta.RemoveServices, name)
	}
}

func (b *batch) policy(u Named) {
	p, err := DecodePolicy(u.Body)
	if err == nil && p.Key() != u.Name {
		err = fmt.Errorf("decode policy: %q is not the resource's name", p.Key())
	}
	if err != nil {
		b.rejected[u.Name] = err
		if p == nil || p.Key() != u.Name {
			p = b.illegible(u.Name)
		}
		p.Groups, p.Invalid = nil, err.Error()
	}
	b.delta.Policies = append(b.delta.Policies, p)
}

// illegible is the policy to enforce where nothing can be read but the resource's name.
func (b *batch) illegible(name string) *mesh.Policy {
	if last := b.current.Policy(policyKey(name)); last != nil {
		p := *last
		p.DryRun = false // what could be anything is enforced
		return &p
	}
	namespace, rest, ok := strings.Cut(name, "/")
	if !ok {
		return &mesh.Policy{Name: name, Scope: mesh.ScopeGlobal}
	}
	p := &mesh.Policy{Namespace: namespace, Name: rest, Scope: mesh.ScopeNamespace}
	if namespace == mesh.RootNamespace || namespace == "" {
		p.Scope = mesh.ScopeGlobal
	}
	return p
}

func (b *batch) removePolicy(name string) {
	if key := policyKey(name); b.current.Policy(key) != nil {
		b.delta.RemovePolicies = append(b.delta.RemovePolicies, key)
	}
}

// policyKey is the key of the policy a resource's name stands for: that of illegible when it names no namespace.
func policyKey(name string) string {
	if strings.Contains(name, "/") {
		return name
	}
	return "/" + name
}
