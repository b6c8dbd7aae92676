package apply_test

import (
	"fmt"
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

// sandbox makes a network namespace with a loopback device that is up.
func sandbox(t *testing.T) (*linux.NetNS, string) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root, and CI must have it")
		}
		t.Skip("needs root to make network namespaces")
	}
	name := fmt.Sprintf("mist-rules-%d-%s", os.Getpid(), strings.NewReplacer("/", "-", " ", "_").Replace(t.Name()))
	run(t, "ip", "netns", "add", name)
	t.Cleanup(func() { run(t, "ip", "netns", "del", name) })
	run(t, "ip", "-n", name, "link", "set", "lo", "up")
	ns, err := linux.OpenNetNS(filepath.Join("/run/netns", name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns, name
}

func run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// dump is everything in a namespace that rules can change: the chains with rules of every table, ip rules, table 100.
func dump(t *testing.T, ns, iptables string) string {
	t.Helper()
	var b strings.Builder
	for _, ipt := range []string{iptables, "ip6" + strings.TrimPrefix(iptables, "ip")} {
		for _, table := range []string{"mangle", "raw", "nat"} {
			for line := range strings.Lines(run(t, "ip", "netns", "exec", ns, ipt, "-t", table, "-S")) {
				if !strings.HasPrefix(line, "-P") && !strings.HasPrefix(line, "#") {
					fmt.Fprintf(&b, "%s %s %s", ipt[:3], table, line)
				}
			}
		}
	}
	for _, f := range []string{"-4", "-6"} {
		b.WriteString(run(t, "ip", "-n", ns, f, "rule"))
		b.WriteString(run(t, "ip", "-n", ns, f, "route", "show", "table", "all", "type", "local", "default"))
	}
	return b.String()
}

// want is how dump prints the rule set, without the lines that every namespace has.
func want(rs rules.Ruleset) map[string]bool {
	lines := map[string]bool{}
	for name, chains := range map[string][]rules.Chain{"ipt": rs.IPv4, "ip6": rs.IPv6} {
		for _, c := range chains {
			lines[fmt.Sprintf("%s %s -N %s", name, c.Table, c.Name)] = true
			lines[fmt.Sprintf("%s %s -A %s %s", name, c.Table, c.From, c.Jump())] = true
			for _, r := range c.Rules {
				lines[fmt.Sprintf("%s %s -A %s %s", name, c.Table, c.Name, r)] = true
			}
		}
	}
	return lines
}

func tools(t *testing.T) []string {
	t.Helper()
	var out []string
	for _, name := range []string{"iptables-nft", "iptables-legacy"} {
		if _, err := exec.LookPath(name); err == nil {
			out = append(out, name)
		}
	}
	if len(out) == 0 {
		out = append(out, "iptables")
	}
	return out
}

func TestApplyThenRemoveLeavesTheNamespaceAsItWas(t *testing.T) {
	for _, tool := range tools(t) {
		for name, o := range map[string]rules.Options{
			"default": {}, "dns": {DNS: true}, "ingress": {Ingress: true}, "virtual": {VirtualInterfaces: []string{"tap0"}},
		} {
			t.Run(tool+"/"+name, func(t *testing.T) {
				ns, path := sandbox(t)
				ipt, err := apply.NewIPTables(tool)
				if err != nil {
					t.Fatal(err)
				}
				before := dump(t, path, tool)
				rs := rules.InPod(o)
				changed, err := ipt.Apply(ns, rs)
				if err != nil || !changed {
					t.Fatalf("Apply = %v, %v, want true, nil", changed, err)
				}
				applied := dump(t, path, tool)
				got := map[string]bool{}
				for line := range strings.Lines(applied) {
					if strings.HasPrefix(line, "ip") {
						got[strings.TrimSpace(line)] = true
					}
				}
				if d := cmp.Diff(want(rs), got); d != "" {
					t.Errorf("rules in the namespace (-want +got):\n%s", d)
				}
				for _, line := range []string{
					"32764:\tfrom all fwmark 0x111/0xfff lookup 100",
					"local default dev lo table 100",
				} {
					if n := strings.Count(applied, line); n != 2 {
						t.Errorf("%q is there %d times, want once for each family in:\n%s", line, n, applied)
					}
				}

				changed, err = ipt.Apply(ns, rs)
				if err != nil || changed {
					t.Errorf("second Apply = %v, %v, want false, nil", changed, err)
				}
				if d := cmp.Diff(applied, dump(t, path, tool)); d != "" {
					t.Errorf("second Apply changed the namespace (-before +after):\n%s", d)
				}

				for range 2 {
					if err := ipt.Remove(ns, rs); err != nil {
						t.Fatal(err)
					}
					if d := cmp.Diff(before, dump(t, path, tool)); d != "" {
						t.Errorf("Remove left something (-before +after):\n%s", d)
					}
				}
			})
		}
	}
}

func TestApplyRepairs(t *testing.T) {
	rs := rules.InPod(rules.Options{})
	for _, tool := range tools(t) {
		for name, damage := range map[string][]string{
			"a rule is missing":            {"-t nat -D ISTIO_OUTPUT 3"},
			"a rule was added in front":    {"-t nat -I ISTIO_OUTPUT 1 -j ACCEPT"},
			"two rules changed places":     {"-t nat -D ISTIO_PRERT 1", "-t nat -A ISTIO_PRERT -s 169.254.7.127/32 -p tcp -m tcp -j ACCEPT"},
			"the chain is empty":           {"-t nat -F ISTIO_PRERT"},
			"the jump is gone":             {"-t nat -D OUTPUT -j ISTIO_OUTPUT"},
			"the chain is gone":            {"-t mangle -D OUTPUT -j ISTIO_OUTPUT", "-t mangle -F ISTIO_OUTPUT", "-t mangle -X ISTIO_OUTPUT"},
			"the jump is there three fold": {"-t nat -I OUTPUT -j ISTIO_OUTPUT", "-t nat -A OUTPUT -j ISTIO_OUTPUT"},
			"a repair was interrupted": {
				"-t nat -F ISTIO_OUTPUT", "-t nat -N ISTIO_OUTPUT_NEW", "-t nat -A ISTIO_OUTPUT_NEW -j ACCEPT",
				"-t nat -I OUTPUT 1 -j ISTIO_OUTPUT_NEW",
			},
		} {
			t.Run(tool+"/"+name, func(t *testing.T) {
				ns, path := sandbox(t)
				ipt, err := apply.NewIPTables(tool)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := ipt.Apply(ns, rs); err != nil {
					t.Fatal(err)
				}
				good := dump(t, path, tool)
				if err := ipt.Verify(ns, rs); err != nil {
					t.Errorf("Verify after Apply: %v", err)
				}
				for _, d := range damage {
					run(t, append([]string{"ip", "netns", "exec", path, tool}, strings.Fields(d)...)...)
				}
				if dump(t, path, tool) == good {
					t.Fatal("the damage did none")
				}
				if err := ipt.Verify(ns, rs); err == nil {
					t.Error("Verify finds nothing wrong with the damaged rules")
				}
				if changed, err := ipt.Apply(ns, rs); err != nil || !changed {
					t.Errorf("Apply = %v, %v, want true, nil", changed, err)
				}
				if d := cmp.Diff(sorted(good), sorted(dump(t, path, tool))); d != "" {
					t.Errorf("after the repair (-want +got):\n%s", d)
				}
				if changed, err := ipt.Apply(ns, rs); err != nil || changed {
					t.Errorf("Apply after the repair = %v, %v, want false, nil", changed, err)
				}
			})
		}
	}
}

// sorted puts chains (-N lines and their blocks) into one order; rules within a chain keep theirs.
func sorted(dump string) []string {
	blocks := map[string]string{}
	for line := range strings.Lines(dump) {
		w := strings.Fields(line)
		key := ""
		if len(w) > 3 && strings.HasPrefix(w[0], "ip") {
			key = strings.Join([]string{w[0], w[1], w[3]}, " ")
		}
		blocks[key] += line
	}
	var keys []string
	for k := range blocks {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	var out []string
	for _, k := range keys {
		out = append(out, blocks[k])
	}
	return out
}

func TestApplyGoesFirstAndLeavesStrangersAlone(t *testing.T) {
	ns, path := sandbox(t)
	tool := tools(t)[0]
	ipt, err := apply.NewIPTables(tool)
	if err != nil {
		t.Fatal(err)
	}
	foreign := "-A OUTPUT -p tcp -m tcp --dport 9 -j ACCEPT"
	run(t, append([]string{"ip", "netns", "exec", path, tool, "-t", "nat"}, strings.Fields(foreign)...)...)
	before := dump(t, path, tool)
	rs := rules.InPod(rules.Options{DNS: true})
	if _, err := ipt.Apply(ns, rs); err != nil {
		t.Fatal(err)
	}
	out := run(t, "ip", "netns", "exec", path, tool, "-t", "nat", "-S", "OUTPUT")
	if want := "-P OUTPUT ACCEPT\n-A OUTPUT -j ISTIO_OUTPUT\n" + foreign + "\n"; out != want {
		t.Errorf("nat OUTPUT is\n%swant\n%s", out, want)
	}
	// Fewer options: what is no longer asked for goes.
	if _, err := ipt.Apply(ns, rules.InPod(rules.Options{Ingress: true})); err != nil {
		t.Fatal(err)
	}
	got := dump(t, path, tool)
	for _, former := range []string{"15006", "15053", "raw"} {
		if strings.Contains(got, former) {
			t.Errorf("rules of the former options are still there:\n%s", got)
		}
	}
	if err := ipt.Verify(ns, rules.InPod(rules.Options{})); err == nil {
		t.Error("Verify misses a chain that is not there")
	}
	if err := ipt.Verify(ns, rules.InPod(rules.Options{Ingress: true})); err != nil {
		t.Error(err)
	}
	if err := ipt.Remove(ns, rs); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, dump(t, path, tool)); d != "" {
		t.Errorf("Remove left something (-before +after):\n%s", d)
	}
}

func TestApplyWithIPv6SwitchedOff(t *testing.T) {
	ns, path := sandbox(t)
	run(t, "ip", "netns", "exec", path, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
	ipt, err := apply.NewIPTables("")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ipt.Apply(ns, rules.InPod(rules.Options{})); err != nil {
		t.Fatal(err)
	}
	if got := dump(t, path, "iptables"); !strings.Contains(got, "ip6 nat -A OUTPUT -j ISTIO_OUTPUT") {
		t.Errorf("IPv6 rules are missing, an application that switches IPv6 on would escape:\n%s", got)
	}
	if err := ipt.Remove(ns, rules.InPod(rules.Options{})); err != nil {
		t.Error(err)
	}
}

func TestApplyBringsLoopbackUp(t *testing.T) {
	ns, path := sandbox(t)
	run(t, "ip", "-n", path, "link", "set", "lo", "down")
	ipt, err := apply.NewIPTables("")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ipt.Apply(ns, rules.InPod(rules.Options{})); err != nil {
		t.Fatal(err)
	}
	if out := run(t, "ip", "-n", path, "link", "show", "lo"); !strings.Contains(out, "UP") {
		t.Errorf("lo is down: %s", out)
	}
}

func TestNewIPTablesSaysWhatIsMissing(t *testing.T) {
	for path, want := range map[string]string{
		"/nowhere/iptables": "is the package iptables installed",
		"/usr/sbin/nft":     "not named iptables",
	} {
		if _, err := apply.NewIPTables(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("NewIPTables(%q) = %v, want an error with %q", path, err, want)
		}
	}
}

// Images hold one program that is iptables, ip6tables and their kin, by the name it is called by, and not every name.
func TestOnlyIPTablesAndItsTwinAreInstalledByName(t *testing.T) {
	for _, kind := range tools(t) {
		t.Run(kind, func(t *testing.T) {
			ns, path := sandbox(t)
			dir := t.TempDir()
			for _, tool := range []string{kind, "ip6" + strings.TrimPrefix(kind, "ip")} {
				real, err := exec.LookPath(tool)
				if err != nil {
					t.Fatal(err)
				}
				if real, err = filepath.EvalSymlinks(real); err != nil {
					t.Fatal(err)
				}
				if err := os.Symlink(real, filepath.Join(dir, tool)); err != nil {
					t.Fatal(err)
				}
			}
			ipt, err := apply.NewIPTables(filepath.Join(dir, kind))
			if err != nil {
				t.Fatal(err)
			}
			rs := rules.InPod(rules.Options{})
			if changed, err := ipt.Apply(ns, rs); err != nil || !changed {
				t.Errorf("Apply = %v, %v, want true, nil", changed, err)
			}
			if err := ipt.Verify(ns, rs); err != nil {
				t.Error(err)
			}
			if got := dump(t, path, kind); !strings.Contains(got, "ip6 nat -A OUTPUT -j ISTIO_OUTPUT") {
				t.Errorf("namespace holds\n%s", got)
			}
		})
	}
}
