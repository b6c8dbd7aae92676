package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/mistnet/mistnet/cni/rules"
	"github.com/mistnet/mistnet/internal/linux"
)

// record is what the agent remembers of one running pod, also across its own restart.
type record struct {
	Namespace, Name string
	UID             string // what ztunnel knows the pod by
	ContainerID     string
	IfName          string
	Netns           string // path
	NetnsID         uint64 // inode: a namesake of the path is another namespace
	IPs             []netip.Addr

	// Captured is set before ztunnel is told of the pod or the first rule goes in, and cleared after the last one is out.
	Captured       bool
	Released       bool          // redirection has ended, what it needed is still there: see drain
	Options        rules.Options // of the rules, when Captured
	ServiceAccount string        // when Captured
	Enabled        bool          // it was captured, and ztunnel had taken it
}

func (r *record) key() podKey { return podKey{r.Namespace, r.Name} }

// open returns the pod's namespace, or errVanished when it is no longer there.
func (r *record) open() (*linux.NetNS, error) {
	ns, err := linux.OpenNetNS(r.Netns)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errVanished, err)
	}
	id, err := ns.ID()
	if err == nil && id != r.NetnsID {
		err = fmt.Errorf("%w: %s is another namespace now", errVanished, r.Netns)
	}
	if err != nil {
		ns.Close()
		return nil, err
	}
	return ns, nil
}

// file returns a descriptor of the pod's namespace for ztunnel.
func (r *record) file() (*os.File, error) {
	ns, err := r.open() // for its checks
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	f, err := os.Open(r.Netns)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errVanished, err)
	}
	return f, nil
}

func netnsID(path string) (uint64, error) {
	ns, err := linux.OpenNetNS(path)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", errVanished, err)
	}
	defer ns.Close()
	return ns.ID()
}

var errVanished = errors.New("network namespace has vanished")

// memoryFile is the file of the run directory that holds records, and brokenSuffix the end of the name it gets when it
// cannot be understood.
const (
	memoryFile   = "pods.json"
	brokenSuffix = ".bad"
)

// records is the file that holds them.
type records struct {
	path string

	mu  sync.Mutex
	all map[podKey]record
}

// openRecords reads the file. One that cannot be understood is set aside: its pods stay captured, and ztunnel, which is
// not told of them, lets nothing through.
func openRecords(path string) (*records, error) {
	rs := &records{path: path, all: make(map[podKey]record)}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return rs, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read known pods: %w", err)
	}
	var list []record
	if err := json.Unmarshal(b, &list); err != nil {
		if rerr := os.Rename(path, path+brokenSuffix); rerr != nil {
			return nil, fmt.Errorf("set broken file aside: %w", rerr)
		}
		return rs, fmt.Errorf("%w: %s (set aside as %[2]s.bad): %w", errBrokenRecords, path, err)
	}
	for _, r := range list {
		rs.all[r.key()] = r
	}
	return rs, nil
}

var errBrokenRecords = errors.New("file of known pods is broken")

func (rs *records) list() []record {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return rs.sorted()
}

func (rs *records) sorted() []record {
	out := make([]record, 0, len(rs.all))
	for _, r := range rs.all {
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b record) int { return strings.Compare(a.key().String(), b.key().String()) })
	return out
}

// put remembers r; it is on disk when put returns without an error.
func (rs *records) put(r record) error {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	rs.all[r.key()] = r
	return rs.save()
}

func (rs *records) remove(k podKey) error {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if _, ok := rs.all[k]; !ok {
		return nil
	}
	delete(rs.all, k)
	return rs.save()
}

// save is called with mu held: the file must show the changes in the order they were made.
func (rs *records) save() error {
	b, err := json.MarshalIndent(rs.sorted(), "", " ")
	if err != nil {
		return fmt.Errorf("encode known pods: %w", err)
	}
	if err := writeFile(rs.path, b, 0o600); err != nil {
		return fmt.Errorf("remember pods: %w", err)
	}
	return nil
}

// writeFile replaces a file at once: readers see the old content or the new. The temporary file's name begins with a
// dot, which watchers of the directory pass over.
func writeFile(path string, content []byte, mode os.FileMode) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, werr := f.Write(content)
	if err := errors.Join(werr, f.Chmod(mode), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
