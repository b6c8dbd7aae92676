package yamldir

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// store is what is known of the directory: every file's objects in their last good form, and which file's form of an
// object is in force. It does no I/O.
type store struct {
	files   map[string]*fileState
	claims  map[Key][]string // the files that hold a good form of the object, in order; the first one's is in force
	current map[Key]document // what was last reported
	shared  map[Key]bool     // objects that more than one file holds
	ignored map[string]bool  // apiVersion and kind already reported
	lost    string           // why the whole directory cannot be read now, if so

	dirty      map[Key]bool
	newIgnored []Ignored
	problems   []Problem // as last reported
}

// fileState is the last known state of one file.
type fileState struct {
	objects  map[Key]document
	problems []Problem
}

func newStore() *store {
	return &store{
		files: make(map[string]*fileState), claims: make(map[Key][]string), current: make(map[Key]document),
		shared: make(map[Key]bool), ignored: make(map[string]bool), dirty: make(map[Key]bool),
	}
}

// holds reports whether the file has objects in force or in waiting.
func (s *store) holds(file string) bool {
	return s.files[file] != nil && len(s.files[file].objects) > 0
}

// remove forgets a file that was deleted.
func (s *store) remove(file string) {
	if old := s.files[file]; old != nil {
		s.replace(file, old, nil)
	}
}

// fail records that a file is there but cannot be read: all its objects stay.
func (s *store) fail(file string, err error) {
	next := &fileState{problems: []Problem{{File: file, Reason: err.Error()}}}
	old := s.files[file]
	if old != nil {
		next.objects = old.objects
	}
	s.replace(file, old, next)
}

// set records a file's new content.
func (s *store) set(file string, content []byte) {
	old := s.files[file]
	next := &fileState{objects: make(map[Key]document)}
	keepAll := false
	var broken []Key
	for _, doc := range parse(file, content) {
		switch {
		case doc.ignored != "":
			s.ignore(doc)
		case len(doc.faults) > 0:
			for _, f := range doc.faults {
				next.problems = append(next.problems, Problem{File: file, Line: f.line, Key: doc.Key, Reason: f.reason})
			}
			if _, known := kinds[doc.Key.Kind]; known && doc.Key.Name != "" {
				broken = append(broken, doc.Key)
			} else {
				keepAll = true // it may be any of those that are missing now
			}
		default:
			if first, twice := next.objects[doc.Key]; twice {
				next.problems = append(next.problems, Problem{File: file, Line: doc.Line, Key: doc.Key,
					Reason: fmt.Sprintf("already defined at line %d of this file", first.Line)})
				continue
			}
			next.objects[doc.Key] = doc
		}
	}
	if old != nil {
		if keepAll {
			broken = slices.Collect(maps.Keys(old.objects))
		}
		for _, key := range broken {
			lastGood, had := old.objects[key]
			if _, has := next.objects[key]; had && !has {
				next.objects[key] = lastGood
			}
		}
	}
	s.replace(file, old, next)
}

func (s *store) ignore(doc document) {
	id := doc.ignored + " " + doc.Key.Kind
	if s.ignored[id] {
		return
	}
	s.ignored[id] = true
	_, name, _ := strings.Cut(doc.Key.Kind, "/")
	s.newIgnored = append(s.newIgnored, Ignored{APIVersion: doc.ignored, Kind: name, File: doc.File, Line: doc.Line})
}

func (s *store) replace(file string, old, next *fileState) {
	if next == nil {
		delete(s.files, file)
		next = &fileState{}
	} else {
		s.files[file] = next
	}
	for key := range next.objects {
		s.dirty[key] = true
		at, held := slices.BinarySearch(s.claims[key], file)
		if !held {
			s.claims[key] = slices.Insert(s.claims[key], at, file)
		}
	}
	if old == nil {
		return
	}
	for key := range old.objects {
		if _, stays := next.objects[key]; stays {
			continue
		}
		s.dirty[key] = true
		if at, held := slices.BinarySearch(s.claims[key], file); held {
			s.claims[key] = slices.Delete(s.claims[key], at, at+1)
		}
	}
}

// flush returns what changed since the last flush; changed is false when nothing did.
func (s *store) flush() (c Change, changed bool) {
	for key := range s.dirty {
		claims := s.claims[key]
		if len(claims) > 1 {
			s.shared[key] = true
		} else {
			delete(s.shared, key)
		}
		before, had := s.current[key]
		if len(claims) == 0 {
			delete(s.claims, key)
			delete(s.current, key)
			if had {
				c.Deletes = append(c.Deletes, key)
			}
			continue
		}
		now := s.files[claims[0]].objects[key]
		s.current[key] = now
		if !had || before.sum != now.sum {
			c.Upserts = append(c.Upserts, now.Object)
		}
	}
	clear(s.dirty)
	slices.SortFunc(c.Upserts, func(a, b Object) int {
		return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), compareKeys(a.Key, b.Key))
	})
	slices.SortFunc(c.Deletes, compareKeys)
	c.Ignored, s.newIgnored = s.newIgnored, nil
	c.Problems = s.allProblems()
	changed = len(c.Upserts)+len(c.Deletes)+len(c.Ignored) > 0 || !slices.Equal(c.Problems, s.problems)
	s.problems = c.Problems
	return c, changed
}

func (s *store) allProblems() []Problem {
	var all []Problem
	if s.lost != "" {
		all = append(all, Problem{File: ".", Reason: s.lost})
	}
	for _, f := range s.files {
		all = append(all, f.problems...)
	}
	for key := range s.shared {
		claims := s.claims[key]
		first := s.files[claims[0]].objects[key]
		for _, file := range claims[1:] {
			all = append(all, Problem{File: file, Line: s.files[file].objects[key].Line, Key: key,
				Reason: fmt.Sprintf("already defined in %s at line %d, which wins", first.File, first.Line)})
		}
	}
	slices.SortFunc(all, compareProblems)
	return all
}
