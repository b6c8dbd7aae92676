package install_test

import (
	"context"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/fsnotify/fsnotify"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap/zaptest"

	"github.com/mistnet/mistnet/cni/install"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const entry = `{"type":"istio-cni","cni_agent_run_dir":"/var/run/istio-cni"}`

func TestInsert(t *testing.T) {
	t.Parallel()
	inputs, err := filepath.Glob("testdata/*.in")
	if err != nil || len(inputs) == 0 {
		t.Fatalf("no inputs: %v", err)
	}
	for _, in := range inputs {
		t.Run(filepath.Base(in), func(t *testing.T) {
			t.Parallel()
			list, err := os.ReadFile(in)
			if err != nil {
				t.Fatal(err)
			}
			got, err := install.Insert(list, []byte(entry))
			if err != nil {
				t.Fatal(err)
			}
			golden := strings.TrimSuffix(in, ".in") + ".golden"
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), string(got)); d != "" {
				t.Errorf("Insert (-want +got):\n%s", d)
			}
			parsed, err := libcni.NetworkConfFromBytes(got)
			if err != nil {
				t.Fatalf("runtimes cannot read the result: %v", err)
			}
			if last := parsed.Plugins[len(parsed.Plugins)-1].Network.Type; last != "istio-cni" {
				t.Errorf("last plugin is %s, want istio-cni", last)
			}
			again, err := install.Insert(got, []byte(entry))
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(got), string(again)); d != "" {
				t.Errorf("second Insert changed something (-before +after):\n%s", d)
			}
			if strings.Contains(string(list), "istio-cni") || !strings.Contains(string(list), "plugins") {
				return
			}
			back, err := install.Remove(got, "istio-cni")
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(list), string(back)); d != "" {
				t.Errorf("Remove does not restore (-original +restored):\n%s", d)
			}
		})
	}
}

func TestInsertRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ list, entry, words string }{
		"no JSON":            {`{"plugins":[`, entry, "read configuration list"},
		"empty chain":        {`{"plugins":[]}`, entry, "no plugin to come after"},
		"plugins no list":    {`{"plugins":{}}`, entry, "not a list"},
		"neither":            {`{"name":"x"}`, entry, "neither"},
		"only ourselves":     {`{"plugins":[{"type":"istio-cni","x":1}]}`, entry, "would be empty"},
		"entry without type": {`{"plugins":[{"type":"bridge"}]}`, `{}`, "no type"},
	} {
		if _, err := install.Insert([]byte(c.list), []byte(c.entry)); err == nil || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: Insert = %v, want an error with %q", name, err, c.words)
		}
	}
}

func FuzzInsertThenRemove(f *testing.F) {
	f.Add(`{"plugins":[{"type":"bridge"}]}`)
	f.Add(`{"plugins" : [ {"type":"a"} , {"type":"istio-cni"},{"type":"b"}],"name":"x"}`)
	f.Fuzz(func(t *testing.T, list string) {
		got, err := install.Insert([]byte(list), []byte(entry))
		if err != nil {
			return
		}
		if again, err := install.Insert(got, []byte(entry)); err != nil || string(again) != string(got) {
			t.Errorf("second Insert of %q = %q, %v", got, again, err)
		}
		if _, err := install.Remove(got, install.PluginType); err != nil {
			t.Errorf("Remove of %q: %v", got, err)
		}
	})
}

func newInstaller(t *testing.T) *install.Installer {
	t.Helper()
	root := t.TempDir()
	i := &install.Installer{
		BinDir: filepath.Join(root, "bin"), ConfDir: filepath.Join(root, "net.d"), Binary: filepath.Join(root, "plugin"),
		Entry: []byte(entry), Log: zaptest.NewLogger(t),
	}
	if err := os.Mkdir(i.ConfDir, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, i.Binary, "#!/bin/true")
	return i
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// tree is every file below dir with its content.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out[f.Name()] = string(b)
	}
	return out
}

func TestInstallThenUninstall(t *testing.T) {
	t.Parallel()
	const bridge = `{"cniVersion":"1.0.0","name":"k8s","plugins":[{"type":"bridge"}]}`
	for name, c := range map[string]struct {
		files map[string]string
		used  string // the file that must hold the entry
	}{
		"a list":            {map[string]string{"10-k8s.conflist": bridge, "99-other.conflist": bridge}, "10-k8s.conflist"},
		"a single plugin":   {map[string]string{"10-k8s.conf": `{"cniVersion":"0.4.0","name":"k8s","type":"bridge"}`}, "10-k8s.conflist"},
		"garbage is passed": {map[string]string{"00-bad.conflist": "{", "10-k8s.conflist": bridge, ".hidden.conflist": bridge}, "10-k8s.conflist"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			i := newInstaller(t)
			for f, content := range c.files {
				write(t, filepath.Join(i.ConfDir, f), content)
			}
			before := tree(t, i.ConfDir)
			for _, want := range []bool{true, false} {
				if changed, err := i.Install(); err != nil || changed != want {
					t.Fatalf("Install = %v, %v, want %v, nil", changed, err, want)
				}
			}
			for f, content := range tree(t, i.ConfDir) {
				if has := strings.Contains(content, "istio-cni"); has != (f == c.used) {
					t.Errorf("%s holds the entry: %v", f, has)
				}
			}
			files, err := libcni.ConfFiles(i.ConfDir, []string{".conf", ".conflist", ".json"})
			if err != nil || name == "a single plugin" && len(files) != 1 {
				t.Errorf("a runtime finds %v, %v", files, err)
			}
			if st, err := os.Stat(filepath.Join(i.BinDir, "istio-cni")); err != nil || st.Mode().Perm() != 0o755 {
				t.Errorf("binary: %v, %v", st, err)
			}
			for range 2 {
				if err := i.Uninstall(); err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(before, tree(t, i.ConfDir)); d != "" {
					t.Errorf("Uninstall does not restore (-original +restored):\n%s", d)
				}
				if left := tree(t, i.BinDir); len(left) > 0 {
					t.Errorf("Uninstall leaves %v", left)
				}
			}
		})
	}
}

func TestRunWaitsForANetworkAndSurvivesBeingOverwritten(t *testing.T) {
	t.Parallel()
	i := newInstaller(t)
	attempts := make(chan error, 100)
	i.OnInstall = func(err error) { attempts <- err }
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := i.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	defer wg.Wait()
	defer cancel()
	if err := next(t, attempts); !errors.Is(err, install.ErrNoNetwork) {
		t.Errorf("first attempt = %v, want %v", err, install.ErrNoNetwork)
	}
	const bridge = `{"cniVersion":"1.0.0","name":"k8s","plugins":[{"type":"bridge"}]}`
	conf := filepath.Join(i.ConfDir, "10-k8s.conflist")
	for range 2 {
		write(t, conf, bridge)
		for {
			if err := next(t, attempts); err == nil {
				break
			}
		}
		if b, err := os.ReadFile(conf); err != nil || !strings.Contains(string(b), "istio-cni") {
			t.Errorf("%s holds %s, %v; want our entry in it", conf, b, err)
		}
	}
}

func next(t *testing.T, attempts chan error) error {
	t.Helper()
	select {
	case err := <-attempts:
		return err
	case <-time.After(20 * time.Second):
		t.Fatal("nothing was installed")
		return nil
	}
}

func TestRunBringsBackWhatIsTakenAway(t *testing.T) {
	t.Parallel()
	for name, watch := range map[string]func() (*fsnotify.Watcher, error){
		"told of changes":                    nil,
		"looking, where watches are used up": func() (*fsnotify.Watcher, error) { return nil, syscall.EMFILE },
	} {
		t.Run(name, func(t *testing.T) { t.Parallel(); bringsBack(t, watch) })
	}
}

func bringsBack(t *testing.T, watch func() (*fsnotify.Watcher, error)) {
	i := newInstaller(t)
	i.Watch = watch
	const bridge = `{"cniVersion":"1.0.0","name":"k8s","plugins":[{"type":"bridge"}]}`
	conf, binary := filepath.Join(i.ConfDir, "10-k8s.conflist"), filepath.Join(i.BinDir, install.PluginType)
	write(t, conf, bridge)
	attempts := make(chan error, 100)
	i.OnInstall = func(err error) { attempts <- err }
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := i.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	defer wg.Wait()
	defer cancel()
	whole := func(after string) {
		t.Helper()
		for {
			if err := next(t, attempts); err == nil {
				break
			}
		}
		st, err := os.Stat(binary)
		if err != nil || st.Mode().Perm() != 0o755 {
			t.Errorf("%s: binary is %v, %v; want mode 0755", after, st, err)
		}
		if b, err := os.ReadFile(conf); err != nil || !strings.Contains(string(b), install.PluginType) {
			t.Errorf("%s: %s holds %s, %v; want our entry in it", after, conf, b, err)
		}
	}
	whole("at first")
	if err := os.Remove(binary); err != nil {
		t.Fatal(err)
	}
	whole("after the binary was deleted")
	write(t, binary, "something else")
	whole("after the binary was overwritten")
	if err := os.Chmod(binary, 0o644); err != nil {
		t.Fatal(err)
	}
	whole("after the binary lost its mode")
	if err := errors.Join(os.Remove(conf), os.WriteFile(conf, []byte(bridge), 0o644)); err != nil {
		t.Fatal(err)
	}
	whole("after another component made the configuration anew")
}
