package yamldir

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// fault is one thing wrong with a document, at a line of it.
type fault struct {
	line   int
	reason string
}

func (f *fault) Error() string { return f.reason }

// checker holds a tree of YAML against a Go type and collects what does not fit: decoders accept unknown fields in
// silence and do not know lines.
type checker struct{ faults []*fault }

func (c *checker) add(n *yaml.Node, path, format string, args ...any) {
	reason := fmt.Sprintf(format, args...)
	if path != "" {
		reason = path + ": " + reason
	}
	c.faults = append(c.faults, &fault{line: n.Line, reason: reason})
}

var (
	protoMessage    = reflect.TypeFor[proto.Message]()
	jsonUnmarshaler = reflect.TypeFor[json.Unmarshaler]()
)

func (c *checker) value(n *yaml.Node, t reflect.Type, path string) {
	n = resolve(n)
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if isNull(n) {
		return
	}
	switch {
	case reflect.PointerTo(t).Implements(protoMessage):
		m := reflect.New(t).Interface().(proto.Message)
		c.message(n, m.ProtoReflect().Descriptor(), path)
		return
	case reflect.PointerTo(t).Implements(jsonUnmarshaler):
		c.custom(n, t, path)
		return
	}
	switch t.Kind() {
	case reflect.Struct:
		c.structure(n, t, path)
	case reflect.Map:
		if c.want(n, yaml.MappingNode, "a mapping", path) {
			for k, v := range pairs(n) {
				c.value(v, t.Elem(), join(path, k.Value))
			}
		}
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			c.scalar(n, "!!str", "a string", path)
			return
		}
		if c.want(n, yaml.SequenceNode, "a list", path) {
			for i, item := range n.Content {
				c.value(item, t.Elem(), path+"["+strconv.Itoa(i)+"]")
			}
		}
	case reflect.String:
		c.scalar(n, "!!str", "a string", path)
	case reflect.Bool:
		c.scalar(n, "!!bool", "true or false", path)
	case reflect.Int, reflect.Int32, reflect.Int64, reflect.Uint32, reflect.Uint64:
		c.scalar(n, "!!int", "a whole number", path)
	}
}

func (c *checker) structure(n *yaml.Node, t reflect.Type, path string) {
	if !c.want(n, yaml.MappingNode, "a mapping", path) {
		return
	}
	fields := make(map[string]reflect.Type)
	names := jsonFields(t, fields, nil)
	for k, v := range pairs(n) {
		ft, ok := fields[k.Value]
		if !ok {
			c.unknown(k, names, path)
			continue
		}
		c.value(v, ft, join(path, k.Value))
	}
}

// jsonFields collects the fields of a struct by their JSON names, those of inlined structs included.
func jsonFields(t reflect.Type, fields map[string]reflect.Type, names []string) []string {
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case name == "-" || !f.IsExported():
		case name == "" && f.Anonymous:
			names = jsonFields(f.Type, fields, names)
		default:
			if name == "" {
				name = f.Name
			}
			fields[name] = f.Type
			names = append(names, name)
		}
	}
	return names
}

// custom lets a type that decodes itself (a quantity, a time) say what it thinks of the value.
func (c *checker) custom(n *yaml.Node, t reflect.Type, path string) {
	raw, err := toJSON(n)
	if err == nil {
		err = reflect.New(t).Interface().(json.Unmarshaler).UnmarshalJSON(raw)
	}
	if err != nil {
		c.add(n, path, "%v", err)
	}
}

// message is structure for types made from protobuf: Istio's.
func (c *checker) message(n *yaml.Node, d protoreflect.MessageDescriptor, path string) {
	if strings.HasPrefix(string(d.FullName()), "google.protobuf.") {
		return // these have forms of their own, which the decoder knows
	}
	if !c.want(n, yaml.MappingNode, "a mapping", path) {
		return
	}
	var names []string
	for i := range d.Fields().Len() {
		names = append(names, d.Fields().Get(i).JSONName())
	}
	for k, v := range pairs(n) {
		f := d.Fields().ByJSONName(k.Value)
		if f == nil {
			f = d.Fields().ByName(protoreflect.Name(k.Value))
		}
		if f == nil {
			c.unknown(k, names, path)
			continue
		}
		c.field(resolve(v), f, join(path, k.Value))
	}
}

func (c *checker) field(n *yaml.Node, f protoreflect.FieldDescriptor, path string) {
	switch {
	case isNull(n):
	case f.IsMap():
		if c.want(n, yaml.MappingNode, "a mapping", path) {
			for k, v := range pairs(n) {
				if f.MapKey().Kind() == protoreflect.Uint32Kind {
					if _, err := strconv.ParseUint(k.Value, 10, 32); err != nil {
						c.add(k, path, "%q is not a whole number", k.Value)
						continue
					}
				}
				c.single(resolve(v), f.MapValue(), join(path, k.Value))
			}
		}
	case f.IsList():
		if c.want(n, yaml.SequenceNode, "a list", path) {
			for i, item := range n.Content {
				c.single(resolve(item), f, path+"["+strconv.Itoa(i)+"]")
			}
		}
	default:
		c.single(n, f, path)
	}
}

func (c *checker) single(n *yaml.Node, f protoreflect.FieldDescriptor, path string) {
	switch f.Kind() {
	case protoreflect.MessageKind:
		if !isNull(n) {
			c.message(n, f.Message(), path)
		}
	case protoreflect.StringKind:
		c.scalar(n, "!!str", "a string", path)
	case protoreflect.BoolKind:
		c.scalar(n, "!!bool", "true or false", path)
	case protoreflect.EnumKind:
		c.enum(n, f.Enum(), path)
	default: // numbers: the decoder takes them as numbers or strings
	}
}

func (c *checker) enum(n *yaml.Node, d protoreflect.EnumDescriptor, path string) {
	if n.Kind != yaml.ScalarNode || n.Tag == "!!int" || d.Values().ByName(protoreflect.Name(n.Value)) != nil {
		return
	}
	var names []string
	for i := range d.Values().Len() {
		names = append(names, string(d.Values().Get(i).Name()))
	}
	c.add(n, path, "%q is not one of %s", n.Value, strings.Join(names, ", "))
}

func (c *checker) unknown(k *yaml.Node, names []string, path string) {
	name := join(path, k.Value)
	if near := nearest(k.Value, names); near != "" {
		c.add(k, "", "unknown field %q, did you mean %q?", name, near)
		return
	}
	c.add(k, "", "unknown field %q", name)
}

func (c *checker) want(n *yaml.Node, kind yaml.Kind, what, path string) bool {
	if n.Kind == kind {
		return true
	}
	c.add(n, path, "want %s, have %s", what, describe(n))
	return false
}

func (c *checker) scalar(n *yaml.Node, tag, what, path string) {
	if n.Kind == yaml.ScalarNode && (jsonTag(n) == tag || isNull(n)) {
		return
	}
	hint := ""
	if tag == "!!str" && n.Kind == yaml.ScalarNode {
		hint = fmt.Sprintf("; put it in quotes: %q", n.Value)
	}
	c.add(n, path, "want %s, have %s%s", what, describe(n), hint)
}

func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	case yaml.ScalarNode, yaml.DocumentNode, yaml.AliasNode:
	}
	switch n.Tag {
	case "!!int", "!!float":
		return "the number " + n.Value
	case "!!bool":
		return n.Value
	}
	return strconv.Quote(n.Value)
}

func join(path, field string) string {
	if path == "" {
		return field
	}
	return path + "." + field
}
