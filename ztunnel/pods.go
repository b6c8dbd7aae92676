package ztunnel

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/zds"
)

// pods are the enrolled pods of the node, as the CNI agent tells them. It implements zds.Pods.
type pods struct {
	*proxy
	mu   sync.Mutex
	pods map[string]*pod // by UID
}

// Add enrols a pod, or replaces it when its network namespace is another one. It takes ownership of netns.
func (ps *pods) Add(_ context.Context, info zds.Info, file *os.File) error {
	netns, err := linux.NetNSFromFile(file)
	if err != nil {
		return fmt.Errorf("take over the network namespace of %s/%s: %w", info.Namespace, info.Name, err)
	}
	ps.mu.Lock()
	defer ps.mu.Unlock()
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

// drain ends all pods, letting connections finish within the grace period.
func (ps *pods) drain() {
	var wg sync.WaitGroup
	for _, d := range ps.list() {
		wg.Go(d.drain)
	}
	wg.Wait()
}
