package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// repository writes a module with a program of every name the catalog has, each small.
func repository(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	write := func(name, text string) {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("go.mod", "module github.com/mistnet/mistnet\n\ngo 1.26\n")
	write("internal/daemon/version.go", "package daemon\n\nvar version string\n\nfunc Version() string { return version }\n")
	write("manifests/charts/istiod/Chart.yaml", "name: istiod\nappVersion: \"1.2.3\"\n")
	for _, im := range catalog {
		for _, p := range im.programs {
			write(filepath.Join(p.source, "main.go"), fmt.Sprintf(
				"package main\n\nimport \"github.com/mistnet/mistnet/internal/daemon\"\n\nfunc main() { println(%q, daemon.Version()) }\n", im.name))
		}
	}
	return dir
}

// make builds images into a new directory.
func makeImages(t *testing.T, source string, images ...string) string {
	t.Helper()
	out := t.TempDir()
	t.Setenv("SOURCE_DATE_EPOCH", "1700000000")
	err := run(t.Context(), []string{"-source", source, "-out", out, "-images", strings.Join(images, ","), "-revision", "abc"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// unpackArchive opens an archive as a layout and returns the image index in it and its annotations.
func unpackArchive(t *testing.T, file string) (v1.ImageIndex, map[string]string) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dir := t.TempDir()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		p := filepath.Join(dir, h.Name)
		if h.Typeflag == tar.TypeDir {
			err = os.MkdirAll(p, 0o755)
		} else {
			var data []byte
			if data, err = io.ReadAll(r); err == nil {
				err = os.WriteFile(p, data, 0o644)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	l, err := layout.FromPath(dir)
	if err != nil {
		t.Fatalf("%s is no image layout: %v", file, err)
	}
	top, err := l.ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	m, err := top.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Manifests) != 1 {
		t.Fatalf("%s names %d images, want 1", file, len(m.Manifests))
	}
	index, err := top.ImageIndex(m.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Errorf("%s is not valid: %v", file, err)
	}
	return index, m.Manifests[0].Annotations
}

// files are the paths of an image's files and links, with what regular ones hold.
func files(t *testing.T, img v1.Image) map[string][]byte {
	t.Helper()
	r := mutate.Extract(img)
	defer r.Close()
	out := make(map[string][]byte)
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeDir {
			continue
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		out["/"+h.Name] = data
	}
}

func each(t *testing.T, index v1.ImageIndex, do func(arch string, img v1.Image, cfg *v1.ConfigFile)) {
	t.Helper()
	m, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	var arches []string
	for _, d := range m.Manifests {
		img, err := index.Image(d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		cfg, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		if d.Platform == nil || d.Platform.Architecture != cfg.Architecture || cfg.OS != "linux" {
			t.Errorf("index says %v, image %s/%s", d.Platform, cfg.OS, cfg.Architecture)
		}
		arches = append(arches, cfg.Architecture)
		do(cfg.Architecture, img, cfg)
	}
	if !slices.Equal(arches, []string{"amd64", "arm64"}) {
		t.Errorf("architectures %v, want amd64 and arm64", arches)
	}
}

func TestImagesHoldWhatTheyExecute(t *testing.T) {
	source := repository(t)
	out := makeImages(t, source, "istiod", "ztunnel", "demo-app")
	for name, user := range map[string]string{"istiod": "1337:1337", "ztunnel": "0:1337", "demo-app": "65532:65532"} {
		index, annotations := unpackArchive(t, filepath.Join(out, name+".tar"))
		if got := annotations["io.containerd.image.name"]; got != "localhost/mistnet/"+name+":1.2.3" {
			t.Errorf("%s is named %q", name, got)
		}
		each(t, index, func(arch string, img v1.Image, cfg *v1.ConfigFile) {
			program := "/usr/local/bin/" + name
			bill := "/usr/share/sbom/mistnet-" + name + ".spdx.json"
			have := files(t, img)
			var paths []string
			for p := range have {
				paths = append(paths, p)
			}
			slices.Sort(paths)
			if want := []string{"/etc/group", "/etc/passwd", program, bill}; !slices.Equal(paths, want) {
				t.Errorf("%s %s holds %v, want %v", name, arch, paths, want)
			}
			if cfg.Config.User != user || !slices.Equal(cfg.Config.Entrypoint, []string{program}) {
				t.Errorf("%s runs %v as %s, want %s as %s", name, cfg.Config.Entrypoint, cfg.Config.User, program, user)
			}
			for label, want := range map[string]string{
				"org.opencontainers.image.version": "1.2.3", "org.opencontainers.image.revision": "abc",
				"org.opencontainers.image.licenses": "Apache-2.0", "io.mistnet.sbom.path": bill,
				"io.mistnet.sbom.digest": fmt.Sprintf("sha256:%x", sha256.Sum256(have[bill])),
			} {
				if got := cfg.Config.Labels[label]; got != want {
					t.Errorf("%s label %s = %q, want %q", name, label, got, want)
				}
			}
			beside, err := os.ReadFile(filepath.Join(out, name+"-"+arch+".spdx.json"))
			if err != nil || !bytes.Equal(beside, have[bill]) {
				t.Errorf("the bill beside %s %s is not the one inside: %v", name, arch, err)
			}
			if !bytes.Contains(have[program], []byte("1.2.3")) {
				t.Errorf("the program of %s %s does not know its version", name, arch)
			}
			checkBill(t, have[bill], program, have[program])
		})
	}
}

// checkBill reads a bill of materials as a stranger would.
func checkBill(t *testing.T, bill []byte, program string, content []byte) {
	t.Helper()
	var doc struct {
		SPDXVersion string
		Packages    []struct {
			SPDXID, Name, PackageFileName, DownloadLocation string
			Checksums                                       []struct{ ChecksumValue string }
		}
		Relationships []struct{ SpdxElementID, RelatedSpdxElement string }
	}
	if err := json.Unmarshal(bill, &doc); err != nil {
		t.Fatal(err)
	}
	ids := map[string]bool{"SPDXRef-DOCUMENT": true}
	var names []string
	for _, p := range doc.Packages {
		if ids[p.SPDXID] || p.DownloadLocation == "" {
			t.Errorf("package %s is named twice or says not where it is from", p.SPDXID)
		}
		ids[p.SPDXID] = true
		names = append(names, p.Name)
		if p.PackageFileName == program && p.Checksums[0].ChecksumValue != fmt.Sprintf("%x", sha256.Sum256(content)) {
			t.Errorf("sum of %s is wrong", program)
		}
	}
	if doc.SPDXVersion != "SPDX-2.3" || !slices.Contains(names, "stdlib") {
		t.Errorf("bill %s names %v", doc.SPDXVersion, names)
	}
	for _, r := range doc.Relationships {
		if !ids[r.SpdxElementID] || !ids[r.RelatedSpdxElement] {
			t.Errorf("relationship %v to what is not there", r)
		}
	}
}

// Two builds, of two checkouts in two directories at two times, are the same to the byte.
func TestBuildsAreReproducible(t *testing.T) {
	first, second := repository(t), repository(t)
	if err := os.Chtimes(filepath.Join(second, "go.mod"), time.Unix(1, 0), time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	a, b := makeImages(t, first, "istiod", "demo-app"), makeImages(t, second, "istiod", "demo-app")
	entries, err := os.ReadDir(a)
	if err != nil || len(entries) != 6 {
		t.Fatalf("%d files, want two archives and four bills: %v", len(entries), err)
	}
	for _, e := range entries {
		x, err := os.ReadFile(filepath.Join(a, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		y, err := os.ReadFile(filepath.Join(b, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(x, y) {
			t.Errorf("%s differs between two builds", e.Name())
		}
	}
}

// The cni image has iptables and nft, what they load and nothing else, and they run.
func TestCNIImageRunsIPTables(t *testing.T) {
	if _, err := exec.LookPath("apt-get"); err != nil {
		t.Skip("apt-get is not installed: the image takes iptables from the distribution's packages")
	}
	source := repository(t)
	out := makeImages(t, source, "cni")
	index, _ := unpackArchive(t, filepath.Join(out, "cni.tar"))
	each(t, index, func(arch string, img v1.Image, cfg *v1.ConfigFile) {
		have := files(t, img)
		for _, want := range []string{"/usr/local/bin/cni-agent", "/opt/cni/bin/istio-cni", "/usr/sbin/iptables", "/usr/sbin/ip6tables", "/usr/sbin/nft",
			"/usr/sbin/iptables-legacy", "/usr/sbin/ip6tables-restore", "/usr/lib/" + triplets[arch] + "/xtables/libxt_owner.so", "/usr/share/doc/iptables/copyright"} {
			if _, ok := have[want]; !ok {
				t.Errorf("%s: %s is missing", arch, want)
			}
		}
		for p := range have {
			ok := slices.ContainsFunc([]string{"/usr/local/bin/cni-agent", "/opt/cni/bin/istio-cni", "/etc/passwd", "/etc/group",
				"/usr/share/sbom/", "/usr/share/doc/", "/usr/sbin/iptables", "/usr/sbin/ip6tables", "/usr/sbin/xtables-", "/usr/sbin/nft"},
				func(prefix string) bool { return strings.HasPrefix(p, prefix) })
			if !ok && !strings.Contains(p, ".so") {
				t.Errorf("%s: nobody needs %s", arch, p)
			}
		}
		if !bytes.Contains(have["/usr/share/sbom/mistnet-cni.spdx.json"], []byte("pkg:deb/")) {
			t.Errorf("%s: the bill names no package of the distribution", arch)
		}
		runIPTables(t, img, arch)
	})
}

// runIPTables makes and lists rules by the programs in an image, in a network namespace of their own.
func runIPTables(t *testing.T, img v1.Image, arch string) {
	t.Helper()
	host, err := exec.Command("go", "env", "GOHOSTARCH").Output()
	if err != nil {
		t.Fatal(err)
	}
	if strings.TrimSpace(string(host)) != arch {
		return // not this machine's
	}
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("not root: the image's programs cannot be tried")
		}
		t.Log("not root: the image's programs are not tried")
		return
	}
	root := t.TempDir()
	r := mutate.Extract(img)
	defer r.Close()
	c := exec.Command("tar", "-x", "-C", root)
	c.Stdin = r
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("unpack image: %v: %s", err, out)
	}
	for _, program := range []string{"iptables", "ip6tables", "iptables-nft", "iptables-legacy"} {
		// A rule with an extension of each kind we use: a match and a target that are libraries of their own.
		rules := "-t nat -A OUTPUT -p tcp -m owner --uid-owner 1 -m mark --mark 0x539/0xfff -j REDIRECT --to-ports 15001"
		for _, args := range []string{program + " " + rules, program + "-save -t nat", program + "-restore --version"} {
			words := strings.Fields(args)
			cmd := exec.Command("unshare", append([]string{"--net", "chroot", root, "/usr/sbin/" + words[0]}, words[1:]...)...)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: %v: %s", args, err, out)
			}
		}
	}
	cmd := exec.Command("unshare", "--net", "chroot", root, "/usr/sbin/nft", "-f", "-")
	cmd.Stdin = strings.NewReader("table inet t { chain c { type nat hook output priority -100; meta l4proto tcp meta mark & 0xfff != 0x539 redirect to :15001; }; }\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("nft: %v: %s", err, out)
	}
}

func TestWrongUsageIsRefused(t *testing.T) {
	for args, want := range map[string]string{
		"-arch=mips":      `"mips" is none of amd64, arm64`,
		"-images=istio":   `"istio" is none of istiod`,
		"everything":      `unexpected argument "everything"`,
		"-source=/nosuch": "find the version",
	} {
		err := run(t.Context(), []string{args}, io.Discard)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("image %s: error = %v, want %q", args, err, want)
		}
	}
}

// A package without what it should bring, or with a library that nobody has, stops the build.
func TestIncompletePackagesAreRefused(t *testing.T) {
	d := &deb{name: "tool", version: "1", arch: "amd64", files: tree{
		"/usr/bin/tool":                 file(0o755, "#!"),
		"/usr/bin/gone":                 symlink("nowhere"),
		"/usr/share/doc/tool/copyright": file(0o644, "free"),
	}}
	bare := &deb{name: "bare", files: tree{"/usr/bin/bare": file(0o755, "#!")}}
	tests := []struct {
		pattern, want string
	}{
		{"/usr/bin/tool", ""},
		{"/usr/bin/other", "no package has a file /usr/bin/other"},
		{"/usr/bin/gone", "points nowhere"},
		{"/usr/bin/bare", "package bare has no licence"},
	}
	for _, tt := range tests {
		got, used, err := pick([]*deb{d, bare}, []string{tt.pattern}, triplets["amd64"])
		if tt.want == "" {
			if err != nil || len(got) != 2 || len(used) != 1 {
				t.Errorf("pick(%s) = %v, %v, %v, want the tool and its licence", tt.pattern, got, used, err)
			}
		} else if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("pick(%s) error = %v, want %q", tt.pattern, err, tt.want)
		}
	}
}
