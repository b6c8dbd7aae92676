package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/mistnet/mistnet/internal/mesh"
)

// redirection is what the agent announces of a pod.
type redirection string

const (
	redirectionNone    redirection = ""        // not in the mesh
	redirectionPending redirection = "pending" // captured, but ztunnel has not taken it
	redirectionEnabled redirection = "enabled"
)

// announcer says what the agent did to pods: statusDir to a directory, *podStatus to the API server.
type announcer interface {
	// write announces a pod. With redirectionNone it returns only when nobody is told otherwise any longer.
	write(ctx context.Context, k podKey, ips []netip.Addr, r redirection) error
	// remove forgets a pod whose sandbox is gone.
	remove(ctx context.Context, k podKey) error
	// last returns what is announced of a pod now, and its addresses if known.
	last(k podKey) (redirection, []netip.Addr)
	// refresh puts right what others changed.
	refresh()
}

// statusDir holds one file for each running pod of the node: what a kubelet would write to the pod's status, and the
// announcement. Agents of several nodes may share it, as each touches the files of its own pods only.
type statusDir string

func (d statusDir) path(k podKey) string {
	return filepath.Join(string(d), k.Namespace+"_"+k.Name+".yaml")
}

func (d statusDir) write(_ context.Context, k podKey, ips []netip.Addr, r redirection) error {
	if d == "" {
		return nil
	}
	pod := corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Namespace: k.Namespace, Name: k.Name},
		Status: corev1.PodStatus{
			Phase:      corev1.PodRunning,
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
		},
	}
	if r != redirectionNone {
		pod.Annotations = map[string]string{mesh.AnnotationRedirection: string(r)}
	}
	for _, ip := range ips {
		pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: ip.String()})
	}
	if len(ips) > 0 {
		pod.Status.PodIP = ips[0].String()
	}
	b, err := yaml.Marshal(pod)
	if err != nil {
		return fmt.Errorf("encode status of pod %s: %w", k, err)
	}
	if err := writeFile(d.path(k), b, 0o644); err != nil {
		return fmt.Errorf("write status of pod %s: %w", k, err)
	}
	return nil
}

func (d statusDir) remove(_ context.Context, k podKey) error {
	if d == "" {
		return nil
	}
	if err := os.Remove(d.path(k)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove status of pod %s: %w", k, err)
	}
	return nil
}

func (d statusDir) last(k podKey) (redirection, []netip.Addr) {
	b, err := os.ReadFile(d.path(k))
	var pod corev1.Pod
	if d == "" || err != nil || yaml.Unmarshal(b, &pod) != nil {
		return redirectionNone, nil
	}
	return redirection(pod.Annotations[mesh.AnnotationRedirection]), podIPs(&pod)
}

func (d statusDir) refresh() {}

// podIPs are the addresses of a pod's status.
func podIPs(pod *corev1.Pod) []netip.Addr {
	var out []netip.Addr
	for _, ip := range pod.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			out = append(out, a.Unmap())
		}
	}
	return out
}
