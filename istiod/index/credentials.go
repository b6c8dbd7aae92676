package index

import (
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/translate"
)

// credentials says which DestinationRules name which Secrets and ConfigMaps.
type credentials struct {
	bySecret    map[name]set[name] // DestinationRules by the Secrets that they are read from
	byConfigMap map[name]set[name] // likewise
	users       map[name]set[name] // DestinationRules by the Secrets whose contents waypoints are given
	inSpace     map[string]set[name]

	dirty       set[name]   // Secrets, as users has them
	dirtySpaces set[string] // namespaces in which others may be given them
}

func newCredentials() credentials {
	return credentials{bySecret: make(map[name]set[name]), byConfigMap: make(map[name]set[name]), users: make(map[name]set[name]),
		inSpace: make(map[string]set[name]), dirty: make(set[name]), dirtySpaces: make(set[string])}
}

// link notes what a DestinationRule names, or forgets it.
func (c *credentials) link(dr *translate.DestinationRule, n name, change func(map[name]set[name], name, name)) {
	for _, s := range translate.CredentialSecrets(dr) {
		change(c.bySecret, s, n)
	}
	for _, cm := range translate.CredentialConfigMaps(dr) {
		change(c.byConfigMap, cm, n)
	}
	for _, s := range translate.NamedCredentials(dr) {
		change(c.users, s, n)
		if c.dirty[s] = struct{}{}; c.users[s] != nil {
			link(c.inSpace, s.Namespace, s)
		} else {
			unlink(c.inSpace, s.Namespace, s)
		}
	}
}

func (x *Index) secret(n name, now *corev1.Secret) {
	if now != nil {
		now = translate.TrimSecret(now)
	}
	keep(x.objects.Secrets, n, now)
	x.markRules(x.credentials.bySecret[n])
	for rule := range x.credentials.bySecret[n] {
		for _, s := range translate.NamedCredentials(x.objects.DestinationRules[rule]) {
			x.credentials.dirty[s] = struct{}{}
		}
	}
}

// markRules marks DestinationRules and the services that they are about.
func (x *Index) markRules(rules set[name]) {
	for n := range rules {
		x.traffic.dirtyRules[n] = struct{}{}
		for key := range x.covered(translate.RuleHost(x.cfg, x.objects.DestinationRules[n])) {
			x.traffic.dirtyServices[key] = struct{}{}
		}
	}
}

// rewarded marks a namespace when a pod that may be a waypoint's comes, goes or changes hands.
func (x *Index) rewarded(namespace string, old, now *corev1.Pod) {
	who := func(pod *corev1.Pod) (gateway, account string) {
		if pod == nil {
			return "", ""
		}
		return pod.Labels[mesh.LabelGatewayName], translate.ServiceAccount(pod)
	}
	was, wasAccount := who(old)
	if is, isAccount := who(now); (was != "" || is != "") && (was != is || wasAccount != isAccount) {
		x.credentials.dirtySpaces[namespace] = struct{}{}
	}
}

func (x *Index) refreshCredentials() {
	c := &x.credentials
	for namespace := range c.dirtySpaces {
		x.mark(c.dirty, c.inSpace[namespace])
	}
	for n := range c.dirty {
		var made *translate.Credential
		if len(c.users[n]) > 0 {
			made = translate.MakeCredential(n, x.objects.Secrets, x.rulesOf(c.users[n]), x.readers(n.Namespace))
		}
		x.putCredential(n.String(), made)
	}
	clear(c.dirty)
	clear(c.dirtySpaces)
}

func (x *Index) rulesOf(names set[name]) (rules []*translate.DestinationRule) {
	for n := range names {
		rules = append(rules, x.objects.DestinationRules[n])
	}
	return rules
}

// readers are the accounts of a namespace's waypoints.
func (x *Index) readers(namespace string) []string {
	all := make(set[string])
	for gw := range x.waypoints.inSpace[namespace] {
		for pod := range x.labels[pair{namespace, mesh.LabelGatewayName, gw.Name}] {
			if who := x.objects.Reader(x.objects.Pods[pod]); who != "" {
				all[who] = struct{}{}
			}
		}
	}
	return slices.Sorted(maps.Keys(all))
}
