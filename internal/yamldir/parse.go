package yamldir

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"reflect"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation"
)

// document is one object of a file: decoded, refused (faults) or of a kind that is ignored.
type document struct {
	Object
	sum     [sha256.Size]byte // of its JSON: what two forms of an object are compared by
	faults  []*fault
	ignored string // apiVersion of an object that is passed over; Key.Kind has the kind
}

// parse reads every document of a file. It never fails as a whole: what is wrong is in the documents.
func parse(file string, content []byte) []document {
	if path.Ext(file) == ".json" {
		// JSON has tabs only between tokens, where YAML dislikes them.
		content = bytes.ReplaceAll(content, []byte("\t"), []byte(" "))
	}
	var docs []document
	for _, chunk := range split(content) {
		docs = append(docs, parseChunk(chunk)...)
	}
	for i := range docs {
		docs[i].File = file
	}
	return docs
}

// chunk is the text of one document and the number of lines above it.
type chunk struct {
	text  []byte
	above int
}

// split cuts a stream at its document markers (YAML 1.2, 9.1.2), so that a document that cannot be scanned does not
// take those after it along.
func split(content []byte) []chunk {
	var chunks []chunk
	cur := chunk{}
	line := 0
	for l := range bytes.Lines(content) {
		if isMarker(l) && len(cur.text) > 0 {
			chunks = append(chunks, cur)
			cur = chunk{above: line}
		}
		cur.text = append(cur.text, l...)
		line++
	}
	return append(chunks, cur)
}

func isMarker(line []byte) bool {
	rest, found := bytes.CutPrefix(line, []byte("---"))
	return found && (len(rest) == 0 || bytes.IndexByte([]byte(" \t\r\n"), rest[0]) >= 0)
}

func parseChunk(c chunk) []document {
	var docs []document
	dec := yaml.NewDecoder(bytes.NewReader(c.text))
	for {
		var root yaml.Node
		err := dec.Decode(&root)
		if errors.Is(err, io.EOF) {
			return docs
		}
		if err != nil {
			f := syntaxFault(err)
			f.line += c.above
			return append(docs, document{Object: Object{Line: f.line}, faults: []*fault{f}})
		}
		for _, doc := range parseRoot(&root) {
			doc.Line += c.above
			for _, f := range doc.faults {
				f.line += c.above
			}
			docs = append(docs, doc)
		}
	}
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

// syntaxFault takes the line out of the decoder's message.
func syntaxFault(err error) *fault {
	f := &fault{line: 1, reason: err.Error()}
	if m := yamlLine.FindStringSubmatch(f.reason); m != nil {
		if n, err := strconv.Atoi(m[1]); err == nil {
			f.line = n
		}
		f.reason = strings.TrimPrefix(f.reason, m[0])
	}
	f.reason = "not YAML: " + f.reason
	return f
}

func parseRoot(root *yaml.Node) []document {
	if root.Kind != yaml.DocumentNode || len(root.Content) == 0 || isNull(root.Content[0]) {
		return nil
	}
	return parseObject(resolve(root.Content[0]))
}

// header is what every object begins with.
type header struct {
	metav1.TypeMeta
	Metadata struct {
		Name         string `json:"name"`
		GenerateName string `json:"generateName"`
		Namespace    string `json:"namespace"`
	} `json:"metadata"`
}

func parseObject(n *yaml.Node) []document {
	doc := document{Object: Object{Line: n.Line}}
	refuse := func(faults ...*fault) []document {
		doc.Value, doc.faults = nil, faults
		return []document{doc}
	}
	if n.Kind != yaml.MappingNode {
		return refuse(&fault{n.Line, "want an object with apiVersion and kind, have " + describe(n)})
	}
	if items := field(n, "items"); items != nil && strings.HasSuffix(text(field(n, "kind")), "List") {
		return parseItems(items)
	}
	raw, err := toJSON(n)
	if err != nil {
		return refuse(asFault(n, err))
	}
	var h header
	if err := json.Unmarshal(raw, &h); err != nil {
		return refuse(&fault{n.Line, "apiVersion, kind or metadata: " + err.Error()})
	}
	if h.Kind == "" || h.APIVersion == "" {
		return refuse(&fault{n.Line, "apiVersion or kind is missing"})
	}
	key, k, known, err := findKind(h.APIVersion, h.Kind)
	doc.Key = Key{Kind: key, Namespace: h.Metadata.Namespace, Name: h.Metadata.Name}
	if !known && err == nil {
		doc.ignored = h.APIVersion
		return []document{doc}
	}
	if known && !k.cluster && doc.Key.Namespace == "" {
		doc.Key.Namespace = metav1.NamespaceDefault
	}
	if err != nil {
		return refuse(&fault{n.Line, err.Error()})
	}
	if f := checkName(n, doc.Key, k); f != nil {
		return refuse(f)
	}
	doc.Value = k.make()
	var c checker
	c.value(n, reflect.TypeOf(doc.Value), "")
	if len(c.faults) > 0 {
		return refuse(c.faults...)
	}
	if err := json.Unmarshal(raw, doc.Value); err != nil {
		return refuse(&fault{n.Line, err.Error()})
	}
	group, name, _ := strings.Cut(key, "/")
	doc.Value.GetObjectKind().SetGroupVersionKind(schema.FromAPIVersionAndKind(k.apiVersion(group), name))
	doc.Value.(metav1.Object).SetNamespace(doc.Key.Namespace)
	doc.sum = sha256.Sum256(raw)
	return []document{doc}
}

func parseItems(items *yaml.Node) []document {
	if items.Kind != yaml.SequenceNode {
		return []document{{Object: Object{Line: items.Line}, faults: []*fault{{items.Line, "items: want a list, have " + describe(items)}}}}
	}
	var docs []document
	for _, item := range items.Content {
		item = resolve(item)
		if field(item, "items") != nil {
			docs = append(docs, document{Object: Object{Line: item.Line}, faults: []*fault{{item.Line, "a list inside of a list"}}})
			continue
		}
		docs = append(docs, parseObject(item)...)
	}
	return docs
}

// checkName holds names to the rules of Kubernetes: other code joins them with slashes and dots.
func checkName(n *yaml.Node, key Key, k kind) *fault {
	at := n
	if m := field(n, "metadata"); m != nil {
		at = m
	}
	switch {
	case key.Name == "":
		return &fault{at.Line, "metadata.name is missing"}
	case k.cluster && key.Namespace != "":
		return &fault{at.Line, fmt.Sprintf("metadata.namespace: a %s lives in no namespace", strings.TrimPrefix(key.Kind, "/"))}
	}
	if bad := validation.IsDNS1123Subdomain(key.Name); len(bad) > 0 {
		return &fault{at.Line, fmt.Sprintf("metadata.name %q: %s", key.Name, bad[0])}
	}
	if bad := validation.IsDNS1123Label(key.Namespace); !k.cluster && len(bad) > 0 {
		return &fault{at.Line, fmt.Sprintf("metadata.namespace %q: %s", key.Namespace, bad[0])}
	}
	return nil
}

// field returns the value of a key of a mapping, or nil.
func field(n *yaml.Node, name string) *yaml.Node {
	for k, v := range pairs(n) {
		if k.Value == name {
			return resolve(v)
		}
	}
	return nil
}

// text is the value of a scalar, or "".
func text(n *yaml.Node) string {
	if n == nil || n.Kind != yaml.ScalarNode {
		return ""
	}
	return n.Value
}

func asFault(n *yaml.Node, err error) *fault {
	if f, ok := errors.AsType[*fault](err); ok {
		return f
	}
	return &fault{n.Line, err.Error()}
}

// Parse decodes the documents of one file without watching anything: the good ones in order, the first of each key
// only, and what is wrong with the others. Objects of ignored kinds are left out.
func Parse(file string, content []byte) ([]Object, []Problem) {
	s := newStore()
	s.set(file, content)
	c, _ := s.flush()
	return c.Upserts, c.Problems
}
