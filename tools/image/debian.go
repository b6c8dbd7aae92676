package main

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// triplets are the library directories of the distribution's architectures.
var triplets = map[string]string{"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}

// deb is a package of the distribution.
type deb struct {
	name, version, arch string
	files               tree
}

// freshFor is how long a list of packages is used before apt is asked again.
const freshFor = 24 * time.Hour

// apt is a package database of its own for one architecture: the machine's sources and keys, but nothing installed, so
// that every dependency is named, and the machine's own database is never touched.
type apt struct{ dir, arch string }

// command is an apt-get command in the database.
func (a apt) command(ctx context.Context, args ...string) *exec.Cmd {
	opts := []string{
		"-o", "APT::Architecture=" + a.arch, "-o", "APT::Architectures=" + a.arch,
		"-o", "Dir::State=" + a.dir + "/state", "-o", "Dir::State::status=" + a.dir + "/status",
		"-o", "Dir::Cache=" + a.dir + "/cache", "-o", "APT::Sandbox::User=", "-o", "Acquire::Languages=none",
		"-o", "Debug::NoLocking=1", "-o", "APT::Install-Recommends=0", "-qq",
	}
	c := exec.CommandContext(ctx, "apt-get", append(opts, args...)...)
	c.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	return c
}

// fetch downloads packages and all they depend on, and opens them; apt checks signatures and sums.
func (a apt) fetch(ctx context.Context, names []string) ([]*deb, error) {
	for _, tool := range []string{"apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("%s is missing: this image needs packages of Debian or a distribution made from it", tool)
		}
	}
	for _, dir := range []string{"state/lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(a.dir, dir), 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(filepath.Join(a.dir, "status"), nil, 0o644); err != nil {
		return nil, err
	}
	if err := a.update(ctx); err != nil {
		return nil, err
	}
	install := append([]string{"install", "--yes"}, names...)
	plan, err := output(a.command(ctx, append(install, "--simulate")...))
	if err != nil {
		return nil, fmt.Errorf("resolve packages %s for %s: %w", strings.Join(names, ", "), a.arch, err)
	}
	debs := parsePlan(plan)
	if len(debs) == 0 {
		return nil, fmt.Errorf("resolve packages %s for %s: apt-get names none: %s", strings.Join(names, ", "), a.arch, plan)
	}
	if _, err := output(a.command(ctx, append(install, "--download-only")...)); err != nil {
		return nil, fmt.Errorf("download packages for %s: %w", a.arch, err)
	}
	for _, d := range debs {
		if err := d.open(ctx, filepath.Join(a.dir, "cache", "archives")); err != nil {
			return nil, fmt.Errorf("open package %s: %w", d.name, err)
		}
	}
	return debs, nil
}

// planned is a line of apt-get --simulate: Inst NAME (VERSION ORIGIN [ARCHITECTURE]).
var planned = regexp.MustCompile(`(?m)^Inst (\S+) \((\S+) .*\[(\w+)\]\)`)

func parsePlan(plan string) []*deb {
	var debs []*deb
	for _, m := range planned.FindAllStringSubmatch(plan, -1) {
		debs = append(debs, &deb{name: m[1], version: m[2], arch: m[3]})
	}
	return debs
}

// open reads the package's files. apt writes the colon of an epoch as %3a in file names.
func (d *deb) open(ctx context.Context, dir string) error {
	name := fmt.Sprintf("%s_%s_%s.deb", d.name, strings.ReplaceAll(d.version, ":", "%3a"), d.arch)
	content, err := output(exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", filepath.Join(dir, name)))
	if err != nil {
		return err
	}
	d.files, err = unpack(strings.NewReader(content))
	return err
}

// update asks for the list of packages when it is old. An old one will do when there is no other.
func (a apt) update(ctx context.Context) error {
	stamp := filepath.Join(a.dir, "updated")
	st, err := os.Stat(stamp)
	if err == nil && time.Since(st.ModTime()) < freshFor {
		return nil
	}
	if _, e := output(a.command(ctx, "update", "-o", "APT::Update::Error-Mode=any")); e != nil {
		if err == nil {
			return nil
		}
		return fmt.Errorf("fetch the list of %s packages: %w", a.arch, e)
	}
	return os.WriteFile(stamp, nil, 0o644)
}

// output runs a command and returns what it prints; what it complains of is in the error.
func output(c *exec.Cmd) (string, error) {
	var complaint bytes.Buffer
	c.Stderr = &complaint
	out, err := c.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", filepath.Base(c.Path), err, bytes.TrimSpace(complaint.Bytes()))
	}
	return string(out), nil
}

// pick takes from the packages the files that match the patterns, the shared libraries and loaders these need, and the
// licence of every package that something was taken from. It returns those packages too.
func pick(debs []*deb, patterns []string, triplet string) (tree, []*deb, error) {
	all, owner := make(tree), make(map[string]*deb)
	for _, d := range debs {
		for p, n := range d.files {
			all[p], owner[p] = n, d
		}
	}
	var todo []string
	for _, pattern := range patterns {
		found := len(todo)
		for p := range all {
			if ok, err := path.Match(pattern, p); err != nil {
				return nil, nil, fmt.Errorf("pattern %s: %w", pattern, err)
			} else if ok {
				todo = append(todo, p)
			}
		}
		if len(todo) == found {
			return nil, nil, fmt.Errorf("no package has a file %s", pattern)
		}
	}
	picked, used := make(tree), make(map[*deb]bool)
	libraries := []string{"/lib/" + triplet, "/usr/lib/" + triplet}
	for len(todo) > 0 {
		p := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if _, ok := picked[p]; ok {
			continue
		}
		chain := all.follow(p)
		if chain == nil {
			return nil, nil, fmt.Errorf("%s points nowhere", p)
		}
		for _, c := range chain {
			picked[c], used[owner[c]] = all[c], true
		}
		needs, err := needed(all[chain[len(chain)-1]].data)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", p, err)
		}
		for _, need := range needs {
			at, err := find(all, libraries, need)
			if err != nil {
				return nil, nil, fmt.Errorf("%s: %w", p, err)
			}
			todo = append(todo, at)
		}
	}
	for d := range used {
		p := "/usr/share/doc/" + d.name + "/copyright"
		if chain := d.files.follow(p); chain != nil {
			for _, c := range chain {
				picked[c] = d.files[c]
			}
		} else if chain := all.follow(p); chain != nil { // a package may point to another's of the same source
			picked[p] = all[chain[len(chain)-1]]
		} else {
			return nil, nil, fmt.Errorf("package %s has no licence at %s", d.name, p)
		}
	}
	packages := slices.SortedFunc(maps.Keys(used), func(a, b *deb) int { return strings.Compare(a.name, b.name) })
	return picked, packages, nil
}

// needed names what the dynamic loader opens for an ELF file: libraries by name, the loader itself by path. A file that
// is none needs nothing.
func needed(data []byte) ([]string, error) {
	if !bytes.HasPrefix(data, []byte(elf.ELFMAG)) {
		return nil, nil
	}
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	needs, err := f.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		loader := make([]byte, p.Filesz)
		if _, err := p.ReadAt(loader, 0); err != nil {
			return nil, err
		}
		needs = append(needs, string(bytes.TrimRight(loader, "\x00")))
	}
	return needs, nil
}

// find is where the loader finds a library without a cache: in the distribution's own directories.
func find(all tree, dirs []string, name string) (string, error) {
	if path.IsAbs(name) {
		if all.follow(name) != nil {
			return name, nil
		}
		return "", fmt.Errorf("no package has %s", name)
	}
	for _, dir := range dirs {
		if p := path.Join(dir, name); all.follow(p) != nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("no package has the library %s", name)
}
