package files_test

import (
	"context"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/istiod/files"
	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
)

// TestMeshConfig: the ConfigMap is read whenever it changes, one that makes no sense is named, and what it said before stays in
// force, for an istiod that starts meanwhile as well.
func TestMeshConfig(t *testing.T) {
	dir, heldFile := t.TempDir(), filepath.Join(t.TempDir(), "held.json")
	config := func(mesh string) {
		write(t, filepath.Join(dir, "mesh.yaml"), "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata: {mesh: '"+mesh+"'}\n")
	}
	other := func(name string) { // after which everything before has been seen
		write(t, filepath.Join(dir, name+".yaml"), "apiVersion: v1\nkind: Namespace\nmetadata: {name: "+name+"}\n")
	}
	config("defaultHttpRetryPolicy: {attempts: 5}")
	start := func() (s *files.Source, events chan []index.Event, stop func()) {
		s, events = files.New(files.Config{Dir: dir, HeldFile: heldFile}), make(chan []index.Event, 10)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx, func(ev []index.Event) { events <- ev }) }()
		return s, events, func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run = %v, want nil", err)
			}
		}
	}
	// said is the last that the events up to one of a kind say of the mesh's configuration.
	said := func(events <-chan []index.Event, last index.Kind) (m *translate.MeshConfig, times int) {
		t.Helper()
		for {
			seen := false
			for _, ev := range next(t, events) {
				if ev.Kind == index.MeshConfig {
					m, _ = ev.Object.(*translate.MeshConfig)
					times++
				}
				seen = seen || ev.Kind == last
			}
			if seen {
				return m, times
			}
		}
	}
	s, events, stop := start()
	if m, _ := said(events, index.MeshConfig); m == nil || m.Retry.Attempts != 5 {
		t.Fatalf("mesh configuration = %+v, want 5 attempts", m)
	}
	config("defaultHttpRetryPolicy: {attempts: 7}")
	if m, _ := said(events, index.MeshConfig); m == nil || m.Retry.Attempts != 7 {
		t.Fatalf("mesh configuration = %+v, want 7 attempts", m)
	}
	config("defaultHttpRetryPolicy: {attempts: many}")
	other("one")
	if m, times := said(events, index.Namespace); times != 0 {
		t.Errorf("a ConfigMap that makes no sense is passed on as %+v", m)
	}
	named := func(s *files.Source) {
		t.Helper()
		p := s.Problems()
		if len(p) != 1 || !strings.Contains(p[0].Reason, "defaultHttpRetryPolicy") || p[0].Line == 0 || filepath.Base(p[0].File) != "mesh.yaml" {
			t.Errorf("problems = %+v, want one that names the field", p)
		}
	}
	named(s)
	stop()

	s, events, stop = start()
	defer stop()
	if m, _ := said(events, index.MeshConfig); m == nil || m.Retry.Attempts != 7 {
		t.Errorf("mesh configuration = %+v after another start, want 7 attempts still", m)
	}
	named(s)
	config("")
	if m, _ := said(events, index.MeshConfig); m == nil || m.Retry != nil {
		t.Errorf("mesh configuration = %+v, want nothing said", m)
	}
	if p := s.Problems(); len(p) != 0 {
		t.Errorf("problems = %+v, want none", p)
	}
}
