package lab_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/e2e/lab"
)

// needsCluster skips a test that takes a minute, and ten the first time, unless it was asked for.
func needsCluster(t *testing.T) {
	t.Helper()
	if os.Getenv("MISTNET_E2E") == "" {
		t.Skip("runs a Kubernetes cluster: set MISTNET_E2E=1 (make e2e does)")
	}
}

// machine is what a lab could change of the machine and must not.
func machine(t *testing.T) map[string][]string {
	t.Helper()
	seen := map[string][]string{}
	glob := func(what, pattern string) {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		seen[what] = found
	}
	// Other tests make namespaces, links and mounts meanwhile; names that a lab gives, or Kubernetes, are ours.
	glob("network namespaces", "/run/netns/me2e-*")
	glob("links", "/sys/class/net/me2e*")
	glob("cgroups", "/sys/fs/cgroup/*/mistnet-e2e-*")
	glob("cgroups of pods", "/sys/fs/cgroup/*/kube*")
	glob("files of the kubelet", "/var/lib/kubelet/*")
	glob("files of containerd", "/var/lib/containerd/*")
	glob("container runtime", "/run/containerd/*")
	glob("CNI configuration", "/etc/cni/net.d/*")
	glob("CNI plugins", "/opt/cni/bin/*")
	glob("CNI state", "/var/lib/cni/*")
	glob("pod logs", "/var/log/pods/*")
	glob("volume plugins", "/usr/libexec/kubernetes/*")
	for _, name := range []string{
		"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys",
		"kernel/keys/root_maxbytes", "net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "kernel/hostname",
	} {
		value, err := os.ReadFile(filepath.Join("/proc/sys", name))
		if err != nil {
			t.Fatal(err)
		}
		seen["sysctl "+name] = []string{string(bytes.TrimSpace(value))}
	}
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		t.Fatal(err)
	}
	ours := regexp.MustCompile(`mistnet-e2e|/kubelet/|containerd|me2e-`)
	for line := range strings.Lines(string(mounts)) {
		if ours.MatchString(line) {
			seen["mounts"] = append(seen["mounts"], line)
		}
	}
	return seen
}

func TestALabLeavesTheMachineAsItWas(t *testing.T) {
	needsCluster(t)
	before := machine(t)
	cfg := lab.FromEnv()
	cfg.Progress = testWriter{t}
	l, err := lab.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	smoke(t, l)
	// Something must be there to be removed, or the comparison proves nothing.
	if left, err := lab.Leftovers("", l.Name()); err != nil || len(left) < 10 {
		t.Errorf("a running lab shows as %q, %v: the check is blind", left, err)
	}
	if cmp.Equal(before, machine(t)) {
		t.Error("a running lab does not show on the machine: the check is blind")
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if left, err := lab.Leftovers("", l.Name()); err != nil || len(left) > 0 {
		t.Errorf("after Close there are %q, %v", left, err)
	}
	if diff := cmp.Diff(before, machine(t)); diff != "" {
		t.Errorf("the machine is not as it was (-before +after):\n%s", diff)
	}
}

type testWriter struct{ testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

func TestConfigIsRefusedByName(t *testing.T) {
	t.Parallel()
	for want, cfg := range map[string]lab.Config{
		"want 1 to 9":              {Nodes: 12},
		"want nftables or":         {ProxyMode: "ipvs"},
		"up to 16 letters a-z and": {Name: "../etc"},
	} {
		_, err := lab.Start(t.Context(), cfg)
		if os.Geteuid() != 0 {
			want = "needs root"
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Start(%+v) = %v, want an error with %q", cfg, err, want)
		}
	}
}

// TestSweepRemovesWhatAKilledProcessLeft starts a lab in a process that is killed in the middle of it.
func TestSweepRemovesWhatAKilledProcessLeft(t *testing.T) {
	needsCluster(t)
	const name = "sweep"
	if os.Getenv("MISTNET_E2E_VICTIM") != "" {
		_, err := lab.Start(t.Context(), lab.Config{Name: name})
		t.Fatalf("started, or not: %v; should have been killed before", err)
	}
	victim := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	victim.Env = append(os.Environ(), "MISTNET_E2E_VICTIM=1")
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	// Both nodes run: their programs and the control plane outlive who started them.
	eventually(t, "the lab is half made", func() error {
		left, err := lab.Leftovers("", name)
		if err == nil && strings.Count(strings.Join(left, "\n"), "node.sh") < 2 {
			err = errors.New("its nodes do not run yet")
		}
		return err
	})
	if err := victim.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = victim.Wait()
	if left, err := lab.Leftovers("", name); err != nil || len(left) < 10 {
		t.Fatalf("a killed process left %q, %v: there is nothing to sweep", left, err)
	}
	if err := lab.Sweep(t.Context(), ""); err != nil {
		t.Error(err)
	}
	if left, err := lab.Leftovers("", name); err != nil || len(left) > 0 {
		t.Errorf("after Sweep there are %q, %v", left, err)
	}
}
