package istiod

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/istiod/ca"
	"github.com/mistnet/mistnet/istiod/files"
	"github.com/mistnet/mistnet/istiod/gateway"
	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/kube"
	"github.com/mistnet/mistnet/istiod/token"
	"github.com/mistnet/mistnet/istiod/translate"
)

// source is where the mesh is written.
type source interface {
	// Run reads until ctx is done. The first call of on carries everything there is, later ones what changed.
	Run(ctx context.Context, on func([]index.Event)) error
	// tell takes the nouns that differ because of what Run delivered.
	tell(changes []index.Change)
	// problems are the objects that are not in force as written.
	problems() []problem
	// report is what only this source can tell, for its debug page; it must be fit for JSON.
	report() any
}

// origin is what istiod gets from the place where its mesh is written: the mesh, its keys, and who calls.
type origin struct {
	source    source
	authority *ca.Authority
	verifier  token.Verifier
	mesh      translate.Config
	namespace string // istiod's own
}

// open opens the place where the mesh is written. With Kubernetes it waits for the API server.
func open(ctx context.Context, cfg Config, env *daemon.Env) (origin, error) {
	o := origin{mesh: translate.Config{
		ClusterID: cfg.ClusterID, TrustDomain: cfg.TrustDomain, RootNamespace: cfg.RootNamespace, ClusterDomain: cfg.ClusterDomain,
		DenyWithoutWaypoint: cfg.WaypointUnavailable == UnavailableDeny,
	}.WithDefaults()}
	if cfg.Source == SourceKubernetes {
		return openKubernetes(ctx, cfg, env, o)
	}
	return openFiles(cfg, env, o)
}

func openFiles(cfg Config, env *daemon.Env, o origin) (origin, error) {
	var err error
	if o.authority, err = openCA(cfg, env.Log); err != nil {
		return o, err
	}
	if o.verifier, err = token.OpenIssuer(cfg.DataDir); err != nil {
		return o, fmt.Errorf("open the token key (-data-dir): %w", err)
	}
	o.namespace = o.mesh.RootNamespace
	o.mesh.NoStatus = true
	o.source = fileSource{files.New(files.Config{
		Dir: cfg.Files, StatusDir: cfg.StatusDir, HeldFile: filepath.Join(cfg.DataDir, "last-good.json"), Log: env.Log.Named("files"),
		Mesh: translate.Name{Namespace: o.mesh.RootNamespace, Name: "istio"},
	})}
	return o, nil
}

func openKubernetes(ctx context.Context, cfg Config, env *daemon.Env, o origin) (origin, error) {
	clients, err := kube.Connect(cfg.Kubeconfig, "mistnet-istiod/"+daemon.Version())
	if err != nil {
		return o, fmt.Errorf("%w (-kubeconfig, or run in a pod with a service account)", err)
	}
	k := kube.Config{Clients: clients, Mesh: o.mesh, Namespace: cmp.Or(cfg.Namespace, o.mesh.RootNamespace), Revision: cfg.Revision,
		Identity: cfg.PodName, Log: env.Log.Named("kube"), Hidden: cfg.Hidden, Waypoints: gateway.Config{
			Image: cfg.WaypointImage, IgnoreIstio: cfg.IgnoreIstio, Network: cfg.Network,
			LogLevel: cfg.WaypointLogLevel, LogFormat: cfg.WaypointLogForm,
		}}
	if k.Waypoints.Defaults, err = gateway.ParseDefaults(cfg.WaypointDefaults); err != nil {
		return o, fmt.Errorf("read -waypoint-defaults: %w", err)
	}
	o.namespace = k.Namespace
	if k.Mesh, err = kube.ReadMesh(ctx, k); err != nil {
		return o, err
	}
	o.mesh = k.Mesh
	if o.authority, err = clusterCA(ctx, cfg, k, env.Log.Named("ca")); err != nil {
		return o, err
	}
	o.verifier = kube.NewReviewer(clients.Kube)
	src := kube.New(k)
	src.WriteRoot(o.authority.RootPEM())
	o.source = &kubeSource{Source: src, keeper: &keeper{
		authority: o.authority, dir: cfg.CADir, kube: k, write: src.WriteRoot, log: env.Log.Named("ca"),
	}}
	return o, nil
}

// clusterCA opens the authority that is mounted, or else the one in a Secret.
func clusterCA(ctx context.Context, cfg Config, k kube.Config, log *zap.Logger) (*ca.Authority, error) {
	keys, err := ca.Files(cfg.CADir)
	if err != nil {
		return nil, fmt.Errorf("read the certificate authority (-ca-dir): %w", err)
	}
	if len(keys) == 0 {
		if keys, err = kube.CAFiles(ctx, k); err != nil {
			return nil, err
		}
	}
	return ca.Open(ca.Config{Files: keys, TrustDomain: k.Mesh.TrustDomain, Overlap: cfg.CAOverlap, Log: log})
}

// problem is one object that is refused, or not served as written.
type problem struct {
	File   string `json:"file,omitempty"`
	Line   int    `json:"line,omitempty"`
	Object string `json:"object,omitempty"`
	Reason string `json:"reason"`
	// Refused: the object's last good form stays in force. Otherwise it is in force as the reason says.
	Refused bool `json:"refused"`
}

// fileSource is a directory of YAML.
type fileSource struct{ *files.Source }

// tell implements source: there is nowhere to tell it but on the debug page.
func (s fileSource) tell([]index.Change) {}

func (s fileSource) problems() []problem {
	var all []problem
	for _, p := range s.Problems() {
		q := problem{File: p.File, Line: p.Line, Reason: p.Reason, Refused: true}
		if !p.Key.IsZero() {
			q.Object = p.Key.String()
		}
		all = append(all, q)
	}
	return all
}

func (s fileSource) report() any { return map[string]any{"objects": s.Places()} }

// locate adds where the objects of problems are written.
func (s fileSource) locate(all []problem) {
	places := make(map[string]files.Place)
	for _, p := range s.Places() {
		_, kind, _ := strings.Cut(p.Kind, "/")
		places[kind+" "+p.Namespace+"/"+p.Name] = p
	}
	for i, p := range all {
		if at, ok := places[p.Object]; ok && p.File == "" {
			all[i].File, all[i].Line = at.File, at.Line
		}
	}
}

// kubeSource is an API server.
type kubeSource struct {
	*kube.Source
	keeper *keeper
}

// Run implements source. The authority is kept up to date as long.
func (s *kubeSource) Run(ctx context.Context, on func([]index.Event)) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.Source.Run(ctx, on) })
	g.Go(func() error { s.keeper.run(ctx); return nil })
	return g.Wait()
}

func (s *kubeSource) tell(changes []index.Change) { s.Tell(changes) }

func (s *kubeSource) problems() []problem {
	var all []problem
	if err := s.keeper.problem(); err != nil {
		all = append(all, problem{Object: "certificate authority", Reason: err.Error(), Refused: true})
	}
	for _, p := range s.Problems() {
		all = append(all, problem{Object: p.Resource + " " + p.Name.String(), Reason: p.Reason, Refused: !p.InForce})
	}
	return all
}

func (s *kubeSource) report() any {
	return map[string]any{"leads": s.Leads(), "resources": s.Feeds()}
}

// problems are those of reading, and then those of meaning.
func (d *Istiod) problems() []problem {
	all := append([]problem{}, d.source.problems()...)
	statuses := d.mirror.nouns().Statuses
	for _, key := range slices.Sorted(maps.Keys(statuses)) {
		all = append(all, problem{Object: key, Reason: string(statuses[key].Reason) + ": " + statuses[key].Message})
	}
	if s, ok := d.source.(fileSource); ok {
		s.locate(all)
	}
	return all
}
