package install

import (
	"embed"
	"fmt"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

//go:embed profiles/*.yaml
var profileFiles embed.FS

// Profile is a named choice of components and values.
type Profile struct {
	Name       string         `json:"-"`
	Components []string       `json:"components"`
	Values     map[string]any `json:"values"`
	Requires   []string       `json:"requires"` // values that have no sensible default
}

var profileAliases = map[string]string{"": "ambient", "default": "ambient", "external": "remote"}

// Profiles are the names of the profiles there are, without their other names.
func Profiles() []string {
	entries, err := profileFiles.ReadDir("profiles")
	if err != nil {
		panic(err) // they are embedded
	}
	var names []string
	for _, e := range entries {
		names = append(names, strings.TrimSuffix(e.Name(), ".yaml"))
	}
	return names
}

// FindProfile returns the profile of this name or alias.
func FindProfile(name string) (*Profile, error) {
	if alias, ok := profileAliases[name]; ok {
		name = alias
	}
	if !slices.Contains(Profiles(), name) {
		return nil, fmt.Errorf("there is no profile %q%s; there are %s", name, DidYouMean(name, Profiles()), strings.Join(Profiles(), ", "))
	}
	b, err := profileFiles.ReadFile("profiles/" + name + ".yaml")
	if err != nil {
		return nil, err
	}
	p := &Profile{Name: name}
	if err := yaml.UnmarshalStrict(b, p); err != nil {
		return nil, fmt.Errorf("read profile %s: %w", name, err)
	}
	return p, nil
}
