package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// PluginType is the name of the plugin's binary and the type of its entry: Istio's, so that a host that is migrated
// does not chain both.
const PluginType = "istio-cni"

// Insert returns the configuration list with the entry as the last plugin of the chain. An entry of the same type that is
// there already is replaced. Everything else keeps its bytes; when nothing needs to change the result equals list.
//
// A configuration with a single plugin (CNI specification 0.4.0, "network configuration") becomes a list that holds it.
func Insert(list, entry []byte) ([]byte, error) {
	var e element
	if err := json.Unmarshal(entry, &e); err != nil || e.Type == "" {
		return nil, fmt.Errorf("insert plugin: entry has no type: %s", entry)
	}
	l, err := parse(list)
	if err != nil {
		return nil, fmt.Errorf("insert plugin: %w", err)
	}
	if l.single {
		if list, err = wrapSingle(list); err != nil {
			return nil, fmt.Errorf("insert plugin: %w", err)
		}
		return Insert(list, entry)
	}
	if last := l.elements[len(l.elements)-1]; last.Type == e.Type && bytes.Equal(list[last.start:last.end], entry) &&
		l.count(e.Type) == 1 {
		return list, nil
	}
	if list, err = Remove(list, e.Type); err != nil {
		return nil, err
	}
	if l, err = parse(list); err != nil {
		return nil, fmt.Errorf("insert plugin: %w", err)
	}
	last := l.elements[len(l.elements)-1]
	var out []byte
	out = append(out, list[:last.end]...)
	out = append(out, ',')
	out = append(out, indent(list, last.start)...)
	out = append(out, entry...)
	return append(out, list[last.end:]...), nil
}

// Remove returns the list without entries of that type: what it was before Insert. A list without one comes back as it
// is.
func Remove(list []byte, pluginType string) ([]byte, error) {
	l, err := parse(list)
	if err != nil {
		return nil, fmt.Errorf("remove plugin: %w", err)
	}
	if l.single || l.count(pluginType) == 0 {
		return list, nil
	}
	if l.count(pluginType) == len(l.elements) {
		return nil, fmt.Errorf("remove plugin: the chain would be empty without %s", pluginType)
	}
	var out []byte
	from := 0
	for i, e := range l.elements {
		if e.Type != pluginType {
			continue
		}
		if i > 0 { // with the comma before it
			out = append(out, list[from:l.elements[i-1].end]...)
			from = e.end
		} else { // with the comma after it
			out = append(out, list[from:e.start]...)
			from = l.elements[1].start
		}
	}
	return append(out, list[from:]...), nil
}

// element is one plugin of a list, and where its text lies.
type element struct {
	Type       string
	start, end int
}

type parsed struct {
	single   bool // one plugin, no list
	elements []element
}

func (p parsed) count(pluginType string) int {
	n := 0
	for _, e := range p.elements {
		if e.Type == pluginType {
			n++
		}
	}
	return n
}

// parse finds the plugins of a list in its text.
func parse(list []byte) (parsed, error) {
	var p parsed
	var top struct {
		Type    string
		Plugins *json.RawMessage
	}
	if err := json.Unmarshal(list, &top); err != nil {
		return p, fmt.Errorf("read configuration list: %w", err)
	}
	if top.Plugins == nil {
		if top.Type == "" {
			return p, errors.New("read configuration list: neither plugins nor type")
		}
		return parsed{single: true}, nil
	}
	dec := json.NewDecoder(bytes.NewReader(list))
	if _, err := dec.Token(); err != nil { // {
		return p, err
	}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return p, err
		}
		if key != "plugins" {
			var skipped json.RawMessage
			if err := dec.Decode(&skipped); err != nil {
				return p, err
			}
			continue
		}
		if t, err := dec.Token(); err != nil || t != json.Delim('[') {
			return p, errors.New("read configuration list: plugins is not a list")
		}
		p.elements = nil
		for dec.More() {
			var raw json.RawMessage
			if err := dec.Decode(&raw); err != nil {
				return p, err
			}
			end := int(dec.InputOffset())
			e := element{start: end - len(raw), end: end}
			if err := json.Unmarshal(raw, &e); err != nil {
				return p, fmt.Errorf("read configuration list: plugin: %w", err)
			}
			p.elements = append(p.elements, e)
		}
		if _, err := dec.Token(); err != nil { // ]
			return p, err
		}
	}
	if len(p.elements) == 0 {
		return p, errors.New("read configuration list: no plugin to come after")
	}
	return p, nil
}

// indent is the white space in front of an element, so that the next one is set the same way.
func indent(list []byte, start int) []byte {
	n := start
	for n > 0 && bytes.IndexByte([]byte(" \t\r\n"), list[n-1]) >= 0 {
		n--
	}
	return list[n:start]
}

// wrapSingle makes a list of a configuration with one plugin.
func wrapSingle(single []byte) ([]byte, error) {
	var head struct {
		CNIVersion string `json:"cniVersion"`
		Name       string `json:"name"`
	}
	if err := json.Unmarshal(single, &head); err != nil {
		return nil, err
	}
	version, err := json.Marshal(head.CNIVersion)
	if err != nil {
		return nil, err
	}
	name, err := json.Marshal(head.Name)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "{\n  \"cniVersion\": %s,\n  \"name\": %s,\n  \"plugins\": [\n    %s\n  ]\n}\n",
		version, name, bytes.TrimSpace(single)), nil
}
