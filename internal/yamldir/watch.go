package yamldir

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	settle    = 10 * time.Millisecond  // quiet time after the last event before files are read
	settleMax = 100 * time.Millisecond // and how long events that never cease may delay that
	// emptyGrace is how long a file that suddenly is empty keeps its objects: whoever truncates a file usually writes
	// it next, and its policies must not vanish in between.
	emptyGrace = 250 * time.Millisecond
	lostPoll   = 500 * time.Millisecond // how often a directory that vanished is looked for

	maxFileBytes = 64 << 20
)

// Watch reads every .yaml, .yml and .json file below dir and calls on with what it holds, then again with each change,
// until ctx is done. The first call carries the whole directory, also when that is nothing; calls never overlap.
// Names that begin with a dot are passed over. It returns nil when ctx is done, and an error when dir cannot be watched
// at the start; a directory that vanishes later is a Problem, and its content stays.
func Watch(ctx context.Context, dir string, on func(Change)) error {
	events, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch %s: %w", dir, err)
	}
	defer events.Close()
	root, err := filepath.EvalSymlinks(dir) // a walk does not follow links, not even from where it starts
	if err != nil {
		return fmt.Errorf("watch %s: %w", dir, err)
	}
	w := &watcher{root: root, events: events, store: newStore(),
		dirs: make(map[string]bool), touched: make(map[string]bool), empty: make(map[string]bool)}
	if err := w.start(); err != nil {
		return fmt.Errorf("watch %s: %w", dir, err)
	}
	first, _ := w.store.flush()
	on(first)
	return w.run(ctx, on)
}

// watcher turns file system events into changes of its store. One goroutine owns it.
type watcher struct {
	root    string
	events  *fsnotify.Watcher
	store   *store
	dirs    map[string]bool // watched directories
	touched map[string]bool // files to read again, by full path
	empty   map[string]bool // files whose emptiness is doubted
	rescan  bool            // read everything again
}

func (w *watcher) start() error {
	info, err := os.Stat(w.root)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return errors.New("not a directory")
	}
	return w.scan()
}

func (w *watcher) run(ctx context.Context, on func(Change)) error {
	quiet, grace, poll := stopped(), stopped(), stopped()
	defer quiet.Stop()
	defer grace.Stop()
	defer poll.Stop()
	var firstEvent time.Time
	report := func() {
		if c, changed := w.store.flush(); changed {
			on(c)
		}
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case ev, open := <-w.events.Events:
			if !open {
				return errors.New("watch: the file system's events ended")
			}
			if !w.note(ev) {
				continue
			}
		case err, open := <-w.events.Errors:
			if !open {
				return errors.New("watch: the file system's events ended")
			}
			_ = err // events were lost, whatever the reason: read everything
			w.rescan = true
		case <-quiet.C:
			firstEvent = time.Time{}
			w.read()
			if len(w.empty) > 0 {
				grace.Reset(emptyGrace)
			}
			if w.store.lost != "" {
				poll.Reset(lostPoll)
			}
			report()
			continue
		case <-grace.C:
			for path := range w.empty {
				w.readFile(path)
			}
			clear(w.empty)
			report()
			continue
		case <-poll.C:
			w.rescan = true
		}
		now := time.Now()
		if firstEvent.IsZero() {
			firstEvent = now
		}
		quiet.Reset(min(settle, settleMax-now.Sub(firstEvent)))
	}
}

func stopped() *time.Timer {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
}

// note remembers what an event asks to be read, and reports whether it asks for anything.
func (w *watcher) note(ev fsnotify.Event) bool {
	path := filepath.Clean(ev.Name)
	base := filepath.Base(path)
	switch {
	case path == w.root:
		gone := ev.Has(fsnotify.Remove) || ev.Has(fsnotify.Rename)
		w.rescan = w.rescan || gone
		return gone
	case w.dirs[path], strings.HasPrefix(base, ".."): // a mounted ConfigMap changes by renaming its ..data link
		w.rescan = true
		return true
	case hidden(base):
		return false
	case wanted(base):
		w.touched[path] = true
		return true
	case ev.Has(fsnotify.Create):
		info, err := os.Stat(path)
		isDir := err == nil && info.IsDir()
		w.rescan = w.rescan || isDir
		return isDir
	}
	return false
}

// hidden tells names of no interest: dot files, and the lock and backup files of editors.
func hidden(base string) bool { return strings.HasPrefix(base, ".") || strings.HasPrefix(base, "#") }

func wanted(base string) bool {
	switch filepath.Ext(base) {
	case ".yaml", ".yml", ".json":
		return !hidden(base)
	}
	return false
}

func (w *watcher) read() {
	if w.rescan {
		w.rescan = false
		clear(w.touched)
		if err := w.scan(); err != nil {
			w.store.lost = fmt.Sprintf("the directory cannot be read, its last content stays in force: %v", err)
			w.forgetDirs()
		} else {
			w.store.lost = ""
		}
		return
	}
	for path := range w.touched {
		if content, err := readRegular(path); err == nil && len(content) == 0 && w.store.holds(w.name(path)) {
			w.empty[path] = true
			continue
		}
		delete(w.empty, path)
		w.readFile(path)
	}
	clear(w.touched)
}

func (w *watcher) forgetDirs() {
	for dir := range w.dirs {
		_ = w.events.Remove(dir)
	}
	clear(w.dirs)
}

// scan reads the whole tree. The watch on a directory is set before its entries are listed, so nothing falls between.
func (w *watcher) scan() error {
	found := make(map[string]bool)
	dirs := make(map[string]bool)
	err := filepath.WalkDir(w.root, func(path string, d fs.DirEntry, err error) error {
		if path != w.root && hidden(filepath.Base(path)) {
			if d != nil && d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		switch {
		case err != nil && path == w.root:
			return err
		case err != nil:
			if !errors.Is(err, fs.ErrNotExist) {
				w.store.fail(w.name(path), err)
				found[w.name(path)] = true
			}
		case d.IsDir() || path == w.root:
			dirs[path] = true
			if err := w.events.Add(path); err != nil {
				return err
			}
		case wanted(d.Name()):
			found[w.name(path)] = true
			w.readFile(path)
		}
		return nil
	})
	if err != nil {
		return err
	}
	w.dirs = dirs
	delete(w.dirs, w.root)
	for file := range w.store.files {
		if !found[file] && !w.unreadable(file, found) {
			w.store.remove(file)
		}
	}
	return nil
}

// unreadable reports whether the file lies below a directory that is there but could not be listed.
func (w *watcher) unreadable(file string, found map[string]bool) bool {
	for dir := filepath.Dir(file); dir != "."; dir = filepath.Dir(dir) {
		if found[dir] {
			return true
		}
	}
	return false
}

// name is how the path of a file reads in objects and problems.
func (w *watcher) name(path string) string {
	rel, err := filepath.Rel(w.root, path)
	if err != nil {
		return path
	}
	return filepath.ToSlash(rel)
}

func (w *watcher) readFile(path string) {
	content, err := readRegular(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		w.store.remove(w.name(path))
	case err != nil:
		w.store.fail(w.name(path), err)
	default:
		w.store.set(w.name(path), content)
	}
}

// readRegular reads a file without waiting on one that is a pipe or a device.
func readRegular(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	content, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return nil, err
	}
	if len(content) > maxFileBytes {
		return nil, fmt.Errorf("larger than %d MiB", maxFileBytes>>20)
	}
	return content, nil
}
