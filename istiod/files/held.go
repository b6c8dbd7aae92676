package files

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"go.uber.org/zap"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/mistnet/mistnet/internal/yamldir"
)

// held is the objects in force whose document is broken now. The last good form of a policy must outlive istiod: a
// restart would else open the door that a slip of the pen left closed. So they are kept in a file of their own.
type held struct {
	path     string // "": they live as long as istiod
	log      *zap.Logger
	saved    string                         // what the file holds
	restored map[yamldir.Key]yamldir.Object // in force from an earlier run, as the directory has no good form
}

// record is one object of the file.
type record struct {
	File   string         `json:"file"`
	Line   int            `json:"line"`
	Object runtime.Object `json:"object"`
}

// load reads what an earlier run held and returns what the directory, at first read, still has no good form of.
func (h *held) load(first yamldir.Change) []yamldir.Object {
	h.restored = make(map[yamldir.Key]yamldir.Object)
	if h.path == "" {
		return nil
	}
	content, err := os.ReadFile(h.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var records []struct {
		File   string          `json:"file"`
		Line   int             `json:"line"`
		Object json.RawMessage `json:"object"`
	}
	if err == nil {
		err = json.Unmarshal(content, &records)
	}
	if err != nil {
		h.log.Error("last good forms of broken objects are lost", zap.String("file", h.path), zap.Error(err))
		return nil
	}
	good := make(map[yamldir.Key]bool)
	for _, o := range first.Upserts {
		good[o.Key] = true
	}
	broken := byFile(first.Problems)
	var back []yamldir.Object
	for _, r := range records {
		objects, _ := yamldir.Parse(h.path, r.Object)
		for _, o := range objects {
			o.File, o.Line = r.File, r.Line
			if !good[o.Key] && broken.concern(o) {
				h.restored[o.Key] = o
				back = append(back, o)
				h.log.Warn("last good form restored", zap.String("file", r.File), zap.Stringer("object", o.Key))
			}
		}
	}
	return back
}

// settle returns the restored objects that must go: what was broken is whole again, or gone.
func (h *held) settle(c yamldir.Change) []yamldir.Key {
	for _, o := range c.Upserts {
		delete(h.restored, o.Key)
	}
	broken := byFile(c.Problems)
	var gone []yamldir.Key
	for key, o := range h.restored {
		if !broken.concern(o) {
			delete(h.restored, key)
			gone = append(gone, key)
		}
	}
	return gone
}

// save writes the objects in force whose document is broken.
func (h *held) save(problems []yamldir.Problem, inForce map[yamldir.Key]yamldir.Object) {
	if h.path == "" {
		return
	}
	var keys []yamldir.Key
	if broken := byFile(problems); len(broken) > 0 {
		for key, o := range inForce {
			if broken.concern(o) {
				keys = append(keys, key)
			}
		}
	}
	slices.SortFunc(keys, compareKeys)
	records := make([]record, 0, len(keys))
	for _, key := range keys {
		o := inForce[key]
		records = append(records, record{File: o.File, Line: o.Line, Object: o.Value})
	}
	content, err := json.Marshal(records)
	if err == nil && string(content) == h.saved {
		return
	}
	if err == nil {
		err = replaceFile(h.path, content)
	}
	if err != nil {
		h.log.Error("last good forms of broken objects would not survive a restart", zap.Error(err))
		return
	}
	h.saved = string(content)
}

// problemsByFile finds the problems of an object without looking at all.
type problemsByFile map[string][]yamldir.Problem

func byFile(problems []yamldir.Problem) problemsByFile {
	m := make(problemsByFile)
	for _, p := range problems {
		m[p.File] = append(m[p.File], p)
	}
	return m
}

func (m problemsByFile) concern(o yamldir.Object) bool {
	return slices.ContainsFunc(m[o.File], func(p yamldir.Problem) bool { return p.Concerns(o) })
}

func compareKeys(a, b yamldir.Key) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

func replaceFile(path string, content []byte) error {
	temp := path + ".new"
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.WriteFile(temp, content, 0o600); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(temp, path)
}
