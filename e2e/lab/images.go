package lab

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// The images of the lab itself. They are never pulled: there is nowhere to pull them from.
const (
	PauseImage   = "mistnet.local/pause:1"
	CoreDNSImage = "mistnet.local/coredns:1"
	AppImage     = "mistnet.local/app:1" // e2e/app: servers and clients for suites
)

// packImages packs the lab's own images into dir and returns their archives.
func packImages(bins Binaries, dir string) ([]string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	var archives []string
	for _, i := range []struct{ name, program string }{
		{PauseImage, filepath.Join(bins.Own, "pause")},
		{CoreDNSImage, filepath.Join(bins.CoreDNS, "coredns")},
		{AppImage, filepath.Join(bins.Own, "app")},
	} {
		archive := filepath.Join(dir, filepath.Base(i.program)+".tar")
		if err := PackImage(archive, i.name, i.program); err != nil {
			return nil, err
		}
		archives = append(archives, archive)
	}
	return archives, nil
}

// PackImage writes an OCI image layout as a tar file: one uncompressed layer that holds one static program, which is the
// entry point and is in the PATH, also by the names in links. Name is the image's full one, as manifests say it.
func PackImage(archive, name, program string, links ...string) error {
	layer, err := packLayer(program, links)
	if err == nil {
		err = writeImage(archive, name, filepath.Base(program), layer)
	}
	if err != nil {
		return fmt.Errorf("pack image %s: %w", name, err)
	}
	return nil
}

// writeImage does so. The annotation is where containerd looks for the image's full name.
func writeImage(archive, name, entrypoint string, layer []byte) error {
	type object = map[string]any
	config, err := json.Marshal(object{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": object{"Entrypoint": []string{"/" + entrypoint}, "Env": []string{"PATH=/"}, "WorkingDir": "/"},
		"rootfs": object{"type": "layers", "diff_ids": []string{digest(layer)}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal(object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": object{"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(config), "size": len(config)},
		"layers": []object{{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest(layer), "size": len(layer)}},
	})
	if err != nil {
		return err
	}
	index, err := json.Marshal(object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
		"manifests": []object{{
			"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(manifest), "size": len(manifest),
			"platform":    object{"architecture": runtime.GOARCH, "os": "linux"},
			"annotations": object{"io.containerd.image.name": name},
		}},
	})
	if err != nil {
		return err
	}
	f, err := os.Create(archive)
	if err != nil {
		return err
	}
	w := tar.NewWriter(f)
	for _, e := range []struct {
		name string
		body []byte
	}{
		{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)},
		{blob(config), config}, {blob(manifest), manifest}, {blob(layer), layer},
		{"index.json", index},
	} {
		if err := put(w, e.name, 0o644, e.body); err != nil {
			f.Close()
			return err
		}
	}
	if err := w.Close(); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

func packLayer(program string, links []string) ([]byte, error) {
	body, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, dir := range []string{"dev", "etc", "proc", "run", "sys", "tmp", "var"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: time.Unix(0, 0)}); err != nil {
			return nil, err
		}
	}
	if err := put(w, filepath.Base(program), 0o755, body); err != nil {
		return nil, err
	}
	for _, name := range links {
		h := &tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: filepath.Base(program), Mode: 0o777, ModTime: time.Unix(0, 0)}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), w.Close()
}

func put(w *tar.Writer, name string, mode int64, body []byte) error {
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(body)), ModTime: time.Unix(0, 0)}); err != nil {
		return err
	}
	_, err := io.Copy(w, bytes.NewReader(body))
	return err
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func blob(b []byte) string {
	return path.Join("blobs", "sha256", strings.TrimPrefix(digest(b), "sha256:"))
}
