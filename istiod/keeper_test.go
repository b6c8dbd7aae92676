package istiod

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/mistnet/mistnet/istiod/ca"
	"github.com/mistnet/mistnet/istiod/kube"
)

// TestKeeperFollowsWhatIsPluggedIn: a Secret, a mount that comes before it, and nothing that is faulty.
func TestKeeperFollowsWhatIsPluggedIn(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		files := make([]map[string][]byte, 3)
		for i := range files {
			var err error
			if files[i], err = ca.NewRoot("cluster.local"); err != nil {
				t.Fatal(err)
			}
		}
		client := fake.NewClientset(&corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "istio-ca-secret"}, Data: files[0]})
		secrets := client.CoreV1().Secrets("istio-system")
		authority, err := ca.Open(ca.Config{Files: files[0], Overlap: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		var handedOut atomic.Pointer[[]byte]
		k := &keeper{authority: authority, dir: dir, kube: kube.Config{Clients: kube.Clients{Kube: client}}, log: zap.NewNop(),
			write: func(pem []byte) { handedOut.Store(&pem) }}
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); k.run(ctx) }()
		defer func() { stop(); <-done }()
		after := func(d time.Duration, what string, roots ...map[string][]byte) {
			t.Helper()
			time.Sleep(d)
			synctest.Wait()
			var want []byte
			for _, r := range roots {
				want = append(want, r["root-cert.pem"]...)
			}
			if got := *handedOut.Load(); !bytes.Equal(got, want) {
				t.Errorf("%s: %d roots are handed out, want %d", what, bytes.Count(got, []byte("BEGIN")), len(roots))
			}
		}
		after(time.Minute, "nothing changed", files[0])
		if _, err := secrets.Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "cacerts"}, Data: files[1]}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		after(20*time.Second, "cacerts came", files[0], files[1])
		after(26*time.Hour, "cacerts signs for longer than certificates live", files[1])

		bad := map[string][]byte{"ca-cert.pem": files[0]["ca-cert.pem"], "ca-key.pem": files[1]["ca-key.pem"], "root-cert.pem": files[0]["root-cert.pem"]}
		if _, err := secrets.Update(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "cacerts"}, Data: bad}, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		after(time.Minute, "cacerts is faulty", files[1])
		if err := k.problem(); err == nil || !strings.Contains(err.Error(), "key does not belong") {
			t.Errorf("problem = %v, want that the key is another's", err)
		}
		for name, data := range files[2] {
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		after(time.Minute, "an authority is mounted", files[1], files[2])
		if err := k.problem(); err != nil {
			t.Errorf("problem = %v, want none", err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"cacerts", "istio-ca-secret"} {
			if err := secrets.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		after(time.Minute, "everything is gone", files[1], files[2])
		if err := k.problem(); err == nil || !strings.Contains(err.Error(), "are gone") {
			t.Errorf("problem = %v, want that the Secrets are gone", err)
		}
	})
}
