package mesh_test

import (
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/internal/mesh"
)

func TestCheckRegex(t *testing.T) {
	for _, expr := range []string{
		"", "/v[0-9]+/.*", "(?i)^/a(b|c)?$", "[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}", `\p{L}{1,64}`, "a{1000}", "(?:GET|POST)",
		strings.Repeat("a", 4000), strings.Repeat("shop.example|", 300),
	} {
		if err := mesh.CheckRegex(expr); err != nil {
			t.Errorf("CheckRegex(%.60q) = %v", expr, err)
		}
	}
	for expr, want := range map[string]string{
		"(":                                 "missing closing",
		"a**":                               "invalid nested repetition",
		`(?=a)`:                             "invalid or unsupported Perl syntax",
		"a{1001}":                           "invalid repeat count",
		strings.Repeat("a", 5000):           "an expression of 5000 bytes",
		"(abcdefghij){1000}":                "program of about 12000 instructions",
		"((a{10}){10}){10}b((a{9}){9}){9}":  "",
		strings.Repeat("(.{0,100}){10}", 9): "instructions",
		"(" + strings.Repeat("a", 4000) + "){1000}": "too large",
		strings.Repeat(`\pL`, 1000):                 "instructions",
	} {
		switch err := mesh.CheckRegex(expr); {
		case want == "" && err != nil:
			t.Errorf("CheckRegex(%.60q) = %v", expr, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("CheckRegex(%.60q) = %v, want %s", expr, err, want)
		}
	}
}

// TestARegexThatPassesIsCheap: whatever passes the check takes no memory to speak of when it is compiled.
func TestARegexThatPassesIsCheap(t *testing.T) {
	for _, expr := range []string{
		"(?i)" + strings.Repeat("k", 4000), "(" + strings.Repeat("a?", 1000) + ")", strings.Repeat("(a{9}){9}", 30), strings.Repeat(`\pL`, 40),
		strings.Repeat("(a|b|", 300) + "c" + strings.Repeat(")", 300), strings.Repeat(".*", 1000), strings.Repeat("[^a]", 1000),
		"(((a?){10}){10}){10}", `(\pL\pN\pS){9}`, strings.Repeat("(?:x+x+)+", 400),
	} {
		if err := mesh.CheckRegex(expr); err != nil {
			continue
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		re := regexp.MustCompile(expr)
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 8<<20 {
			t.Errorf("%.60q is compiled with %d KiB", expr, n>>10)
		}
		runtime.KeepAlive(re)
	}
}
