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

const (
	// adoptEvery is how often pods are looked for that should be in the mesh and whose namespace could not be found yet.
	adoptEvery = 5 * time.Second
	// troubleAfter is how long a pod may go unfound before the log says so. What the API server tells of a pod runs ahead of
	// its processes when it starts, and behind them when it ends.
	troubleAfter = 3 * adoptEvery
)

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

	look    chan struct{}       // one place: to be asked twice is to be asked
	trouble map[string]*trouble // by UID
}

// trouble is a pod's that should be found and is not.
type trouble struct {
	since time.Time
	told  bool // it is in the log
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
	uids := make(map[string]bool) // of all pods: to see none of them says more than to miss one
	for _, pod := range a.catalog.all() {
		uids[string(pod.UID)] = true
	}
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
	missing := errors.New("the pod runs, and no process of it is found")
	if len(processes) == 0 {
		missing = fmt.Errorf("no process of any pod is seen in %s (is it the host's /proc?)", a.proc)
	}
	for _, rec := range strays {
		err := missing
		if p, ok := processes[rec.UID]; ok {
			rec.Netns = a.proc.netns(p.pid)
			err = a.take(ctx, rec, hosts)
		}
		if err != nil {
			a.complain(rec, err)
			continue
		}
		a.metrics.events.WithLabelValues(eventAdd).Inc()
		delete(a.trouble, rec.UID)
		a.log.Info("running pod found", zap.Stringer("pod", rec.key()),
			zap.String("uid", rec.UID), zap.String("netns", rec.Netns))
	}
	return nil
}

// complain says once that a pod is not taken, when that is not because it just starts or ends.
func (a *adopter) complain(rec record, err error) {
	t := a.trouble[rec.UID]
	if t == nil {
		t = &trouble{since: time.Now()}
		a.trouble[rec.UID] = t
	}
	if pod := a.catalog.pod(rec.key()); pod == nil || pod.DeletionTimestamp != nil || time.Since(t.since) < troubleAfter {
		a.log.Debug("running pod not taken yet", zap.Stringer("pod", rec.key()), zap.String("uid", rec.UID), zap.Error(err))
		return
	}
	if !t.told {
		t.told = true
		a.log.Warn("running pod not taken, trying again", zap.Stringer("pod", rec.key()), zap.String("uid", rec.UID), zap.Error(err))
	}
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
	for uid := range a.trouble {
		if !seen[uid] {
			delete(a.trouble, uid)
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
