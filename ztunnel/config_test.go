package ztunnel_test

import (
	"strings"
	"testing"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/ztunnel"
)

func TestConfigNamesEveryFault(t *testing.T) {
	tests := []struct {
		name string
		args []string
		want []string // parts of the error; none: valid
	}{
		{"valid", []string{"-node-name=n1"}, nil},
		{"no node", nil, []string{"-node-name (NODE_NAME) is missing"}},
		{"plaintext control plane", []string{"-node-name=n1", "-xds-address=http://x:1"}, []string{"-xds-address", "want https://"}},
		{"several", []string{"-instance-ip=x", "-metrics-addr=1", "-max-streams=0"},
			[]string{"-node-name", "-instance-ip", "-metrics-addr", "-max-streams is 0"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := new(ztunnel.Config)
			fs := daemon.NewFlagSet("ztunnel")
			cfg.Register(fs)
			if err := fs.Parse(tt.args, func(string) (string, bool) { return "", false }); err != nil {
				t.Fatal(err)
			}
			err := cfg.Validate()
			if (err == nil) != (len(tt.want) == 0) {
				t.Fatalf("Validate = %v, want parts %q", err, tt.want)
			}
			for _, part := range tt.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("Validate = %v, want %q in it", err, part)
				}
			}
		})
	}
}
