package cni

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/cni/plugin"
	"github.com/mistnet/mistnet/cni/rules"
	"github.com/mistnet/mistnet/cni/rules/apply"
	"github.com/mistnet/mistnet/internal/zds"
)

const (
	retryFirst  = 50 * time.Millisecond
	retryLast   = 2 * time.Second
	sweepEvery  = 10 * time.Second // how often namespaces that vanished without a DEL are looked for
	knownWithin = 2 * time.Second  // how long ADD waits for the pod's object to appear
	stepWithin  = 5 * time.Second  // one exchange with ztunnel
	drainEvery  = 2 * time.Second  // how often connections of a released pod are looked for
)

// redirector puts rules into namespaces and takes them out: *apply.Redirection.
type redirector = apply.Redirector

// ztunnels are told of pods that come and go: *zds.Server.
type ztunnels interface {
	Add(ctx context.Context, pod zds.Pod) error
	Del(ctx context.Context, uid string) error
	Connected() int
}

// reconciler brings every pod of the node to where it should be. Each pod has one worker, which alone acts on it; what
// others want of the pod they write down and wake the worker.
type reconciler struct {
	rules   redirector
	zt      ztunnels
	catalog *catalog
	records *records
	status  announcer
	probes  probes
	log     *zap.Logger

	proc  procDir
	fetch func(ctx context.Context, k podKey, uid string) error // asks for a pod that is not known; may be nil

	releaseGrace time.Duration // how long ztunnel serves a released pod at least

	repairEvery time.Duration // how often rules are compared with what they should be; 0: only at the start
	sweeps      []func()      // what else is looked at from time to time

	start chan *pod     // new pods, to run, which owns the workers
	slots chan struct{} // one place for each change of rules at a time: some of them take processes

	mu   sync.Mutex
	pods map[podKey]*pod
}

// pod is one attached pod. The first group is guarded by reconciler.mu, the second belongs to the worker.
type pod struct {
	key      podKey
	rec      record
	file     *os.File // the namespace, for ztunnel; closed when the pod is gone
	gone     bool
	starting bool          // the runtime waits for it: no process of it runs yet
	gen      int           // counts attachments; what a worker found out about an earlier one is void
	greeted  int           // counts snapshots: what an earlier ztunnel answered is void
	stale    []string      // UIDs of earlier attachments that ztunnel may still know
	result   result        // of the worker's last attempt
	settled  chan struct{} // closed and replaced with each result
	wake     chan struct{} // one place: to be woken twice is to be woken

	seen      int
	again     time.Duration  // when to settle it again though all went well; 0: when woken
	allowed   bool           // probes are let in
	released  time.Time      // when its redirection ended
	applied   *rules.Options // what the namespace holds, as far as the worker knows
	verified  time.Time      // when the worker knew for certain
	acked     bool           // ztunnel has taken the pod
	ackedBy   int            // greeted when it did
	announced *redirection
	clean     bool // not captured for certain: nothing to remove
}

type result struct {
	gen int
	err error
}

// rulesError marks a failure that waiting does not mend.
type rulesError struct{ err error }

func (e rulesError) Error() string { return e.err.Error() }
func (e rulesError) Unwrap() error { return e.err }

var errSuperseded = errors.New("pod was attached anew")

// restore takes up the pods of an earlier run. Those whose namespace is gone are ended by their workers.
func (r *reconciler) restore(list []record) {
	for _, rec := range list {
		p := newPod(rec)
		p.file, _ = rec.file() // when it has vanished, the worker finds out
		p.acked = rec.Enabled  // until another ztunnel comes
		r.pods[p.key] = p
	}
}

func newPod(rec record) *pod {
	return &pod{key: rec.key(), rec: rec, settled: make(chan struct{}), wake: make(chan struct{}, 1)}
}

// run owns the workers until ctx is done.
func (r *reconciler) run(ctx context.Context) error {
	var workers sync.WaitGroup
	defer workers.Wait()
	for _, p := range r.all() {
		workers.Go(func() { r.work(ctx, p) })
	}
	every := sweepEvery
	if r.repairEvery > 0 {
		every = min(every, r.repairEvery)
	}
	sweep := time.NewTicker(every)
	defer sweep.Stop()
	for {
		select {
		case p := <-r.start:
			workers.Go(func() { r.work(ctx, p) })
		case <-sweep.C:
			r.wakeAll()
			for _, fn := range r.sweeps {
				fn()
			}
		case <-ctx.Done():
			return nil
		}
	}
}

func (r *reconciler) all() []*pod {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]*pod, 0, len(r.pods))
	for _, p := range r.pods {
		out = append(out, p)
	}
	return out
}

func (r *reconciler) wakeAll() {
	for _, p := range r.all() {
		p.nudge()
	}
}

func (r *reconciler) wakeOne(k podKey) {
	r.mu.Lock()
	p := r.pods[k]
	r.mu.Unlock()
	if p != nil {
		p.nudge()
	}
}

func (p *pod) nudge() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// snapshot is every captured pod: what ztunnel must serve.
func (r *reconciler) snapshot() []zds.Pod {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []zds.Pod
	for _, p := range r.pods {
		if p.rec.Captured && !p.gone && p.file != nil {
			out = append(out, zds.Pod{Info: p.rec.info(), NetNS: p.file})
			// Whether ztunnel takes a pod of the snapshot the agent is not told: each is offered once more, which
			// costs nothing when it did.
			p.greeted++
			p.nudge()
		}
	}
	return out
}

func (r *record) info() zds.Info {
	return zds.Info{UID: r.UID, Name: r.Name, Namespace: r.Namespace, ServiceAccount: r.ServiceAccount}
}

// attach takes a pod that is about to start and returns when it is ready to, or with why it must not start.
func (r *reconciler) attach(ctx context.Context, ev plugin.Event) error {
	rec := record{
		Namespace: ev.PodNamespace, Name: ev.PodName, UID: ev.PodUID,
		ContainerID: ev.ContainerID, IfName: ev.IfName, Netns: r.proc.onHost(ev.Netns),
	}
	for _, ip := range ev.IPs {
		rec.IPs = append(rec.IPs, ip.Address.Addr())
	}
	var err error
	if rec.NetnsID, err = netnsID(rec.Netns); err != nil {
		return err
	}
	hosts, err := r.proc.hosts()
	if err != nil {
		return err
	}
	if slices.Contains(hosts, rec.NetnsID) {
		return errHostNetwork
	}
	object, err := r.identify(ctx, rec.key(), rec.UID)
	if err != nil {
		return err
	}
	rec.UID = cmp.Or(rec.UID, object, rec.key().String())
	p, gen, err := r.admit(ctx, rec, true)
	if err != nil {
		return err
	}
	err = r.await(ctx, p, gen)
	if err != nil {
		r.leave(p, gen)
		return err
	}
	r.mu.Lock()
	if p.gen == gen {
		p.starting = false
	}
	r.mu.Unlock()
	return nil
}

// identify waits a little until it is known whether the pod is to be in the mesh, and returns the UID of its object.
func (r *reconciler) identify(ctx context.Context, k podKey, uid string) (object string, err error) {
	ctx, cancel := context.WithTimeout(ctx, knownWithin)
	defer cancel()
	var asked sync.WaitGroup
	var refused error // of the last question
	if _, _, err := r.catalog.decide(k, uid); err != nil && r.fetch != nil {
		asked.Go(func() { refused = r.fetch(ctx, k, uid) })
	}
	object, err = r.catalog.await(ctx, k, uid)
	cancel()
	asked.Wait()
	if err != nil && refused != nil {
		err = fmt.Errorf("%w; the API server says: %w", err, refused)
	}
	return object, err
}

// adopt takes a pod that runs already, unless it is known by now.
func (r *reconciler) adopt(ctx context.Context, rec record) error {
	_, _, err := r.admit(ctx, rec, false)
	return err
}

func (r *reconciler) knows(k podKey) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.pods[k] != nil
}

// admit writes the attachment down, in place of an earlier one of the same pod when replace says so.
func (r *reconciler) admit(ctx context.Context, rec record, replace bool) (p *pod, gen int, err error) {
	file, err := rec.file()
	if err != nil {
		return nil, 0, err
	}
	r.mu.Lock()
	p = r.pods[rec.key()]
	fresh := p == nil
	if !fresh && !replace {
		r.mu.Unlock()
		file.Close()
		return p, 0, nil
	}
	if fresh {
		p = newPod(rec)
		r.pods[p.key] = p
	} else {
		switch {
		case p.rec.NetnsID == rec.NetnsID && p.rec.UID == rec.UID:
			// The runtime repeats itself: what is in the namespace is there still.
			rec.Captured, rec.Released, rec.Options, rec.ServiceAccount = p.rec.Captured, p.rec.Released, p.rec.Options, p.rec.ServiceAccount
		case p.rec.Captured:
			p.stale = append(p.stale, p.rec.UID)
		}
		if p.file != nil {
			p.file.Close()
		}
		p.rec, p.gone = rec, false
	}
	p.file, p.starting = file, replace
	p.gen++
	gen = p.gen
	r.mu.Unlock()
	if !fresh {
		p.nudge()
		return p, gen, nil
	}
	select {
	case r.start <- p:
		return p, gen, nil
	case <-ctx.Done():
		r.mu.Lock()
		delete(r.pods, p.key)
		r.mu.Unlock()
		file.Close()
		return nil, 0, fmt.Errorf("start worker of pod %s: %w", p.key, ctx.Err())
	}
}

// await waits until the worker is done with an attachment. A ztunnel that is missing is waited for as long as ctx lets.
func (r *reconciler) await(ctx context.Context, p *pod, gen int) error {
	var last error
	for {
		r.mu.Lock()
		res, settled, current := p.result, p.settled, p.gen
		r.mu.Unlock()
		if current != gen {
			return errSuperseded
		}
		if res.gen == gen {
			var permanent rulesError
			if res.err == nil || errors.As(res.err, &permanent) || errors.Is(res.err, errVanished) {
				return res.err
			}
			last = res.err
		}
		select {
		case <-settled:
		case <-ctx.Done():
			return cmp.Or(last, ctx.Err())
		}
	}
}

// detach ends a pod and waits for its worker as long as ctx lets. A container ID that is not the pod's current one is an
// echo of an earlier sandbox and means nothing.
func (r *reconciler) detach(ctx context.Context, k podKey, containerID string) {
	r.mu.Lock()
	p := r.pods[k]
	if p == nil || containerID != "" && p.rec.ContainerID != "" && p.rec.ContainerID != containerID {
		r.mu.Unlock()
		return
	}
	gen, settled := p.gen, p.settled
	r.mu.Unlock()
	r.leave(p, gen)
	for {
		select {
		case <-settled:
		case <-ctx.Done():
			return
		}
		r.mu.Lock()
		over := r.pods[k] != p || p.gen != gen
		settled = p.settled
		r.mu.Unlock()
		if over {
			return
		}
	}
}

// leave marks an attachment as ended.
func (r *reconciler) leave(p *pod, gen int) {
	r.mu.Lock()
	if p.gen == gen {
		p.gone = true
	}
	r.mu.Unlock()
	p.nudge()
}

// verify reports how a pod differs from what it should be, without touching it.
func (r *reconciler) verify(ev plugin.Event) error {
	k := podKey{ev.PodNamespace, ev.PodName}
	r.mu.Lock()
	p := r.pods[k]
	var rec record
	if p != nil {
		rec = p.rec
	}
	r.mu.Unlock()
	if p == nil {
		return fmt.Errorf("pod %s is not known", k)
	}
	if rec.ContainerID != "" && rec.ContainerID != ev.ContainerID {
		return fmt.Errorf("pod %s is attached as container %s, not %s", k, rec.ContainerID, ev.ContainerID)
	}
	ns, err := rec.open()
	if err != nil {
		return err
	}
	defer ns.Close()
	v, _, unknown := r.catalog.decide(k, rec.UID)
	v.Options.Joined = rec.Options.Joined
	switch {
	case unknown == nil && v.Enrolled && !rec.Enabled:
		return fmt.Errorf("pod %s is not yet enrolled", k)
	case unknown == nil && v.Enrolled && !equalOptions(v.Options, rec.Options):
		return fmt.Errorf("pod %s is not yet captured as it should be", k)
	case rec.Captured && !rec.Released:
		return r.rules.Verify(ns, rules.InPod(rec.Options))
	}
	return nil
}

// keep ends every pod whose container is not among the valid ones.
func (r *reconciler) keep(valid []plugin.Attachment) {
	alive := make(map[string]bool, len(valid))
	for _, a := range valid {
		alive[a.ContainerID] = true
	}
	for _, p := range r.all() {
		r.mu.Lock()
		id, gen := p.rec.ContainerID, p.gen
		r.mu.Unlock()
		if id != "" && !alive[id] {
			r.log.Info("pod collected as garbage", zap.Stringer("pod", p.key), zap.String("container.id", id))
			r.leave(p, gen)
		}
	}
}

// equalOptions compares by value: options hold a slice.
func equalOptions(a, b rules.Options) bool {
	return reflect.DeepEqual(a, b) || len(a.VirtualInterfaces)+len(b.VirtualInterfaces) == 0 &&
		a.DNS == b.DNS && a.Ingress == b.Ingress && a.Joined == b.Joined && a.ProbeIPv4 == b.ProbeIPv4 && a.ProbeIPv6 == b.ProbeIPv6
}

// probes lets the host's health checks into captured pods: an apply.HostProbes, or noProbes.
type probes interface {
	Allow(uid string, ips []netip.Addr) error
	Forbid(ips []netip.Addr) error
}

// noProbes leaves the host alone.
type noProbes struct{}

func (noProbes) Allow(string, []netip.Addr) error { return nil }
func (noProbes) Forbid([]netip.Addr) error        { return nil }
