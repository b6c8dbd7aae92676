package kube_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/mistnet/mistnet/istiod/kube"
	"github.com/mistnet/mistnet/istiod/token"
)

// reviews is an API server that looks at tokens.
type reviews struct {
	*fake.Clientset
	asked atomic.Int32
	down  atomic.Bool

	mu      sync.Mutex
	answers map[string]authenticationv1.TokenReviewStatus
}

func newReviews(objects ...runtime.Object) *reviews {
	r := &reviews{Clientset: fake.NewClientset(objects...), answers: make(map[string]authenticationv1.TokenReviewStatus)}
	r.PrependReactor("create", "tokenreviews", func(a clienttesting.Action) (bool, runtime.Object, error) {
		r.asked.Add(1)
		if r.down.Load() {
			return true, nil, apierrors.NewServiceUnavailable("down")
		}
		review := a.(clienttesting.CreateAction).GetObject().(*authenticationv1.TokenReview).DeepCopy()
		r.mu.Lock()
		defer r.mu.Unlock()
		review.Status = r.answers[review.Spec.Token]
		if len(review.Spec.Audiences) != 1 || review.Spec.Audiences[0] != "istio-ca" {
			return true, nil, fmt.Errorf("audiences = %v, want istio-ca", review.Spec.Audiences)
		}
		return true, review, nil
	})
	return r
}

func (r *reviews) set(raw string, st authenticationv1.TokenReviewStatus) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answers[raw] = st
}

// good is the verdict on a token of a node proxy; extra is key, value, …
func good(extra ...string) authenticationv1.TokenReviewStatus {
	st := authenticationv1.TokenReviewStatus{Authenticated: true, Audiences: []string{"istio-ca"},
		User: authenticationv1.UserInfo{Username: "system:serviceaccount:istio-system:ztunnel", Extra: map[string]authenticationv1.ExtraValue{}}}
	for i := 0; i < len(extra); i += 2 {
		st.User.Extra["authentication.kubernetes.io/"+extra[i]] = authenticationv1.ExtraValue{extra[i+1]}
	}
	return st
}

func TestReviewerTellsWhoCalls(t *testing.T) {
	t.Parallel()
	zt := pod("istio-system", "ztunnel-x", "10.0.0.9")
	zt.UID, zt.Spec.ServiceAccountName = "u1", "ztunnel"
	other := good()
	other.Audiences = []string{"https://kubernetes.default.svc"}
	user := good()
	user.User.Username = "admin"
	for name, c := range map[string]struct {
		status authenticationv1.TokenReviewStatus
		want   token.Caller
		err    string
	}{
		"all is in the token": {status: good("pod-name", "ztunnel-x", "pod-uid", "u1", "node-name", "n7"),
			want: token.Caller{Namespace: "istio-system", ServiceAccount: "ztunnel", Pod: "ztunnel-x", PodUID: "u1", Node: "n7"}},
		"the node is looked up": {status: good("pod-name", "ztunnel-x", "pod-uid", "u1"),
			want: token.Caller{Namespace: "istio-system", ServiceAccount: "ztunnel", Pod: "ztunnel-x", PodUID: "u1", Node: "n1"}},
		"a token without a pod":       {status: good(), want: token.Caller{Namespace: "istio-system", ServiceAccount: "ztunnel"}},
		"another pod of that name":    {status: good("pod-name", "ztunnel-x", "pod-uid", "u2"), err: "another of that name"},
		"a pod that is gone":          {status: good("pod-name", "ztunnel-y", "pod-uid", "u1"), err: "is gone"},
		"for somebody else":           {status: other, err: "not for istio-ca"},
		"not a service account":       {status: user, err: "not a service account"},
		"expired":                     {status: authenticationv1.TokenReviewStatus{Error: "token has expired"}, err: "token has expired"},
		"unknown to the API server":   {status: authenticationv1.TokenReviewStatus{}, err: "does not know it"},
		"a pod without a uid is none": {status: good("pod-name", "ztunnel-x"), err: "gone"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newReviews(zt.DeepCopy())
			r.set("raw", c.status)
			got, err := kube.NewReviewer(r).Verify(t.Context(), "raw")
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) || errors.Is(err, token.ErrUnavailable) || got != (token.Caller{}) {
					t.Errorf("Verify = %+v, %v, want no caller and an error with %q", got, err, c.err)
				}
				return
			}
			if err != nil || got != c.want {
				t.Errorf("Verify = %+v, %v, want %+v", got, err, c.want)
			}
		})
	}
	for _, raw := range []string{"", strings.Repeat("x", 20_000)} {
		r := newReviews()
		if _, err := kube.NewReviewer(r).Verify(t.Context(), raw); err == nil || r.asked.Load() != 0 {
			t.Errorf("Verify(%d bytes) = %v after %d questions, want an error without asking", len(raw), err, r.asked.Load())
		}
	}
}

// TestReviewerAsksSeldom: a verdict holds for a minute, a refusal for seconds, and nothing for longer than the token.
func TestReviewerAsksSeldom(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newReviews()
		v := kube.NewReviewer(r)
		good7 := good("pod-name", "z", "pod-uid", "u", "node-name", "n7")
		short := "h." + base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"exp":%d}`, time.Now().Add(20*time.Second).Unix())) + ".s"
		r.set("long", good7)
		r.set(short, good7)
		verify := func(raw string, ok bool, asked int32) {
			t.Helper()
			before := r.asked.Load()
			_, err := v.Verify(t.Context(), raw)
			if n := r.asked.Load() - before; (err == nil) != ok || n != asked {
				t.Errorf("at %s: Verify(%.4s) = %v after %d questions, want accepted: %v after %d", time.Now().Format("04:05"), raw, err, n, ok, asked)
			}
		}
		verify("long", true, 1)
		verify("long", true, 0)
		verify(short, true, 1)
		verify(short, true, 0)
		verify("bad", false, 1)
		verify("bad", false, 0)
		time.Sleep(6 * time.Second)
		verify("bad", false, 1)
		time.Sleep(15 * time.Second)
		verify(short, true, 1) // the token's end is the API server's to judge
		verify("long", true, 0)
		time.Sleep(40 * time.Second)
		r.set("long", authenticationv1.TokenReviewStatus{})
		verify("long", false, 1)
	})
}

// TestReviewerOutlivesTheAPIServer: who was known goes on to be while nobody can be asked, for a while, and until the
// token ends.
func TestReviewerOutlivesTheAPIServer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newReviews()
		v := kube.NewReviewer(r)
		short := "h." + base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"exp":%d}`, time.Now().Add(3*time.Minute).Unix())) + ".s"
		for _, raw := range []string{"known", short} {
			r.set(raw, good("pod-name", "z", "pod-uid", "u", "node-name", "n7"))
			if _, err := v.Verify(t.Context(), raw); err != nil {
				t.Fatal(err)
			}
		}
		r.down.Store(true)
		time.Sleep(2 * time.Minute)
		for raw, ok := range map[string]bool{"known": true, short: true, "new": false} {
			if _, err := v.Verify(t.Context(), raw); (err == nil) != ok || err != nil && !errors.Is(err, token.ErrUnavailable) {
				t.Errorf("Verify(%.5s) while the API server is down = %v, want accepted: %v", raw, err, ok)
			}
		}
		time.Sleep(2 * time.Minute)
		if _, err := v.Verify(t.Context(), short); !errors.Is(err, token.ErrUnavailable) {
			t.Errorf("Verify of a token that ended while the API server is down = %v, want unavailable", err)
		}
		time.Sleep(12 * time.Minute)
		if _, err := v.Verify(t.Context(), "known"); !errors.Is(err, token.ErrUnavailable) {
			t.Errorf("Verify after 16 minutes = %v, want unavailable", err)
		}
	})
}

// TestReviewerAsksOnceForAll: one question serves all who wait, also when who asked it first has left.
func TestReviewerAsksOnceForAll(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newReviews()
		r.set("raw", good())
		gate := make(chan struct{})
		r.PrependReactor("create", "tokenreviews", func(clienttesting.Action) (bool, runtime.Object, error) {
			<-gate
			return false, nil, nil
		})
		v := kube.NewReviewer(r)
		gone, leave := context.WithCancel(t.Context())
		left := make(chan error, 1)
		go func() { _, err := v.Verify(gone, "raw"); left <- err }()
		synctest.Wait()
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if _, err := v.Verify(t.Context(), "raw"); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		leave()
		if err := <-left; !errors.Is(err, token.ErrUnavailable) {
			t.Errorf("Verify of one who left = %v, want unavailable", err)
		}
		close(gate)
		wg.Wait()
		if n := r.asked.Load(); n != 1 {
			t.Errorf("the API server was asked %d times, want 1", n)
		}
	})
}
