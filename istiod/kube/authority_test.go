package kube_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/mistnet/mistnet/istiod/ca"
	"github.com/mistnet/mistnet/istiod/kube"
	"github.com/mistnet/mistnet/istiod/translate"
)

func secret(name string, data map[string][]byte) *corev1.Secret {
	return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: name}, Data: data}
}

// TestReplicasShareOneRoot: of replicas that start at once, each finds the root that one of them made.
func TestReplicasShareOneRoot(t *testing.T) {
	t.Parallel()
	client := fake.NewClientset()
	roots := make([][]byte, 5)
	var wg sync.WaitGroup
	for i := range roots {
		wg.Go(func() {
			files, err := kube.CAFiles(t.Context(), kube.Config{Clients: kube.Clients{Kube: client}, Mesh: translate.Config{TrustDomain: "mesh.example"}})
			if err != nil {
				t.Error(err)
				return
			}
			a, err := ca.Open(ca.Config{Files: files, TrustDomain: "mesh.example"})
			if err != nil {
				t.Error(err)
				return
			}
			roots[i] = a.RootPEM()
		})
	}
	wg.Wait()
	for _, r := range roots {
		if len(r) == 0 || !bytes.Equal(r, roots[0]) {
			t.Fatal("two replicas have two roots")
		}
	}
	kept, err := client.CoreV1().Secrets("istio-system").Get(t.Context(), "istio-ca-secret", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if kept.Type != "istio.io/ca-root" || !bytes.Equal(kept.Data["root-cert.pem"], roots[0]) || !bytes.Equal(kept.Data["ca-cert.pem"], roots[0]) || len(kept.Data["ca-key.pem"]) == 0 {
		t.Errorf("Secret of type %s with %d keys, want Istio's layout", kept.Type, len(kept.Data))
	}
}

func TestPluggedAuthorityGoesFirst(t *testing.T) {
	t.Parallel()
	mine, err := ca.NewRoot("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := ca.NewRoot("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	// As old versions of Istio left it: no root-cert.pem, and empty keys.
	old := map[string][]byte{"ca-cert.pem": mine["ca-cert.pem"], "ca-key.pem": mine["ca-key.pem"], "cert-chain.pem": nil, "key.pem": nil}
	manager := map[string][]byte{"tls.crt": theirs["ca-cert.pem"], "tls.key": theirs["ca-key.pem"], "ca.crt": theirs["root-cert.pem"]}
	for name, c := range map[string]struct {
		secrets []runtime.Object
		want    []byte
	}{
		"only the self-signed one": {[]runtime.Object{secret("istio-ca-secret", old)}, mine["root-cert.pem"]},
		"both":                     {[]runtime.Object{secret("istio-ca-secret", old), secret("cacerts", theirs)}, theirs["root-cert.pem"]},
		"as cert-manager writes":   {[]runtime.Object{secret("cacerts", manager)}, theirs["root-cert.pem"]},
	} {
		files, err := kube.CAFiles(t.Context(), kube.Config{Clients: kube.Clients{Kube: fake.NewClientset(c.secrets...)}})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		a, err := ca.Open(ca.Config{Files: files})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !bytes.Equal(a.RootPEM(), c.want) {
			t.Errorf("%s: the root is another", name)
		}
	}
	_, err = kube.CAFiles(t.Context(), kube.Config{Clients: kube.Clients{Kube: fake.NewClientset(secret("cacerts", map[string][]byte{"x": nil}))}})
	if err == nil || !strings.Contains(err.Error(), "istio-system/cacerts") {
		t.Errorf("a Secret without keys: %v, want an error that names it", err)
	}
}

// TestMeshConfigIsAwaited: without the API server's word istiod does not guess.
func TestMeshConfigIsAwaited(t *testing.T) {
	t.Parallel()
	client := fake.NewClientset(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istio-canary"},
		Data: map[string]string{"mesh": "trustDomain: mesh.example\nrootNamespace: istio-config\naccessLogFile: /dev/stdout\nmistnet: {waypointUnavailable: deny}\n" +
			"defaultVirtualServiceExportTo: [.]\ndefaultDestinationRuleExportTo: [shop]\ndefaultHttpRetryPolicy: {attempts: 5, retryOn: 'reset,503', perTryTimeout: 2s}\n"}})
	refusals := 2
	client.PrependReactor("get", "configmaps", func(clienttesting.Action) (bool, runtime.Object, error) {
		if refusals--; refusals >= 0 {
			return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "configmaps"}, "istio-canary", nil)
		}
		return false, nil, nil
	})
	cfg := kube.Config{Clients: kube.Clients{Kube: client}, Revision: "canary", Mesh: translate.Config{ClusterID: "east"}}
	got, err := kube.ReadMesh(t.Context(), cfg)
	want := translate.Config{ClusterID: "east", TrustDomain: "mesh.example", RootNamespace: "istio-config", ClusterDomain: "cluster.local"}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("ReadMesh = %+v, %v, want %+v", got, err, want)
	}
	cfg.Revision = "default"
	if got, err := kube.ReadMesh(t.Context(), cfg); err != nil || got.TrustDomain != "cluster.local" {
		t.Errorf("ReadMesh without a ConfigMap = %+v, %v, want the defaults", got, err)
	}
}

// TestRootOfOurOwnIsRenewed: in the Secret, under the version that was read, with nothing else of it lost.
func TestRootOfOurOwnIsRenewed(t *testing.T) {
	t.Parallel()
	files, err := ca.NewRoot("cluster.local")
	if err != nil {
		t.Fatal(err)
	}
	client := fake.NewClientset()
	cfg := kube.Config{Clients: kube.Clients{Kube: client}}
	if renewed, err := kube.RenewCA(t.Context(), cfg); renewed || err != nil {
		t.Errorf("RenewCA without a Secret = %t, %v; want nothing", renewed, err)
	}
	files["note"] = []byte("kept")
	if _, err := client.CoreV1().Secrets("istio-system").Create(t.Context(), secret("istio-ca-secret", files), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if renewed, err := kube.RenewCA(t.Context(), cfg); renewed || err != nil {
		t.Errorf("RenewCA of a new root = %t, %v; want nothing", renewed, err)
	}
	short := shortRoot(t)
	if _, err := client.CoreV1().Secrets("istio-system").Update(t.Context(), secret("istio-ca-secret", short), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if renewed, err := kube.RenewCA(t.Context(), cfg); !renewed || err != nil {
		t.Fatalf("RenewCA of a root about to expire = %t, %v; want a new one", renewed, err)
	}
	got, err := kube.PresentCAFiles(t.Context(), cfg)
	if err != nil || !bytes.Equal(got["ca-key.pem"], short["ca-key.pem"]) || bytes.Equal(got["ca-cert.pem"], short["ca-cert.pem"]) ||
		!bytes.Contains(got["root-cert.pem"], short["root-cert.pem"]) {
		t.Errorf("%v: the key is another, or the certificate is not, or the old root is lost", err)
	}
	a, err := ca.Open(ca.Config{Files: got})
	if err != nil {
		t.Fatal(err)
	}
	if _, root := a.Expiry(); time.Until(root) < 9*365*24*time.Hour {
		t.Errorf("the new root expires on %s", root)
	}
}

// shortRoot is a root with a tenth of its life left.
func shortRoot(t *testing.T) map[string][]byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{Organization: []string{"cluster.local"}},
		NotBefore: time.Now().Add(-9 * time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return map[string][]byte{"ca-cert.pem": cert, "root-cert.pem": cert, "ca-key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})}
}
