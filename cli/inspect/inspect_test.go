package inspect_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/cli/inspect"
)

var update = flag.Bool("update", false, "rewrite golden files")

// recorded is when the dumps were taken.
var recorded = time.Date(2026, 11, 22, 14, 26, 12, 0, time.UTC)

func read(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(filepath.Join("testdata", name), got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(string(read(t, name)), string(got)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

// mistnet.json was recorded from a node of the demo, istio.json is in the form of Istio's ztunnel.
func TestTables(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"mistnet", "istio"} {
		d, err := inspect.ReadDump(read(t, name+".json"))
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := d.Print(&out, "all", inspect.Filter{}, recorded); err != nil {
			t.Fatal(err)
		}
		golden(t, name+".golden.txt", out.Bytes())
	}
}

func TestFilter(t *testing.T) {
	t.Parallel()
	d, err := inspect.ReadDump(read(t, "mistnet.json"))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := d.Print(&out, "workload", inspect.Filter{Namespace: "shop", Node: "node2"}, recorded); err != nil {
		t.Fatal(err)
	}
	if lines := strings.Split(strings.TrimSpace(out.String()), "\n"); len(lines) != 2 || !strings.HasPrefix(lines[1], "shop      cart-2") {
		t.Errorf("workloads of shop on node2:\n%s", out.String())
	}
}

func TestExpiredCertificate(t *testing.T) {
	t.Parallel()
	d, err := inspect.ReadDump(read(t, "mistnet.json"))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := d.Print(&out, "certificate", inspect.Filter{}, recorded.AddDate(0, 0, 2)); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(out.String()) {
		if strings.Contains(line, " Leaf ") && !strings.Contains(line, " false ") {
			t.Errorf("two days later: %s", line)
		}
	}
}

func TestRawIsWhatZtunnelSaid(t *testing.T) {
	t.Parallel()
	b := read(t, "mistnet.json")
	d, err := inspect.ReadDump(b)
	if err != nil {
		t.Fatal(err)
	}
	var whole map[string]any
	if err := json.Unmarshal(b, &whole); err != nil {
		t.Fatal(err)
	}
	for part, key := range inspect.Parts {
		var out bytes.Buffer
		if err := d.PrintRaw(&out, part, "json"); err != nil {
			t.Fatal(err)
		}
		var got any
		if err := json.Unmarshal(out.Bytes(), &got); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(whole[key], got); diff != "" || got == nil {
			t.Errorf("%s -o json (-want +got):\n%s", part, diff)
		}
	}
}

func TestClients(t *testing.T) {
	t.Parallel()
	clients, err := inspect.ReadClients(read(t, "xds.json"), "istiod-1")
	if err != nil {
		t.Fatal(err)
	}
	clients[1].Types[0].Rejected = map[string]string{"shop/bad": "no scope"}
	clients[1].Types[1].InFlight = true
	var out bytes.Buffer
	if err := inspect.PrintClients(&out, clients); err != nil {
		t.Fatal(err)
	}
	golden(t, "xds.golden.txt", out.Bytes())
}

func TestWhatIsNoDumpIsRefused(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"", "not found", "[]", "{}", `{"workloads":{}}`} {
		if _, err := inspect.ReadDump([]byte(s)); err == nil || !strings.Contains(err.Error(), "config_dump") {
			t.Errorf("ReadDump(%q) = %v, want a hint at /config_dump", s, err)
		}
	}
}
