package cni_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mistnet/mistnet/cni"
)

// Pods' groups as kubelets of all kinds make them.
var cgroupShapes = map[string]string{
	"v1, cgroupfs":                     "12:pids:/kubepods/burstable/pod%[1]s/2f1c\n1:name=systemd:/kubepods/burstable/pod%[1]s/2f1c\n",
	"v1, systemd":                      "12:pids:/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod%[2]s.slice/cri-containerd-2f1c.scope\n",
	"v2, cgroupfs":                     "0::/kubepods/besteffort/pod%[1]s/2f1c\n",
	"v2, systemd":                      "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod%[2]s.slice/cri-containerd-2f1c.scope\n",
	"v2, systemd, guaranteed":          "0::/kubepods.slice/kubepods-pod%[2]s.slice/crio-2f1c.scope\n",
	"v2, from another cgroup":          "0::/../../kubepods-burstable-pod%[2]s.slice/cri-containerd-2f1c.scope\n",
	"v2, cgroupfs, from another":       "0::/../../burstable/pod%[1]s/2f1c\n",
	"kind":                             "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod%[2]s.slice/cri-containerd-2f1c.scope\n",
	"systemd path, cgroupfs runtime":   "0::/system.slice/containerd.service/kubepods-burstable-pod%[2]s.slice:cri-containerd:2f1c\n",
	"hybrid, the second line tells":    "13:rdma:/\n0::/kubepods/pod%[1]s/2f1c\n",
	"a pod inside of a pod (nested)":   "0::/kubepods/podffffffff-0000-0000-0000-000000000000/c1/kubepods/pod%[1]s/2f1c\n",
	"docker, with a container's group": "11:cpu,cpuacct:/kubepods/pod%[1]s/docker-2f1c.scope/init\n",
}

func TestPodOf(t *testing.T) {
	t.Parallel()
	const uid = "0f6c3a52-77f0-4e9b-9e0b-0d9f8c1d2e3f"
	const static = "1b4cc1d1ba3b0e8ae2e5d8b9a3a0c9d7" // a static pod's UID is a hash
	for name, shape := range cgroupShapes {
		for _, id := range []string{uid, static} {
			line := fmt.Sprintf(shape, id, strings.ReplaceAll(id, "-", "_"))
			if got := cni.PodOf(line, map[string]bool{uid: true, static: true}); got != id {
				t.Errorf("%s: podOf(%q) = %q, want %q", name, line, got, id)
			}
			if got := cni.PodOf(line, map[string]bool{"another": true}); got != "" {
				t.Errorf("%s: podOf(%q) = %q, want none", name, line, got)
			}
		}
	}
	for _, line := range []string{
		"", "\n", "nonsense", "0::/", "0::/user.slice", "0::/pod", "0::/kubepods-pod.slice", "0::/x" + uid,
		"0::/kubepods/pod" + uid + "f/2f1c", "0::/kubepods/notpod" + uid, "0:/kubepods/pod" + uid,
	} {
		if got := cni.PodOf(line, map[string]bool{uid: true, "": true}); got != "" {
			t.Errorf("podOf(%q) = %q, want none", line, got)
		}
	}
}

// procTree is a directory that looks like /proc. Namespaces in it are links to real ones.
type procTree struct {
	t   *testing.T
	dir string
}

func newProcTree(t *testing.T) *procTree { return &procTree{t, t.TempDir()} }

func (p *procTree) process(pid int, started uint64, cgroups, netns string) {
	p.t.Helper()
	dir := filepath.Join(p.dir, strconv.Itoa(pid))
	if err := os.MkdirAll(filepath.Join(dir, "ns"), 0o755); err != nil {
		p.t.Fatal(err)
	}
	// A name may look like the rest of the line.
	stat := fmt.Sprintf("%d (a) S 1 (b) S 1 %s%d 0 0\n", pid, strings.Repeat("0 ", 17), started)
	for name, content := range map[string]string{"cgroup": cgroups, "stat": stat} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			p.t.Fatal(err)
		}
	}
	if netns != "" {
		if err := os.Symlink(netns, filepath.Join(dir, "ns", "net")); err != nil {
			p.t.Fatal(err)
		}
	}
}

func TestTheOldestProcess(t *testing.T) {
	t.Parallel()
	p := newProcTree(t)
	of := func(uid string) string { return "0::/kubepods/pod" + uid + "/c\n" }
	p.process(900, 50, of("u-1"), "")
	p.process(30, 70, of("u-1"), "") // numbers wrap around: the smaller one may be the younger
	p.process(901, 60, of("u-2"), "")
	p.process(5, 1, "0::/init.scope\n", "")
	p.process(6, 1, of("u-3"), "") // not asked for
	p.process(7, 1, of("u-2"), "")
	for file, content := range map[string]string{
		"7/stat": "7 (ended", "uptime": "1 1", "8/none": "", "self/cgroup": of("u-1"),
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(p.dir, file)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(p.dir, file), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := cni.Oldest(p.dir, map[string]bool{"u-1": true, "u-2": true, "u-4": true})
	if d := cmp.Diff(map[string]int{"u-1": 900, "u-2": 901}, got); err != nil || d != "" {
		t.Errorf("oldest = %v (-want +got):\n%s", err, d)
	}
	if _, err := cni.Oldest(filepath.Join(p.dir, "nowhere"), nil); err == nil {
		t.Error("a directory that is missing is no error")
	}
}

// sleeper starts a process inside the sandbox and gives the sandbox the pod's addresses.
func (s *sandbox) sleeper() (pid int) {
	s.t.Helper()
	run(s.t, "ip", "-n", s.name, "addr", "add", "10.9.0.5/32", "dev", "lo")
	cmd := exec.Command("ip", "netns", "exec", s.name, "sleep", "1000")
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd.Process.Pid
}

func TestPodsThatRunAlreadyAreFound(t *testing.T) {
	t.Parallel()
	ambient := func(p *corev1.Pod) { p.Labels = map[string]string{"istio.io/dataplane-mode": "ambient"} }
	static := func(p *corev1.Pod) { p.Annotations = map[string]string{"kubernetes.io/config.mirror": "hash-1"} }
	c := newCluster(t, ns("shop", "ambient"), ns("plain", ""),
		pod("shop", "web-1", "u-1", running), pod("shop", "static", "u-2", running, static),
		pod("plain", "left", "u-3", running, announced("enabled")), // the label went while no agent ran
		pod("plain", "other", "u-4", running),
		pod("shop", "host", "u-5", running, func(p *corev1.Pod) { p.Spec.HostNetwork = true }),
		pod("shop", "lost", "u-6", running),  // its process is in the host's namespace
		pod("shop", "wrong", "u-7", running), // a namespace without the pod's address
		pod("shop", "done", "u-8", running, func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }),
		pod("plain", "late", "u-9", running),
		pod("shop", "elsewhere", "u-10", running, func(p *corev1.Pod) { p.Spec.NodeName = "node-2" }),
	)
	tree := newProcTree(t)
	boxes := map[string]*sandbox{}
	for i, uid := range []string{"u-1", "hash-1", "u-3", "u-4", "u-7", "u-8", "u-9", "u-10"} {
		s := newSandbox(t)
		boxes[uid] = s
		if uid != "u-7" {
			s.sleeper()
		}
		tree.process(100+i, 7, "0::/kubepods/pod"+uid+"/c\n", s.path())
		tree.process(300+i, 8, "0::/kubepods/pod"+uid+"/c2\n", "/proc/self/ns/net") // a child, not asked
	}
	tree.process(200, 7, "0::/kubepods/podu-6/c\n", "/proc/self/ns/net")
	c.config = func(cfg *cni.Config) { cfg.ProcDir = tree.dir }
	// What the agent did to u-3 before it forgot.
	stop := c.launch()
	z, _ := c.ztunnel()
	z.await(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", boxes["u-1"].id()))
	c.announces("shop", "web-1", "enabled")
	c.announces("shop", "static", "enabled")
	c.announces("plain", "left", "")
	if !boxes["u-1"].captured() || !boxes["hash-1"].captured() {
		t.Error("not captured")
	}
	for _, uid := range []string{"u-3", "u-4", "u-7", "u-8", "u-9", "u-10"} {
		if boxes[uid].captured() {
			t.Errorf("%s is captured", uid)
		}
	}
	for _, name := range []string{"host", "lost", "wrong", "done", "elsewhere"} {
		c.announces("shop", name, "")
	}

	// A label on a running pod that nobody reported.
	late := pod("plain", "late", "u-9", running, ambient)
	if _, err := c.api.CoreV1().Pods("plain").Update(t.Context(), late, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	z.await(fmt.Sprintf("add u-9 plain/late sa-late %d", boxes["u-9"].id()))
	c.announces("plain", "late", "enabled")
	stop()

	// The memory is lost, and so is u-9's label: it is found again, and let go.
	if err := os.WriteFile(filepath.Join(c.dir("run"), "pods.json"), []byte(`[{"Name":`), 0o600); err != nil {
		t.Fatal(err)
	}
	plain := pod("plain", "late", "u-9", running, announced("enabled"))
	if _, err := c.api.CoreV1().Pods("plain").Update(t.Context(), plain, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.launch()
	z.await(fmt.Sprintf("add u-1 shop/web-1 sa-web-1 %d", boxes["u-1"].id()))
	c.announces("plain", "late", "")
	c.eventually("its rules are gone", func() bool {
		return !strings.Contains(boxes["u-9"].exec("iptables-save"), "ISTIO_")
	})
	if !boxes["u-1"].captured() {
		t.Error("u-1 lost its rules with the memory")
	}
}

func TestPodsAreFoundByTheirRealProcesses(t *testing.T) {
	t.Parallel()
	needRoot(t)
	// The process's own group is the one the test runs in; the pod is named after it.
	s := newSandbox(t)
	pid := s.sleeper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("processes here are in %q", b)
	group := podGroup(t, pid)
	got, err := cni.Oldest("/proc", map[string]bool{group: true})
	if err != nil || got[group] != pid {
		t.Errorf("oldest = %v, %v; want process %d", got, err, pid)
	}
}

// podGroup puts the process into a cgroup of a made-up pod, and returns the pod's UID.
func podGroup(t *testing.T, pid int) string {
	t.Helper()
	uid := fmt.Sprintf("mist-%d-%d", os.Getpid(), pid)
	var tried []string
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup/pids"} {
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
			tried = append(tried, err.Error())
			continue
		}
		dir := filepath.Join(root, "pod"+uid)
		if err := os.Mkdir(dir, 0o755); err != nil {
			tried = append(tried, err.Error())
			continue
		}
		t.Cleanup(func() { os.Remove(dir) })
		err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644)
		if err == nil {
			// Registered later, runs earlier: the group must be empty to be removed.
			t.Cleanup(func() {
				p, err := os.FindProcess(pid)
				if err == nil {
					p.Kill()
				}
				for range 1000 {
					if b, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs")); len(b) == 0 {
						return
					}
				}
			})
			return uid
		}
		tried = append(tried, err.Error())
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("no cgroup can be made: %v", tried)
	}
	t.Skipf("no cgroup can be made: %v", tried)
	return ""
}
