// Package keyfile keeps secrets in files: made once, whole or not at all, readable by their owner only.
//
// It does not know what is in them.
package keyfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// maxBytes bounds what is read: no key or certificate file comes near.
const maxBytes = 1 << 20

// LoadOrCreate returns what the file holds. If there is none, create makes the content, which is written with mode
// 0600, in a directory made with mode 0700 if need be; of several processes that do so at once all return the same. It
// refuses a file that others may read.
func LoadOrCreate(path string, create func() ([]byte, error)) ([]byte, error) {
	data, err := Load(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return data, err
	}
	if data, err = create(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("create secret: %w", err)
	}
	if err := writeOnce(path, data); err != nil {
		return nil, fmt.Errorf("create secret %s: %w", path, err)
	}
	return Load(path) // ours, or that of another process that was first
}

// writeOnce leaves a file that exists as it is. The content appears at path in one step, after it is on disk.
func writeOnce(path string, data []byte) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".new-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, os.Remove(f.Name()))
	}()
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	// A link, not a rename: it fails when the name is taken.
	if err := os.Link(f.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Load returns what the file holds, provided that only its owner may read it.
func Load(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read secret: %w", err)
	}
	if others := info.Mode().Perm() & 0o077; others != 0 {
		return nil, fmt.Errorf("read secret %s: its mode %04o lets others at it; run chmod 600 on it, and replace it if they may have read it",
			path, info.Mode().Perm())
	}
	return read(path, info)
}

func read(path string, info fs.FileInfo) ([]byte, error) {
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("read %s: not a regular file", path)
	}
	if info.Size() > maxBytes {
		return nil, fmt.Errorf("read %s: %d bytes, at most %d are plausible", path, info.Size(), maxBytes)
	}
	return os.ReadFile(path)
}

// LoadMounted is Load for a file that somebody else puts there, with the mode that suits them: a mounted Kubernetes
// Secret is readable by all in its container.
func LoadMounted(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	return read(path, info)
}
