package xds

import (
	"slices"
	"sort"
	"sync/atomic"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// compactSlack is how many changes a log may gather beyond twice what the last compaction kept.
const compactSlack = 1024

// store holds the resources of one type, each encoded once, and the order in which they last changed.
//
// That order is the log: every name is in it once, at its latest change. A client is a cursor into it, so what is
// pending for a client is the set of names behind its cursor: a name that changes a thousand times while the client is
// busy is sent once, and a waiting client costs no memory. Server.mu guards it.
type store struct {
	typeURL  string
	declared bool // something was published, if only that there is nothing
	seq      uint64
	live     int
	entries  map[string]*entry // removed names too, until every cursor has passed them
	log      []*entry          // by seq; superseded entries stay until compaction
	byAlias  map[string][]string
	follows  map[string][]string // name followed → names of its followers
	watches  map[*watch]struct{}
	roomy    int // the log is not worth compacting below this length

	sent, nacked atomic.Uint64 // responses, to all clients ever; not guarded
}

// entry is one state of a resource. Only superseded and wire change, when a later state takes its place.
type entry struct {
	seq              uint64
	name, version    string
	aliases, follows []string
	wire             []byte // as it stands in a response: tag, length, Resource; nil when removed
	superseded       bool
	private          bool // of a removal: what is removed was
	readers          []string
}

func (e *entry) removed() bool { return e.wire == nil }

func newStore(typeURL string) *store {
	return &store{
		typeURL: typeURL, entries: make(map[string]*entry), byAlias: make(map[string][]string),
		follows: make(map[string][]string), watches: make(map[*watch]struct{}), roomy: compactSlack,
	}
}

// encodeEntry makes the bytes that every client of the resource shares.
func encodeEntry(typeURL string, r Resource) (*entry, error) {
	v := r.Version
	if v == "" {
		v = version(r.Body)
	}
	body, err := proto.Marshal(&discovery.Resource{
		Name: r.Name, Version: v, Aliases: r.Aliases, Resource: &anypb.Any{TypeUrl: typeURL, Value: r.Body},
	})
	if err != nil {
		return nil, err
	}
	wire := make([]byte, 0, len(body)+protowire.SizeTag(resourcesField)+protowire.SizeVarint(uint64(len(body))))
	wire = protowire.AppendTag(wire, resourcesField, protowire.BytesType)
	wire = protowire.AppendBytes(wire, body)
	return &entry{name: r.Name, version: v, aliases: r.Aliases, follows: r.Follows, wire: wire, private: r.Private, readers: r.Readers}, nil
}

// resourcesField is the number of DeltaDiscoveryResponse.resources.
const resourcesField = 2

// put replaces the state of a name, and reports whether that changed anything.
func (s *store) put(e *entry) bool {
	old := s.entries[e.name]
	if old == nil && e.removed() || old != nil && sameEntry(old, e) {
		return false
	}
	if old != nil {
		s.unlink(old)
		if !old.removed() {
			s.live--
		}
		old.superseded, old.wire = true, nil
		e.private = e.private || e.removed() && old.private
	}
	s.seq++
	e.seq = s.seq
	s.entries[e.name] = e
	s.log = append(s.log, e)
	if !e.removed() {
		s.live++
		s.link(e)
	}
	return true
}

func sameEntry(a, b *entry) bool {
	if a.removed() || b.removed() {
		return a.removed() == b.removed()
	}
	return a.version == b.version && slices.Equal(a.aliases, b.aliases) && slices.Equal(a.follows, b.follows) &&
		a.private == b.private && slices.Equal(a.readers, b.readers)
}

func (s *store) link(e *entry) {
	for _, alias := range e.aliases {
		s.byAlias[alias] = append(s.byAlias[alias], e.name)
	}
	for _, name := range e.follows {
		s.follows[name] = append(s.follows[name], e.name)
	}
}

func (s *store) unlink(e *entry) {
	if e.removed() {
		return
	}
	for _, alias := range e.aliases {
		dropName(s.byAlias, alias, e.name)
	}
	for _, name := range e.follows {
		dropName(s.follows, name, e.name)
	}
}

func dropName(index map[string][]string, key, name string) {
	i := slices.Index(index[key], name)
	if i < 0 {
		return
	}
	index[key] = slices.Delete(index[key], i, i+1)
	if len(index[key]) == 0 {
		delete(index, key)
	}
}

// get returns the resource of that name, or nil.
func (s *store) get(name string) *entry {
	if e := s.entries[name]; e != nil && !e.removed() {
		return e
	}
	return nil
}

// lookup returns what a subscriber to name gets: the resource of that name and those with that alias, each followed by
// those that follow it, and those that follow name itself.
func (s *store) lookup(name string) []*entry {
	var found []*entry
	if e := s.get(name); e != nil {
		found = append(found, e)
	}
	for _, n := range s.byAlias[name] {
		found = append(found, s.get(n))
	}
	for _, e := range found {
		found = append(found, s.followers(e.name)...)
	}
	if s.get(name) == nil {
		found = append(found, s.followers(name)...)
	}
	return found
}

func (s *store) followers(name string) []*entry {
	var found []*entry
	for _, n := range s.follows[name] {
		found = append(found, s.get(n))
	}
	return found
}

// since returns the changes after a cursor.
func (s *store) since(cursor uint64) []*entry {
	i := sort.Search(len(s.log), func(i int) bool { return s.log[i].seq > cursor })
	return s.log[i:]
}

// compact forgets superseded changes, and removals that every client has passed. It is worth its while only now and
// then.
func (s *store) compact() {
	if len(s.log) < s.roomy {
		return
	}
	passed := s.seq
	for w := range s.watches {
		passed = min(passed, w.cursor)
	}
	kept := make([]*entry, 0, s.live)
	for _, e := range s.log {
		switch {
		case e.superseded:
		case e.removed() && e.seq <= passed:
			delete(s.entries, e.name)
		default:
			kept = append(kept, e)
		}
	}
	s.log, s.roomy = kept, 2*len(kept)+compactSlack
}
