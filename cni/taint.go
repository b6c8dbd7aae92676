package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/mistnet/mistnet/internal/daemon"
)

// DefaultTaint is the taint that keeps pods off a node until the agent is ready there. Whoever makes nodes puts it on, or
// the agent does: see Config.Taint.
const DefaultTaint = "cni.istio.io/not-ready"

const (
	// untaintEvery is how often readiness, and after a failure the node, is looked at.
	untaintEvery = time.Second
	// taintAfter is how long an agent that was ready may be unready before its node is tainted.
	taintAfter = 5 * time.Second
	// taintWithin bounds the last write of an agent that stops.
	taintWithin = 3 * time.Second
)

// tainter keeps the taint on the node that is not ready for pods, and off the one that is.
type tainter struct {
	client    kubernetes.Interface
	node, key string
	add       bool // put it on, too
	ready     *daemon.Readiness
	log       *zap.Logger
}

// run works until ctx is done. An agent that starts is not ready; one that only takes the taint off is done when it did.
func (t *tainter) run(ctx context.Context) error {
	look := time.NewTicker(untaintEvery)
	defer look.Stop()
	warned, settled := false, ""
	var unready time.Time // since when; zero: ready
	was := false          // it was ready once
	for {
		want := "off"
		if len(t.ready.Waiting()) == 0 {
			unready, was = time.Time{}, true
		} else {
			if unready.IsZero() {
				unready = time.Now()
			}
			if want = ""; t.add && (!was || time.Since(unready) > taintAfter) {
				want = "on"
			}
		}
		if want != "" && want != settled {
			err := t.set(ctx, want == "on")
			switch {
			case err == nil && want == "off" && !t.add:
				return nil
			case err == nil:
				settled, warned = want, false
			case !warned && !apierrors.IsConflict(err) && ctx.Err() == nil:
				warned = true
				t.log.Warn("taint not changed, trying again", zap.String("taint", t.key), zap.Error(err))
			}
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// stop is for an agent that ends, and is followed by another: until that is ready pods had better go elsewhere. When the
// mesh leaves the node so does the taint.
func (t *tainter) stop(ctx context.Context, leaving bool) {
	if !t.add {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, taintWithin)
	defer cancel()
	for {
		err := t.set(ctx, !leaving)
		if err == nil {
			return
		}
		if !apierrors.IsConflict(err) || ctx.Err() != nil {
			t.log.Warn("taint not changed", zap.String("taint", t.key), zap.Error(err))
			return
		}
	}
}

func (t *tainter) set(ctx context.Context, on bool) error {
	changed, err := setTaint(ctx, t.client, t.node, t.key, on)
	switch {
	case err != nil || !changed:
	case on:
		t.log.Info("taint added, pods go to other nodes until this one is ready", zap.String("node", t.node), zap.String("taint", t.key))
	default:
		t.log.Info("taint removed, pods may come to this node", zap.String("node", t.node), zap.String("taint", t.key))
	}
	return err
}

// setTaint adds a taint with that key and the effect NoSchedule, or removes every one with that key, whatever its effect. A
// node that changed meanwhile is a conflict.
func setTaint(ctx context.Context, client kubernetes.Interface, name, key string, on bool) (changed bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, stepWithin)
	defer cancel()
	node, err := client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return false, fmt.Errorf("read node: %w", err)
	}
	has := func(t corev1.Taint) bool { return t.Key == key }
	taints := slices.Clone(node.Spec.Taints)
	if on == slices.ContainsFunc(taints, has) {
		return false, nil
	}
	if on {
		taints = append(taints, corev1.Taint{Key: key, Effect: corev1.TaintEffectNoSchedule})
	} else {
		taints = slices.DeleteFunc(taints, has)
	}
	body, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"resourceVersion": node.ResourceVersion},
		"spec":     map[string]any{"taints": taints},
	})
	if err != nil {
		return false, fmt.Errorf("encode taints: %w", err)
	}
	if _, err := client.CoreV1().Nodes().Patch(ctx, name, types.MergePatchType, body, metav1.PatchOptions{}); err != nil {
		return false, fmt.Errorf("patch node: %w", err)
	}
	return true, nil
}
