package rules_test

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/cni/rules"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s differs from its golden file (-want +got):\n%s", name, d)
	}
}

func TestInPod(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]rules.Options{
		"default":            {},
		"dns":                {DNS: true},
		"joined":             {Joined: true},
		"ingress":            {Ingress: true},
		"ingress_dns":        {Ingress: true, DNS: true},
		"virtual_interfaces": {VirtualInterfaces: []string{"tap0", "br-vm"}},
		"ingress_virtual":    {Ingress: true, VirtualInterfaces: []string{"tap0"}},
		"probe_addresses": {
			ProbeIPv4: netip.MustParseAddr("169.254.1.1"), ProbeIPv6: netip.MustParseAddr("fd00::7"),
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			golden(t, name, rules.InPod(o).Text())
			golden(t, name+"_nft", rules.NFT(rules.InPod(o).Tables))
		})
	}
}

func TestHostProbe(t *testing.T) {
	t.Parallel()
	h := rules.HostProbe(netip.Addr{}, netip.Addr{})
	golden(t, "hostprobe", h.Text())
	golden(t, "hostprobe_nft", rules.NFT([]rules.Table{h.Table}))
}

func TestRedirectionIsConnectedLast(t *testing.T) {
	t.Parallel()
	for _, o := range []rules.Options{{}, {DNS: true}, {Ingress: true}} {
		rs := rules.InPod(o)
		for _, chains := range [][]rules.Chain{rs.IPv4, rs.IPv6} {
			nat := false
			for _, c := range chains {
				if nat && c.Table != "nat" {
					t.Errorf("InPod(%+v): %s %s is connected after nat, want before", o, c.Table, c.Name)
				}
				nat = nat || c.Table == "nat"
			}
			if last := chains[len(chains)-1]; last.From != "OUTPUT" || last.Table != "nat" {
				t.Errorf("InPod(%+v): last chain is %s %s, want nat OUTPUT", o, last.Table, last.From)
			}
		}
	}
}

func TestParseInterfaces(t *testing.T) {
	t.Parallel()
	for in, want := range map[string][]string{
		"":                          nil,
		"tap0":                      {"tap0"},
		" tap0 , tap1,tap0":         {"tap0", "tap1"},
		"-j,! x,a b,a/b,..,eth+":    nil,
		"abcdefghijklmnop,kube-br0": {"kube-br0"},
	} {
		if d := cmp.Diff(want, rules.ParseInterfaces(in)); d != "" {
			t.Errorf("ParseInterfaces(%q) (-want +got):\n%s", in, d)
		}
	}
}

func TestSame(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, a, b string
		want       bool
	}{
		{"itself", "-p tcp -j ACCEPT", "-p tcp -j ACCEPT", true},
		{"a match that says nothing new", "-p tcp -m tcp -j ACCEPT", "-p tcp -j ACCEPT", true},
		{"full masks", "-j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff", "-j CONNMARK --restore-mark", true},
		{"a narrower mask", "-j CONNMARK --restore-mark --nfmask 0xfff --ctmask 0xffffffff", "-j CONNMARK --restore-mark", false},
		{"another port", "-p tcp -j REDIRECT --to-ports 1", "-p tcp -j REDIRECT --to-ports 2", false},
		{"negated", "! -d 127.0.0.1/32 -j ACCEPT", "-d 127.0.0.1/32 -j ACCEPT", false},
	} {
		if got := rules.Same(strings.Fields(c.a), strings.Fields(c.b)); got != c.want {
			t.Errorf("%s: Same(%q, %q) = %v, want %v", c.name, c.a, c.b, got, c.want)
		}
	}
}
