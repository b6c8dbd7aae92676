package controlplane_test

import (
	"strings"
	"testing"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/controlplane"
	"github.com/mistnet/mistnet/internal/daemon"
)

func parsed(t *testing.T, args ...string) *controlplane.Config {
	t.Helper()
	cfg := new(controlplane.Config)
	fs := daemon.NewFlagSet("proxy")
	cfg.Register(fs)
	if err := fs.Parse(args, func(string) (string, bool) { return "", false }); err != nil {
		t.Fatal(err)
	}
	return cfg
}

func TestConfigNamesEveryFault(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		args []string
		want []string // parts of the error; none: valid
	}{
		{nil, nil},
		{[]string{"-xds-address=https://istiod"}, nil},
		{[]string{"-xds-address=http://istiod:15012"}, []string{`-xds-address: "http://istiod:15012": want https://`, "-ca-address"}},
		{[]string{"-ca-address=istiod:15012"}, []string{"-ca-address"}},
		{[]string{"-ca-address=https://:15012"}, []string{"-ca-address"}},
	} {
		err := parsed(t, tt.args...).Validate()
		if (err == nil) != (len(tt.want) == 0) {
			t.Errorf("%q: Validate = %v, want parts %q", tt.args, err, tt.want)
			continue
		}
		for _, part := range tt.want {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%q: Validate = %v, want %q in it", tt.args, err, part)
			}
		}
	}
}

func TestTheAuthorityIsWhereIstiodIsUnlessSaidOtherwise(t *testing.T) {
	t.Parallel()
	cfg := parsed(t, "-xds-address=https://a:1", "-xds-root-ca=roots.pem")
	if err := cfg.Validate(); err != nil || cfg.CAAddress != "https://a:1" || cfg.CARootCA != "roots.pem" {
		t.Errorf("the authority is at %q, known by %q, %v, want those of xDS", cfg.CAAddress, cfg.CARootCA, err)
	}
	cfg = parsed(t, "-xds-address=https://a:1", "-ca-address=https://b:2", "-ca-root-ca=other.pem")
	if err := cfg.Validate(); err != nil || cfg.CAAddress != "https://b:2" || cfg.CARootCA != "other.pem" {
		t.Errorf("the authority is at %q, known by %q, %v, want what was said", cfg.CAAddress, cfg.CARootCA, err)
	}
}

func TestMissingRootsAreAFaultAtStart(t *testing.T) {
	t.Parallel()
	cfg := parsed(t, "-xds-root-ca="+t.TempDir()+"/none")
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	if _, err := controlplane.New(cfg, controlplane.Options{Log: zap.NewNop()}); err == nil || !strings.Contains(err.Error(), "xDS client: read istiod's root certificate") {
		t.Errorf("New = %v, want that the roots cannot be read", err)
	}
}
