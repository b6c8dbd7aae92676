package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/mistnet/mistnet/internal/netlab"
)

// command returns how a component of the control plane is run.
func (l *Lab) command(component string) ([]string, error) {
	pki := func(file string) string { return l.path("pki", file) }
	kubeconfig := pki(component + ".kubeconfig")
	// Not over TCP, where a capture on the fabric would see what it stores. It insists on advertising an address all the same.
	etcd := "unix://" + l.path("run", "etcd.sock")
	switch component {
	case "etcd":
		return []string{
			filepath.Join(l.state.Binaries.Etcd, "etcd"), "--data-dir=" + l.path("etcd"), "--unsafe-no-fsync", "--log-level=warn",
			"--listen-client-urls=" + etcd, "--advertise-client-urls=http://127.0.0.1:2379", "--listen-peer-urls=http://127.0.0.1:2380",
		}, nil
	case "kube-apiserver":
		services := serviceRange
		if l.state.DualStack {
			services += "," + service6
		}
		return []string{
			filepath.Join(l.state.Binaries.Kube, component), "--etcd-servers=" + etcd, "--profiling=false",
			"--advertise-address=" + controlPlaneIP.String(), "--bind-address=0.0.0.0", "--secure-port=" + strconv.Itoa(apiPort),
			"--service-cluster-ip-range=" + services, "--allow-privileged=true",
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
			"--client-ca-file=" + pki("ca.crt"), "--tls-cert-file=" + pki("apiserver.crt"), "--tls-private-key-file=" + pki("apiserver.key"),
			"--kubelet-client-certificate=" + pki("apiserver-kubelet.crt"), "--kubelet-client-key=" + pki("apiserver-kubelet.key"),
			"--kubelet-certificate-authority=" + pki("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
			"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
			"--service-account-key-file=" + pki("sa.pub"), "--service-account-signing-key-file=" + pki("sa.key"),
			"--requestheader-client-ca-file=" + pki("front.crt"), "--requestheader-allowed-names=front-proxy-client",
			"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
			"--requestheader-extra-headers-prefix=X-Remote-Extra-",
			"--proxy-client-cert-file=" + pki("front-client.crt"), "--proxy-client-key-file=" + pki("front-client.key"),
			"--enable-aggregator-routing=true", // webhooks are dialed by pod address: there is no kube-proxy beside it
		}, nil
	case "kube-controller-manager":
		return []string{
			filepath.Join(l.state.Binaries.Kube, component), "--bind-address=127.0.0.1", "--leader-elect=false", "--profiling=false",
			"--kubeconfig=" + kubeconfig, "--authentication-kubeconfig=" + kubeconfig, "--authorization-kubeconfig=" + kubeconfig,
			"--use-service-account-credentials=true", "--service-account-private-key-file=" + pki("sa.key"),
			"--root-ca-file=" + pki("ca.crt"), "--cluster-signing-cert-file=" + pki("ca.crt"), "--cluster-signing-key-file=" + pki("ca.key"),
			"--allocate-node-cidrs=false", "--flex-volume-plugin-dir=" + l.path("flex"),
			"--kube-api-qps=500", "--kube-api-burst=1000", // the defaults make it wait for itself at start
		}, nil
	case "kube-scheduler":
		return []string{
			filepath.Join(l.state.Binaries.Kube, component), "--bind-address=127.0.0.1", "--leader-elect=false", "--profiling=false",
			"--kubeconfig=" + kubeconfig, "--authentication-kubeconfig=" + kubeconfig, "--authorization-kubeconfig=" + kubeconfig,
		}, nil
	}
	return nil, fmt.Errorf("no component %q of the control plane: want etcd, kube-apiserver, kube-controller-manager or kube-scheduler", component)
}

// Start starts a component of the control plane: etcd, kube-apiserver, kube-controller-manager or kube-scheduler.
func (l *Lab) Start(component string) error {
	args, err := l.command(component)
	if err != nil {
		return err
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	pid, err := l.spawn(l.netns("cp"), cmd, l.path("log", component+".log"))
	if err != nil {
		return fmt.Errorf("start %s: %w", component, err)
	}
	return os.WriteFile(l.path("run", component+".pid"), []byte(strconv.Itoa(pid)), 0o644)
}

// Stop kills a component of the control plane and waits for its end: kill -9, for a crash is what suites ask for.
func (l *Lab) Stop(ctx context.Context, component string) error {
	if _, err := l.command(component); err != nil {
		return err
	}
	return endPIDFile(ctx, l.path("run", component+".pid"))
}

// Restart stops and starts a component of the control plane.
func (l *Lab) Restart(ctx context.Context, component string) error {
	if err := l.Stop(ctx, component); err != nil {
		return err
	}
	return l.Start(component)
}

// spawn starts a program in a network namespace, detached from this process, which may end before it.
func (l *Lab) spawn(netns string, cmd *exec.Cmd, logFile string) (int, error) {
	log, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := within(filepath.Join(netnsDir, netns), cmd.Start); err != nil {
		return 0, err
	}
	// Waiting only spares this process a zombie; it ends with the program or with this process.
	go func() { _ = cmd.Wait() }()
	return cmd.Process.Pid, nil
}

// endPIDFile kills the process a file names, waits until it is gone, and removes the file. Without the file there is
// nothing to do.
func endPIDFile(ctx context.Context, file string) error {
	raw, err := os.ReadFile(file)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	_ = syscall.Kill(pid, syscall.SIGKILL)
	err = until(ctx, endTimeout, fmt.Sprintf("process %d to end", pid), func(context.Context) error {
		if _, err := netlab.ProcessStart(pid); err == nil {
			return fmt.Errorf("it runs")
		}
		// Its first thread may be over while others still hold its sockets.
		if threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid)); err == nil && len(threads) > 1 {
			return fmt.Errorf("%d of its threads run", len(threads)-1)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return os.Remove(file)
}

// until calls fn every now and then until it returns no error, and says after timeout what was waited for and why it was
// not so.
func until(ctx context.Context, timeout time.Duration, what string, fn func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := fn(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w: %w", what, context.Cause(ctx), err)
		case <-tick.C:
		}
	}
}

// tails returns the ends of all logs, for a failed test.
func (l *Lab) tails() string {
	const lines = 15
	var b strings.Builder
	logs, _ := filepath.Glob(l.path("log", "*.log"))
	more, _ := filepath.Glob(l.path("node*", "*.log"))
	for _, file := range slices.Concat(logs, more) {
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		all := strings.Split(strings.TrimSpace(string(text)), "\n")
		fmt.Fprintf(&b, "== %s\n%s\n", strings.TrimPrefix(file, l.state.dir+"/"), strings.Join(all[max(0, len(all)-lines):], "\n"))
	}
	return b.String()
}
