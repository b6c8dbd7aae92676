// Package yamldir watches a directory of plain Kubernetes YAML and says what changed in it, object by object.
//
// It hides files: multi-document YAML, lists, JSON, editors' temporary files, half-written and renamed files,
// duplicates, and documents that cannot be understood. A document that is refused is reported with its file, line and
// reason, its last good form stays, and everything else goes on. The package does not interpret objects beyond
// decoding them strictly; what they mean is for its callers.
package yamldir

import (
	"cmp"
	"strings"

	"k8s.io/apimachinery/pkg/runtime"
)

// Key names one object of the directory.
type Key struct {
	Kind      string // group/kind: "/Pod", "security.istio.io/AuthorizationPolicy"
	Namespace string // "" for kinds that live outside of namespaces
	Name      string
}

// String reads like a path: Pod shop/cart-1, or the kind alone when nothing else is known.
func (k Key) String() string {
	_, kind, _ := strings.Cut(k.Kind, "/")
	switch {
	case k.Name == "":
		return kind
	case k.Namespace == "":
		return kind + " " + k.Name
	}
	return kind + " " + k.Namespace + "/" + k.Name
}

// IsZero reports whether the key names nothing: the document was not understood that far.
func (k Key) IsZero() bool { return k == Key{} }

func compareKeys(a, b Key) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

// Object is one decoded object and where it was written.
type Object struct {
	Key  Key
	File string // relative to the watched directory, with slashes
	Line int    // of the first line of the object, from 1
	// Value is a pointer to one of the types of Kinds; read-only. Where a kind is served in several versions it is
	// the newest one's type.
	Value runtime.Object
}

// Problem is one object or file that is refused. If it had a good form before, that one stays in force.
type Problem struct {
	File   string
	Line   int // 0 when the file as a whole cannot be read
	Key    Key // zero when the document was not understood that far
	Reason string
}

// Concerns reports whether the problem may be about that object: it names it, or it is about a document of the
// object's file that was not understood far enough to tell.
func (p Problem) Concerns(o Object) bool {
	_, known := kinds[p.Key.Kind]
	return p.File == o.File && (p.Key == o.Key || !known || p.Key.Name == "")
}

func compareProblems(a, b Problem) int {
	return cmp.Or(cmp.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), compareKeys(a.Key, b.Key),
		cmp.Compare(a.Reason, b.Reason))
}

// Ignored is an object of a kind this package does not decode.
type Ignored struct {
	APIVersion, Kind string
	File             string
	Line             int
}

// Change is what became different in the directory.
type Change struct {
	Upserts  []Object  // new or different, ordered by file and line
	Deletes  []Key     // gone, ordered
	Problems []Problem // all current ones, not only the new
	Ignored  []Ignored // kinds met for the first time and passed over
}
