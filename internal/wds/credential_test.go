package wds_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/internal/wds"
)

func TestCredentialsKeepWhatTheyHave(t *testing.T) {
	t.Parallel()
	for _, c := range []*mesh.Credential{
		{Namespace: "shop", Name: "cert", Certificate: []byte("c"), PrivateKey: []byte("k"), Roots: []byte("r"), CRL: []byte("l")},
		{Namespace: "shop", Name: "roots", Roots: []byte("r")},
	} {
		body, err := wds.EncodeCredential(c)
		if err != nil {
			t.Fatal(err)
		}
		back, err := wds.DecodeCredential(body)
		if diff := cmp.Diff(c, back); diff != "" || err != nil {
			t.Errorf("%s changed on the wire: %v\n%s", c.Key(), err, diff)
		}
	}
	for why, c := range map[string]*mesh.Credential{
		"it has no name": {Namespace: "shop"},
		"go together":    {Namespace: "shop", Name: "x", PrivateKey: []byte("hush")},
	} {
		if _, err := wds.EncodeCredential(c); err == nil || !strings.Contains(err.Error(), why) || strings.Contains(err.Error(), "hush") {
			t.Errorf("EncodeCredential = %v, want %q", err, why)
		}
	}
}

// TestPrivateKeysDoNotShow however a credential is printed.
func TestPrivateKeysDoNotShow(t *testing.T) {
	t.Parallel()
	c := mesh.Credential{Namespace: "shop", Name: "x", PrivateKey: []byte("hush")}
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{string(text), fmt.Sprint(c), fmt.Sprintf("%+v", &c), fmt.Sprintf("%#v", c), fmt.Sprintf("%s %q %x", c, c, c)} {
		if strings.Contains(s, "hush") || strings.Contains(s, "68757368") || strings.Contains(s, "aHVzaA") || strings.Contains(s, "104") {
			t.Errorf("the key shows in %s", s)
		}
	}
}

func FuzzDecodeCredential(f *testing.F) {
	body, err := wds.EncodeCredential(&mesh.Credential{Namespace: "shop", Name: "cert", Certificate: []byte("c"), PrivateKey: []byte("k")})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(body)
	f.Fuzz(func(t *testing.T, in []byte) {
		c, err := wds.DecodeCredential(in)
		if err != nil {
			return
		}
		again, err := wds.EncodeCredential(c)
		if err != nil {
			t.Fatalf("what was decoded cannot be encoded: %v", err)
		}
		if back, err := wds.DecodeCredential(again); err != nil || !cmp.Equal(c, back) {
			t.Errorf("changed on the wire: %v", err)
		}
	})
}
