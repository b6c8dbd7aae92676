package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
)

// Binaries are where the programs of a cluster are: one directory per module of e2e/bins, named by what it was built from.
type Binaries struct {
	Kube       string // kube-apiserver, kube-controller-manager, kube-scheduler, kubelet, kube-proxy, kubectl
	Containerd string // containerd, ctr, containerd-shim-runc-v2
	Etcd       string // etcd
	CoreDNS    string // coredns
	Own        string // pause and app, of this repository
}

// target is a module below e2e/bins and what is built of it.
type target struct {
	name     string
	packages []string
	pinned   string // the module whose version names the release
	ldflags  func(version string) string
	tags     string
}

func targets() []target {
	plain := func(string) string { return "-s -w" }
	return []target{
		{name: "etcd", packages: []string{"."}, pinned: "go.etcd.io/etcd/server/v3", ldflags: plain},
		{name: "coredns", packages: []string{"."}, pinned: "github.com/coredns/coredns", ldflags: plain},
		{
			name: "containerd", pinned: "github.com/containerd/containerd/v2", tags: "no_btrfs,no_devmapper,no_zfs",
			packages: []string{
				"github.com/containerd/containerd/v2/cmd/containerd",
				"github.com/containerd/containerd/v2/cmd/ctr",
				"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
			},
			ldflags: func(v string) string { return "-s -w -X github.com/containerd/containerd/v2/version.Version=" + v },
		},
		{
			name: "kube", pinned: "k8s.io/kubernetes",
			packages: []string{
				"k8s.io/kubernetes/cmd/kube-apiserver", "k8s.io/kubernetes/cmd/kube-controller-manager",
				"k8s.io/kubernetes/cmd/kube-scheduler", "k8s.io/kubernetes/cmd/kubelet",
				"k8s.io/kubernetes/cmd/kube-proxy", "k8s.io/kubernetes/cmd/kubectl",
			},
			// A client refuses to work with a server whose version it cannot read.
			ldflags: func(v string) string {
				major, rest, _ := strings.Cut(strings.TrimPrefix(v, "v"), ".")
				minor, _, _ := strings.Cut(rest, ".")
				const at = " -X k8s.io/component-base/version."
				return "-s -w" + at + "gitVersion=" + v + at + "gitMajor=" + major + at + "gitMinor=" + minor + at + "gitTreeState=clean"
			},
		},
	}
}

// Build makes the programs that are not in the cache yet, about ten minutes of two cores the first time and nothing after
// that, and says on progress what it does. cacheDir "" is mistnet-e2e in the user's cache directory. It must run somewhere
// inside the repository.
func Build(ctx context.Context, cacheDir string, progress io.Writer) (Binaries, error) {
	root, err := moduleRoot(ctx)
	if err != nil {
		return Binaries{}, err
	}
	if cacheDir == "" {
		if cacheDir, err = defaultCache(); err != nil {
			return Binaries{}, err
		}
	}
	dirs := map[string]string{}
	for _, t := range targets() {
		if dirs[t.name], err = t.build(ctx, filepath.Join(root, "e2e", "bins", t.name), cacheDir, progress); err != nil {
			return Binaries{}, fmt.Errorf("build %s: %w", t.name, err)
		}
	}
	own, err := buildOwn(ctx, root, cacheDir)
	if err != nil {
		return Binaries{}, err
	}
	return Binaries{Kube: dirs["kube"], Containerd: dirs["containerd"], Etcd: dirs["etcd"], CoreDNS: dirs["coredns"], Own: own}, nil
}

func defaultCache() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "mistnet-e2e"), nil
}

func moduleRoot(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("ask go for the module: %w", err)
	}
	mod := strings.TrimSpace(string(out))
	if text, err := os.ReadFile(mod); err != nil || !bytes.HasPrefix(text, []byte("module github.com/mistnet/mistnet\n")) {
		return "", errors.New("not inside the mistnet repository: the programs to build are listed there, in e2e/bins")
	}
	return filepath.Dir(mod), nil
}

// build returns the directory with the module's programs, building them when what they are made of is new.
func (t target) build(ctx context.Context, src, cacheDir string, progress io.Writer) (string, error) {
	mod, err := os.ReadFile(filepath.Join(src, "go.mod"))
	if err != nil {
		return "", err
	}
	m := regexp.MustCompile(`(?m)^(?:require)?\s*` + regexp.QuoteMeta(t.pinned) + ` (v\S+)( // indirect)?$`).FindSubmatch(mod)
	if m == nil {
		return "", fmt.Errorf("%s/go.mod does not require %s", src, t.pinned)
	}
	version := string(m[1])
	args := []string{"build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-tags=" + t.tags, "-ldflags=" + t.ldflags(version)}
	sum := sha256.New()
	fmt.Fprintln(sum, runtime.Version(), runtime.GOARCH, args, t.packages)
	if err := hashDir(sum, src); err != nil {
		return "", err
	}
	dir := filepath.Join(cacheDir, t.name+"-"+version+"-"+hex.EncodeToString(sum.Sum(nil))[:12])
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	fmt.Fprintf(progress, "building %s %s (kept in %s)\n", t.name, version, dir)
	return dir, intoPlace(dir, func(tmp string) error {
		return goBuild(ctx, src, append(append(args, "-o", tmp+"/"), t.packages...))
	})
}

// goBuild runs at the lowest priority: the first time it takes minutes, and the machine is somebody's.
func goBuild(ctx context.Context, dir string, args []string) error {
	cmd := exec.CommandContext(ctx, "nice", append([]string{"-n", "19", "go"}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOFLAGS=", "GOTOOLCHAIN=local", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build in %s: %w\n%s", dir, err, out)
	}
	return nil
}

// intoPlace has make fill a directory beside dir, and renames it when it is complete: nobody sees it half made, and of two
// who make it at once one wins.
func intoPlace(dir string, make func(tmp string) error) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	if err := make(tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// hashDir adds the names and contents of the files directly in dir.
func hashDir(w io.Writer, dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return err
		}
		fmt.Fprintf(w, "%s %d\n", e.Name(), len(b))
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return nil
}

// buildOwn builds the repository's own helpers, which change with it: the go command knows what is stale.
func buildOwn(ctx context.Context, root, cacheDir string) (string, error) {
	tmp, err := os.MkdirTemp("", "mistnet-e2e-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	err = goBuild(ctx, root, []string{"build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", tmp + "/", "./e2e/cmd/pause", "./e2e/cmd/app"})
	if err != nil {
		return "", err
	}
	sum := sha256.New()
	if err := hashDir(sum, tmp); err != nil {
		return "", err
	}
	dir := filepath.Join(cacheDir, "own-"+hex.EncodeToString(sum.Sum(nil))[:12])
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	return dir, intoPlace(dir, func(into string) error { return os.CopyFS(into, os.DirFS(tmp)) })
}
