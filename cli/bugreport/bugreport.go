// Package bugreport collects what somebody needs to understand a mesh that does not work into one archive: the objects of
// the mesh and those that configure it, the state of its programs, and their logs. It takes no Secrets, and leaves out
// values that look like credentials; what a part of the report cannot read is a line in errors.txt, not the end of it.
package bugreport

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/yaml"

	"github.com/mistnet/mistnet/cli/check"
	"github.com/mistnet/mistnet/cli/cluster"
)

// maxLog bounds the log of one container, counted from its end.
const maxLog = 10 << 20

// Options say what to collect.
type Options struct {
	Cluster *cluster.Cluster
	Version string        // of the charts
	Since   time.Duration // of logs; zero: all there is
	Now     time.Time     // of files in the archive
	Say     func(format string, args ...any)
	// Page reads a page on a pod's loopback; nil: through port forwarding.
	Page func(ctx context.Context, namespace, pod string, port int, path string) ([]byte, error)
}

// Write collects everything into a tar.gz. It fails when the archive cannot be written or ctx is over.
func Write(ctx context.Context, out io.Writer, o Options) error {
	zip := gzip.NewWriter(out)
	r := &report{o: o, c: o.Cluster, tar: tar.NewWriter(zip)}
	if r.o.Page == nil {
		r.o.Page = o.Cluster.PodPage
	}
	for _, part := range []func(context.Context){r.checks, r.objects, r.programs} {
		part(ctx)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	r.add("errors.txt", []byte(strings.Join(r.errors, "\n")+"\n"))
	return errors.Join(r.failed, r.tar.Close(), zip.Close())
}

type report struct {
	o      Options
	c      *cluster.Cluster
	tar    *tar.Writer
	errors []string
	failed error // of the archive itself
}

func (r *report) add(name string, body []byte) {
	if r.failed != nil {
		return
	}
	head := &tar.Header{Name: path.Join("mistnet-bug-report", name), Mode: 0o600, Size: int64(len(body)), ModTime: r.o.Now}
	if r.failed = r.tar.WriteHeader(head); r.failed == nil {
		_, r.failed = r.tar.Write(body)
	}
}

func (r *report) missing(what string, err error) {
	r.errors = append(r.errors, fmt.Sprintf("%s: %v", what, cluster.Explain(err)))
}

func (r *report) checks(ctx context.Context) {
	r.o.Say("checks")
	ch := &check.Checker{Cluster: r.c, Version: r.o.Version, Page: r.o.Page}
	var text bytes.Buffer
	check.Print(&text, slices.Concat(ch.Before(ctx), ch.After(ctx)))
	r.add("check.txt", text.Bytes())
}

// wholeCluster are the kinds that are collected from everywhere; of all others only those in the mesh's own namespace.
func wholeCluster(group, kind string) bool {
	switch group {
	case "networking.istio.io", "security.istio.io", "telemetry.istio.io", "extensions.istio.io", "gateway.networking.k8s.io":
		return true
	case "":
		return slices.Contains([]string{"Namespace", "Node", "Pod", "Service", "ServiceAccount", "Event"}, kind)
	case "apps":
		return kind == "Deployment" || kind == "DaemonSet" || kind == "StatefulSet"
	case "discovery.k8s.io":
		return kind == "EndpointSlice"
	case "networking.k8s.io":
		return kind == "NetworkPolicy"
	case "apiextensions.k8s.io":
		return false // their schemas are large and known
	}
	return strings.HasSuffix(kind, "WebhookConfiguration")
}

func (r *report) objects(ctx context.Context) {
	r.o.Say("objects")
	lists, err := r.c.Kube.Discovery().ServerPreferredResources()
	if err != nil && len(lists) == 0 {
		r.missing("what the cluster serves", err)
		return
	}
	for _, l := range lists {
		gv, err := schema.ParseGroupVersion(l.GroupVersion)
		if err != nil {
			continue
		}
		for _, res := range l.APIResources {
			if res.Kind == "Secret" || strings.Contains(res.Name, "/") || !slices.Contains(res.Verbs, "list") {
				continue
			}
			everywhere := wholeCluster(gv.Group, res.Kind)
			if !everywhere && !res.Namespaced {
				continue
			}
			r.list(ctx, gv.WithResource(res.Name), res.Kind, everywhere)
		}
	}
}

func (r *report) list(ctx context.Context, gvr schema.GroupVersionResource, kind string, everywhere bool) {
	namespace := r.c.Namespace
	if everywhere {
		namespace = ""
	}
	objects, err := r.c.Dynamic.Resource(gvr).Namespace(namespace).List(ctx, metav1.ListOptions{})
	switch {
	case apierrors.IsNotFound(err), apierrors.IsMethodNotSupported(err):
		return
	case err != nil:
		r.missing("list "+gvr.Resource, err)
		return
	case len(objects.Items) == 0:
		return
	}
	var all bytes.Buffer
	for i := range objects.Items {
		u := &objects.Items[i]
		clean(u)
		b, err := yaml.Marshal(u.Object)
		if err != nil {
			r.missing(kind+" "+u.GetName(), err)
			continue
		}
		all.WriteString("---\n")
		all.Write(b)
	}
	name := strings.TrimSuffix(gvr.Resource+"."+gvr.Group, ".")
	r.add("objects/"+name+".yaml", all.Bytes())
}

// secretive are parts of names whose values nobody should mail around.
var secretive = []string{"password", "passwd", "secret", "token", "credential", "apikey", "api_key", "private"}

// clean takes out what is of no use, and values of environment variables and annotations that look like credentials.
func clean(u *unstructured.Unstructured) {
	unstructured.RemoveNestedField(u.Object, "metadata", "managedFields")
	annotations := u.GetAnnotations()
	for k := range annotations {
		if k == "kubectl.kubernetes.io/last-applied-configuration" || looksSecret(k) {
			annotations[k] = "(left out)"
		}
	}
	if annotations != nil {
		u.SetAnnotations(annotations)
	}
	redact(u.Object)
}

// redact replaces the value of every {name: PASSWORD, value: ...} in the tree.
func redact(v any) {
	switch v := v.(type) {
	case map[string]any:
		name, _ := v["name"].(string)
		if _, ok := v["value"].(string); ok && looksSecret(name) {
			v["value"] = "(left out)"
		}
		for _, sub := range v {
			redact(sub)
		}
	case []any:
		for _, sub := range v {
			redact(sub)
		}
	}
}

func looksSecret(name string) bool {
	name = strings.ToLower(name)
	return slices.ContainsFunc(secretive, func(s string) bool { return strings.Contains(name, s) })
}

// programs collects logs and pages of the mesh's own pods.
func (r *report) programs(ctx context.Context) {
	pods, err := r.c.Kube.CoreV1().Pods(r.c.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		r.missing("list pods", err)
		return
	}
	for i := range pods.Items {
		p := &pods.Items[i]
		if !check.Component(p.Labels) || ctx.Err() != nil {
			continue
		}
		r.o.Say("pod %s", p.Name)
		for _, ct := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
			r.log(ctx, p, ct.Name, false)
			r.log(ctx, p, ct.Name, true)
		}
		if p.Status.Phase != corev1.PodRunning {
			continue
		}
		switch {
		case p.Labels["app"] == "ztunnel":
			r.page(ctx, p, 15000, "/config_dump", "config_dump.json")
			r.page(ctx, p, 15020, "/metrics", "metrics.txt")
		case p.Labels["app"] == "istiod":
			for _, page := range []string{"problems", "objects", "xds", "nouns"} {
				r.page(ctx, p, 15014, "/debug/"+page, page+".json")
			}
			r.page(ctx, p, 15014, "/metrics", "metrics.txt")
		default:
			r.page(ctx, p, 15014, "/metrics", "metrics.txt")
		}
	}
}

func (r *report) log(ctx context.Context, p *corev1.Pod, container string, previous bool) {
	limit := int64(maxLog)
	opts := &corev1.PodLogOptions{Container: container, Previous: previous, LimitBytes: &limit, Timestamps: true}
	if s := int64(r.o.Since / time.Second); s > 0 {
		opts.SinceSeconds = &s
	}
	b, err := r.c.Kube.CoreV1().Pods(p.Namespace).GetLogs(p.Name, opts).DoRaw(ctx)
	name := "pods/" + p.Name + "/" + container + ".log"
	if previous {
		name = "pods/" + p.Name + "/" + container + ".previous.log"
	}
	if err != nil {
		if !previous { // most containers never ended
			r.missing("log of "+p.Name+"/"+container, err)
		}
		return
	}
	r.add(name, b)
}

func (r *report) page(ctx context.Context, p *corev1.Pod, port int, page, file string) {
	b, err := r.o.Page(ctx, p.Namespace, p.Name, port, page)
	if err != nil {
		r.missing(fmt.Sprintf("%s of %s", page, p.Name), err)
		return
	}
	if strings.HasSuffix(file, ".json") {
		b = scrub(b)
	}
	r.add("pods/"+p.Name+"/"+file, b)
}

// scrub redacts a page of JSON as objects are; what is no JSON stays.
func scrub(b []byte) []byte {
	var v any
	if json.Unmarshal(b, &v) != nil {
		return b
	}
	redact(v)
	clean, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return b
	}
	return clean
}
