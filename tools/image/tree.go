package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"time"
)

// tree is a file system: cleaned absolute paths and what is there.
type tree map[string]node

// node is a file, a directory or a symbolic link; all belong to root.
type node struct {
	kind byte  // tar.TypeReg, TypeDir or TypeSymlink
	mode int64 // permissions with sticky bit
	data []byte
	link string
}

func file(mode int64, text string) node {
	return node{kind: tar.TypeReg, mode: mode, data: []byte(text)}
}
func directory(mode int64) node { return node{kind: tar.TypeDir, mode: mode} }
func symlink(to string) node    { return node{kind: tar.TypeSymlink, mode: 0o777, link: to} }

// withParents is t and the directories its paths need.
func (t tree) withParents() tree {
	out := maps.Clone(t)
	for p := range t {
		for dir := path.Dir(p); dir != "/"; dir = path.Dir(dir) {
			if _, ok := out[dir]; !ok {
				out[dir] = directory(0o755)
			}
		}
	}
	return out
}

// epoch is the time of every file, so that a layer depends on nothing but its contents.
var epoch = time.Unix(0, 0).UTC()

// pack writes t as a tar archive: sorted, every file root's and of the epoch.
func (t tree) pack() ([]byte, error) {
	t = t.withParents()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, p := range slices.Sorted(maps.Keys(t)) {
		n := t[p]
		h := &tar.Header{Typeflag: n.kind, Name: strings.TrimPrefix(p, "/"), Mode: n.mode, ModTime: epoch, Format: tar.FormatPAX}
		switch n.kind {
		case tar.TypeDir:
			h.Name += "/"
		case tar.TypeSymlink:
			h.Linkname = n.link
		default:
			h.Size = int64(len(n.data))
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("pack %s: %w", p, err)
		}
		if _, err := w.Write(n.data); err != nil {
			return nil, fmt.Errorf("pack %s: %w", p, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// unpack reads a tar archive of files, directories and symbolic links.
func unpack(r io.Reader) (tree, error) {
	t := make(tree)
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return t, nil
		}
		if err != nil {
			return nil, err
		}
		p := path.Join("/", h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
		case tar.TypeSymlink:
			t[p] = symlink(h.Linkname)
		case tar.TypeReg:
			data, err := io.ReadAll(tr)
			if err != nil {
				return nil, err
			}
			t[p] = node{kind: tar.TypeReg, mode: h.Mode & 0o755, data: data}
		default:
			return nil, fmt.Errorf("%s is neither file, directory nor symbolic link", h.Name)
		}
	}
}

// maxLinks bounds a chain of symbolic links.
const maxLinks = 8

// follow returns the chain of symbolic links that begins at p, and the file it ends at, last; nil when there is none.
func (t tree) follow(p string) []string {
	var chain []string
	for range maxLinks {
		n, ok := t[p]
		if !ok {
			return nil
		}
		chain = append(chain, p)
		if n.kind != tar.TypeSymlink {
			return chain
		}
		if path.IsAbs(n.link) {
			p = path.Clean(n.link)
		} else {
			p = path.Join(path.Dir(p), n.link)
		}
	}
	return nil
}
