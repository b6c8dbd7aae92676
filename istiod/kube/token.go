package kube

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/mistnet/mistnet/istiod/token"
)

const (
	// A token is shown with every stream and every certificate request; a node proxy that starts makes hundreds.
	believeFor  = time.Minute
	doubtFor    = 5 * time.Second  // a token that was refused, so that asking in a loop does not reach the API server
	believeDown = 15 * time.Minute // while the API server does not answer: pods cannot be deleted then either
	mostTokens  = 10_000           // remembered

	maxTokenBytes = 16 << 10
)

// What Kubernetes tells of a token bound to a pod, beside the account (KEP 4193).
const (
	extraPodName  = "authentication.kubernetes.io/pod-name"
	extraPodUID   = "authentication.kubernetes.io/pod-uid"
	extraNodeName = "authentication.kubernetes.io/node-name"
	accountPrefix = "system:serviceaccount:"
)

// Reviewer verifies tokens of service accounts by asking the API server. It implements token.Verifier.
type Reviewer struct {
	client kubernetes.Interface
	now    func() time.Time
	flight singleflight.Group

	mu    sync.Mutex
	known map[[sha256.Size]byte]review
}

// review is what the API server said of a token, and when.
type review struct {
	caller token.Caller
	denied error
	at     time.Time
	until  time.Time // when the token itself ends; zero: it does not say
}

// NewReviewer returns a verifier that asks through client.
func NewReviewer(client kubernetes.Interface) *Reviewer {
	return &Reviewer{client: client, now: time.Now, known: make(map[[sha256.Size]byte]review)}
}

// errDenied is the API server's no, which another question would not change.
var errDenied = errors.New("token is not accepted")

// Verify implements token.Verifier. An error that is not the API server's verdict wraps token.ErrUnavailable.
func (r *Reviewer) Verify(ctx context.Context, raw string) (token.Caller, error) {
	if raw == "" || len(raw) > maxTokenBytes {
		return token.Caller{}, fmt.Errorf("%w: %d bytes cannot be a token", errDenied, len(raw))
	}
	key := sha256.Sum256([]byte(raw)) // the token itself is not kept
	if v, ok := r.recall(key, believeFor); ok {
		return v.caller, v.denied
	}
	// The question is asked once for all who wait, and not given up when the first of them leaves.
	answer := r.flight.DoChan(string(key[:]), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
		defer cancel()
		v, err := r.ask(ctx, raw)
		if err == nil {
			r.remember(key, v)
		}
		return v, err
	})
	select {
	case a := <-answer:
		if a.Err == nil {
			v, _ := a.Val.(review)
			return v.caller, v.denied
		}
		if v, ok := r.recall(key, believeDown); ok && v.denied == nil {
			return v.caller, nil
		}
		return token.Caller{}, fmt.Errorf("%w: %w", token.ErrUnavailable, a.Err)
	case <-ctx.Done():
		return token.Caller{}, fmt.Errorf("%w: %w", token.ErrUnavailable, context.Cause(ctx))
	}
}

// recall returns what was said of a token less than that long ago.
func (r *Reviewer) recall(key [sha256.Size]byte, within time.Duration) (review, bool) {
	now := r.now()
	r.mu.Lock()
	defer r.mu.Unlock()
	v, ok := r.known[key]
	if v.denied != nil {
		within = doubtFor
	}
	return v, ok && now.Sub(v.at) < within && (v.until.IsZero() || now.Before(v.until))
}

func (r *Reviewer) remember(key [sha256.Size]byte, v review) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.known) >= mostTokens {
		for k, old := range r.known { // those of no more use first
			if v.at.Sub(old.at) > believeFor || old.denied != nil {
				delete(r.known, k)
			}
		}
		for k := range r.known {
			if len(r.known) < mostTokens {
				break
			}
			delete(r.known, k)
		}
	}
	r.known[key] = v
}

// ask has the API server look at the token. An error means that there was no verdict.
func (r *Reviewer) ask(ctx context.Context, raw string) (review, error) {
	v := review{at: r.now(), until: expiry(raw)}
	deny := func(format string, args ...any) (review, error) {
		v.caller, v.denied = token.Caller{}, fmt.Errorf("%w: "+format, append([]any{errDenied}, args...)...)
		return v, nil
	}
	got, err := r.client.AuthenticationV1().TokenReviews().Create(ctx, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: raw, Audiences: []string{token.Audience}},
	}, metav1.CreateOptions{})
	if err != nil {
		return v, fmt.Errorf("review token: %w", err)
	}
	st := got.Status
	switch {
	case !st.Authenticated && st.Error != "":
		return deny("%s", st.Error)
	case !st.Authenticated:
		return deny("the API server does not know it")
	case !slices.Contains(st.Audiences, token.Audience):
		return deny("it is not for %s", token.Audience)
	}
	account, ok := strings.CutPrefix(st.User.Username, accountPrefix)
	namespace, name, two := strings.Cut(account, ":")
	if !ok || !two || namespace == "" || name == "" {
		return deny("%q is not a service account", st.User.Username)
	}
	v.caller = token.Caller{
		Namespace: namespace, ServiceAccount: name,
		Pod: extra(st, extraPodName), PodUID: extra(st, extraPodUID), Node: extra(st, extraNodeName),
	}
	if v.caller.Pod == "" || v.caller.Node != "" {
		return v, nil
	}
	return r.place(ctx, v, deny)
}

// place finds the node of the pod a token is bound to, where the API server did not tell it with the token.
func (r *Reviewer) place(ctx context.Context, v review, deny func(string, ...any) (review, error)) (review, error) {
	c := v.caller
	pod, err := r.client.CoreV1().Pods(c.Namespace).Get(ctx, c.Pod, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return deny("its pod %s/%s is gone", c.Namespace, c.Pod)
	case err != nil:
		return v, fmt.Errorf("find the pod of a token: %w", err)
	case c.PodUID == "" || string(pod.UID) != c.PodUID:
		return deny("its pod %s/%s is gone, there is another of that name", c.Namespace, c.Pod)
	case pod.Spec.ServiceAccountName != c.ServiceAccount:
		return deny("its pod %s/%s does not run as %s", c.Namespace, c.Pod, c.ServiceAccount)
	}
	v.caller.Node = pod.Spec.NodeName
	return v, nil
}

func extra(st authenticationv1.TokenReviewStatus, key string) string {
	if values := st.User.Extra[key]; len(values) == 1 {
		return values[0]
	}
	return ""
}

// expiry reads when a token ends (RFC 7519, 4.1.4) out of one that the API server is asked about anyway.
func expiry(raw string) time.Time {
	parts := strings.Split(raw, ".")
	if len(parts) != 3 {
		return time.Time{}
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[1])
	var claims struct {
		Exp float64 `json:"exp"`
	}
	if err != nil || json.Unmarshal(text, &claims) != nil || claims.Exp <= 0 {
		return time.Time{}
	}
	return time.Unix(int64(claims.Exp), 0)
}
