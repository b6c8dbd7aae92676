package xds

import (
	"slices"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// A response holds at most so many resources, and ends with the first that takes it over so many bytes.
const (
	maxResources     = 5000
	maxResponseBytes = 4 << 20
)

// watch is one type on one stream: what the client asked for, what it has and how far it was told. The stream's mutex
// guards it, and for cursor also Server.mu, since compaction reads it.
type watch struct {
	stream   *stream
	store    *store
	wildcard bool
	chunks   bool            // the client understands partial answers
	names    map[string]bool // subscribed by name
	has      map[string]bool // resources the client has by name subscription
	reader   string          // who the client is, for what is not for everybody
	given    map[string]bool // private resources that the client has: of others it hears nothing, not even that they go

	start   uint64            // the log when the client came: removals before are in claims or none of its business
	cursor  uint64            // changes up to here were sent or do not concern the client
	claims  map[string]string // what the client said it has, until something else was sent
	queue   []string          // subscribed names to answer
	removes map[string]bool   // removals to send
	owed    bool              // a wildcard's first answer is due, even if it is empty
	syncing bool              // its last part was not sent yet

	nonce    string // of the response in flight; "" when the client has answered
	status   TypeStatus
	rejected map[string]string
}

// batch is the content of one response.
type batch struct {
	entries []*entry
	bytes   int    // of entries
	raw     []byte // the resources, encoded
	removes []string
	partial bool
	seen    map[string]bool // names told, where a name can come up more than once
}

func newWatch(s *store, req *discovery.DeltaDiscoveryRequest, reader string, chunks bool) *watch {
	w := &watch{
		store: s, chunks: chunks, reader: reader, given: make(map[string]bool), names: make(map[string]bool), has: make(map[string]bool),
		removes: make(map[string]bool), rejected: make(map[string]string), claims: req.GetInitialResourceVersions(),
		start: s.seq, cursor: s.seq,
	}
	w.status.TypeURL = s.typeURL
	if w.claims == nil {
		w.claims = make(map[string]string)
	}
	if len(req.GetResourceNamesSubscribe()) == 0 {
		w.watchAll()
	}
	for name := range w.claims {
		if w.get(name) == nil && (w.wildcard || !w.named(name)) {
			w.remove(name)
		}
	}
	return w
}

// sees reports whether a resource is for this client.
func (w *watch) sees(e *entry) bool { return !e.private || slices.Contains(e.readers, w.reader) }

// get returns the resource of that name, or nil when the client is not to know of any.
func (w *watch) get(name string) *entry {
	if e := w.store.get(name); e != nil && w.sees(e) {
		return e
	}
	return nil
}

// lookup is the store's, of what is for this client.
func (w *watch) lookup(name string) []*entry {
	return slices.DeleteFunc(w.store.lookup(name), func(e *entry) bool { return !w.sees(e) })
}

// named reports whether there is a resource of that name or alias for this client.
func (w *watch) named(name string) bool {
	return w.get(name) != nil ||
		slices.ContainsFunc(w.store.byAlias[name], func(n string) bool { return w.get(n) != nil })
}

// claimed subscribes to what a client without a wildcard says it has: that, too, is how a client names its
// subscriptions when it reconnects.
func (w *watch) claimed() {
	if w.wildcard {
		return
	}
	for _, name := range sortedKeys(w.claims) {
		if w.claims[name] != "" {
			w.has[name] = true
		}
		if !w.names[name] {
			w.names[name] = true
			w.queue = append(w.queue, name)
		}
	}
}

func (w *watch) watchAll() {
	w.wildcard, w.cursor, w.owed, w.syncing = true, 0, true, true
}

// subscribe follows a request's lists of names. In one message, unsubscribing wins: "*" in both means nothing yet.
func (w *watch) subscribe(names, drop []string) {
	dropped := make(map[string]bool, len(drop))
	for _, name := range drop {
		dropped[name] = true
	}
	for _, name := range names {
		switch {
		case dropped[name]:
		case name == Wildcard && !w.wildcard:
			w.watchAll()
		case name != Wildcard:
			w.names[name] = true
			w.queue = append(w.queue, name) // asked again, told again: the client may have lost it
		}
	}
	for name := range dropped {
		if name == Wildcard {
			w.wildcard, w.owed, w.syncing = false, false, false
			w.cursor = max(w.cursor, w.start)
			continue
		}
		delete(w.names, name)
		if w.wildcard {
			w.queue = append(w.queue, name) // it still has the resource by the wildcard, and must hear so
		} else {
			delete(w.has, name)
		}
	}
}

// news reports whether there may be something to send.
func (w *watch) news() bool { return w.owed || w.behind() }

func (w *watch) behind() bool { return len(w.queue) > 0 || w.cursor < w.store.seq }

// collect takes what is pending, as much as fits one response. Removals are taken only when asked for.
func (w *watch) collect(removals bool) batch {
	var b batch
	if !w.wildcard || len(w.queue) > 0 {
		b.seen = make(map[string]bool)
	}
	bounded := w.chunks || !w.syncing
	for len(w.queue) > 0 && !(bounded && b.full()) {
		name := w.queue[0]
		w.queue = w.queue[1:]
		w.answer(&b, name)
	}
	if !w.wildcard && len(w.queue) == 0 {
		w.claims = nil // they were about the first answer
	}
	full := bounded && b.full()
	if !full {
		for _, e := range w.store.since(w.cursor) {
			if full = bounded && b.full(); full {
				break
			}
			w.cursor = e.seq
			w.change(&b, e)
		}
	}
	if w.syncing {
		b.partial = full
		w.syncing = full
	}
	for name := range w.removes {
		if !removals || len(b.removes) == maxResources {
			break
		}
		b.removes = append(b.removes, name)
		delete(w.removes, name)
	}
	b.raw = make([]byte, 0, b.bytes)
	for _, e := range b.entries {
		b.raw = append(b.raw, e.wire...)
	}
	return b
}

// answer adds what a subscribed name stands for, or its absence. A name claimed without a version is waited for, so
// what it stands for is told even if the client has it by another name.
func (w *watch) answer(b *batch, name string) {
	found := w.lookup(name)
	if v, claimed := w.claims[name]; claimed && v == "" {
		for _, e := range found {
			delete(w.claims, e.name)
		}
	}
	if !w.named(name) {
		w.remove(name)
	}
	for _, e := range found {
		w.add(b, e)
	}
}

// change adds one entry of the log if it concerns the client.
func (w *watch) change(b *batch, e *entry) {
	switch {
	case e.superseded:
	case e.private && (e.removed() || !w.sees(e)):
		w.denied(e)
	case e.removed():
		w.gone(e)
	case w.wildcard, w.concerns(e):
		w.add(b, e)
	}
}

// denied takes back a private resource that the client had.
func (w *watch) denied(e *entry) {
	if w.given[e.name] || w.names[e.name] {
		delete(w.given, e.name)
		delete(w.has, e.name)
		w.remove(e.name)
	}
}

func (w *watch) gone(e *entry) {
	if w.wildcard {
		if e.seq > w.start {
			w.remove(e.name)
		}
		return
	}
	if w.has[e.name] || w.names[e.name] {
		delete(w.has, e.name)
		w.remove(e.name)
	}
	for _, alias := range e.aliases {
		if w.names[alias] && !w.named(alias) {
			w.remove(alias)
		}
	}
}

// remove plans a removal. From here on the client's claim to the name is void: should it come back, it must be sent.
func (w *watch) remove(name string) {
	w.removes[name] = true
	delete(w.claims, name)
}

// concerns reports whether a client without a wildcard should get e.
func (w *watch) concerns(e *entry) bool {
	if w.has[e.name] || w.names[e.name] {
		return true
	}
	for _, alias := range e.aliases {
		if w.names[alias] {
			return true
		}
	}
	for _, name := range e.follows {
		if w.names[name] || w.has[name] {
			return true
		}
	}
	return false
}

func (w *watch) add(b *batch, e *entry) {
	if b.seen[e.name] {
		return
	}
	if b.seen != nil {
		b.seen[e.name] = true
	}
	if v, ok := w.claims[e.name]; !ok || v != e.version {
		w.encode(b, e)
	}
	if e.private {
		w.given[e.name] = true
	}
	if w.wildcard || w.has[e.name] {
		return
	}
	w.has[e.name] = true
	for _, follower := range w.store.followers(e.name) {
		if !w.has[follower.name] && w.sees(follower) {
			w.add(b, follower)
		}
	}
}

func (w *watch) encode(b *batch, e *entry) {
	b.entries = append(b.entries, e)
	b.bytes += len(e.wire)
	delete(w.claims, e.name)
	delete(w.removes, e.name)
	delete(w.rejected, e.name)
	for _, alias := range e.aliases {
		delete(w.removes, alias)
	}
}

func (b *batch) full() bool { return len(b.entries) >= maxResources || b.bytes >= maxResponseBytes }

func (b *batch) empty() bool { return len(b.entries) == 0 && len(b.removes) == 0 }

// response makes the message. The resources go in as the bytes they were encoded to when they were published: what is
// an unknown field to the library on this side is resources on the other.
func (b *batch) response(typeURL, nonce, info string) *discovery.DeltaDiscoveryResponse {
	resp := &discovery.DeltaDiscoveryResponse{
		TypeUrl: typeURL, Nonce: nonce, RemovedResources: b.removes, SystemVersionInfo: info,
	}
	if b.partial {
		resp.SystemVersionInfo = partial
	}
	resp.ProtoReflect().SetUnknown(b.raw)
	return resp
}

// sent notes a response that is on its way.
func (w *watch) sent(b *batch, nonce string, now time.Time) {
	w.nonce, w.owed = nonce, false
	w.status.Sent++
	w.store.sent.Add(1)
	w.status.SentResources += uint64(len(b.entries))
	w.status.LastSent = now
}
