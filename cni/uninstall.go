package cni

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"go.uber.org/zap"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"

	"github.com/mistnet/mistnet/cni/plugin"
	"github.com/mistnet/mistnet/cni/rules"
	"github.com/mistnet/mistnet/cni/rules/apply"
	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/mesh"
)

// leaveWithin bounds the cleaning of a node: less than the time Kubernetes gives a pod to end (30 s by default), with
// askOwner before it.
const leaveWithin = 20 * time.Second

// leaveIfOrphaned cleans the node up when the agent stops because it is uninstalled, and leaves it as it is when another
// agent follows: after an upgrade, a restart or a reboot.
func (a *Agent) leaveIfOrphaned(ctx context.Context) error {
	gone := a.kube.owner.gone(ctx)
	if a.taints != nil {
		a.taints.stop(ctx, gone)
	}
	if !gone {
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
	errs = append(errs, a.rec.releaseAll(ctx), a.withdrawRest(ctx))
	if h, ok := a.rec.probes.(apply.HostProbes); ok {
		errs = append(errs, h.Remove())
	}
	if err := errors.Join(errs...); err != nil { // the memory stays: a second attempt needs it
		return fmt.Errorf("leave the node: %w", err)
	}
	if err := a.cfg.forget(); err != nil {
		return fmt.Errorf("leave the node: %w", err)
	}
	a.log.Info("mesh left the node")
	return nil
}

// withdrawRest takes back announcements of pods that are not the agent's any longer: they have ended, or were not found.
func (a *Agent) withdrawRest(ctx context.Context) error {
	var errs []error
	for _, pod := range a.catalog.all() {
		k := podKey{pod.Namespace, pod.Name}
		if announced, _ := a.rec.status.last(k); announced == redirectionNone || a.rec.knows(k) {
			continue
		}
		if err := a.kube.status.patch(ctx, k, pod.UID, redirectionNone); err != nil {
			errs = append(errs, fmt.Errorf("withdraw announcement of pod %s: %w", k, err))
		}
	}
	return errors.Join(errs...)
}

// forget removes what the agent and the plugin keep in the run directory.
func (c *Config) forget() error {
	var errs []error
	for _, name := range []string{memoryFile, memoryFile + brokenSuffix, plugin.SocketName, "istio-cni.log", "istio-cni.log.1"} {
		if err := os.Remove(filepath.Join(c.RunDir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// uninstall is for a host whose agent is gone and left its work behind. It goes by the agent's memory, and on Kubernetes by
// what the API server says of the node's pods, too.
func (c *Config) uninstall(ctx context.Context, log *zap.Logger) error {
	if c.RunDir == "" {
		c.RunDir = plugin.DefaultRunDir
	}
	socket := filepath.Join(c.RunDir, plugin.SocketName)
	if conn, err := net.DialTimeout("unix", socket, time.Second); err == nil {
		conn.Close()
		return fmt.Errorf("uninstall: an agent answers at %s: stop it first", socket)
	}
	i, err := c.installer(log)
	if err != nil {
		return err
	}
	redirect, err := c.redirection()
	if err != nil {
		return err
	}
	known, err := openRecords(filepath.Join(c.RunDir, memoryFile))
	if err != nil && !errors.Is(err, errBrokenRecords) {
		return fmt.Errorf("uninstall: %w", err)
	}
	errs := []error{i.Uninstall()}
	list := known.list()
	status := announcer(statusDir(c.StatusDir))
	if c.Source == SourceKubernetes {
		more, err := c.withdraw(ctx, log)
		errs = append(errs, err)
		list = append(list, more...)
		status = statusDir("")
	}
	seen := make(map[uint64]bool) // namespaces
	for _, rec := range list {
		if !rec.Captured || seen[rec.NetnsID] {
			continue
		}
		seen[rec.NetnsID] = true
		ns, err := rec.open()
		if errors.Is(err, errVanished) {
			continue
		}
		if err == nil {
			err = errors.Join(status.write(ctx, rec.key(), rec.IPs, redirectionNone), redirect.Remove(ns, rules.InPod(rec.Options)))
			ns.Close()
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("release pod %s: %w", rec.key(), err))
			continue
		}
		log.Info("pod released", zap.Stringer("pod", rec.key()))
	}
	if c.HostProbe {
		var here *linux.NetNS
		errs = append(errs, redirect.RemoveHost(here, hostProbe()))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("uninstall: %w", err)
	}
	return c.forget()
}

// withdraw takes the announcements of the node's pods back, and returns those whose namespaces are found: an agent that is
// gone may have lost its memory, too.
func (c *Config) withdraw(ctx context.Context, log *zap.Logger) ([]record, error) {
	client := c.Client
	var err error
	if client == nil {
		if client, err = connect(c.Kubeconfig); err != nil {
			return nil, err
		}
	}
	if c.Untaint != "" {
		if _, err := setTaint(ctx, client, c.Node, c.Untaint, false); err != nil {
			return nil, fmt.Errorf("remove taint: %w", err)
		}
	}
	pods, err := client.CoreV1().Pods("").List(ctx, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector("spec.nodeName", c.Node).String(),
	})
	if err != nil {
		return nil, fmt.Errorf("list the node's pods: %w", err)
	}
	catalog := newCatalog(c.Policy, true)
	status := newPodStatus(client, catalog, log)
	uids := make(map[string]bool)
	var list []record
	var errs []error
	for _, pod := range pods.Items {
		if pod.Annotations[mesh.AnnotationRedirection] == "" || pod.Spec.NodeName != c.Node {
			continue
		}
		k := podKey{pod.Namespace, pod.Name}
		if err := status.patch(ctx, k, pod.UID, redirectionNone); err != nil {
			errs = append(errs, fmt.Errorf("withdraw announcement of pod %s: %w", k, err))
		}
		uid := cmp.Or(pod.Annotations[annotationMirror], string(pod.UID))
		uids[uid] = true
		list = append(list, record{Namespace: k.Namespace, Name: k.Name, UID: uid, IPs: podIPs(&pod), Captured: true})
	}
	proc := c.procDir()
	processes, err := proc.oldest(uids)
	errs = append(errs, err)
	hosts, err := proc.hosts()
	errs = append(errs, err)
	var found []record
	for _, rec := range list {
		p, ok := processes[rec.UID]
		if !ok {
			continue
		}
		rec.Netns = proc.netns(p.pid)
		if rec.NetnsID, err = netnsID(rec.Netns); err != nil || slices.Contains(hosts, rec.NetnsID) {
			continue
		}
		if ok, err := owns(rec.Netns, rec.IPs); err == nil && ok {
			found = append(found, rec)
		}
	}
	return found, errors.Join(errs...)
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
