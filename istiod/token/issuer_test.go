package token_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/istiod/token"
)

var ztunnel = token.Caller{
	Namespace: "istio-system", ServiceAccount: "ztunnel", Pod: "ztunnel-abcde", PodUID: "uid-1", Node: "node-1",
}

func open(t testing.TB, dir string) *token.Issuer {
	t.Helper()
	i, err := token.OpenIssuer(dir)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func TestIssueAndVerify(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	raw, err := open(t, dir).Issue(ztunnel, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	again := open(t, dir) // a restarted control plane must know its tokens
	got, err := again.Verify(t.Context(), raw)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(ztunnel, got); d != "" {
		t.Errorf("caller (-want +got):\n%s", d)
	}
	plain := token.Caller{Namespace: "shop", ServiceAccount: "web"}
	if raw, err = again.Issue(plain, time.Hour); err != nil {
		t.Fatal(err)
	}
	if got, err = again.Verify(t.Context(), raw); err != nil || got != plain {
		t.Errorf("unbound token: %+v, %v, want %+v", got, err, plain)
	}
}

// The layout is Kubernetes', whoever reads it.
func TestLayout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raw, err := open(t, t.TempDir()).Issue(ztunnel, 12*time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		parts := strings.Split(raw, ".")
		if len(parts) != 3 {
			t.Fatalf("token of %d parts, want 3", len(parts))
		}
		body, err := base64.RawURLEncoding.DecodeString(parts[1])
		if err != nil {
			t.Fatal(err)
		}
		var got any
		if err := json.Unmarshal(body, &got); err != nil {
			t.Fatal(err)
		}
		now := float64(time.Now().Unix())
		want := map[string]any{
			"iss": "https://istiod.istio-system.svc", "sub": "system:serviceaccount:istio-system:ztunnel",
			"aud": []any{"istio-ca"}, "iat": now, "exp": now + 43200,
			"kubernetes.io": map[string]any{
				"namespace": "istio-system", "serviceaccount": map[string]any{"name": "ztunnel"},
				"pod":  map[string]any{"name": "ztunnel-abcde", "uid": "uid-1"},
				"node": map[string]any{"name": "node-1"},
			},
		}
		if d := cmp.Diff(any(want), got); d != "" {
			t.Errorf("claims (-want +got):\n%s", d)
		}
	})
}

func TestExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := open(t, t.TempDir())
		raw, err := i.Issue(ztunnel, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute + 5*time.Second)
		if _, err := i.Verify(t.Context(), raw); err != nil {
			t.Errorf("five seconds late, within the leeway: %v", err)
		}
		time.Sleep(10 * time.Second)
		if _, err := i.Verify(t.Context(), raw); err == nil || !strings.Contains(err.Error(), "expired 15s ago") {
			t.Errorf("fifteen seconds late: %v, want expired", err)
		}
	})
}

// forge signs claims with a key as a signer of its own would.
func forge(t testing.TB, alg jose.SignatureAlgorithm, key any, claims map[string]any) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, nil)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func keyOf(t testing.TB, dir string) *ecdsa.PrivateKey {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, "token-key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(data)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return key.(*ecdsa.PrivateKey)
}

func TestRefusedTokens(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	i := open(t, dir)
	own := keyOf(t, dir)
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	claims := func(edit func(map[string]any)) map[string]any {
		now := time.Now().Unix()
		c := map[string]any{
			"iss": "https://istiod.istio-system.svc", "sub": "system:serviceaccount:shop:web", "aud": []string{"istio-ca"},
			"iat": now, "exp": now + 600,
			"kubernetes.io": map[string]any{"namespace": "shop", "serviceaccount": map[string]any{"name": "web"}},
		}
		edit(c)
		return c
	}
	good := forge(t, jose.ES256, own, claims(func(map[string]any) {}))
	if _, err := i.Verify(t.Context(), good); err != nil {
		t.Fatalf("the token the others are made of: %v", err)
	}
	parts := strings.Split(good, ".")
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`))
	public, err := x509.MarshalPKIXPublicKey(own.Public())
	if err != nil {
		t.Fatal(err)
	}
	set := func(k string, v any) map[string]any { return claims(func(c map[string]any) { c[k] = v }) }
	cases := []struct{ name, raw, want string }{
		{"empty", "", "not a token"},
		{"garbage", "a.b.c", "not a token"},
		{"unsigned", none + "." + parts[1] + ".", "not a token signed with ES256"},
		{"signed by a stranger", forge(t, jose.ES256, stranger, claims(func(map[string]any) {})), "not signed by this control plane's key"},
		{"HMAC with our public key", forge(t, jose.HS256, public, claims(func(map[string]any) {})), "not a token signed with ES256"},
		{"signature of another body", parts[0] + "." + strings.Split(forge(t, jose.ES256, own, set("x", 1)), ".")[1] + "." + parts[2], "not signed by"},
		{"another audience", forge(t, jose.ES256, own, set("aud", []string{"https://kubernetes.default.svc"})), "not for istio-ca"},
		{"no audience", forge(t, jose.ES256, own, claims(func(c map[string]any) { delete(c, "aud") })), "not for istio-ca"},
		{"another issuer", forge(t, jose.ES256, own, set("iss", "https://elsewhere")), "iss"},
		{"no expiry", forge(t, jose.ES256, own, claims(func(c map[string]any) { delete(c, "exp") })), "does not say when"},
		{"issued in the future", forge(t, jose.ES256, own, set("iat", time.Now().Unix()+300)), "future"},
		{"subject of another account", forge(t, jose.ES256, own, set("sub", "system:serviceaccount:istio-system:ztunnel")), "do not agree"},
		{"no account", forge(t, jose.ES256, own, claims(func(c map[string]any) { delete(c, "kubernetes.io") })), "do not agree"},
		{"far too long", strings.Repeat("a", 1<<20), "bytes"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if got, err := i.Verify(t.Context(), c.raw); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Verify = %+v, %v, want an error with %q", got, err, c.want)
			}
		})
	}
}

func TestKeyFile(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	i := open(t, dir)
	path := filepath.Join(dir, "token-key.pem")
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Mode().Perm(); got != 0o600 {
		t.Errorf("mode of the key file = %04o, want 0600", got)
	}
	if _, err := i.Issue(token.Caller{}, time.Hour); err == nil {
		t.Error("a token for nobody was issued")
	}
	if _, err := i.Issue(ztunnel, 0); err == nil {
		t.Error("a token without a lifetime was issued")
	}
	if err := os.WriteFile(path, []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := token.OpenIssuer(dir); err == nil {
		t.Error("a broken key file was accepted")
	}
}

func TestFromAuthorization(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		header []string
		want   string
	}{
		{nil, ""}, {[]string{""}, ""}, {[]string{"Bearer"}, ""}, {[]string{"Bearer "}, ""}, {[]string{"Basic abc"}, ""},
		{[]string{"Bearer a", "Bearer b"}, ""}, {[]string{"Bearer abc"}, "abc"}, {[]string{"bearer abc"}, "abc"},
	} {
		got, err := token.FromAuthorization(c.header)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("FromAuthorization(%q) = %q, %v, want %q", c.header, got, err, c.want)
		}
	}
}

// Whatever is sent, only what Issue made is believed.
func FuzzVerify(f *testing.F) {
	i := open(f, f.TempDir())
	good, err := i.Issue(ztunnel, time.Hour)
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range []string{"", good, good + ".", good[:len(good)-3], "a.b.c", `{"payload":"","signatures":[]}`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		if c, err := i.Verify(t.Context(), raw); err == nil && c != ztunnel {
			t.Errorf("Verify(%q) = %+v", raw, c)
		}
	})
}
