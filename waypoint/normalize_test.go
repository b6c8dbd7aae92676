package waypoint

import (
	"math/rand/v2"
	"net/url"
	"path"
	"strings"
	"testing"
)

func TestNormalize(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]string{
		"/":                   "/",
		"/a/b.c/..d":          "/a/b.c/..d",
		"/a/./b":              "/a/b",
		"/a/../b":             "/b",
		"/a/..":               "/",
		"/a/b/.":              "/a/b/",
		"/../../a":            "/a",
		"/public/%2e%2E/x":    "/x",
		`/public\..\x`:        "/x",
		"/%41%7e%2Fx":         "/A~%2Fx",
		"//a//b":              "//a//b",
		"/%zz":                "/%zz",
		"*":                   "*",
		"/a%2e":               "/a.",
		"/public/.%2e/admin/": "/admin/",
	} {
		if got := normalizeBase.normalize(path); got != want {
			t.Errorf("normalize(%q) = %q, want %q", path, got, want)
		}
		if twice := normalizeBase.normalize(normalizeBase.normalize(path)); twice != want {
			t.Errorf("normalize of its result %q is %q: a path normalised once more is another", want, twice)
		}
	}
}

// TestNormalizations differ in what they hold for a way to write a slash.
func TestNormalizations(t *testing.T) {
	t.Parallel()
	for path, want := range map[string][4]string{ // NONE, BASE, MERGE_SLASHES, DECODE_AND_MERGE_SLASHES
		"/a/b":             {"/a/b", "/a/b", "/a/b", "/a/b"},
		"/a//b///c/":       {"/a//b///c/", "/a//b///c/", "/a/b/c/", "/a/b/c/"},
		"//":               {"//", "//", "/", "/"},
		"/a/../b":          {"/a/../b", "/b", "/b", "/b"},
		"/a%2Fb%5cc":       {"/a%2Fb%5cc", "/a%2Fb%5cc", "/a%2Fb%5cc", "/a/b/c"},
		"/a%2f..%2fadmin":  {"/a%2f..%2fadmin", "/a%2f..%2fadmin", "/a%2f..%2fadmin", "/admin"},
		"/a//../b":         {"/a//../b", "/a/b", "/a/b", "/a/b"},
		`/a\\b`:            {`/a\\b`, "/a//b", "/a/b", "/a/b"},
		"/a%252Fb":         {"/a%252Fb", "/a%252Fb", "/a%252Fb", "/a%252Fb"},
		"/%2e%2e%2f%2fx/.": {"/%2e%2e%2f%2fx/.", "/..%2f%2fx/", "/..%2f%2fx/", "/x/"},
		"*":                {"*", "*", "*", "*"},
	} {
		for i, name := range []string{"NONE", "BASE", "MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES"} {
			n, err := parseNormalization(name)
			if err != nil {
				t.Fatal(err)
			}
			if got := n.normalize(path); got != want[i] {
				t.Errorf("%s of %q is %q, want %q", name, path, got, want[i])
			}
			if twice := n.normalize(n.normalize(path)); twice != want[i] {
				t.Errorf("%s of its result %q is %q", name, want[i], twice)
			}
		}
	}
	if _, err := parseNormalization("MERGE"); err == nil {
		t.Error("MERGE is taken for a normalization")
	}
}

// TestNormalizedPathsAreReadOneWay: however an application reads what it is sent (as it is, with dot segments resolved, with escapes
// undone), a path that policies took for one outside of /admin is not one within.
func TestNormalizedPathsAreReadOneWay(t *testing.T) {
	t.Parallel()
	parts := []string{"/", "/", "/", ".", "..", "%2e", "%2E", "%2f", "%2F", "%5c", `\`, "admin", "%61dmin", "a", "%25", "2e", "2f", "%252e", "%3b", ";", "~"}
	rng := rand.New(rand.NewPCG(3, 4))
	slashes := strings.NewReplacer(`\`, "/")
	within := 0
	for range 200_000 {
		text := "/"
		for range 1 + rng.IntN(9) {
			text += parts[rng.IntN(len(parts))]
		}
		if _, err := url.PathUnescape(text); err != nil {
			continue // package http1 refuses it
		}
		for _, n := range []normalization{normalizeBase, normalizeMerge, normalizeDecode} {
			sent := n.normalize(text)
			if again := n.normalize(sent); again != sent {
				t.Fatalf("%d: %q becomes %q, and that becomes %q", n, text, sent, again)
			}
			if strings.HasPrefix(sent, "/admin") {
				within++
				continue
			}
			readings := []string{slashes.Replace(path.Clean(slashes.Replace(sent)))}
			if n == normalizeDecode { // what was escaped twice is not a slash to anybody who undoes it once
				once, _ := url.PathUnescape(sent)
				readings = append(readings, path.Clean(slashes.Replace(once)))
			}
			for _, r := range readings {
				if n == normalizeBase && strings.Contains(sent, "//") {
					continue // which applications may merge, and BASE does not
				}
				if strings.HasPrefix(r, "/admin") {
					t.Fatalf("%d: %q is sent as %q, which can be read as %q", n, text, sent, r)
				}
			}
		}
	}
	if within < 1000 {
		t.Errorf("only %d paths are within: the generator is too weak", within)
	}
}
