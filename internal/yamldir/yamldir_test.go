package yamldir_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/mistnet/mistnet/internal/yamldir"
)

// lab is a watched directory and the changes reported so far.
type lab struct {
	t       *testing.T
	dir     string
	changes chan yamldir.Change
}

func watch(t *testing.T, files map[string]string) (*lab, yamldir.Change) {
	t.Helper()
	l := &lab{t: t, dir: t.TempDir(), changes: make(chan yamldir.Change, 100)}
	for name, content := range files {
		l.write(name, content)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- yamldir.Watch(ctx, l.dir, func(c yamldir.Change) { l.changes <- c }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Watch = %v, want nil", err)
		}
	})
	return l, l.next()
}

func (l *lab) next() yamldir.Change {
	l.t.Helper()
	select {
	case c := <-l.changes:
		return c
	case <-time.After(10 * time.Second):
		l.t.Fatal("no change was reported within 10 s")
		return yamldir.Change{}
	}
}

func (l *lab) path(name string) string { return filepath.Join(l.dir, name) }

// write replaces a file at once, as careful writers do.
func (l *lab) write(name, content string) {
	l.t.Helper()
	path := l.path(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		l.t.Fatal(err)
	}
	temp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".tmp")
	if err := os.WriteFile(temp, []byte(content), 0o644); err != nil {
		l.t.Fatal(err)
	}
	if err := os.Rename(temp, path); err != nil {
		l.t.Fatal(err)
	}
}

// text is a change in a form that is easy to compare.
func text(c yamldir.Change) string {
	var b strings.Builder
	for _, o := range c.Upserts {
		fmt.Fprintf(&b, "+ %s (%s:%d)\n", o.Key, o.File, o.Line)
	}
	for _, k := range c.Deletes {
		fmt.Fprintf(&b, "- %s\n", k)
	}
	for _, p := range c.Problems {
		fmt.Fprintf(&b, "! %s:%d [%s] %s\n", p.File, p.Line, p.Key, p.Reason)
	}
	for _, i := range c.Ignored {
		fmt.Fprintf(&b, "~ %s %s (%s:%d)\n", i.APIVersion, i.Kind, i.File, i.Line)
	}
	return b.String()
}

func want(t *testing.T, c yamldir.Change, lines ...string) {
	t.Helper()
	w := strings.Join(lines, "\n")
	if w != "" {
		w += "\n"
	}
	if diff := cmp.Diff(w, text(c)); diff != "" {
		t.Errorf("change (-want +got):\n%s", diff)
	}
}

const podYAML = `apiVersion: v1
kind: Pod
metadata: {name: cart-1, namespace: shop, creationTimestamp: 2026-01-02T03:04:05Z, labels: {app: cart}}
spec:
  nodeName: n1
  containers:
  - name: cart
    ports: [{containerPort: 8080, name: http}]
    resources: {limits: {cpu: 1, memory: 1Gi}}
    readinessProbe: {httpGet: {path: /, port: http}}
`

const policyYAML = `apiVersion: security.istio.io/v1beta1
kind: AuthorizationPolicy
metadata: {name: deny, namespace: shop}
spec:
  action: DENY
  rules:
  - from: [{source: {notPrincipals: ["cluster.local/ns/shop/sa/web"]}}]
`

func TestWholeDirectoryComesFirst(t *testing.T) {
	_, c := watch(t, map[string]string{
		"a.yaml": "# a comment\n---\n" + podYAML + "---\n# nothing\n---\n" + policyYAML,
		"sub/list.yml": `apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Namespace, metadata: {name: shop}}
- apiVersion: v1
  kind: ServiceAccount
  metadata: {name: web}
`,
		"n.json":      "{\n\t\"apiVersion\": \"v1\",\n\t\"kind\": \"Node\", \"metadata\": {\"name\": \"n1\"}}",
		"ignored.txt": "not: [yaml",
		".a.yaml.swp": "not: [yaml",
		"#a.yaml":     "not: [yaml",
		"other.yaml":  "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n---\napiVersion: apps/v1\nkind: Deployment\n",
	})
	want(t, c,
		"+ Pod shop/cart-1 (a.yaml:3)",
		"+ AuthorizationPolicy shop/deny (a.yaml:16)",
		"+ Node n1 (n.json:1)",
		"+ Namespace shop (sub/list.yml:4)",
		"+ ServiceAccount default/web (sub/list.yml:5)",
		"~ apps/v1 Deployment (other.yaml:1)",
	)
	pod := c.Upserts[0].Value.(*corev1.Pod)
	if pod.Spec.Containers[0].Ports[0].ContainerPort != 8080 || pod.CreationTimestamp.Year() != 2026 {
		t.Errorf("pod was not decoded: %+v", pod)
	}
	policy := c.Upserts[1].Value.(*securityv1.AuthorizationPolicy)
	if got := policy.Spec.GetRules()[0].GetFrom()[0].GetSource().GetNotPrincipals(); len(got) != 1 || policy.APIVersion != "security.istio.io/v1" {
		t.Errorf("policy was not decoded: %v", policy)
	}
	if sa := c.Upserts[4].Value.(*corev1.ServiceAccount); sa.Namespace != "default" {
		t.Errorf("namespace = %q, want default", sa.Namespace)
	}
}

func TestRefusedDocuments(t *testing.T) {
	meta := "metadata: {name: x, namespace: shop}\n"
	pod := "apiVersion: v1\nkind: Pod\n" + meta
	ap := "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n" + meta
	cases := map[string]struct{ yaml, want string }{
		"unknown field":       {pod + "spec:\n  nodeNam: n1\n", `! f.yaml:5 [Pod shop/x] unknown field "spec.nodeNam", did you mean "nodeName"?`},
		"unknown, far":        {pod + "spec:\n  zzzzzzzz: n1\n", `! f.yaml:5 [Pod shop/x] unknown field "spec.zzzzzzzz"`},
		"unknown in metadata": {pod[:len(pod)-len(meta)] + "metadata:\n  name: x\n  namespace: shop\n  label: {}\n", `! f.yaml:6 [Pod shop/x] unknown field "metadata.label", did you mean "labels"?`},
		"field of a list":     {pod + "spec:\n  containers:\n  - name: a\n    image: b\n    prots: []\n", `! f.yaml:8 [Pod shop/x] unknown field "spec.containers[0].prots", did you mean "ports"?`},
		"wrong case":          {pod + "spec: {nodename: n1}\n", `! f.yaml:4 [Pod shop/x] unknown field "spec.nodename", did you mean "nodeName"?`},
		"number for text":     {pod + "spec:\n  nodeName: 17\n", `! f.yaml:5 [Pod shop/x] spec.nodeName: want a string, have the number 17; put it in quotes: "17"`},
		"text for number":     {pod + "spec:\n  priority: high\n", `! f.yaml:5 [Pod shop/x] spec.priority: want a whole number, have "high"`},
		"text for a list":     {pod + "spec:\n  containers: none\n", `! f.yaml:5 [Pod shop/x] spec.containers: want a list, have "none"`},
		"bad quantity":        {pod + "spec:\n  overhead:\n    cpu: many\n", `! f.yaml:6 [Pod shop/x] spec.overhead.cpu: quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'`},
		"istio unknown":       {ap + "spec:\n  rules:\n  - from:\n    - source:\n        namespace: [a]\n", `! f.yaml:8 [AuthorizationPolicy shop/x] unknown field "spec.rules[0].from[0].source.namespace", did you mean "namespaces"?`},
		"istio enum":          {ap + "spec:\n  action: DENNY\n", `! f.yaml:5 [AuthorizationPolicy shop/x] spec.action: "DENNY" is not one of ALLOW, DENY, AUDIT, CUSTOM`},
		"istio text":          {ap + "spec:\n  rules:\n  - to: [{operation: {ports: [80]}}]\n", `! f.yaml:6 [AuthorizationPolicy shop/x] spec.rules[0].to[0].operation.ports[0]: want a string, have the number 80; put it in quotes: "80"`},
		"old version":         {"apiVersion: security.istio.io/v1alpha1\nkind: AuthorizationPolicy\n" + meta, `! f.yaml:1 [AuthorizationPolicy shop/x] version "v1alpha1" of AuthorizationPolicy is not one of v1, v1beta1`},
		"kind misspelt":       {"apiVersion: security.istio.io/v1\nkind: AuthorisationPolicy\n" + meta, `! f.yaml:1 [AuthorisationPolicy shop/x] unknown kind "AuthorisationPolicy", did you mean "AuthorizationPolicy"?`},
		"no kind":             {"apiVersion: v1\n" + meta, `! f.yaml:1 [] apiVersion or kind is missing`},
		"no name":             {"apiVersion: v1\nkind: Pod\nspec: {}\n", `! f.yaml:1 [Pod] metadata.name is missing`},
		"bad name":            {"apiVersion: v1\nkind: Pod\nmetadata: {name: a/b}\n", `! f.yaml:3 [Pod default/a/b] metadata.name "a/b": a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')`},
		"namespaced node":     {"apiVersion: v1\nkind: Node\n" + meta, `! f.yaml:3 [Node shop/x] metadata.namespace: a Node lives in no namespace`},
		"key twice":           {pod + "spec:\n  nodeName: a\n  nodeName: b\n", `! f.yaml:6 [] key "nodeName" is there twice`},
		"not YAML":            {pod + "spec: [\n", `! f.yaml:4 [] not YAML: did not find expected node content`},
		"not an object":       {"just text\n", `! f.yaml:1 [] want an object with apiVersion and kind, have "just text"`},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			_, got := watch(t, map[string]string{"f.yaml": c.yaml + "---\n" + podYAML})
			problems := yamldir.Change{Problems: got.Problems}
			want(t, problems, c.want)
			if len(got.Upserts) != 1 || got.Upserts[0].Key.Name != "cart-1" {
				t.Errorf("upserts = %v, want the good document after the bad one", got.Upserts)
			}
		})
	}
}

func TestLastGoodStays(t *testing.T) {
	l, c := watch(t, map[string]string{"f.yaml": podYAML + "---\n" + policyYAML})
	want(t, c, "+ Pod shop/cart-1 (f.yaml:1)", "+ AuthorizationPolicy shop/deny (f.yaml:12)")

	l.write("f.yaml", podYAML+"---\n"+strings.Replace(policyYAML, "action", "acton", 1))
	want(t, l.next(), `! f.yaml:16 [AuthorizationPolicy shop/deny] unknown field "spec.acton", did you mean "action"?`)

	// A document that cannot even be scanned may be any that is missing: all stay.
	l.write("f.yaml", strings.Replace(podYAML, "cart-1", "cart-2", 1)+"---\nfoo: [\n")
	want(t, l.next(), "+ Pod shop/cart-2 (f.yaml:1)", "! f.yaml:12 [] not YAML: did not find expected node content")

	l.write("f.yaml", strings.Replace(podYAML, "cart-1", "cart-2", 1))
	want(t, l.next(), "- Pod shop/cart-1", "- AuthorizationPolicy shop/deny")
}

func TestDuplicates(t *testing.T) {
	l, c := watch(t, map[string]string{"b.yaml": podYAML, "c.yaml": podYAML + "---\n" + podYAML})
	want(t, c, "+ Pod shop/cart-1 (b.yaml:1)",
		"! c.yaml:1 [Pod shop/cart-1] already defined in b.yaml at line 1, which wins",
		"! c.yaml:12 [Pod shop/cart-1] already defined at line 1 of this file")

	l.write("a.yaml", strings.Replace(podYAML, "n1", "n2", 1))
	want(t, l.next(), "+ Pod shop/cart-1 (a.yaml:1)",
		"! b.yaml:1 [Pod shop/cart-1] already defined in a.yaml at line 1, which wins",
		"! c.yaml:1 [Pod shop/cart-1] already defined in a.yaml at line 1, which wins",
		"! c.yaml:12 [Pod shop/cart-1] already defined at line 1 of this file")

	if err := os.Remove(l.path("a.yaml")); err != nil {
		t.Fatal(err)
	}
	want(t, l.next(), "+ Pod shop/cart-1 (b.yaml:1)",
		"! c.yaml:1 [Pod shop/cart-1] already defined in b.yaml at line 1, which wins",
		"! c.yaml:12 [Pod shop/cart-1] already defined at line 1 of this file")
}

func TestFilesComeAndGo(t *testing.T) {
	l, c := watch(t, nil)
	want(t, c)
	l.write("deep/er/f.yaml", podYAML)
	want(t, l.next(), "+ Pod shop/cart-1 (deep/er/f.yaml:1)")
	l.write("deep/er/g.yaml", policyYAML)
	want(t, l.next(), "+ AuthorizationPolicy shop/deny (deep/er/g.yaml:1)")
	if err := os.Rename(l.path("deep"), l.path("away")); err != nil {
		t.Fatal(err)
	}
	l.write("h.yaml", strings.Replace(podYAML, "cart-1", "cart-2", 1))
	want(t, l.next(), "+ Pod shop/cart-2 (h.yaml:1)") // the others only moved: they are the same objects
	if err := os.RemoveAll(l.path("away")); err != nil {
		t.Fatal(err)
	}
	want(t, l.next(), "- Pod shop/cart-1", "- AuthorizationPolicy shop/deny")
}

func TestTruncatedFileKeepsItsObjectsForAWhile(t *testing.T) {
	l, _ := watch(t, map[string]string{"f.yaml": policyYAML})
	if err := os.Truncate(l.path("f.yaml"), 0); err != nil {
		t.Fatal(err)
	}
	l.write("mark.yaml", podYAML)
	want(t, l.next(), "+ Pod shop/cart-1 (mark.yaml:1)")
	want(t, l.next(), "- AuthorizationPolicy shop/deny")
}

func TestDirectoryThatVanishes(t *testing.T) {
	l, _ := watch(t, map[string]string{"f.yaml": policyYAML})
	if err := os.Rename(l.dir, l.dir+".gone"); err != nil {
		t.Fatal(err)
	}
	c := l.next()
	if len(c.Deletes) != 0 || len(c.Problems) != 1 || !strings.Contains(c.Problems[0].Reason, "stays in force") {
		t.Fatalf("change = %s, want one problem and no deletion", text(c))
	}
	if err := os.Rename(l.dir+".gone", l.dir); err != nil {
		t.Fatal(err)
	}
	want(t, l.next())
	l.write("g.yaml", podYAML)
	want(t, l.next(), "+ Pod shop/cart-1 (g.yaml:1)")
}

func TestUnreadableFiles(t *testing.T) {
	l, _ := watch(t, map[string]string{"f.yaml": policyYAML})
	if err := os.Remove(l.path("f.yaml")); err != nil {
		t.Fatal(err)
	}
	want(t, l.next(), "- AuthorizationPolicy shop/deny")
	if err := os.Mkdir(l.path("f.yaml"), 0o755); err != nil {
		t.Fatal(err)
	}
	want(t, l.next(), "! f.yaml:0 [] not a regular file")
}

func TestDirectoryMayBeALink(t *testing.T) {
	dir, link := t.TempDir(), filepath.Join(t.TempDir(), "link")
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "f.yaml"), []byte(podYAML), 0o644), os.Symlink(dir, link)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err := yamldir.Watch(ctx, link, func(c yamldir.Change) {
		want(t, c, "+ Pod shop/cart-1 (f.yaml:1)")
		cancel()
	})
	if err != nil {
		t.Errorf("Watch = %v, want nil", err)
	}
}

// TestMountedConfigMap changes files as a kubelet does: behind a link that is swapped.
func TestMountedConfigMap(t *testing.T) {
	dir := t.TempDir()
	swap := func(version, content string) {
		t.Helper()
		if err := errors.Join(
			os.Mkdir(filepath.Join(dir, "..v"+version), 0o755),
			os.WriteFile(filepath.Join(dir, "..v"+version, "f.yaml"), []byte(content), 0o644),
			os.Symlink("..v"+version, filepath.Join(dir, "..data_tmp")),
			os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")),
		); err != nil {
			t.Fatal(err)
		}
	}
	swap("1", podYAML)
	if err := os.Symlink("..data/f.yaml", filepath.Join(dir, "f.yaml")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	calls := 0
	err := yamldir.Watch(ctx, dir, func(c yamldir.Change) {
		switch calls++; calls {
		case 1:
			want(t, c, "+ Pod shop/cart-1 (f.yaml:1)")
			swap("2", policyYAML)
		case 2:
			want(t, c, "+ AuthorizationPolicy shop/deny (f.yaml:1)", "- Pod shop/cart-1")
			cancel()
		}
	})
	if err != nil || calls != 2 {
		t.Errorf("Watch = %v after %d calls, want nil after 2", err, calls)
	}
}

func TestNoDirectory(t *testing.T) {
	err := yamldir.Watch(t.Context(), filepath.Join(t.TempDir(), "nowhere"), func(yamldir.Change) {})
	if err == nil {
		t.Fatal("Watch of a directory that is not there = nil, want an error")
	}
}
