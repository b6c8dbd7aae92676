package apply_test

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/cni/rules"
	"github.com/mistnet/mistnet/cni/rules/apply"
	"github.com/mistnet/mistnet/internal/linux"
)

// everything a namespace holds that either mode can change. What the programs make of themselves, empty tables, is left out.
func everything(t *testing.T, path string) string {
	t.Helper()
	var b strings.Builder
	for _, tool := range tools(t) {
		b.WriteString(dump(t, path, tool))
	}
	b.WriteString(run(t, "ip", "netns", "exec", path, "nft", "list", "ruleset", "inet"))
	return b.String()
}

func TestNFTablesApplyThenRemove(t *testing.T) {
	for name, o := range map[string]rules.Options{
		"default": {}, "dns": {DNS: true}, "ingress": {Ingress: true}, "virtual": {VirtualInterfaces: []string{"tap0"}},
	} {
		t.Run(name, func(t *testing.T) {
			ns, path := sandbox(t)
			nft, err := apply.NewNFTables("")
			if err != nil {
				t.Fatal(err)
			}
			foreign := "table inet mine {\n\tchain c {\n\t\ttcp dport 9 accept\n\t}\n}\n"
			run(t, "ip", "netns", "exec", path, "nft", foreign)
			before := everything(t, path)
			rs := rules.InPod(o)
			for _, want := range []bool{true, false} {
				if changed, err := nft.Apply(ns, rs); err != nil || changed != want {
					t.Errorf("Apply = %v, %v, want %v, nil", changed, err, want)
				}
				if err := nft.Verify(ns, rs); err != nil {
					t.Error(err)
				}
			}
			for other, o := range map[string]rules.Options{"dns": {DNS: true}, "ingress": {Ingress: true}, "default": {}} {
				if err := nft.Verify(ns, rules.InPod(o)); (err == nil) != (other == name) {
					t.Errorf("Verify finds the rules of %s: %v", other, err)
				}
				if _, err := nft.Apply(ns, rules.InPod(o)); err != nil {
					t.Error(err)
				}
				if err := nft.Verify(ns, rules.InPod(o)); err != nil {
					t.Errorf("after a change of options: %v", err)
				}
				if _, err := nft.Apply(ns, rs); err != nil {
					t.Error(err)
				}
			}
			if got := everything(t, path); !strings.Contains(got, "lookup 100") {
				t.Errorf("routes are missing:\n%s", got)
			}
			for range 2 {
				if err := nft.Remove(ns, rs); err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(before, everything(t, path)); d != "" {
					t.Errorf("Remove left something (-before +after):\n%s", d)
				}
			}
		})
	}
}

func TestNFTablesRepairs(t *testing.T) {
	ns, path := sandbox(t)
	nft, err := apply.NewNFTables("")
	if err != nil {
		t.Fatal(err)
	}
	rs := rules.InPod(rules.Options{})
	for _, damage := range []string{
		"flush chain inet istio-ambient-nat istio-output",
		"insert rule inet istio-ambient-nat istio-output accept",
		"flush table inet istio-ambient-mangle",
		"delete table inet istio-ambient-nat",
		"flush chain inet istio-ambient-nat output",
	} {
		if _, err := nft.Apply(ns, rs); err != nil {
			t.Fatal(err)
		}
		run(t, append([]string{"ip", "netns", "exec", path, "nft"}, strings.Fields(damage)...)...)
		if err := nft.Verify(ns, rs); err == nil {
			t.Errorf("%s: Verify finds nothing wrong", damage)
		}
		if changed, err := nft.Apply(ns, rs); err != nil || !changed {
			t.Errorf("%s: Apply = %v, %v", damage, changed, err)
		}
		if err := nft.Verify(ns, rs); err != nil {
			t.Errorf("%s: after the repair: %v", damage, err)
		}
	}
}

func redirection(t *testing.T, c apply.Config) *apply.Redirection {
	t.Helper()
	var here *linux.NetNS
	if c.Host == nil {
		c.Host = here
	}
	r, err := apply.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestAnotherModeTakesOver(t *testing.T) {
	for _, tool := range tools(t) {
		t.Run(tool, func(t *testing.T) {
			ns, path := sandbox(t)
			rs := rules.InPod(rules.Options{DNS: true})
			modes := map[apply.Mode]*apply.Redirection{}
			for _, m := range []apply.Mode{apply.ModeIPTables, apply.ModeNFTables} {
				modes[m] = redirection(t, apply.Config{Mode: m, IPTables: tool})
			}
			before := everything(t, path)
			for _, m := range []apply.Mode{apply.ModeIPTables, apply.ModeNFTables, apply.ModeIPTables} {
				if changed, err := modes[m].Apply(ns, rs); err != nil || !changed {
					t.Fatalf("%s: Apply = %v, %v, want true, nil", m, changed, err)
				}
				if err := modes[m].Verify(ns, rs); err != nil {
					t.Errorf("%s: %v", m, err)
				}
				got := everything(t, path)
				iptables, nft := strings.Contains(got, "ISTIO_OUTPUT"), strings.Contains(got, "istio-ambient-nat")
				if iptables != (m == apply.ModeIPTables) || nft != (m == apply.ModeNFTables) || strings.Count(got, "lookup 100") < 2 {
					t.Errorf("%s: the namespace holds\n%s", m, got)
				}
				if changed, err := modes[m].Apply(ns, rs); err != nil || changed {
					t.Errorf("%s: second Apply = %v, %v, want false, nil", m, changed, err)
				}
			}
			if err := modes[apply.ModeNFTables].Release(ns); err != nil { // of the other mode's rules
				t.Fatal(err)
			}
			if got := everything(t, path); strings.Contains(got, "REDIRECT") || !strings.Contains(got, "CONNMARK") || !strings.Contains(got, "lookup 100") {
				t.Errorf("after Release the namespace holds\n%s", got)
			}
			if err := modes[apply.ModeNFTables].Remove(ns, rs); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(before, everything(t, path)); d != "" {
				t.Errorf("Remove left something (-before +after):\n%s", d)
			}
		})
	}
}

func TestAutoModeLooksAround(t *testing.T) {
	host, path := sandbox(t)
	for _, c := range []struct {
		name          string
		iptables, nft string
		kubeProxy     bool
		want          apply.Mode
	}{
		{"both work", "", "", false, apply.ModeIPTables},
		{"no iptables", "/nowhere/iptables", "", false, apply.ModeNFTables},
		{"iptables that fails", fails(t, "iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"), "", false, apply.ModeNFTables},
		{"no nft", "", "/nowhere/nft", true, apply.ModeIPTables},
		{"kube-proxy with nftables", "", "", true, apply.ModeNFTables},
	} {
		if c.kubeProxy {
			run(t, "ip", "netns", "exec", path, "nft", "add table ip kube-proxy")
		}
		r := redirection(t, apply.Config{Mode: apply.ModeAuto, IPTables: c.iptables, NFT: c.nft, Host: host})
		if got, why := r.Mode(); got != c.want {
			t.Errorf("%s: mode is %s (%s), want %s", c.name, got, why, c.want)
		}
	}
	if _, err := apply.New(apply.Config{IPTables: "/nowhere/iptables", NFT: "/nowhere/nft", Host: host}); err == nil {
		t.Error("New without any program does not fail")
	}
}

// fails makes programs that fail, and returns the first.
func fails(t *testing.T, names ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, name := range names {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\necho broken >&2\nexit 1\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, names[0])
}

// counted makes programs that write down each start, and returns the first and how to count.
func counted(t *testing.T, names ...string) (first string, starts func() int) {
	t.Helper()
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	for _, name := range names {
		real, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		script := fmt.Sprintf("#!/bin/sh\necho %s >> %s\nexec %s \"$@\"\n", name, log, real)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, names[0]), func() int {
		b, _ := os.ReadFile(log)
		_ = os.Remove(log)
		return strings.Count(string(b), "\n")
	}
}

// A pod waits for every one of these programs when it starts.
func TestFewProgramsAreStarted(t *testing.T) {
	iptables := func(kind string) (string, func() int) {
		return counted(t, "iptables-"+kind, "iptables-"+kind+"-save", "iptables-"+kind+"-restore",
			"ip6tables-"+kind, "ip6tables-"+kind+"-save", "ip6tables-"+kind+"-restore")
	}
	for name, c := range map[string]struct {
		mode                 apply.Mode
		programs             func() (string, func() int)
		fresh, again, remove int
	}{
		"iptables":        {apply.ModeIPTables, func() (string, func() int) { return iptables("nft") }, 0, 2, 4},    // a look at each family; a look and a change
		"legacy iptables": {apply.ModeIPTables, func() (string, func() int) { return iptables("legacy") }, 2, 2, 4}, // which cannot be copied
		"nftables":        {apply.ModeNFTables, func() (string, func() int) { return counted(t, "nft") }, 0, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			ns, path := sandbox(t)
			program, starts := c.programs()
			config := apply.Config{Mode: c.mode, IPTables: program}
			if c.mode == apply.ModeNFTables {
				config = apply.Config{Mode: c.mode, NFT: program}
			}
			r := redirection(t, config)
			rs := rules.InPod(rules.Options{DNS: true})
			if err := r.Learn(rs); err != nil {
				t.Fatal(err)
			}
			starts()
			for step, want := range []int{c.fresh, c.again} {
				if changed, err := r.Apply(ns, rs); err != nil || changed != (step == 0) {
					t.Fatalf("Apply %d = %v, %v", step+1, changed, err)
				}
				if got := starts(); got != want {
					t.Errorf("Apply %d started %d programs, want %d", step+1, got, want)
				}
			}
			if got := everything(t, path); !strings.Contains(got, "15053") {
				t.Errorf("the namespace holds\n%s", got)
			}
			if err := r.Remove(ns, rs); err != nil {
				t.Fatal(err)
			}
			if got := starts(); got != c.remove {
				t.Errorf("Remove started %d programs, want %d", got, c.remove)
			}
		})
	}
}

// listed is everything packet filters of a namespace hold, as the programs print it, table by table: their order means nothing.
func listed(t *testing.T, path string) []string {
	t.Helper()
	in := func(args ...string) string { return run(t, append([]string{"ip", "netns", "exec", path}, args...)...) }
	var out []string
	for _, program := range []string{"iptables-nft-save", "ip6tables-nft-save"} {
		for _, table := range []string{"raw", "mangle", "nat"} {
			for line := range strings.Lines(in(program, "-t", table)) {
				if !strings.HasPrefix(line, "#") { // dates
					out = append(out, program+" "+line)
				}
			}
		}
	}
	tables := slices.Sorted(strings.Lines(in("nft", "list", "tables")))
	for _, table := range tables {
		out = append(out, strings.Split(in(append([]string{"nft", "list"}, strings.Fields(table)...)...), "\n")...)
	}
	return out
}

// What is copied into namespaces must be what the programs make of the same rules, whoever looks.
func TestCopiesAreWhatProgramsMake(t *testing.T) {
	for name, o := range map[string]rules.Options{
		"default": {}, "dns": {DNS: true}, "joined": {Joined: true, DNS: true}, "ingress": {Ingress: true},
		"virtual": {VirtualInterfaces: []string{"tap0", "br-vm"}},
		"probes":  {ProbeIPv4: netip.MustParseAddr("169.254.1.1"), ProbeIPv6: netip.MustParseAddr("fd00::7")},
	} {
		rs := rules.InPod(o)
		t.Run("iptables/"+name, func(t *testing.T) {
			var made []string
			t.Run("made", func(t *testing.T) {
				ns, path := sandbox(t)
				if _, err := redirection(t, apply.Config{Mode: apply.ModeIPTables, IPTables: "iptables-nft"}).Apply(ns, rs); err != nil {
					t.Fatal(err)
				}
				made = listed(t, path)
			})
			copied, path := sandbox(t)
			program, starts := counted(t, "iptables-nft", "iptables-nft-save", "iptables-nft-restore",
				"ip6tables-nft", "ip6tables-nft-save", "ip6tables-nft-restore")
			r := redirection(t, apply.Config{Mode: apply.ModeIPTables, IPTables: program})
			if err := r.Learn(rs); err != nil {
				t.Fatal(err)
			}
			starts()
			if _, err := r.Apply(copied, rs); err != nil {
				t.Fatal(err)
			}
			if n := starts(); n > 0 {
				t.Errorf("%d programs were started: nothing was copied", n)
			}
			if !strings.Contains(strings.Join(made, "\n"), ":15001") {
				t.Errorf("no redirection was made: %q", made)
			}
			if d := cmp.Diff(made, listed(t, path)); d != "" {
				t.Errorf("the copy differs (-made +copied):\n%s", d)
			}
		})
		t.Run("nftables/"+name, func(t *testing.T) {
			var made []string
			t.Run("made", func(t *testing.T) {
				_, path := sandbox(t)
				script := filepath.Join(t.TempDir(), "script")
				if err := os.WriteFile(script, []byte(rules.NFT(rs.Tables)), 0o600); err != nil {
					t.Fatal(err)
				}
				run(t, "ip", "netns", "exec", path, "nft", "-f", script)
				made = listed(t, path)
			})
			copied, path := sandbox(t)
			r := redirection(t, apply.Config{Mode: apply.ModeNFTables})
			for _, former := range []rules.Options{{DNS: true, Joined: true}, {Ingress: true}, o} {
				if _, err := r.Apply(copied, rules.InPod(former)); err != nil {
					t.Fatal(err)
				}
			}
			if !strings.Contains(strings.Join(made, "\n"), ":15001") {
				t.Errorf("no redirection was made: %q", made)
			}
			if d := cmp.Diff(made, listed(t, path)); d != "" {
				t.Errorf("the copy differs (-made +copied):\n%s", d)
			}
		})
	}
}

func TestHostNFT(t *testing.T) {
	ns, path := sandbox(t)
	r := redirection(t, apply.Config{Mode: apply.ModeNFTables})
	rs := rules.HostProbe(netip.Addr{}, netip.Addr{})
	in := func(args ...string) string { return run(t, append([]string{"ip", "netns", "exec", path}, args...)...) }
	old := redirection(t, apply.Config{Mode: apply.ModeIPTables})
	if _, err := old.NewHost(ns, rs); err != nil {
		t.Fatal(err)
	}
	pod := []netip.Addr{netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("fd00::5")}
	var h apply.HostProbes
	var err error
	for range 2 { // the second as after a restart
		if h, err = r.NewHost(ns, rs); err != nil {
			t.Fatal(err)
		}
		if err := h.Allow("u-1", pod); err != nil {
			t.Fatal(err)
		}
	}
	if got := in("iptables-save") + in("ipset", "save"); strings.Contains(strings.ToLower(got), "istio") {
		t.Errorf("the other mode's rules stay:\n%s", got)
	}
	got := in("nft", "list", "ruleset", "inet")
	for _, want := range []string{`10.0.0.5 comment "u-1"`, `fd00::5 comment "u-1"`, "snat ip to 169.254.7.127", "snat ip6 to fd16:9254:7127:1337:ffff:ffff:ffff:ffff"} {
		if strings.Count(got, want) != 1 {
			t.Errorf("the table is\n%s\nwant once %s", got, want)
		}
	}
	if err := h.Keep(map[string][]netip.Addr{"u-1": pod[1:]}); err != nil {
		t.Fatal(err)
	}
	if got := in("nft", "list", "ruleset", "inet"); strings.Contains(got, "10.0.0.5") || !strings.Contains(got, "fd00::5") {
		t.Errorf("the table is\n%s\nwant only fd00::5 in it", got)
	}
	for range 2 {
		if err := h.Forbid(pod); err != nil {
			t.Fatal(err)
		}
	}
	if got := in("nft", "list", "ruleset", "inet"); strings.Contains(got, "fd00::5") {
		t.Errorf("the table still holds\n%s", got)
	}
	for range 2 {
		if err := r.RemoveHost(ns, rs); err != nil {
			t.Fatal(err)
		}
	}
	if got := in("nft", "list", "ruleset"); strings.Contains(got, "istio") {
		t.Errorf("left behind:\n%s", got)
	}
}
