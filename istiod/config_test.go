package istiod_test

import (
	"strings"
	"testing"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/istiod"
)

func TestFlags(t *testing.T) {
	for name, c := range map[string]struct {
		host string // KUBERNETES_SERVICE_HOST
		args []string
		want string // part of the fault; "": none
	}{
		"in a pod nothing need be said":        {host: "10.96.0.1"},
		"elsewhere files are":                  {want: "-files is required"},
		"files":                                {args: []string{"-files=/x"}},
		"files in a pod must be meant":         {host: "10.96.0.1", args: []string{"-files=/x"}, want: "-source=files"},
		"and may be":                           {host: "10.96.0.1", args: []string{"-files=/x", "-source=files"}},
		"a cluster from outside":               {args: []string{"-source=kubernetes", "-kubeconfig=/k"}},
		"a cluster needs no directory of keys": {args: []string{"-source=kubernetes", "-data-dir="}},
		"files do":                             {args: []string{"-files=/x", "-data-dir="}, want: "-data-dir is required"},
		"a source that there is not":           {args: []string{"-source=kube"}, want: `"kube" is neither kubernetes nor files`},
		"an address that is none":              {args: []string{"-files=/x", "-ips=a"}, want: "-ips"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("KUBERNETES_SERVICE_HOST", c.host)
			var cfg istiod.Config
			fs := daemon.NewFlagSet("istiod")
			cfg.Register(fs)
			if err := fs.Parse(c.args, func(string) (string, bool) { return "", false }); err != nil {
				t.Fatal(err)
			}
			err := cfg.Validate()
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("Validate = %v, want %q", err, c.want)
			}
		})
	}
}
