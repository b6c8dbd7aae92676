package cni

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/cni/rules"
	"github.com/mistnet/mistnet/cni/rules/apply"
	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/zds"
)

// work is the life of a pod's worker: it settles the pod at once, whenever it is woken, and again after a failure.
func (r *reconciler) work(ctx context.Context, p *pod) {
	retry := time.NewTimer(0)
	defer retry.Stop()
	pause := time.Duration(0)
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
			pause = 0
		case <-retry.C:
		}
		gen, over, err := r.settle(ctx, p)
		if ctx.Err() != nil {
			return
		}
		r.publish(p, gen, err)
		switch {
		case over:
			return
		case err != nil:
			if pause == 0 && !errors.Is(err, errSuperseded) && !errors.Is(err, errVanished) {
				r.log.Warn("pod not settled, trying again", zap.Stringer("pod", p.key), zap.Error(err))
			}
			pause = min(max(2*pause, retryFirst), retryLast)
			retry.Reset(pause)
		case p.again > 0:
			pause = 0
			retry.Reset(p.again)
		default:
			pause = 0
			retry.Stop()
		}
	}
}

// publish shows the attempt's result to those who wait for it.
func (r *reconciler) publish(p *pod, gen int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p.result = result{gen, err}
	close(p.settled)
	p.settled = make(chan struct{})
}

// settle makes one attempt to bring the pod to where it should be. Over means that the pod is gone and forgotten.
func (r *reconciler) settle(ctx context.Context, p *pod) (gen int, over bool, err error) {
	r.mu.Lock()
	rec, gone, stale, greeted, starting := p.rec, p.gone, p.stale, p.greeted, p.starting
	gen = p.gen
	r.mu.Unlock()
	p.again = 0
	if p.ackedBy != greeted {
		p.acked, p.ackedBy = false, greeted
	}
	if p.seen != gen {
		p.seen, p.applied, p.acked, p.announced, p.clean, p.allowed = gen, nil, false, nil, false, false
	}
	if err := r.drop(ctx, p, stale); err != nil {
		return gen, false, err
	}
	if gone {
		over, err := r.end(ctx, p, gen, rec)
		return gen, over, err
	}
	ns, err := rec.open()
	if errors.Is(err, errVanished) {
		r.log.Info("network namespace vanished, pod dropped", zap.Stringer("pod", p.key), zap.Error(err))
		r.leave(p, gen)
		p.nudge()
		return gen, false, err
	}
	if err != nil {
		return gen, false, err
	}
	defer ns.Close()

	v, _, unknown := r.catalog.decide(p.key, rec.UID)
	switch {
	case unknown == nil && v.Enrolled:
		v.Options.Joined = !starting
		if rec.Captured && !rec.Released {
			v.Options.Joined = rec.Options.Joined
		}
		return gen, false, r.enrol(ctx, p, gen, rec, ns, v, starting)
	case unknown == nil, rec.Released:
		return gen, false, r.release(ctx, p, gen, rec, ns, v)
	case rec.Captured:
		// Its object is gone before its sandbox, or not read yet: the pod stays as it was.
		return gen, false, r.enrol(ctx, p, gen, rec, ns, Verdict{
			Enrolled: true, Why: "was enrolled", ServiceAccount: rec.ServiceAccount, Options: rec.Options,
		}, starting)
	}
	return gen, false, nil
}

// drop makes ztunnel forget former selves of the pod.
func (r *reconciler) drop(ctx context.Context, p *pod, uids []string) error {
	for _, uid := range uids {
		if err := r.del(ctx, uid); err != nil {
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	p.stale = p.stale[len(uids):]
	return nil
}

func (r *reconciler) del(ctx context.Context, uid string) error {
	ctx, cancel := context.WithTimeout(ctx, stepWithin)
	defer cancel()
	return r.zt.Del(ctx, uid)
}

// enrol captures the pod and hands it to ztunnel, and only then announces it.
//
// Of a pod that starts, or was captured before, nothing may pass by the mesh: it is captured whatever ztunnel says. One that
// runs outside of the mesh is captured when ztunnel serves it, and goes on as it did until then: its connections would
// be refused, and it was in the clear anyway.
func (r *reconciler) enrol(ctx context.Context, p *pod, gen int, rec record, ns *linux.NetNS, v Verdict, starting bool) error {
	if !rec.Captured || rec.Released || !equalOptions(rec.Options, v.Options) || rec.ServiceAccount != v.ServiceAccount {
		rec.Captured, rec.Released, rec.Options, rec.ServiceAccount = true, false, v.Options, v.ServiceAccount
		if err := r.update(p, gen, rec); err != nil {
			return err
		}
	}
	p.clean = false
	if err := r.inspect(ctx, p, ns); err != nil {
		return err
	}
	var captured, offered error
	if starting || rec.Enabled {
		var both sync.WaitGroup
		both.Go(func() { captured = r.capture(ctx, p, rec, ns, v) })
		offered = r.offer(ctx, p, rec)
		both.Wait()
	} else if offered = r.offer(ctx, p, rec); offered == nil {
		captured = r.capture(ctx, p, rec, ns, v)
	}
	if err := errors.Join(captured, offered); err != nil {
		if rec.Enabled { // ztunnel had it once: peers may go on sending
			return err
		}
		return errors.Join(err, r.announce(ctx, p, rec, redirectionPending))
	}
	if !rec.Enabled {
		rec.Enabled = true
		if err := r.update(p, gen, rec); err != nil {
			return err
		}
		r.log.Info("pod enrolled", zap.Stringer("pod", p.key), zap.String("uid", rec.UID), zap.String("reason", v.Why))
	}
	return r.announce(ctx, p, rec, redirectionEnabled)
}

// capture lets the host's probes in and redirects everything else, unless it is so already.
func (r *reconciler) capture(ctx context.Context, p *pod, rec record, ns *linux.NetNS, v Verdict) error {
	if p.allowed && p.applied != nil && equalOptions(*p.applied, v.Options) {
		return nil
	}
	p.applied = nil
	var changed bool
	var applied, allowed error
	err := r.slot(ctx, func() error {
		var both sync.WaitGroup // probes are let by with or without rules
		both.Go(func() { allowed = r.probes.Allow(rec.UID, rec.IPs) })
		changed, applied = r.rules.Apply(ns, rules.InPod(v.Options))
		both.Wait()
		return nil
	})
	switch {
	case err != nil:
		return err
	case applied != nil:
		return rulesError{fmt.Errorf("capture pod %s: %w", p.key, applied)}
	case allowed != nil:
		return fmt.Errorf("let probes into pod %s: %w", p.key, allowed)
	}
	p.applied, p.allowed, p.verified = &v.Options, true, time.Now()
	r.log.Info("pod captured", zap.Stringer("pod", p.key), zap.String("reason", v.Why), zap.Bool("changed", changed))
	return nil
}

// inspect compares the pod's rules with what was applied, when the last time is long enough ago, and forgets that they
// were when they differ: somebody else changed them.
func (r *reconciler) inspect(ctx context.Context, p *pod, ns *linux.NetNS) error {
	if p.applied == nil || r.repairEvery == 0 || time.Since(p.verified) < r.repairEvery {
		return nil
	}
	return r.slot(ctx, func() error {
		if err := r.rules.Verify(ns, rules.InPod(*p.applied)); err != nil {
			r.log.Warn("rules were changed by somebody else, putting them right", zap.Stringer("pod", p.key), zap.Error(err))
			p.applied = nil
			return nil
		}
		p.verified, p.allowed = time.Now(), false
		return nil
	})
}

// slot runs fn when few enough others do.
func (r *reconciler) slot(ctx context.Context, fn func() error) error {
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
		return fn()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// offer hands the pod to ztunnel and waits until it serves it, unless it has taken it already.
func (r *reconciler) offer(ctx context.Context, p *pod, rec record) error {
	if p.acked {
		return nil
	}
	file, err := rec.file() // its own: p.file is closed when the pod is attached anew
	if err != nil {
		return err
	}
	defer file.Close()
	ctx, cancel := context.WithTimeout(ctx, stepWithin)
	defer cancel()
	if err := r.zt.Add(ctx, zds.Pod{Info: rec.info(), NetNS: file}); err != nil {
		return err
	}
	p.acked = true
	return nil
}

// release: announcement, redirection, and when ztunnel has nothing to do for the pod any more what else was captured with,
// and ztunnel, in this order: peers learn first that the pod no longer speaks HBONE, and nothing is captured that nobody
// would serve. It does nothing for a pod that was never captured but state its status.
func (r *reconciler) release(ctx context.Context, p *pod, gen int, rec record, ns *linux.NetNS, v Verdict) error {
	if err := r.announce(ctx, p, rec, redirectionNone); err != nil {
		if !r.catalog.isLeaving() {
			return err
		}
		// Nobody serves the pod from now on: peers that are not told are the lesser evil.
		r.log.Warn("announcement stays", zap.Stringer("pod", p.key), zap.Error(err))
	}
	if !rec.Captured {
		if p.clean {
			return nil
		}
		p.clean = true
		return r.update(p, gen, rec)
	}
	if !rec.Released {
		if err := r.slot(ctx, func() error { return r.rules.Release(ns) }); err != nil {
			return rulesError{fmt.Errorf("release pod %s: %w", p.key, err)}
		}
		if err := r.probes.Forbid(rec.IPs); err != nil { // not before: they would be captured
			return fmt.Errorf("keep probes out of pod %s: %w", p.key, err)
		}
		rec.Released, rec.Enabled = true, false
		if err := r.update(p, gen, rec); err != nil {
			return err
		}
		p.applied, p.allowed, p.released = nil, false, time.Now()
		r.log.Info("pod released", zap.Stringer("pod", p.key), zap.String("uid", rec.UID), zap.String("reason", v.Why))
	}
	wait, err := r.drain(p, ns)
	if p.again = wait; err != nil || wait > 0 {
		return err
	}
	if err := r.slot(ctx, func() error { return r.rules.Remove(ns, rules.InPod(rec.Options)) }); err != nil {
		return rulesError{fmt.Errorf("release pod %s: %w", p.key, err)}
	}
	p.acked = false
	uid := rec.UID
	rec.Captured, rec.Released, rec.Options, rec.ServiceAccount = false, false, rules.Options{}, ""
	r.mu.Lock()
	if p.gen == gen {
		p.stale = append(p.stale, uid) // until ztunnel has let go of it
	}
	r.mu.Unlock()
	if err := r.update(p, gen, rec); err != nil {
		return err
	}
	p.clean = true
	r.log.Info("pod left to itself", zap.Stringer("pod", p.key), zap.String("uid", uid))
	return r.drop(ctx, p, []string{uid})
}

// drain returns how long ztunnel is to go on serving a pod that was released, before it is looked again: until peers that
// have not heard of it yet must have, and then until the last connection it carries for the pod has ended. When the mesh
// leaves the node ztunnel does too.
func (r *reconciler) drain(p *pod, ns *linux.NetNS) (time.Duration, error) {
	if r.catalog.isLeaving() {
		return 0, nil
	}
	if p.released.IsZero() { // by an earlier agent
		p.released = time.Now()
	}
	if rest := r.releaseGrace - time.Since(p.released); rest > 0 {
		return rest, nil
	}
	busy, err := apply.Carries(ns)
	if busy {
		return drainEvery, err
	}
	return 0, err
}

// end forgets a pod that is gone. Its rules stay in its namespace and vanish with it: until then nothing leaks.
func (r *reconciler) end(ctx context.Context, p *pod, gen int, rec record) (over bool, err error) {
	if err := r.status.remove(ctx, p.key); err != nil {
		return false, err
	}
	p.announced = nil
	if rec.Captured {
		if err := r.probes.Forbid(rec.IPs); err != nil {
			return false, err
		}
		if err := r.del(ctx, rec.UID); err != nil {
			return false, err
		}
	}
	if !r.current(p, gen) {
		return false, errSuperseded
	}
	if err := r.records.remove(p.key); err != nil {
		return false, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if p.gen != gen { // the next attempt writes the new attachment's record
		return false, errSuperseded
	}
	delete(r.pods, p.key)
	if p.file != nil {
		p.file.Close()
	}
	r.log.Info("pod gone", zap.Stringer("pod", p.key), zap.String("uid", rec.UID))
	return true, nil
}

// update makes rec what the agent knows of the pod, on disk too, unless the pod was attached anew meanwhile.
func (r *reconciler) update(p *pod, gen int, rec record) error {
	r.mu.Lock()
	if p.gen != gen {
		r.mu.Unlock()
		return errSuperseded
	}
	p.rec = rec
	r.mu.Unlock()
	return r.records.put(rec)
}

func (r *reconciler) current(p *pod, gen int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return p.gen == gen
}

// announce writes the pod's status when it differs from what was written last.
func (r *reconciler) announce(ctx context.Context, p *pod, rec record, to redirection) error {
	if p.announced != nil && *p.announced == to {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, stepWithin)
	defer cancel()
	if err := r.status.write(ctx, p.key, rec.IPs, to); err != nil {
		return err
	}
	p.announced = &to
	return nil
}
