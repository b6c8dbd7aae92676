package ztunnel_test

import (
	"strings"
	"testing"
	"time"

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
		{"several", []string{"-instance-ip=x", "-metrics-addr=1", "-max-streams=0", "-kill-after=-1"},
			[]string{"-kill-after", "-node-name", "-instance-ip", "-metrics-addr", "-max-streams is 0"}},
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

func TestGraceFitsTheTimeThereIs(t *testing.T) {
	for _, tt := range []struct {
		env  map[string]string
		want time.Duration
	}{
		{nil, 5 * time.Second},
		{map[string]string{"TERMINATION_GRACE_PERIOD_SECONDS": "30"}, 25 * time.Second},
		{map[string]string{"TERMINATION_GRACE_PERIOD_SECONDS": "11"}, 6 * time.Second},
		{map[string]string{"TERMINATION_GRACE_PERIOD_SECONDS": "10"}, 9 * time.Second},
		{map[string]string{"TERMINATION_GRACE_PERIOD_SECONDS": "1"}, time.Second},
		{map[string]string{"TERMINATION_GRACE_PERIOD_SECONDS": "30", "CONNECTION_TERMINATION_DEADLINE": "7s"}, 7 * time.Second},
	} {
		cfg := new(ztunnel.Config)
		fs := daemon.NewFlagSet("ztunnel")
		cfg.Register(fs)
		if err := fs.Parse([]string{"-node-name=n"}, func(k string) (string, bool) { v, ok := tt.env[k]; return v, ok }); err != nil {
			t.Fatal(err)
		}
		if err := cfg.Validate(); err != nil || cfg.Grace != tt.want {
			t.Errorf("with %v the grace period is %s, %v, want %s", tt.env, cfg.Grace, err, tt.want)
		}
	}
}
