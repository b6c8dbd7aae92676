// Package explain answers from YAML, or from what a cluster's API server holds, what a mesh would do: what is wrong with the
// configuration, and what becomes of a request. It asks the very code that istiod and waypoints run.
package explain

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/files"
	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
	"github.com/mistnet/mistnet/waypoint/route"
)

// Mesh is what a configuration means.
type Mesh struct {
	cfg      translate.Config
	nouns    translate.Nouns
	table    *route.Table
	problems []Problem
}

// Problem is something in a configuration that does not do what it says.
type Problem struct {
	Object string // "VirtualService shop/reviews"
	Reason string // a word: Invalid, UnsupportedValue, Ignored, Refused, …
	What   string // for the person who wrote it
}

// Read reads the YAML files and directories named by paths, as istiod does in files mode.
func Read(ctx context.Context, paths ...string) (*Mesh, error) {
	return gathered(paths, func(dir string) (*Mesh, error) {
		return read(ctx, dir, metav1.Time{}, translate.Config{NoStatus: true})
	})
}

// gathered calls do with a directory that holds the YAML below paths, and is gone afterwards.
func gathered(paths []string, do func(dir string) (*Mesh, error)) (*Mesh, error) {
	dir, err := os.MkdirTemp("", "mistctl-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	for _, p := range paths {
		if err := gather(dir, p); err != nil {
			return nil, err
		}
	}
	return do(dir)
}

// read reads the files of dir. What does not say when it was created was created at born.
func read(ctx context.Context, dir string, born metav1.Time, cfg translate.Config) (*Mesh, error) {
	cfg = cfg.WithDefaults()
	x := index.New(cfg)
	var edge []Problem
	source := files.New(files.Config{Dir: dir})
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	err := source.Run(ctx, func(events []index.Event) {
		for _, e := range events {
			if o, ok := e.Object.(metav1.Object); ok && !born.IsZero() && o.GetCreationTimestamp().Time.IsZero() {
				o.SetCreationTimestamp(born)
			}
		}
		edge = atTheEdge(events)
		x.Apply(append(events, waypointServices(events)...)...)
		cancel() // the first call carries everything
	})
	if err != nil && !errors.Is(err, context.Canceled) {
		return nil, err
	}
	m := &Mesh{cfg: cfg, nouns: x.Nouns()}
	for _, p := range source.Problems() {
		object := p.Key.String()
		if file := strings.TrimPrefix(p.File, dir+string(filepath.Separator)); strings.HasPrefix(file, given) {
			object = strings.TrimSpace(fmt.Sprintf("%s:%d %s", ungathered(file), p.Line, object))
		}
		m.problems = append(m.problems, Problem{Object: object, Reason: "Refused", What: ungathered(p.Reason)})
	}
	asleep, err := idle(dir)
	if err != nil {
		return nil, err
	}
	m.problems = append(append(m.problems, asleep...), edge...)
	m.judge()
	return m, nil
}

// waypointServices are the Services that istiod would make of Gateways: on paper they are not there yet, and what is bound to
// them is not wrong for that.
func waypointServices(events []index.Event) (made []index.Event) {
	have := make(map[translate.Name]bool)
	for _, e := range events {
		if e.Kind == index.Service {
			have[e.Name] = true
		}
	}
	for _, e := range events {
		g, ok := e.Object.(*gatewayv1.Gateway)
		if !ok || slices.Contains(ingressClasses, g.Spec.GatewayClassName) {
			continue
		}
		name := translate.ServiceOfGateway(g)
		if have[name] || len(g.Spec.Addresses) > 0 {
			continue
		}
		svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: name.Namespace, Name: name.Name}}
		svc.Spec.ClusterIP, svc.Spec.ClusterIPs = onPaper, []string{onPaper}
		svc.Spec.Ports = []corev1.ServicePort{{Name: "mesh", Port: mesh.PortHBONE}}
		made = append(made, index.Event{Kind: index.Service, Name: name, Object: svc})
	}
	return made
}

// onPaper is the address of a Service that was never made (RFC 5737).
const onPaper = "192.0.2.1"

// gather copies the YAML files below path into dir, so that they are read as one directory.
func gather(dir, path string) error {
	return filepath.WalkDir(path, func(p string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if ext := filepath.Ext(p); p != path && ext != ".yaml" && ext != ".yml" && ext != ".json" {
			return nil
		}
		text, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		name := given + strings.ReplaceAll(filepath.ToSlash(filepath.Clean(p)), "/", slash)
		if filepath.Ext(name) == "" {
			name += ".yaml"
		}
		return os.WriteFile(filepath.Join(dir, name), text, 0o600)
	})
}

// How gather names a file after its path: control characters, which nobody writes in one.
const (
	given = "\x1e" // before all of it, so that ../ hides nothing
	slash = "\x1f"
)

// ungathered is text with the paths that people gave.
func ungathered(text string) string { return strings.NewReplacer(given, "", slash, "/").Replace(text) }

// judge compiles the routes and collects what is wrong.
func (m *Mesh) judge() {
	for _, s := range m.nouns.Statuses {
		m.problems = append(m.problems, Problem{Object: s.Key(), Reason: string(s.Reason), What: s.Message})
	}
	routes := make([]*mesh.Route, 0, len(m.nouns.Routes))
	for _, r := range m.nouns.Routes {
		routes = append(routes, r)
	}
	var faults []route.Problem
	m.table, faults = route.Compile(routes)
	for _, f := range faults {
		m.problems = append(m.problems, ruleProblem(&f))
	}
	m.problems = append(m.problems, m.missingSubsets()...)
	m.problems = append(m.problems, m.unseenCallers()...)
	slices.SortFunc(m.problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Object, b.Object), cmp.Compare(a.What, b.What))
	})
}

// ruleProblem says what route.Compile found. A rule's key is kind/namespace/name/protocol/index.
func ruleProblem(f *route.Problem) Problem {
	p := Problem{Object: f.Route, Reason: f.Kind.String(), What: f.Reason}
	if part := strings.Split(f.Route, "/"); len(part) == 5 {
		p.Object = fmt.Sprintf("%s %s/%s", part[0], part[1], part[2])
		p.What = fmt.Sprintf("%s rule %s: %s", part[3], part[4], f.Reason)
	}
	return p
}

// Problems are ordered by object.
func (m *Mesh) Problems() []Problem { return m.problems }

// service finds the one that a client of a namespace means by a host.
func (m *Mesh) service(host, namespace string) (*mesh.Service, error) {
	names := []string{host}
	if !strings.HasSuffix(host, "."+m.cfg.ClusterDomain) {
		names = append(names, host+"."+m.cfg.ClusterDomain, host+".svc."+m.cfg.ClusterDomain, host+"."+namespace+".svc."+m.cfg.ClusterDomain)
	}
	var found []*mesh.Service
	for _, s := range m.nouns.Services {
		if slices.Contains(names, s.Hostname) {
			return s, nil
		}
		if s.Name == host {
			found = append(found, s)
		}
	}
	if len(found) == 0 {
		for _, s := range m.nouns.Services {
			if s.Dynamic && s.Covers(strings.ToLower(host)) && (len(found) == 0 || len(s.Hostname) > len(found[0].Hostname)) {
				found = []*mesh.Service{s}
			}
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("no service is called %s", host)
	case 1:
		return found[0], nil
	}
	return nil, fmt.Errorf("there are services %s in several namespaces: say %s.NAMESPACE", host, host)
}
