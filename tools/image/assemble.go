package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// part is an image for one architecture.
type part struct {
	arch  string
	image v1.Image
	bill  []byte // its SPDX document
}

// source is where the project lives, for labels.
const source = "https://github.com/mistnet/mistnet"

// assemble puts an image together, in layers by how often they change: users and directories, the distribution's
// files, the programs, the bill of materials.
func assemble(ctx context.Context, o options, im image, arch string, programs map[string]binary, log io.Writer) (part, error) {
	layers := []tree{base()}
	var debs []*deb
	if len(im.packages) > 0 {
		fmt.Fprintf(log, "%-9s %s packages of the distribution\n", im.name, arch)
		fetched, err := apt{filepath.Join(o.cache, arch), arch}.fetch(ctx, im.packages)
		if err != nil {
			return part{}, err
		}
		files, used, err := pick(fetched, im.runs, triplets[arch])
		if err != nil {
			return part{}, err
		}
		for at, to := range im.links {
			files[at] = symlink(to)
		}
		layers, debs = append(layers, files), used
	}
	own, byPath := make(tree), make(map[string]binary)
	for _, p := range im.programs {
		own[p.path], byPath[p.path] = node{kind: tar.TypeReg, mode: 0o755, data: programs[p.source].data}, programs[p.source]
	}
	bill, err := spdx(o, im, arch, byPath, debs)
	if err != nil {
		return part{}, err
	}
	billPath := "/usr/share/sbom/mistnet-" + im.name + ".spdx.json"
	layers = append(layers, own, tree{billPath: node{kind: tar.TypeReg, mode: 0o644, data: bill}})

	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, t := range layers {
		if img, err = appendLayer(img, t, o); err != nil {
			return part{}, err
		}
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return part{}, err
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture, cfg.Created = "linux", arch, v1.Time{Time: o.created}
	if arch == "arm64" {
		cfg.Variant = "v8"
	}
	cfg.Config = v1.Config{
		User: im.user, Entrypoint: []string{im.programs[0].path}, WorkingDir: "/",
		Env:    []string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		Labels: labels(o, im, bill, billPath),
	}
	if img, err = mutate.ConfigFile(img, cfg); err != nil {
		return part{}, err
	}
	return part{arch, img, bill}, nil
}

func labels(o options, im image, bill []byte, billPath string) map[string]string {
	l := map[string]string{
		"org.opencontainers.image.title":    im.title,
		"org.opencontainers.image.version":  o.version,
		"org.opencontainers.image.source":   source,
		"org.opencontainers.image.licenses": im.licenses,
		"org.opencontainers.image.created":  o.created.Format("2006-01-02T15:04:05Z07:00"),
		"io.mistnet.sbom.path":              billPath,
		"io.mistnet.sbom.digest":            fmt.Sprintf("sha256:%x", sha256.Sum256(bill)),
	}
	if o.revision != "" {
		l["org.opencontainers.image.revision"] = o.revision
	}
	return l
}

func appendLayer(img v1.Image, t tree, o options) (v1.Image, error) {
	packed, err := t.pack()
	if err != nil {
		return nil, err
	}
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(packed)), nil }
	layer, err := tarball.LayerFromOpener(open, tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(6))
	if err != nil {
		return nil, err
	}
	return mutate.Append(img, mutate.Addendum{
		Layer:   layer,
		History: v1.History{Created: v1.Time{Time: o.created}, CreatedBy: "tools/image"},
	})
}

// write makes one archive of an image for all its architectures, an OCI image layout in a tar file, and lays the bills
// of materials beside it.
func write(o options, name string, parts []part, log io.Writer) error {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range parts {
		cfg, err := p.image.ConfigFile()
		if err != nil {
			return err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add: p.image, Descriptor: v1.Descriptor{Platform: cfg.Platform()},
		})
		bill := filepath.Join(o.out, name+"-"+p.arch+".spdx.json")
		if err := os.WriteFile(bill, p.bill, 0o644); err != nil {
			return err
		}
	}
	dir, err := os.MkdirTemp(o.out, ".layout-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	ref := o.hub + "/" + name + ":" + o.version
	// containerd names the image by the first annotation, podman and skopeo by the second.
	if err := l.AppendIndex(index, layout.WithAnnotations(map[string]string{
		"io.containerd.image.name":          ref,
		"org.opencontainers.image.ref.name": o.version,
	})); err != nil {
		return err
	}
	archive, err := readTree(dir)
	if err != nil {
		return err
	}
	packed, err := archive.pack()
	if err != nil {
		return err
	}
	// Written beside and renamed: whoever imports archives while they are built reads an old or a new one, whole.
	at := filepath.Join(o.out, name+".tar")
	if err := os.WriteFile(at+".new", packed, 0o644); err != nil {
		return err
	}
	if err := os.Rename(at+".new", at); err != nil {
		return err
	}
	digest, err := index.Digest()
	if err != nil {
		return err
	}
	fmt.Fprintf(log, "%-9s %s %s %d MiB\n", name, ref, digest, len(packed)>>20)
	return nil
}

// readTree reads a directory of plain files.
func readTree(dir string) (tree, error) {
	t := make(tree)
	root := os.DirFS(dir)
	err := fs.WalkDir(root, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := fs.ReadFile(root, p)
		t[path.Join("/", p)] = node{kind: tar.TypeReg, mode: 0o644, data: data}
		return err
	})
	return t, err
}
