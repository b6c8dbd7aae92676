package yamldir

import (
	"encoding/json"
	"fmt"
	"iter"

	"go.yaml.in/yaml/v3"
)

// maxNodes bounds what aliases may make of one document.
const maxNodes = 1 << 18

// maxDepth bounds how deep a document may nest.
const maxDepth = 100

// resolve follows aliases.
func resolve(n *yaml.Node) *yaml.Node {
	for range maxDepth {
		if n.Kind != yaml.AliasNode || n.Alias == nil {
			break
		}
		n = n.Alias
	}
	return n
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.Tag == "!!null" }

// jsonTag is the type a scalar has once it is JSON, which knows no dates and no bytes.
func jsonTag(n *yaml.Node) string {
	switch n.Tag {
	case "!!timestamp", "!!binary", "!!merge":
		return "!!str"
	}
	return n.Tag
}

// pairs yields the keys and values of a mapping; those of merged mappings (<<) come last, where no own key hides them.
func pairs(n *yaml.Node) iter.Seq2[*yaml.Node, *yaml.Node] {
	return func(yield func(k, v *yaml.Node) bool) {
		m := merging{keys: make(map[string]bool, len(n.Content)/2), done: make(map[*yaml.Node]bool), yield: yield}
		m.mapping(n)
	}
}

// merging is a walk over a mapping and what is merged into it.
type merging struct {
	keys  map[string]bool
	done  map[*yaml.Node]bool // mappings walked: a second time would add nothing, and one may contain itself
	yield func(k, v *yaml.Node) bool
}

func (m *merging) mapping(n *yaml.Node) bool {
	own := len(m.done) == 0
	m.done[n] = true
	var merged []*yaml.Node
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := resolve(n.Content[i]), n.Content[i+1]
		if k.Tag == "!!merge" {
			merged = append(merged, resolve(v))
			continue
		}
		if m.keys[k.Value] && !own {
			continue
		}
		m.keys[k.Value] = true
		if !m.yield(k, v) {
			return false
		}
	}
	for _, from := range merged {
		list := []*yaml.Node{from}
		if from.Kind == yaml.SequenceNode {
			list = from.Content
		}
		for _, f := range list {
			if f = resolve(f); f.Kind == yaml.MappingNode && !m.done[f] && !m.mapping(f) {
				return false
			}
		}
	}
	return true
}

// toJSON rewrites a tree as JSON. It refuses what JSON objects cannot say: keys that are not scalars, keys that repeat.
func toJSON(n *yaml.Node) ([]byte, error) {
	budget := maxNodes
	v, err := toValue(n, &budget, 0)
	if err != nil {
		return nil, err
	}
	return json.Marshal(v)
}

func toValue(n *yaml.Node, budget *int, depth int) (any, error) {
	n = resolve(n)
	if *budget--; *budget < 0 || depth > maxDepth {
		return nil, &fault{n.Line, "the document is too large or too deep"}
	}
	switch n.Kind {
	case yaml.MappingNode:
		m := make(map[string]any, len(n.Content)/2)
		for k, v := range pairs(n) {
			if k.Kind != yaml.ScalarNode {
				return nil, &fault{k.Line, "a key must be a plain value"}
			}
			if _, twice := m[k.Value]; twice {
				return nil, &fault{k.Line, fmt.Sprintf("key %q is there twice", k.Value)}
			}
			value, err := toValue(v, budget, depth+1)
			if err != nil {
				return nil, err
			}
			m[k.Value] = value
		}
		return m, nil
	case yaml.SequenceNode:
		list := make([]any, 0, len(n.Content))
		for _, item := range n.Content {
			value, err := toValue(item, budget, depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, value)
		}
		return list, nil
	case yaml.ScalarNode:
		return toScalar(n)
	case yaml.DocumentNode, yaml.AliasNode:
	}
	return nil, &fault{n.Line, "not a value"}
}

func toScalar(n *yaml.Node) (any, error) {
	if jsonTag(n) == "!!str" {
		return n.Value, nil
	}
	var v any
	if err := n.Decode(&v); err != nil {
		return nil, &fault{n.Line, err.Error()}
	}
	return v, nil
}
