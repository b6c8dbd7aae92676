package install

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/strvals"
	"sigs.k8s.io/yaml"
)

// Input is what the user asks for.
type Input struct {
	Profile string
	Files   []string // of values, later ones win
	Sets    []string // key=value, as Helm's --set; they win over files
}

// Settings are values by component, and global ones, after profile, files and --set were put together.
type Settings struct {
	Profile    string         `json:"profile"`
	Components []string       `json:"components"` // in the order of installation
	Own        map[string]any `json:"own"`        // what the user asked for, without the profile
	Values     map[string]any `json:"-"`          // Own over the profile's: "global" and one entry per component
}

// defaultsKey is where Istio's charts keep their defaults, so that a user's values win over a profile's.
const defaultsKey = "_internal_defaults_do_not_set"

// Settle puts the user's wishes over the profile's, over base when there is one (the values of the mesh as it was
// installed). A key that no chart knows is refused by name.
func (c *Charts) Settle(in Input, base *Settings) (*Settings, error) {
	user := map[string]any{}
	for _, file := range in.Files {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("read values: %w", err)
		}
		var vals map[string]any
		if err := yaml.UnmarshalStrict(b, &vals); err != nil {
			return nil, fmt.Errorf("read values of %s: %s", file, strings.TrimPrefix(err.Error(), "error unmarshaling JSON: "))
		}
		if vals != nil {
			user = chartutil.CoalesceTables(vals, user)
		}
	}
	for _, set := range in.Sets {
		if err := strvals.ParseInto(set, user); err != nil {
			return nil, fmt.Errorf("--set %s: want key=value: %w", set, err)
		}
	}
	user, err := istioSpelling(user)
	if err != nil {
		return nil, err
	}
	c.inward(user)
	name := in.Profile
	if p, ok := user["profile"].(string); ok {
		delete(user, "profile")
		name = p
	}
	if name == "" && base != nil {
		name = base.Profile
	}
	profile, err := FindProfile(name)
	if err != nil {
		return nil, err
	}
	chosen, err := choose(profile.Components, user)
	if err != nil {
		return nil, err
	}
	if err := c.known(user); err != nil {
		return nil, err
	}
	if base != nil && (in.Profile == "" || base.Profile == profile.Name) {
		if _, asked := user["components"]; !asked {
			chosen = base.Components
		}
		user = chartutil.CoalesceTables(user, clone(base.Own))
	}
	delete(user, "components")
	for _, path := range profile.Requires {
		if lookup(user, path) == nil {
			return nil, fmt.Errorf("profile %s needs --set %s=VALUE", profile.Name, path)
		}
	}
	values := chartutil.CoalesceTables(clone(user), clone(profile.Values))
	return &Settings{Profile: profile.Name, Components: chosen, Own: user, Values: values}, nil
}

// istioSpelling accepts values as istioctl's users write them: values.pilot.x for istiod.x, meshConfig at the top.
func istioSpelling(in map[string]any) (map[string]any, error) {
	out := clone(in)
	if vals, ok := out["values"]; ok {
		m, isMap := vals.(map[string]any)
		if !isMap {
			return nil, fmt.Errorf("values is not a map")
		}
		delete(out, "values")
		out = chartutil.CoalesceTables(out, m)
	}
	move := func(from, component string, under ...string) error {
		v, ok := out[from]
		if !ok {
			return nil
		}
		delete(out, from)
		for _, key := range slices.Backward(under) {
			v = map[string]any{key: v}
		}
		m, isMap := v.(map[string]any)
		if !isMap {
			return fmt.Errorf("%s is not a map", from)
		}
		to, _ := out[component].(map[string]any)
		if to == nil {
			to = map[string]any{}
		}
		out[component] = chartutil.CoalesceTables(to, m)
		return nil
	}
	for _, err := range []error{
		move("pilot", "istiod"), move("meshConfig", "istiod", "meshConfig"),
		move("hub", "global", "hub"), move("tag", "global", "tag"),
	} {
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// inward lets base.x stand for base.base.x: charts may keep values under their own name.
func (c *Charts) inward(user map[string]any) {
	for name, ch := range c.byName {
		inner, _ := defaults(ch)[name].(map[string]any)
		vals, _ := user[name].(map[string]any)
		for key, v := range vals {
			_, outside := defaults(ch)[key]
			if _, inside := inner[key]; !inside || outside {
				continue
			}
			delete(vals, key)
			own, _ := vals[name].(map[string]any)
			if own == nil {
				own = map[string]any{}
				vals[name] = own
			}
			own[key] = v
		}
	}
}

// choose applies components.NAME=bool (or istioctl's components.NAME.enabled=bool) to the profile's components.
func choose(profile []string, user map[string]any) ([]string, error) {
	on := map[string]bool{}
	for _, name := range profile {
		on[name] = true
	}
	wishes, ok := user["components"].(map[string]any)
	if user["components"] != nil && !ok {
		return nil, fmt.Errorf("components is not a map: write --set components.NAME=true or false")
	}
	for _, name := range slices.Sorted(maps.Keys(wishes)) {
		wish := wishes[name]
		if name == "pilot" {
			name = "istiod"
		}
		if !slices.Contains(Components, name) {
			return nil, fmt.Errorf("there is no component %q%s; there are %s", name, DidYouMean(name, Components), strings.Join(Components, ", "))
		}
		if m, isMap := wish.(map[string]any); isMap {
			wish = m["enabled"]
		}
		enabled, isBool := wish.(bool)
		if !isBool {
			return nil, fmt.Errorf("components.%s is %v, want true or false", name, wish)
		}
		on[name] = enabled
	}
	var chosen []string
	for _, name := range Components {
		if on[name] {
			chosen = append(chosen, name)
		}
	}
	return chosen, nil
}

// known refuses keys that none of the charts has a default for.
func (c *Charts) known(user map[string]any) error {
	top := append(slices.Clone(Components), "global", "components", "profile", "meshConfig", "values", "pilot", "hub", "tag")
	for _, key := range slices.Sorted(maps.Keys(user)) {
		switch {
		case key == "components":
		case key == "global":
			all := map[string]any{}
			for _, ch := range c.byName {
				if g, ok := defaults(ch)["global"].(map[string]any); ok {
					all = chartutil.CoalesceTables(all, clone(g))
				}
			}
			if err := knownUnder("global", user[key], all); err != nil {
				return err
			}
		case slices.Contains(Components, key):
			if err := knownUnder(key, user[key], defaults(c.byName[key])); err != nil {
				return err
			}
		default:
			near := DidYouMean(key, top)
			if near == "" {
				near = fmt.Sprintf(": want one of %s", strings.Join(top, ", "))
			}
			return fmt.Errorf("unknown value %q%s", key, near)
		}
	}
	return nil
}

// kubernetesOwn says whether path is in a structure of Kubernetes', which has keys that no chart's defaults name: the API
// server judges them. It is what the charts' schemas leave open as well.
func kubernetesOwn(path string) bool {
	for _, key := range strings.Split(path, ".") {
		switch key {
		case "resources", "nodeSelector", "seccompProfile":
			return true
		}
	}
	return false
}

func knownUnder(path string, got, want any) error {
	table, isTable := want.(map[string]any)
	vals, isMap := got.(map[string]any)
	switch {
	case got == nil, want == nil, isTable && len(table) == 0 && isMap:
		return nil // unset, or the chart passes on whatever is there
	case isTable && !isMap:
		return fmt.Errorf("value %s is %v, want a map with keys such as %q", path, got, firstKey(table))
	case !isTable && isMap:
		return fmt.Errorf("value %s is a map, want a single value or list such as %v", path, quoted(want))
	case !isTable:
		return sameKind(path, got, want)
	}
	for _, key := range slices.Sorted(maps.Keys(vals)) {
		sub, ok := table[key]
		if !ok && kubernetesOwn(path) {
			continue
		}
		if !ok {
			near := DidYouMean(key, slices.Collect(maps.Keys(table)))
			if near != "" {
				near = strings.Replace(near, `"`, `"`+path+".", 1)
			}
			return fmt.Errorf("unknown value %q%s", path+"."+key, near)
		}
		if err := knownUnder(path+"."+key, vals[key], sub); err != nil {
			return err
		}
	}
	return nil
}

// sameKind refuses what the templates would quietly misread: words for truth, text for numbers, scalars for lists.
func sameKind(path string, got, want any) error {
	_, gotList := got.([]any)
	_, wantList := want.([]any)
	_, gotBool := got.(bool)
	_, wantBool := want.(bool)
	switch {
	case wantList && !gotList:
		return fmt.Errorf("value %s is %v, want a list: --set %s={a,b}", path, quoted(got), path)
	case gotList && !wantList && want != "":
		return fmt.Errorf("value %s is a list, want a single value such as %v", path, quoted(want))
	case wantBool && !gotBool:
		return fmt.Errorf("value %s is %v, want true or false", path, quoted(got))
	}
	if isNumber(want) && !isNumber(got) {
		return fmt.Errorf("value %s is %v, want a number", path, quoted(got))
	}
	return nil
}

func isNumber(v any) bool {
	switch v.(type) {
	case int, int64, float64:
		return true
	}
	return false
}

func quoted(v any) string {
	if s, ok := v.(string); ok {
		return fmt.Sprintf("%q", s)
	}
	return fmt.Sprint(v)
}

func firstKey(m map[string]any) string { return slices.Sorted(maps.Keys(m))[0] }

// defaults are the values a chart knows, wherever it keeps them.
func defaults(ch *chart.Chart) map[string]any {
	if inner, ok := ch.Values[defaultsKey].(map[string]any); ok {
		return inner
	}
	return ch.Values
}

func lookup(m map[string]any, path string) any {
	var v any = m
	for key := range strings.SplitSeq(path, ".") {
		table, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = table[key]
	}
	return v
}

// clone copies tables; what they hold besides tables is shared.
func clone(m map[string]any) map[string]any {
	out := make(map[string]any, len(m))
	for k, v := range m {
		if t, ok := v.(map[string]any); ok {
			v = clone(t)
		}
		out[k] = v
	}
	return out
}
