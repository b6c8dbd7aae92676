package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/netlab"
)

// connect opens the control plane's namespace and prepares the client.
func (l *Lab) connect() error {
	var err error
	if l.space, err = linux.OpenNetNS(filepath.Join(netnsDir, l.netns("cp"))); err != nil {
		return fmt.Errorf("open lab %s: %w", l.state.Name, err)
	}
	if l.config, err = clientcmd.BuildConfigFromFlags("", l.Kubeconfig()); err != nil {
		return err
	}
	l.config.Dial = l.DialContext
	l.config.QPS, l.config.Burst = 200, 400
	l.client, err = kubernetes.NewForConfig(l.config)
	return err
}

// Client is an administrator's client of the API server.
func (l *Lab) Client() *kubernetes.Clientset { return l.client }

// RESTConfig is what Client is made of, for other clients.
func (l *Lab) RESTConfig() *rest.Config { return rest.CopyConfig(l.config) }

// DialContext connects from outside the nodes: from the network they are on, where the API server is.
func (l *Lab) DialContext(ctx context.Context, _, address string) (net.Conn, error) {
	return dialIn(ctx, filepath.Join(netnsDir, l.netns("cp")), address)
}

// Command prepares a program of the machine to be run on the network the nodes are on, with kubectl in its PATH and an
// administrator's KUBECONFIG.
func (l *Lab) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + filepath.Join(netnsDir, l.netns("cp")), "--"}, args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+l.Kubeconfig(), "PATH="+l.Bin()+":"+os.Getenv("PATH"), "KUBECACHEDIR="+l.path("kubecache"))
	return cmd
}

// Kubectl runs kubectl as an administrator and returns its standard output; standard error is part of the error.
func (l *Lab) Kubectl(ctx context.Context, args ...string) (string, error) {
	return l.kubectl(ctx, nil, args...)
}

// Apply has kubectl apply manifests.
func (l *Lab) Apply(ctx context.Context, manifests string, args ...string) error {
	_, err := l.kubectl(ctx, []byte(manifests), append([]string{"apply", "-f", "-"}, args...)...)
	return err
}

func (l *Lab) kubectl(ctx context.Context, stdin []byte, args ...string) (string, error) {
	cmd := l.Command(ctx, append([]string{filepath.Join(l.Bin(), "kubectl")}, args...)...)
	cmd.Stdin = bytes.NewReader(stdin)
	return output(cmd, "kubectl "+strings.Join(args, " "))
}

// WaitForAPI waits until the API server says that it is ready.
func (l *Lab) WaitForAPI(ctx context.Context) error {
	return until(ctx, readyTimeout, "the API server", func(ctx context.Context) error {
		return l.client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	})
}

// WaitReady waits until the node's kubelet says that it is ready, later than the node's last start.
func (n *Node) WaitReady(ctx context.Context) error {
	fi, err := os.Stat(n.pidFile()) // written at the start
	if err != nil {
		return fmt.Errorf("%s is off", n.Name)
	}
	started := fi.ModTime().Truncate(time.Second) // as the API's times are
	return until(ctx, readyTimeout, n.Name+" to be ready", func(ctx context.Context) error {
		node, err := n.lab.client.CoreV1().Nodes().Get(ctx, n.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range node.Status.Conditions {
			if c.Type != corev1.NodeReady {
				continue
			}
			if c.Status == corev1.ConditionTrue && !c.LastHeartbeatTime.Time.Before(started) {
				return nil
			}
			return fmt.Errorf("ready is %s since %s: %s", c.Status, c.LastTransitionTime, c.Message)
		}
		return errors.New("it has no condition Ready")
	})
}

// deployDNS applies CoreDNS. The node DNS check that follows proves it: controller manager, scheduler, kubelet, CNI, service
// accounts and kube-proxy work by then.
func (l *Lab) deployDNS(ctx context.Context) error {
	manifests, err := l.render("files/coredns.yaml", nil)
	if err != nil {
		return err
	}
	return l.Apply(ctx, string(manifests))
}

// LoadImages imports image archives, OCI or Docker's, on every node that runs. Images are pinned: the kubelet does not
// remove them.
func (l *Lab) LoadImages(ctx context.Context, archives ...string) error {
	var errs []error
	for _, n := range l.Nodes {
		if !n.running() {
			continue
		}
		for _, archive := range archives {
			errs = append(errs, n.loadImage(ctx, archive))
		}
	}
	return errors.Join(errs...)
}

// loadOwn builds what the lab's own images are made of, if that has changed, and loads them: for who works on e2e/app.
func (l *Lab) loadOwn(ctx context.Context, progress io.Writer) error {
	bins, err := Build(ctx, "", progress)
	if err != nil {
		return err
	}
	archives, err := packImages(bins, l.path("images"))
	if err != nil {
		return err
	}
	return l.LoadImages(ctx, archives...)
}

func (n *Node) loadImage(ctx context.Context, archive string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	cmd, err := n.Command(ctx, "ctr", "images", "import", "--label", "io.cri-containerd.pinned=pinned", "-")
	if err != nil {
		return err
	}
	cmd.Stdin = f
	_, err = output(cmd, fmt.Sprintf("load %s on %s", archive, n.Name))
	return err
}

// Capture records all traffic between nodes, and between nodes and the control plane, until ctx ends or Stop.
func (l *Lab) Capture(ctx context.Context) (*netlab.Capture, error) {
	// CaptureIn uses nothing of the netlab.Lab it is a method of.
	return new(netlab.Lab).CaptureIn(ctx, &netlab.Namespace{NetNS: l.space, NSName: l.netns("cp")})
}
