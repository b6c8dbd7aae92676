// Command image builds the container images of Mistnet without a container engine: static Go programs on a base of
// almost nothing, for every architecture, as OCI archives that containerd, kind, podman, skopeo and crane read.
//
//	go -C tools run ./image -out ../bin/images
//
// An image holds what it executes, the users it runs as and the licences of what others wrote; nothing else: no shell,
// no package manager. Archives are reproducible: the same commit, Go release and distribution packages give the same
// bytes. Beside each archive, and in the image under /usr/share/sbom, lies its bill of materials in SPDX.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

// options say what is built, from what, and where to.
type options struct {
	source   string // the repository
	out      string // directory of the archives
	cache    string // directory of downloaded packages
	hub      string // what image names begin with
	version  string
	revision string
	created  time.Time
	arches   []string
	images   []string
}

func run(ctx context.Context, args []string, log io.Writer) error {
	o, err := parse(args)
	if err != nil {
		return err
	}
	if err := o.complete(ctx); err != nil {
		return err
	}
	return build(ctx, o, log)
}

func parse(args []string) (options, error) {
	var o options
	var arches, images string
	names := imageNames()
	fs := flag.NewFlagSet("image", flag.ContinueOnError)
	fs.StringVar(&o.source, "source", "..", "the repository")
	fs.StringVar(&o.out, "out", "../bin/images", "directory for the archives")
	fs.StringVar(&o.cache, "cache", "", "directory for downloaded packages (default: the user's cache directory)")
	fs.StringVar(&o.hub, "hub", "localhost/mistnet", "what the images' names begin with")
	fs.StringVar(&o.version, "version", "", "the images' tag (default: appVersion of the istiod chart)")
	fs.StringVar(&o.revision, "revision", "", "the commit, for the label (default: what git says)")
	fs.StringVar(&arches, "arch", "amd64,arm64", "architectures, separated by commas")
	fs.StringVar(&images, "images", strings.Join(names, ","), "images, separated by commas")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	if fs.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	o.arches, o.images = strings.Split(arches, ","), strings.Split(images, ",")
	var errs []error
	for _, a := range o.arches {
		if _, ok := triplets[a]; !ok {
			errs = append(errs, fmt.Errorf("-arch: %q is none of amd64, arm64", a))
		}
	}
	for _, name := range o.images {
		if !slices.Contains(names, name) {
			errs = append(errs, fmt.Errorf("-images: %q is none of %s", name, strings.Join(names, ", ")))
		}
	}
	return o, errors.Join(errs...)
}

// complete fills in what was not given: version from the chart, commit and its time from git, and the cache's place.
func (o *options) complete(ctx context.Context) error {
	if o.version == "" {
		v, err := chartVersion(filepath.Join(o.source, "manifests/charts/istiod/Chart.yaml"))
		if err != nil {
			return fmt.Errorf("find the version (or give -version): %w", err)
		}
		o.version = v
	}
	if o.revision == "" {
		o.revision = git(ctx, o.source, "rev-parse", "HEAD")
		if git(ctx, o.source, "status", "--porcelain", "--untracked-files=no") != "" {
			o.revision += "-dirty"
		}
	}
	if o.cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			return fmt.Errorf("find a cache directory (or give -cache): %w", err)
		}
		o.cache = filepath.Join(dir, "mistnet", "image")
	}
	// https://reproducible-builds.org/docs/source-date-epoch/
	text := os.Getenv("SOURCE_DATE_EPOCH")
	if text == "" {
		text = git(ctx, o.source, "log", "-1", "--format=%ct")
	}
	o.created = time.Unix(0, 0).UTC()
	if text != "" {
		seconds, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return fmt.Errorf("SOURCE_DATE_EPOCH=%q: want seconds since 1970", text)
		}
		o.created = time.Unix(seconds, 0).UTC()
	}
	var err error
	o.cache, err = filepath.Abs(o.cache)
	return err
}

// git is what a git command prints, or "" where there is no repository: a release's tarball has none.
func git(ctx context.Context, dir string, args ...string) string {
	out, err := exec.CommandContext(ctx, "git", append([]string{"-C", dir}, args...)...).Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

// chartVersion reads appVersion of a chart.
func chartVersion(path string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "appVersion:"); ok {
			return strings.Trim(strings.TrimSpace(v), `"'`), nil
		}
	}
	return "", fmt.Errorf("%s has no appVersion", path)
}

// build makes every image for every architecture and writes the archives.
func build(ctx context.Context, o options, log io.Writer) error {
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "mistnet-image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	parts := make(map[string][]part) // by image
	for _, arch := range o.arches {
		programs, err := compile(ctx, o, arch, filepath.Join(work, arch))
		if err != nil {
			return err
		}
		for _, im := range catalog {
			if !slices.Contains(o.images, im.name) {
				continue
			}
			p, err := assemble(ctx, o, im, arch, programs, log)
			if err != nil {
				return fmt.Errorf("image %s for %s: %w", im.name, arch, err)
			}
			parts[im.name] = append(parts[im.name], p)
		}
	}
	for _, name := range o.images {
		if err := write(o, name, parts[name], log); err != nil {
			return fmt.Errorf("image %s: %w", name, err)
		}
	}
	return nil
}
