package install

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	"go.uber.org/zap"
)

// Installer keeps the plugin on a host. BinDir, ConfDir, Binary and Entry are required.
type Installer struct {
	BinDir  string // where the runtime looks for plugins, usually /opt/cni/bin
	ConfDir string // where it looks for configuration, usually /etc/cni/net.d
	Binary  string // the plugin to copy
	Entry   []byte // its entry in the chain, JSON with the type PluginType
	Log     *zap.Logger

	// Watch makes what tells of changes; nil means fsnotify.NewWatcher.
	Watch func() (*fsnotify.Watcher, error)

	// OnInstall, if set, is told of every attempt that changed something, failed, or was the first to succeed.
	OnInstall func(error)
}

// ErrNoNetwork is what Install returns while no other plugin has put its configuration there.
var ErrNoNetwork = errors.New("no network configuration to extend")

// retained is added to the name of a configuration of a single plugin while a list stands in for it.
const retained = ".before-istio-cni"

// settle is how long the directory must be quiet before it is looked at, and retry how long until a failure is tried
// again.
const (
	settle    = 100 * time.Millisecond
	retry     = 5 * time.Second
	pollEvery = time.Second
	recheck   = 30 * time.Second // events do not come from everywhere: a directory may be replaced as a whole
)

// Run installs, and installs again when somebody overwrites the configuration or deletes the binary, until ctx is done. It leaves
// everything in place then: while no agent answers, new pods wait instead of starting outside of the mesh.
//
// A machine may have no watch left to give (fs.inotify.max_user_instances is for all of its programs together): then it
// looks every second.
func (i *Installer) Run(ctx context.Context) error {
	dirs := []string{i.ConfDir, i.BinDir}
	for _, dir := range dirs {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("watch %s: %w", dir, err)
		}
	}
	var events chan fsnotify.Event // nil: there are none
	var lost chan error
	var poll <-chan time.Time
	add := func(string) error { return nil }
	if w, err := i.watcher(); err == nil {
		defer w.Close()
		events, lost, add = w.Events, w.Errors, w.Add
	} else {
		i.Log.Warn("directories are not watched, looking every second", zap.Error(err))
		ticker := time.NewTicker(pollEvery)
		defer ticker.Stop()
		poll = ticker.C
	}
	next := time.NewTimer(0)
	defer next.Stop()
	ready, seen := false, ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-lost:
			i.Log.Warn("events of the configuration directory lost", zap.Error(err))
			next.Reset(settle)
		case ev := <-events:
			if i.concerns(ev.Name) {
				next.Reset(settle)
			}
		case <-poll:
			if ready && i.signature() != seen {
				next.Reset(0)
			}
		case <-next.C:
			for _, dir := range dirs { // a directory made anew is another one
				if err := errors.Join(os.MkdirAll(dir, 0o755), add(dir)); err != nil {
					i.Log.Warn("directory not watched", zap.String("dir", dir), zap.Error(err))
				}
			}
			seen = i.signature() // before: a change that comes meanwhile is seen
			changed, err := i.Install()
			if i.OnInstall != nil && (changed || err != nil || !ready) {
				i.OnInstall(err)
			}
			ready = err == nil
			if err != nil {
				i.Log.Warn("plugin not installed", zap.Error(err))
				next.Reset(retry)
				continue
			}
			next.Reset(recheck)
			if changed {
				i.Log.Info("plugin installed", zap.String("conf.dir", i.ConfDir))
			}
		}
	}
}

func (i *Installer) watcher() (*fsnotify.Watcher, error) {
	if i.Watch != nil {
		return i.Watch()
	}
	return fsnotify.NewWatcher()
}

// signature changes with the files that concern us.
func (i *Installer) signature() string {
	var b strings.Builder
	for _, dir := range []string{i.ConfDir, i.BinDir} {
		files, _ := os.ReadDir(dir)
		for _, f := range files {
			if info, err := f.Info(); err == nil && i.concerns(filepath.Join(dir, f.Name())) {
				fmt.Fprintln(&b, f.Name(), info.Size(), info.Mode(), info.ModTime().UnixNano())
			}
		}
	}
	return b.String()
}

// concerns reports whether a change of that file may undo what was installed: any configuration, and of the plugins ours.
func (i *Installer) concerns(path string) bool {
	return filepath.Dir(path) != filepath.Clean(i.BinDir) || filepath.Base(path) == PluginType
}

// Install puts the binary and then the entry in place, each at once. It reports whether anything had to change.
func (i *Installer) Install() (changed bool, err error) {
	binary, err := os.ReadFile(i.Binary)
	if err != nil {
		return false, fmt.Errorf("install plugin: %w", err)
	}
	if err := os.MkdirAll(i.BinDir, 0o755); err != nil {
		return false, fmt.Errorf("install plugin: %w", err)
	}
	changed, err = replace(filepath.Join(i.BinDir, PluginType), binary, 0o755)
	if err != nil {
		return changed, fmt.Errorf("install plugin: %w", err)
	}
	path, err := i.active()
	if err != nil {
		return changed, err
	}
	old, err := os.ReadFile(path)
	if err != nil {
		return changed, fmt.Errorf("install plugin: %w", err)
	}
	list, err := Insert(old, i.Entry)
	if err != nil {
		return changed, fmt.Errorf("%s: %w", path, err)
	}
	did, err := replace(asList(path), list, 0o600)
	if err == nil && asList(path) != path { // until then the runtime finds either, and both work
		err = os.Rename(path, path+retained)
	}
	if err != nil {
		return changed || did, fmt.Errorf("install plugin: %w", err)
	}
	return changed || did, nil
}

// Uninstall takes the entry out of every configuration and then removes the binary. What is not there is no error.
func (i *Installer) Uninstall() error {
	files, err := os.ReadDir(i.ConfDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("uninstall plugin: %w", err)
	}
	var errs []error
	for _, f := range files {
		path := filepath.Join(i.ConfDir, f.Name())
		if single, ok := strings.CutSuffix(path, retained); ok {
			errs = append(errs, os.Rename(path, single))
			if err := os.Remove(asList(single)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
			continue
		}
		if !isConf(path) {
			continue
		}
		old, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) { // the list of a single plugin, gone with it
			continue
		}
		errs = append(errs, err)
		if list, err := Remove(old, PluginType); err == nil {
			_, err = replace(path, list, 0o600)
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("uninstall plugin: %w", err) // the binary stays: an entry may still ask for it
	}
	if err := os.Remove(filepath.Join(i.BinDir, PluginType)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("uninstall plugin: %w", err)
	}
	return nil
}

// active is the configuration a runtime uses: the first by name.
func (i *Installer) active() (string, error) {
	files, err := os.ReadDir(i.ConfDir)
	if err != nil {
		return "", fmt.Errorf("install plugin: %w", err)
	}
	var names []string
	for _, f := range files {
		if isConf(f.Name()) {
			names = append(names, f.Name())
		}
	}
	slices.Sort(names)
	for _, name := range names {
		path := filepath.Join(i.ConfDir, name)
		if b, err := os.ReadFile(path); err == nil {
			if _, err := parse(b); err == nil { // runtimes skip what they cannot read
				return path, nil
			}
		}
	}
	return "", fmt.Errorf("install plugin: %w in %s", ErrNoNetwork, i.ConfDir)
}

func isConf(name string) bool {
	switch filepath.Ext(name) {
	case ".conf", ".conflist", ".json":
		return !strings.HasPrefix(filepath.Base(name), ".")
	}
	return false
}

// asList is the name the file must have for runtimes to read it as a list. They tell by the name alone.
func asList(path string) string {
	if filepath.Ext(path) == ".conflist" {
		return path
	}
	return strings.TrimSuffix(path, filepath.Ext(path)) + ".conflist"
}

// replace writes a file at once, unless it has that content already. A configuration keeps the mode it had.
func replace(path string, content []byte, mode os.FileMode) (changed bool, err error) {
	if st, err := os.Stat(path); err == nil {
		runs := st.Mode().Perm()&0o100 != 0
		if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, content) && runs == (mode&0o100 != 0) {
			return false, nil
		}
		if mode&0o100 == 0 {
			mode = st.Mode().Perm() &^ 0o111
		}
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return false, err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, werr := f.Write(content)
	if err := errors.Join(werr, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return false, err
	}
	return true, os.Rename(f.Name(), path)
}
