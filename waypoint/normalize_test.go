package waypoint

import "testing"

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
		if got := normalize(path); got != want {
			t.Errorf("normalize(%q) = %q, want %q", path, got, want)
		}
		if twice := normalize(normalize(path)); twice != want {
			t.Errorf("normalize of its result %q is %q: a path normalised once more is another", want, twice)
		}
	}
}
