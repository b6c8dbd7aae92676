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

// DefaultTaint is the taint that keeps pods off a node until the agent is ready there. Whoever makes nodes puts it on.
const DefaultTaint = "cni.istio.io/not-ready"

// untaintEvery is how often readiness, and after a failure the node, is looked at.
const untaintEvery = time.Second

// untaint takes the taint off the node once the agent is ready, and ends then.
func untaint(ctx context.Context, client kubernetes.Interface, node, key string, ready *daemon.Readiness, log *zap.Logger) error {
	look := time.NewTicker(untaintEvery)
	defer look.Stop()
	warned := false
	for {
		if len(ready.Waiting()) == 0 {
			removed, err := removeTaint(ctx, client, node, key)
			if err == nil {
				if removed {
					log.Info("taint removed, pods may come to this node", zap.String("node", node), zap.String("taint", key))
				}
				return nil
			}
			if !warned && !apierrors.IsConflict(err) && ctx.Err() == nil {
				warned = true
				log.Warn("taint not removed, trying again", zap.String("taint", key), zap.Error(err))
			}
		}
		select {
		case <-look.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// removeTaint removes every taint with that key, whatever its effect. A node that changed meanwhile is a conflict.
func removeTaint(ctx context.Context, client kubernetes.Interface, name, key string) (removed bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, stepWithin)
	defer cancel()
	node, err := client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return false, fmt.Errorf("read node: %w", err)
	}
	left := slices.DeleteFunc(slices.Clone(node.Spec.Taints), func(t corev1.Taint) bool { return t.Key == key })
	if len(left) == len(node.Spec.Taints) {
		return false, nil
	}
	body, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"resourceVersion": node.ResourceVersion},
		"spec":     map[string]any{"taints": left},
	})
	if err != nil {
		return false, fmt.Errorf("encode taints: %w", err)
	}
	if _, err := client.CoreV1().Nodes().Patch(ctx, name, types.MergePatchType, body, metav1.PatchOptions{}); err != nil {
		return false, fmt.Errorf("patch node: %w", err)
	}
	return true, nil
}
