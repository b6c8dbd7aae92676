package cni

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/cni/plugin"
	"github.com/mistnet/mistnet/cni/rules/apply"
)

// leaveWithin bounds the cleaning of a node: less than the time Kubernetes gives a pod to end (30 s by default), with
// askOwner before it.
const leaveWithin = 20 * time.Second

// leaveIfOrphaned cleans the node up when the agent stops because it is uninstalled, and leaves it as it is when another
// agent follows: after an upgrade, a restart or a reboot.
func (a *Agent) leaveIfOrphaned(ctx context.Context) error {
	if !a.kube.owner.gone(ctx) {
		a.log.Info("node is left as it is, for the next agent")
		return nil
	}
	return a.leave(ctx)
}

// leave takes everything off the node: first the plugin, so that no pod asks for an agent that is about to be gone, then
// the redirection of running pods, whose traffic goes on without the mesh, then what the host itself has.
func (a *Agent) leave(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, leaveWithin)
	defer cancel()
	a.log.Info("mesh leaves the node", zap.Int("pods", len(a.rec.all())))
	var errs []error
	if a.cfg.CNIConfDir != "" {
		i, err := a.cfg.installer(a.log.Named("install"))
		if err == nil {
			err = i.Uninstall()
		}
		errs = append(errs, err)
	}
	a.catalog.leave()
	errs = append(errs, a.rec.releaseAll(ctx))
	if h, ok := a.rec.probes.(*apply.Host); ok {
		errs = append(errs, h.Remove())
	}
	if errors.Join(errs...) == nil { // else the memory is what a second attempt needs
		for _, name := range []string{memoryFile, memoryFile + brokenSuffix, plugin.SocketName, "istio-cni.log"} {
			if err := os.Remove(filepath.Join(a.cfg.RunDir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("leave the node: %w", err)
	}
	a.log.Info("mesh left the node")
	return nil
}

// releaseAll waits until no pod is captured any longer. The catalog must say that none is to be.
func (r *reconciler) releaseAll(ctx context.Context) error {
	r.wakeAll()
	var errs []error
	for _, p := range r.all() {
		for {
			r.mu.Lock()
			captured, settled, last := p.rec.Captured && !p.gone, p.settled, p.result.err
			r.mu.Unlock()
			if !captured {
				break
			}
			select {
			case <-settled:
				continue
			case <-ctx.Done():
				errs = append(errs, fmt.Errorf("release pod %s: %w", p.key, errors.Join(ctx.Err(), last)))
			}
			break
		}
	}
	return errors.Join(errs...)
}
