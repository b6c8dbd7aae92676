package authz_test

import (
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/internal/mesh"
)

func TestTemplatesMatchAsTheirRegularExpressionsDo(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(3, 4))
	segments := []string{"a", "bc", "", "{*}", "{*}", "{**}"}
	matched, checked := 0, 0
	for range 20_000 {
		template := ""
		for range 1 + rng.IntN(4) {
			template += "/" + oneOf(rng, segments)
		}
		if mesh.CheckPathTemplate(template) != nil {
			continue
		}
		var path strings.Builder
		for range 1 + rng.IntN(5) {
			path.WriteString("/" + oneOf(rng, []string{"a", "bc", "", "x"}))
		}
		p := &mesh.Policy{Namespace: "ns", Name: "p", Groups: []mesh.Group{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{
			Operation: &mesh.Operation{Paths: []mesh.StringMatch{{Kind: mesh.MatchTemplate, Value: template}}},
		}}}}}}}
		set, err := authz.Compile([]*mesh.Policy{p})
		if err != nil {
			t.Fatalf("Compile(%q) = %v", template, err)
		}
		pattern := strings.NewReplacer(`\{\*\}`, `[^/]+`, `\{\*\*\}`, `.*`).Replace(regexp.QuoteMeta(template))
		want := regexp.MustCompile("^" + pattern + "$").MatchString(path.String())
		if got := set.Check(&authz.Request{HTTP: &authz.HTTP{Path: path.String()}}).Allow; got != want {
			t.Fatalf("template %q matches %q: %v, want %v", template, path.String(), got, want)
		}
		checked++
		if want {
			matched++
		}
	}
	if checked < 1000 || matched < 100 {
		t.Errorf("only %d templates checked, of which %d matched: the generator is too weak", checked, matched)
	}
}
