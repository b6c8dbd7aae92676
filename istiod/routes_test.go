package istiod_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/files"
	"github.com/mistnet/mistnet/istiod/index"
	"github.com/mistnet/mistnet/istiod/translate"
	"github.com/mistnet/mistnet/waypoint/route"
)

// TestWaypointsUnderstandRoutes: what translate holds to be valid, the waypoint's compiler does too; else the status of an
// object would not tell why requests are refused.
func TestWaypointsUnderstandRoutes(t *testing.T) {
	t.Parallel()
	paths, err := filepath.Glob("translate/testdata/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "mesh.yaml"), text, 0o600); err != nil {
			t.Fatal(err)
		}
		x := index.New(translate.Config{})
		ctx, cancel := context.WithCancel(t.Context())
		if err := files.New(files.Config{Dir: dir}).Run(ctx, func(events []index.Event) { x.Apply(events...); cancel() }); err != nil {
			t.Fatal(err)
		}
		invalid := make(map[string]string)
		var routes []*mesh.Route
		for key, r := range x.Nouns().Routes {
			seen++
			routes = append(routes, r)
			invalid[key] = r.Invalid
		}
		_, found := route.Compile(routes)
		for _, p := range found {
			if p.Kind == route.Invalid && invalid[p.Route] == "" {
				t.Errorf("%s: %v, and translate does not say so", path, p)
			}
			if p.Kind == route.Ignored {
				t.Errorf("%s: %v", path, p)
			}
		}
	}
	if seen < 40 {
		t.Errorf("only %d routes were looked at", seen)
	}
}
