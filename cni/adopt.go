package cni

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"
)

// adoptEvery is how often pods are looked for that should be in the mesh and whose namespace could not be found yet.
const adoptEvery = 5 * time.Second

// adopter finds pods that run without the plugin having reported them: they are older than the agent, or its memory
// was lost. It finds their network namespaces through their processes.
type adopter struct {
	catalog *catalog
	rec     *reconciler
	status  announcer
	proc    procDir
	node    string // pods of other nodes are theirs
	log     *zap.Logger
	metrics *metrics

	look   chan struct{}   // one place: to be asked twice is to be asked
	warned map[string]bool // UIDs whose trouble is in the log
}

func (a *adopter) nudge() {
	select {
	case a.look <- struct{}{}:
	default:
	}
}

// run adopts whenever asked to, and from time to time, until ctx is done.
func (a *adopter) run(ctx context.Context) error {
	again := time.NewTicker(adoptEvery)
	defer again.Stop()
	for {
		select {
		case <-a.look:
		case <-again.C:
		case <-ctx.Done():
			return nil
		}
		if err := a.adopt(ctx); err != nil && ctx.Err() == nil {
			a.log.Warn("running pods not found", zap.Error(err))
		}
	}
}

// adopt makes one attempt at every pod that is missing.
func (a *adopter) adopt(ctx context.Context) error {
	strays := a.strays()
	if len(strays) == 0 {
		return nil
	}
	uids := make(map[string]bool, len(strays))
	for _, rec := range strays {
		uids[rec.UID] = true
	}
	processes, err := a.proc.oldest(uids)
	if err != nil {
		return err
	}
	hosts, err := a.proc.hosts()
	if err != nil {
		return err
	}
	for _, rec := range strays {
		err := errors.New("no process of the pod is found (is the host's /proc mounted?)")
		if p, ok := processes[rec.UID]; ok {
			rec.Netns = a.proc.netns(p.pid)
			err = a.take(ctx, rec, hosts)
		}
		switch {
		case err == nil:
			a.metrics.events.WithLabelValues(eventAdd).Inc()
			delete(a.warned, rec.UID)
			a.log.Info("running pod found", zap.Stringer("pod", rec.key()),
				zap.String("uid", rec.UID), zap.String("netns", rec.Netns))
		case ctx.Err() == nil && !a.warned[rec.UID]:
			a.warned[rec.UID] = true
			a.log.Warn("running pod not taken, trying again", zap.Stringer("pod", rec.key()),
				zap.String("uid", rec.UID), zap.Error(err))
		}
	}
	return nil
}

// strays lists the running pods that the reconciler does not know, and that are to be in the mesh or were.
func (a *adopter) strays() []record {
	var out []record
	if !a.catalog.isLoaded() {
		return nil
	}
	seen := make(map[string]bool)
	for _, pod := range a.catalog.all() {
		k := podKey{pod.Namespace, pod.Name}
		if pod.Spec.HostNetwork || isOver(pod) || pod.Spec.NodeName != a.node || a.rec.knows(k) {
			continue
		}
		uid := cmp.Or(pod.Annotations[annotationMirror], string(pod.UID))
		announced, ips := a.status.last(k)
		v, _, err := a.catalog.decide(k, uid)
		if err != nil || len(ips) == 0 || uid == "" || !v.Enrolled && announced == redirectionNone {
			continue
		}
		seen[uid] = true
		rec := record{Namespace: k.Namespace, Name: k.Name, UID: uid, IPs: ips}
		if announced != redirectionNone {
			// What it was captured with nobody knows any more: Apply and Remove do without.
			rec.Captured, rec.ServiceAccount = true, v.ServiceAccount
			rec.Options, rec.Enabled = v.Options, announced == redirectionEnabled
		}
		out = append(out, rec)
	}
	for uid := range a.warned {
		if !seen[uid] {
			delete(a.warned, uid)
		}
	}
	slices.SortFunc(out, func(x, y record) int { return cmp.Compare(x.UID, y.UID) })
	return out
}

// take hands a pod to the reconciler when the namespace that was found is certainly the pod's.
func (a *adopter) take(ctx context.Context, rec record, hosts []uint64) (err error) {
	if rec.NetnsID, err = netnsID(rec.Netns); err != nil {
		return err
	}
	if slices.Contains(hosts, rec.NetnsID) {
		return errHostNetwork
	}
	ok, err := owns(rec.Netns, rec.IPs)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("namespace %s has none of the pod's addresses %v", rec.Netns, rec.IPs)
	}
	return a.rec.adopt(ctx, rec)
}
