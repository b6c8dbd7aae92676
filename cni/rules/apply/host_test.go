package apply_test

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/cni/rules"
	"github.com/mistnet/mistnet/cni/rules/apply"
)

func TestHost(t *testing.T) {
	ns, path := sandbox(t)
	if _, err := exec.LookPath("ipset"); err != nil {
		t.Skip("ipset is not installed")
	}
	ipt, err := apply.NewIPTables("")
	if err != nil {
		t.Fatal(err)
	}
	var h *apply.Host
	for range 2 { // the second as after a restart
		if h, err = apply.NewHost(ipt, ns, rules.HostProbe(netip.Addr{}, netip.Addr{})); err != nil {
			t.Fatal(err)
		}
	}
	in := func(args ...string) string { return run(t, append([]string{"ip", "netns", "exec", path}, args...)...) }
	want := "-A ISTIO_POSTRT -p tcp -m owner --socket-exists -m set --match-set istio-inpod-probes-v4 dst -j SNAT --to-source 169.254.7.127"
	if got := in("iptables", "-t", "nat", "-S"); strings.Count(got, want) != 1 || strings.Count(got, "-A POSTROUTING -j ISTIO_POSTRT") != 1 {
		t.Errorf("rules are\n%s\nwant once\n%s", got, want)
	}
	// What others did to the table is put right, and theirs stays.
	in("iptables", "-t", "nat", "-A", "POSTROUTING", "-j", "ISTIO_POSTRT")
	in("iptables", "-t", "nat", "-I", "POSTROUTING", "1", "-s", "192.0.2.1/32", "-j", "RETURN")
	in("iptables", "-t", "nat", "-A", "ISTIO_POSTRT", "-j", "RETURN")
	if _, err = apply.NewHost(ipt, ns, rules.HostProbe(netip.Addr{}, netip.Addr{})); err != nil {
		t.Fatal(err)
	}
	const order = "-A POSTROUTING -j ISTIO_POSTRT\n-A POSTROUTING -s 192.0.2.1/32 -j RETURN\n-A ISTIO_POSTRT -p tcp"
	if got := in("iptables", "-t", "nat", "-S"); !strings.Contains(got, order) || strings.Count(got, "ISTIO_POSTRT") != 3 {
		t.Errorf("rules are\n%s\nwant our one rule, entered once and first, and the other", got)
	}
	in("iptables", "-t", "nat", "-D", "POSTROUTING", "-s", "192.0.2.1/32", "-j", "RETURN")
	pod := []netip.Addr{netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("fd00::5")}
	for range 2 {
		if err := h.Allow("u-1", pod); err != nil {
			t.Fatal(err)
		}
	}
	list := in("ipset", "save")
	for _, want := range []string{
		`add istio-inpod-probes-v4 10.0.0.5 comment "u-1"`, `add istio-inpod-probes-v6 fd00::5 comment "u-1"`,
	} {
		if strings.Count(list, want) != 1 {
			t.Errorf("sets are\n%s\nwant once %s", list, want)
		}
	}
	// An agent that follows finds the sets as they were, and takes back what is no longer a pod's.
	if h, err = apply.NewHost(ipt, ns, rules.HostProbe(netip.Addr{}, netip.Addr{})); err != nil {
		t.Fatal(err)
	}
	if got := in("ipset", "save"); got != list {
		t.Errorf("after a restart sets are\n%s\nwant\n%s", got, list)
	}
	if err := h.Keep(map[string][]netip.Addr{"u-1": pod[1:]}); err != nil {
		t.Fatal(err)
	}
	if got := in("ipset", "save"); strings.Contains(got, "10.0.0.5") || !strings.Contains(got, "fd00::5") {
		t.Errorf("sets are\n%s\nwant only fd00::5 in them", got)
	}
	for range 2 {
		if err := h.Forbid(pod); err != nil {
			t.Fatal(err)
		}
	}
	if got := in("ipset", "save"); strings.Contains(got, "add ") {
		t.Errorf("sets still hold\n%s", got)
	}
	for range 2 {
		if err := h.Remove(); err != nil {
			t.Fatal(err)
		}
	}
	if got := in("ipset", "save") + in("iptables", "-t", "nat", "-S"); strings.Contains(strings.ToLower(got), "istio") {
		t.Errorf("left behind:\n%s", got)
	}
}
