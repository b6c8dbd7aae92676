package install

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/mistnet/mistnet/cli/cluster"
)

// progress is how far a workload is.
type progress struct {
	want, ready int32
	done        bool
	note        string // why not, when it is known
	word        string // what is counted; "ready" when empty
}

func (p progress) String() string {
	s := fmt.Sprintf("%d of %d %s", p.ready, p.want, cmp.Or(p.word, "ready"))
	if p.note != "" {
		s += ", " + p.note
	}
	return s
}

// await polls until check is done, telling each change, for as long as the installer's timeout.
func (in *Installer) await(ctx context.Context, what string, check func(context.Context) (progress, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, in.Timeout, errors.New("timeout"))
	defer cancel()
	tick := time.NewTicker(in.Poll)
	defer tick.Stop()
	told := ""
	var p progress
	for {
		now, err := check(ctx)
		switch {
		case err == nil:
			p = now
		case ctx.Err() == nil && !transient(err):
			return cluster.Explain(fmt.Errorf("wait for %s: %w", what, err))
		}
		if p.done {
			return nil
		}
		if s := p.String(); s != told {
			told = s
			in.say("    %s: %s", what, s)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			if cause := context.Cause(ctx); cause.Error() != "timeout" {
				return cause
			}
			return fmt.Errorf("%s is not done after %s (%s): look at kubectl -n %s describe pods, then run the same command again, with a longer --timeout if it only needs time",
				what, in.Timeout, p, in.Cluster.Namespace)
		}
	}
}

// transient are failures of an API server that is restarting or busy.
func transient(err error) bool {
	return !apierrors.IsForbidden(err) && !apierrors.IsUnauthorized(err) && !apierrors.IsInvalid(err) && !apierrors.IsBadRequest(err)
}

// rolledOut is the progress of a Deployment or DaemonSet.
func (in *Installer) rolledOut(ctx context.Context, r Ref) (progress, error) {
	var (
		p        progress
		selector *metav1.LabelSelector
		current  bool // the status is that of what was applied
	)
	switch r.Kind {
	case "Deployment":
		d, err := in.Cluster.Kube.AppsV1().Deployments(r.Namespace).Get(ctx, r.Name, metav1.GetOptions{})
		if err != nil {
			return p, err
		}
		p.want = 1
		if d.Spec.Replicas != nil {
			p.want = *d.Spec.Replicas
		}
		selector = d.Spec.Selector
		old := d.Status.Replicas - d.Status.UpdatedReplicas // they are available, as far as anybody is
		p.ready = max(0, min(d.Status.UpdatedReplicas, d.Status.AvailableReplicas-old))
		current = d.Status.ObservedGeneration >= d.Generation
		if p.done = current && p.ready >= p.want && old == 0; !p.done && p.ready >= p.want {
			p.note = "the old ones are still there"
		}
	case "DaemonSet":
		d, err := in.Cluster.Kube.AppsV1().DaemonSets(r.Namespace).Get(ctx, r.Name, metav1.GetOptions{})
		if err != nil {
			return p, err
		}
		p.want, selector = d.Status.DesiredNumberScheduled, d.Spec.Selector
		p.ready = min(d.Status.UpdatedNumberScheduled, d.Status.NumberAvailable)
		current = d.Status.ObservedGeneration >= d.Generation
		p.done = current && p.ready >= p.want
	default:
		return progress{done: true}, nil
	}
	switch {
	case p.done:
		return p, nil
	case !current:
		return progress{want: p.want, note: "applied"}, nil
	case p.note != "":
		return p, nil
	}
	pods, err := in.Cluster.Kube.CoreV1().Pods(r.Namespace).List(ctx, metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(selector)})
	switch {
	case err == nil:
		p.note = Trouble(pods.Items)
	case ctx.Err() != nil:
		return p, err // what was known before says more
	}
	return p, nil
}

// Trouble says why the first pod that is not ready is not, or is empty.
func Trouble(pods []corev1.Pod) string {
	pods = slices.Clone(pods)
	slices.SortFunc(pods, func(a, b corev1.Pod) int { return cmp.Compare(a.Name, b.Name) })
	for i := range pods {
		if why := notReady(&pods[i]); why != "" {
			return pods[i].Name + ": " + why
		}
	}
	return ""
}

func notReady(p *corev1.Pod) string {
	for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		if w := c.State.Waiting; w != nil && w.Reason != "" && w.Reason != "ContainerCreating" && w.Reason != "PodInitializing" {
			return strings.TrimSuffix(w.Reason+" ("+firstLine(w.Message)+")", " ()")
		}
		if t := c.State.Terminated; t != nil && t.ExitCode != 0 {
			return fmt.Sprintf("%s exited with status %d (kubectl -n %s logs %s)", c.Name, t.ExitCode, p.Namespace, p.Name)
		}
	}
	for _, c := range p.Status.Conditions {
		switch {
		case c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse:
			return "not scheduled: " + firstLine(c.Message)
		case c.Type == corev1.PodReady && c.Status == corev1.ConditionFalse && p.DeletionTimestamp == nil:
			return "not ready yet"
		}
	}
	return ""
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	if runes := []rune(line); len(runes) > 160 {
		line = string(runes[:160]) + "…"
	}
	return line
}

// established is the progress of definitions: whether the API server serves their kinds.
func (in *Installer) established(ctx context.Context, crds []Object) (progress, error) {
	p := progress{want: int32(len(crds))}
	for _, o := range crds {
		r, err := in.resource(refOf(o))
		if err != nil {
			return p, err
		}
		live, err := r.Get(ctx, o.GetName(), metav1.GetOptions{})
		if err != nil {
			return p, err
		}
		if conditionTrue(live, "Established") {
			p.ready++
		}
	}
	p.done = p.ready == p.want
	return p, nil
}

func conditionTrue(u *unstructured.Unstructured, kind string) bool {
	conditions, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions")
	return slices.ContainsFunc(conditions, func(c any) bool {
		m, ok := c.(map[string]any)
		return ok && m["type"] == kind && m["status"] == "True"
	})
}
