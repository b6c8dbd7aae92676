package ztunnel

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/zds"
)

// certificateWait is how long the agent's list of pods is held up by one certificate.
const certificateWait = 2 * time.Second

// pods are the enrolled pods of the node, as the CNI agent tells them. It implements zds.Pods.
type pods struct {
	*proxy
	complete func() // called when every pod the agent named is served

	mu      sync.Mutex
	pods    map[string]*pod // by UID
	refused map[string]bool // by UID: named by the agent, and not here
	synced  bool            // the agent's list is complete
	settled bool            // it was served once, all of it
	slow    bool            // the last certificate that was waited for did not come
}

// connected forgets what an earlier connection to the agent said; the pods stay.
func (ps *pods) connected() {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.synced, ps.refused = false, make(map[string]bool)
}

// Add enrols a pod, or replaces it when its network namespace is another one. It takes ownership of netns.
//
// Until all pods of the agent's first list are served, a pod without a certificate is refused if another ztunnel serves it:
// opening its listeners takes its connections away from the one that is to be replaced, which has a certificate. The agent
// offers it again. When nobody serves the pod it is served at once, with what needs no certificate.
func (ps *pods) Add(ctx context.Context, info zds.Info, file *os.File) error {
	netns, err := linux.NetNSFromFile(file)
	if err != nil {
		err = fmt.Errorf("take over the network namespace of %s/%s: %w", info.Namespace, info.Name, err)
	} else if err = ps.certificate(ctx, info); err != nil {
		if served(ctx, netns) {
			netns.Close()
			err = fmt.Errorf("pod %s/%s is not taken over: %w", info.Namespace, info.Name, err)
		} else {
			ps.log.Warn("pod is served without a certificate, as nobody else does", zap.String("pod", info.Namespace+"/"+info.Name), zap.Error(err))
			err = nil
		}
	}
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if err == nil {
		err = ps.add(info, netns)
	}
	if err != nil {
		ps.refused[info.UID] = true
		return err
	}
	delete(ps.refused, info.UID)
	ps.check()
	return nil
}

// certificate waits a little for the pod's certificate, unless that is no condition any more.
func (ps *pods) certificate(ctx context.Context, info zds.Info) error {
	ps.mu.Lock()
	settled, slow := ps.settled, ps.slow
	known := ps.pods[info.UID] != nil
	ps.mu.Unlock()
	if settled || known {
		return nil
	}
	wait := certificateWait
	if slow {
		wait = certificateWait / 100 // the list is long, and what is missing is asked for already
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	_, err := ps.ids.SVID(ctx, ps.identity(info))
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.slow = err != nil
	return err
}

// served reports whether a ztunnel has listeners in the namespace: one that does not share is refused beside them. When that
// cannot be found out, there may be one.
func served(ctx context.Context, netns *linux.NetNS) bool {
	ln, err := netns.Listen(ctx, linux.ListenOptions{Addr: netip.AddrPortFrom(netip.IPv6Unspecified(), mesh.PortHBONE)})
	if err != nil {
		return true
	}
	ln.Close()
	return false
}

// check tells when every pod the agent named is served. The caller holds mu.
func (ps *pods) check() {
	if ps.synced && len(ps.refused) == 0 {
		ps.settled = true
		ps.complete()
	}
}

// add takes ownership of netns. The caller holds mu.
func (ps *pods) add(info zds.Info, netns *linux.NetNS) error {
	if old := ps.pods[info.UID]; old != nil {
		if old.info == info && sameNetNS(old.netns, netns) {
			netns.Close()
			return nil
		}
		ps.drop(info.UID)
	}
	d, err := ps.startPod(info, netns)
	if err != nil {
		ps.log.Error("pod cannot be enrolled", zap.String("pod", info.Namespace+"/"+info.Name), zap.Error(err))
		return err
	}
	ps.pods[info.UID] = d
	ps.log.Info("pod enrolled", zap.String("pod", info.Namespace+"/"+info.Name), zap.String("uid", info.UID))
	return nil
}

func sameNetNS(a, b *linux.NetNS) bool {
	x, errX := a.ID()
	y, errY := b.ID()
	return errX == nil && errY == nil && x == y
}

// Keep confirms a pod the agent cannot open again; it must be here already.
func (ps *pods) Keep(_ context.Context, uid string) error {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if ps.pods[uid] == nil {
		return fmt.Errorf("keep pod %s: it is not here, add it with its network namespace", uid)
	}
	return nil
}

// Del ends a pod and its connections at once.
func (ps *pods) Del(_ context.Context, uid string) error {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	ps.drop(uid)
	delete(ps.refused, uid)
	ps.check()
	return nil
}

// Synced drops every pod the agent's list did not name.
func (ps *pods) Synced(_ context.Context, uids []string) error {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	for uid := range ps.pods {
		if !slices.Contains(uids, uid) {
			ps.drop(uid)
		}
	}
	ps.synced = true
	ps.check()
	return nil
}

// drop ends one pod. The caller holds mu.
func (ps *pods) drop(uid string) {
	d := ps.pods[uid]
	if d == nil {
		return
	}
	delete(ps.pods, uid)
	d.leave()
	ps.log.Info("pod left", zap.String("pod", d.info.Namespace+"/"+d.info.Name), zap.String("uid", uid))
	if !ps.needs(d.id) {
		ps.ids.Forget(d.id)
	}
}

// needs reports whether a pod of the node runs as id. The caller holds mu.
func (ps *pods) needs(id mesh.Identity) bool {
	for _, d := range ps.pods {
		if d.id == id {
			return true
		}
	}
	return false
}

// list returns the pods there are.
func (ps *pods) list() []*pod {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	all := make([]*pod, 0, len(ps.pods))
	for _, d := range ps.pods {
		all = append(all, d)
	}
	return all
}

// drain ends all pods, letting connections finish within the grace period, or until ctx is done.
func (ps *pods) drain(ctx context.Context) {
	var wg sync.WaitGroup
	for _, d := range ps.list() {
		wg.Go(func() { d.drain(ctx) })
	}
	wg.Wait()
}
