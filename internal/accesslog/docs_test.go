package accesslog

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestDocsNameTheOperators that have values, all of them and no other.
func TestDocsNameTheOperators(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(text), "A waypoint has values for\n\n`")
	list, _, closed := strings.Cut(rest, "`")
	if !found || !closed {
		t.Fatal("docs/operations.md has no list of operators")
	}
	var want []string
	for name, o := range operators {
		if o.op != Never {
			want = append(want, name)
		}
	}
	slices.Sort(want)
	got := strings.Fields(list)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("operators in docs/operations.md (-want +got):\n%s", diff)
	}
}
