package keyfile_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/mistnet/mistnet/istiod/keyfile"
)

func TestCreatedOncePrivately(t *testing.T) {
	old := syscall.Umask(0) // modes must not depend on it
	defer syscall.Umask(old)
	dir := filepath.Join(t.TempDir(), "state")
	path := filepath.Join(dir, "secret")
	// Many at once, each with content of its own: all must return the same.
	got := make([][]byte, 16)
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() {
			var err error
			if got[i], err = keyfile.LoadOrCreate(path, func() ([]byte, error) { return fmt.Appendf(nil, "content %d", i), nil }); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for i := range got {
		if !bytes.Equal(got[i], got[0]) || len(got[i]) == 0 {
			t.Errorf("caller %d got %q, another %q", i, got[i], got[0])
		}
	}
	for name, want := range map[string]os.FileMode{dir: 0o700, path: 0o600} {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != want {
			t.Errorf("mode of %s = %04o, want %04o", name, info.Mode().Perm(), want)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("directory holds %v (%v), want the secret only", entries, err)
	}
}

func TestRefusals(t *testing.T) {
	never := func() ([]byte, error) { t.Error("create called"); return nil, nil }
	t.Run("others may read it", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "secret")
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, 0o640); err != nil {
			t.Fatal(err)
		}
		if _, err := keyfile.LoadOrCreate(path, never); err == nil || !strings.Contains(err.Error(), "chmod 600") {
			t.Errorf("LoadOrCreate = %v, want a hint at chmod 600", err)
		}
		if data, err := keyfile.LoadMounted(path); err != nil || string(data) != "x" {
			t.Errorf("LoadMounted = %q, %v", data, err)
		}
	})
	t.Run("it is a directory", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "secret")
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if _, err := keyfile.LoadOrCreate(path, never); err == nil {
			t.Error("a directory was read as a secret")
		}
	})
	t.Run("it is far too large", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "secret")
		if err := os.WriteFile(path, make([]byte, 2<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := keyfile.Load(path); err == nil {
			t.Error("2 MiB were read as a secret")
		}
	})
	t.Run("its content cannot be made", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "state", "secret")
		broken := errors.New("no entropy")
		if _, err := keyfile.LoadOrCreate(path, func() ([]byte, error) { return nil, broken }); !errors.Is(err, broken) {
			t.Errorf("LoadOrCreate = %v, want %v", err, broken)
		}
		if _, err := os.Stat(filepath.Dir(path)); !os.IsNotExist(err) {
			t.Errorf("something was left behind: %v", err)
		}
	})
}
