package kube_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// apiServer is a real API server, and an etcd, for one test.
type apiServer struct {
	t    *testing.T
	dir  string
	bin  string
	args []string
	proc *exec.Cmd

	kube    kubernetes.Interface // as administrator
	dynamic dynamic.Interface
	url     string
}

const adminToken = "administrator"

// startAPIServer skips the test where the two programs are not at hand: they are not built here.
func startAPIServer(t *testing.T) *apiServer {
	t.Helper()
	bins := make(map[string]string)
	for _, env := range []string{"KUBE_APISERVER_BIN", "ETCD_BIN"} {
		if bins[env] = os.Getenv(env); bins[env] == "" {
			t.Skipf("optional: %s does not say where that program is", env)
		}
	}
	s := &apiServer{t: t, dir: t.TempDir(), bin: bins["KUBE_APISERVER_BIN"]}
	client, peer, port := freePort(t), freePort(t), freePort(t)
	etcd := fmt.Sprintf("http://127.0.0.1:%d", client)
	s.spawn(bins["ETCD_BIN"], "--data-dir="+filepath.Join(s.dir, "etcd"), "--unsafe-no-fsync", "--listen-client-urls="+etcd, "--advertise-client-urls="+etcd,
		fmt.Sprintf("--listen-peer-urls=http://127.0.0.1:%d", peer), fmt.Sprintf("--initial-advertise-peer-urls=http://127.0.0.1:%d", peer),
		fmt.Sprintf("--initial-cluster=default=http://127.0.0.1:%d", peer))
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	s.check(err)
	der, err := x509.MarshalECPrivateKey(key)
	s.check(err)
	s.file("sa.key", pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}))
	s.file("tokens", []byte(adminToken+",admin,admin,system:masters\n"))
	s.url = fmt.Sprintf("https://127.0.0.1:%d", port)
	s.args = []string{"--etcd-servers=" + etcd, fmt.Sprintf("--secure-port=%d", port), "--bind-address=127.0.0.1", "--cert-dir=" + filepath.Join(s.dir, "certs"),
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file=" + filepath.Join(s.dir, "sa.key"),
		"--service-account-signing-key-file=" + filepath.Join(s.dir, "sa.key"), "--token-auth-file=" + filepath.Join(s.dir, "tokens"),
		"--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount", "--service-cluster-ip-range=10.96.0.0/16",
		"--shutdown-delay-duration=0s", "--watch-cache=true", "--profiling=false"}
	admin := &rest.Config{Host: s.url, BearerToken: adminToken, TLSClientConfig: rest.TLSClientConfig{Insecure: true}, QPS: 200, Burst: 400}
	s.kube, err = kubernetes.NewForConfig(admin)
	s.check(err)
	s.dynamic, err = dynamic.NewForConfig(admin)
	s.check(err)
	s.up()
	return s
}

func freePort(t *testing.T) int {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).Port
}

func (s *apiServer) check(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *apiServer) file(name string, content []byte) {
	s.t.Helper()
	s.check(os.WriteFile(filepath.Join(s.dir, name), content, 0o600))
}

func (s *apiServer) spawn(bin string, args ...string) *exec.Cmd {
	s.t.Helper()
	cmd := exec.Command(bin, args...)
	log, err := os.Create(filepath.Join(s.dir, filepath.Base(bin)+".log"))
	s.check(err)
	cmd.Stdout, cmd.Stderr = log, log
	s.check(cmd.Start())
	s.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if text, err := os.ReadFile(log.Name()); err == nil && s.t.Failed() {
			s.t.Logf("end of the log of %s:\n%s", filepath.Base(bin), text[max(0, len(text)-3000):])
		}
		log.Close()
	})
	return cmd
}

// up starts the API server and waits until it answers.
func (s *apiServer) up() {
	s.t.Helper()
	s.proc = s.spawn(s.bin, s.args...)
	s.await("the API server is ready", 2*time.Minute, func(ctx context.Context) error {
		return s.kube.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	})
}

// down ends it at once, as a power cut does.
func (s *apiServer) down() {
	s.t.Helper()
	s.check(s.proc.Process.Kill())
	_ = s.proc.Wait()
}

func (s *apiServer) await(what string, most time.Duration, try func(context.Context) error) {
	s.t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(most)
	for {
		err := try(s.t.Context())
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			s.t.Fatalf("never: %s: %v", what, err)
		}
	}
}

// apply creates the objects of a YAML text, of the kinds given by resource.
func (s *apiServer) apply(text []byte, resources map[string]schema.GroupVersionResource) {
	s.t.Helper()
	for d := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(text), 4096); ; {
		var u unstructured.Unstructured
		if err := d.Decode(&u.Object); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			s.t.Fatal(err)
		}
		r, ok := resources[u.GetKind()]
		if !ok {
			continue
		}
		var to dynamic.ResourceInterface = s.dynamic.Resource(r)
		if u.GetNamespace() != "" {
			to = s.dynamic.Resource(r).Namespace(u.GetNamespace())
		}
		_, err := to.Create(s.t.Context(), &u, metav1.CreateOptions{})
		s.check(err)
	}
}

// prepare makes istiod's namespace and account, with the permissions of testdata/rbac.yaml and no others.
func (s *apiServer) prepare() (kubeconfig string) {
	s.t.Helper()
	s.namespace("istio-system")
	s.account("istio-system", "istiod")
	rules, err := os.ReadFile("testdata/rbac.yaml")
	s.check(err)
	s.apply(rules, map[string]schema.GroupVersionResource{
		"ClusterRole": rbacv1.SchemeGroupVersion.WithResource("clusterroles"), "Role": rbacv1.SchemeGroupVersion.WithResource("roles")})
	ctx := s.t.Context()
	subject := []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: "istio-system", Name: "istiod"}}
	_, err = s.kube.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "istiod"},
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "istiod"}, Subjects: subject}, metav1.CreateOptions{})
	s.check(err)
	_, err = s.kube.RbacV1().RoleBindings("istio-system").Create(ctx, &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "istiod"},
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "istiod"}, Subjects: subject}, metav1.CreateOptions{})
	s.check(err)
	path := filepath.Join(s.dir, "istiod.kubeconfig")
	s.check(clientcmd.WriteToFile(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"c": {Server: s.url, InsecureSkipTLSVerify: true}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"u": {Token: s.token("istio-system", "istiod", nil)}},
		Contexts:       map[string]*clientcmdapi.Context{"x": {Cluster: "c", AuthInfo: "u"}},
		CurrentContext: "x",
	}, path))
	return path
}

func (s *apiServer) namespace(name string) {
	s.t.Helper()
	_, err := s.kube.CoreV1().Namespaces().Create(s.t.Context(), namespace(name, nil), metav1.CreateOptions{})
	s.check(err)
}

func (s *apiServer) account(ns, name string) {
	s.t.Helper()
	_, err := s.kube.CoreV1().ServiceAccounts(ns).Create(s.t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}}, metav1.CreateOptions{})
	s.check(err)
}

// token is one of an account: for the API server, or, when it is bound to a pod, for istiod.
func (s *apiServer) token(ns, account string, pod *corev1.Pod) string {
	s.t.Helper()
	req := &authenticationv1.TokenRequest{}
	if pod != nil {
		req.Spec.Audiences = []string{"istio-ca"}
		req.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID}
	}
	got, err := s.kube.CoreV1().ServiceAccounts(ns).CreateToken(s.t.Context(), account, req, metav1.CreateOptions{})
	s.check(err)
	return got.Status.Token
}

// pod makes a pod that runs, as kubelet and the CNI agent would leave it.
func (s *apiServer) pod(ns, name, node, ip string) *corev1.Pod {
	s.t.Helper()
	p := pod(ns, name, ip)
	p.UID, p.ManagedFields, p.Spec.NodeName = "", nil, node
	got, err := s.kube.CoreV1().Pods(ns).Create(s.t.Context(), p, metav1.CreateOptions{})
	s.check(err)
	got.Status = p.Status
	got, err = s.kube.CoreV1().Pods(ns).UpdateStatus(s.t.Context(), got, metav1.UpdateOptions{})
	s.check(err)
	return got
}

// crds installs Istio's own, from its module.
func (s *apiServer) crds() {
	s.t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "istio.io/api").Output()
	s.check(err)
	text, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(out)), "kubernetes", "customresourcedefinitions.gen.yaml"))
	s.check(err)
	s.apply(text, map[string]schema.GroupVersionResource{
		"CustomResourceDefinition": {Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}})
}

func (s *apiServer) create(r schema.GroupVersionResource, u *unstructured.Unstructured) {
	s.t.Helper()
	u = u.DeepCopy()
	unstructured.RemoveNestedField(u.Object, "metadata", "generation")
	s.await("create "+u.GetName(), patience, func(ctx context.Context) error { // a CRD takes a moment to be served
		_, err := s.dynamic.Resource(r).Namespace(u.GetNamespace()).Create(ctx, u, metav1.CreateOptions{})
		return err
	})
}
