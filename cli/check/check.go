// Package check looks at a cluster and says, line by line, what is well and what is not, with what to do about it. Before
// an installation it asks whether the mesh would work; after it, whether it does. It changes nothing.
package check

import (
	"context"
	"fmt"
	"io"

	"github.com/mistnet/mistnet/cli/cluster"
)

// Grade is how well something is.
type Grade int

// The grades.
const (
	unknown Grade = iota
	Good
	Doubtful // works, or works for now
	Bad
)

func (g Grade) String() string {
	switch g {
	case Good:
		return "✓"
	case Doubtful:
		return "‼"
	case Bad:
		return "✗"
	case unknown:
	}
	return "?"
}

// Line is one thing that was looked at.
type Line struct {
	Grade Grade
	Text  string
	Hint  string // what to do about it, when it is not good
}

// Group is lines about one matter.
type Group struct {
	Title string
	Lines []Line
}

func (g *Group) good(format string, args ...any) {
	g.Lines = append(g.Lines, Line{Good, fmt.Sprintf(format, args...), ""})
}

func (g *Group) doubt(hint, format string, args ...any) {
	g.Lines = append(g.Lines, Line{Doubtful, fmt.Sprintf(format, args...), hint})
}

func (g *Group) bad(hint, format string, args ...any) {
	g.Lines = append(g.Lines, Line{Bad, fmt.Sprintf(format, args...), hint})
}

// failed adds a line for a question that got no answer.
func (g *Group) failed(what string, err error) {
	g.bad("", "%s: %v", what, cluster.Explain(err))
}

// Checker runs checks of one cluster.
type Checker struct {
	Cluster *cluster.Cluster
	Version string // of mistctl's charts
	// Page reads a page that a pod serves on its own loopback; nil: through port forwarding.
	Page func(ctx context.Context, namespace, pod string, port int, path string) ([]byte, error)
}

func (c *Checker) page(ctx context.Context, namespace, pod string, port int, path string) ([]byte, error) {
	if c.Page != nil {
		return c.Page(ctx, namespace, pod, port, path)
	}
	return c.Cluster.PodPage(ctx, namespace, pod, port, path)
}

// Before asks whether the mesh can be installed.
func (c *Checker) Before(ctx context.Context) []Group {
	return []Group{c.api(), c.permissions(ctx), c.nodes(ctx), c.conflicts(ctx)}
}

// After asks whether the installed mesh works.
func (c *Checker) After(ctx context.Context) []Group {
	return []Group{c.api(), c.nodes(ctx), c.controlPlane(ctx), c.dataPlane(ctx), c.enrolment(ctx)}
}

// Print writes the groups and reports whether nothing is bad.
func Print(out io.Writer, groups []Group) bool {
	counts := make(map[Grade]int)
	for _, g := range groups {
		fmt.Fprintf(out, "%s\n", g.Title)
		for _, l := range g.Lines {
			counts[l.Grade]++
			fmt.Fprintf(out, "  %s %s\n", l.Grade, l.Text)
			if l.Hint != "" {
				fmt.Fprintf(out, "      → %s\n", l.Hint)
			}
		}
		fmt.Fprintln(out)
	}
	fmt.Fprintf(out, "%d ✓  %d ‼  %d ✗\n", counts[Good], counts[Doubtful], counts[Bad])
	return counts[Bad] == 0
}
