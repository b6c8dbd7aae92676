package main

import (
	"context"
	"debug/buildinfo"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
)

// versionVariable is what programs answer to -version.
const versionVariable = "github.com/mistnet/mistnet/internal/daemon.version"

// binary is a compiled Go program.
type binary struct {
	data []byte
	info *buildinfo.BuildInfo // what it says it was built from
}

// compile builds the programs of the wanted images for one architecture: static, without the paths of this machine,
// for the lowest level of the architecture. It returns them by source.
func compile(ctx context.Context, o options, arch, dir string) (map[string]binary, error) {
	var sources []string
	for _, im := range catalog {
		for _, p := range im.programs {
			if slices.Contains(o.images, im.name) && !slices.Contains(sources, p.source) {
				sources = append(sources, p.source)
			}
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	args := []string{"build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid= -X " + versionVariable + "=" + o.version, "-o", dir + "/"}
	c := exec.CommandContext(ctx, "go", append(args, sources...)...)
	c.Dir = o.source
	c.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOAMD64=v1", "GOARM64=v8.0")
	if _, err := output(c); err != nil {
		return nil, fmt.Errorf("compile for %s: %w", arch, err)
	}
	out := make(map[string]binary)
	for _, s := range sources {
		p := filepath.Join(dir, path.Base(s))
		data, err := os.ReadFile(p)
		if err != nil {
			return nil, err
		}
		info, err := buildinfo.ReadFile(p)
		if err != nil {
			return nil, fmt.Errorf("read what %s was built from: %w", s, err)
		}
		out[s] = binary{data, info}
	}
	return out, nil
}
