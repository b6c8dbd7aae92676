// Package fakeapi is a Kubernetes API server in memory, for tests of mistctl: it stores objects, merges what is applied,
// keeps versions and preconditions, and plays the controllers' part where a test asks for it. It validates nothing, and
// merges lists by replacing them.
package fakeapi

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// Object is an object as JSON has it.
type Object = map[string]any

// kinds are what is served: group/version → plural → kind; * marks kinds without a namespace.
var kinds = map[string]map[string]string{
	"v1": {"namespaces": "*Namespace", "nodes": "*Node", "pods": "Pod", "services": "Service", "configmaps": "ConfigMap",
		"secrets": "Secret", "serviceaccounts": "ServiceAccount", "events": "Event", "resourcequotas": "ResourceQuota"},
	"apps/v1":                         {"deployments": "Deployment", "daemonsets": "DaemonSet", "replicasets": "ReplicaSet"},
	"policy/v1":                       {"poddisruptionbudgets": "PodDisruptionBudget"},
	"autoscaling/v2":                  {"horizontalpodautoscalers": "HorizontalPodAutoscaler"},
	"coordination.k8s.io/v1":          {"leases": "Lease"},
	gatewayAPI:                        {"gateways": "Gateway", "gatewayclasses": "*GatewayClass"},
	"networking.istio.io/v1":          {"virtualservices": "VirtualService"},
	"networking.istio.io/v1alpha3":    {"envoyfilters": "EnvoyFilter"},
	"apiextensions.k8s.io/v1":         {"customresourcedefinitions": "*CustomResourceDefinition"},
	"admissionregistration.k8s.io/v1": {"validatingwebhookconfigurations": "*ValidatingWebhookConfiguration"},
	"authorization.k8s.io/v1":         {"selfsubjectaccessreviews": "*SelfSubjectAccessReview"},
	"rbac.authorization.k8s.io/v1": {"clusterroles": "*ClusterRole", "clusterrolebindings": "*ClusterRoleBinding",
		"roles": "Role", "rolebindings": "RoleBinding"},
}

const gatewayAPI = "gateway.networking.k8s.io/v1"

// Server is a running fake.
type Server struct {
	Config     *rest.Config
	GatewayAPI bool // whether its kinds are served

	mu      sync.Mutex
	objects map[string]Object // by path
	next    int
	log     []string // "VERB path" of every change

	// Stored runs under the server's lock after every change of an object and may fill in its status.
	Stored func(kind string, o Object)
	// Deny forbids a verb on a plural resource.
	Deny func(verb, plural string) bool
	// Request runs, outside the lock, before a request is answered.
	Request func(r *http.Request)
}

// New starts a server that ends with the test. Programs are ready as soon as they are applied.
func New(t *testing.T) *Server {
	s := &Server{objects: make(map[string]Object), Stored: Ready}
	web := httptest.NewServer(s)
	t.Cleanup(web.Close)
	s.Config = &rest.Config{Host: web.URL, QPS: -1, ContentConfig: rest.ContentConfig{ContentType: "application/json"}}
	for _, ns := range []string{"default", "kube-system"} {
		s.Put("/api/v1/namespaces/"+ns, Object{"apiVersion": "v1", "kind": "Namespace", "metadata": Object{"name": ns}})
	}
	return s
}

// Refuse makes s the address of a server that is gone.
func (s *Server) Refuse(t *testing.T) {
	t.Helper()
	web := httptest.NewServer(http.NotFoundHandler())
	web.Close()
	s.Config = &rest.Config{Host: web.URL}
}

// Kubeconfig writes a kubeconfig for the server and returns its path.
func (s *Server) Kubeconfig(t *testing.T) string {
	t.Helper()
	cfg := clientcmdapi.NewConfig()
	cfg.Clusters["fake"] = &clientcmdapi.Cluster{Server: s.Config.Host}
	cfg.Contexts["fake"] = &clientcmdapi.Context{Cluster: "fake"}
	cfg.CurrentContext = "fake"
	path := t.TempDir() + "/kubeconfig"
	if err := clientcmd.WriteToFile(*cfg, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// Ready is what controllers of a healthy cluster do at once.
func Ready(kind string, o Object) {
	generation := at(o, "metadata")["generation"]
	switch kind {
	case "Deployment":
		replicas := at(o, "spec")["replicas"]
		if replicas == nil {
			replicas = 1
		}
		o["status"] = Object{"observedGeneration": generation, "replicas": replicas, "updatedReplicas": replicas, "availableReplicas": replicas, "readyReplicas": replicas}
	case "DaemonSet":
		o["status"] = Object{"observedGeneration": generation, "desiredNumberScheduled": 2, "updatedNumberScheduled": 2, "numberAvailable": 2, "numberReady": 2}
	case "CustomResourceDefinition":
		o["status"] = Object{"conditions": []any{Object{"type": "Established", "status": "True"}}}
	}
}

// Put stores an object at its path.
func (s *Server) Put(path string, o Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.store(path, o)
}

// Get returns the object at a path, or nil.
func (s *Server) Get(path string) Object {
	s.mu.Lock()
	defer s.mu.Unlock()
	return copied(s.objects[path])
}

// Paths lists what is stored, sorted.
func (s *Server) Paths() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.objects))
}

// Log lists the changes made through the API, as "VERB path", and forgets them.
func (s *Server) Log() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	log := s.log
	s.log = nil
	return log
}

func (s *Server) store(path string, o Object) Object {
	s.next++
	m := at(o, "metadata")
	if old := s.objects[path]; old != nil {
		m["uid"] = at(old, "metadata")["uid"]
	} else {
		m["uid"] = "uid-" + strconv.Itoa(s.next)
	}
	m["generation"] = 1
	m["resourceVersion"] = strconv.Itoa(s.next)
	if s.Stored != nil {
		kind, _ := o["kind"].(string)
		s.Stored(kind, o)
	}
	s.objects[path] = copied(o)
	return o
}

// ServeHTTP answers as an API server.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s.Request != nil {
		s.Request(r)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.discovered(w, r.URL.Path) {
		return
	}
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	gv, rest := "v1", parts[2:]
	if parts[0] == "apis" {
		gv, rest = parts[1]+"/"+parts[2], parts[3:]
	}
	namespace := ""
	if len(rest) >= 3 && rest[0] == "namespaces" {
		namespace, rest = rest[1], rest[2:]
	}
	kind := strings.TrimPrefix(s.kinds()[gv][rest[0]], "*")
	if kind == "" {
		fail(w, http.StatusNotFound, "NotFound", "the server could not find the requested resource")
		return
	}
	verb := verbs[r.Method]
	if verb == "get" && len(rest) == 1 {
		verb = "list"
	}
	if s.Deny != nil && s.Deny(verb, rest[0]) {
		group, _, ok := strings.Cut(gv, "/")
		if !ok {
			group = ""
		}
		in := ""
		if namespace != "" {
			in = fmt.Sprintf(" in the namespace %q", namespace)
		}
		fail(w, http.StatusForbidden, "Forbidden", fmt.Sprintf("%s %q is forbidden: User \"eve\" cannot %s resource %q in API group %q%s", rest[0], "x", verb, rest[0], group, in))
		return
	}
	if kind == "SelfSubjectAccessReview" {
		s.review(w, r)
		return
	}
	switch verb {
	case "list":
		s.list(w, r, gv, kind, rest[0], namespace)
	case "get":
		s.answer(w, s.objects[r.URL.Path])
	case "create":
		o := read(r)
		o["apiVersion"], o["kind"] = gv, kind
		name, _ := at(o, "metadata")["name"].(string)
		path := r.URL.Path + "/" + name
		if s.objects[path] != nil {
			fail(w, http.StatusConflict, "AlreadyExists", rest[0]+" \""+name+"\" already exists")
			return
		}
		if namespace != "" {
			at(o, "metadata")["namespace"] = namespace
		}
		s.log = append(s.log, "create "+path)
		s.answer(w, s.store(path, o))
	default:
		s.change(w, r, verb, gv, kind)
	}
}

var verbs = map[string]string{"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}

func (s *Server) change(w http.ResponseWriter, r *http.Request, verb, gv, kind string) {
	path, body := r.URL.Path, read(r)
	old := s.objects[path]
	dry := r.URL.Query().Get("dryRun") != ""
	switch verb {
	case "patch":
		merged := merge(copied(old), body)
		if dry {
			s.answer(w, merged)
			return
		}
		s.log = append(s.log, "apply "+path)
		s.answer(w, s.store(path, merged))
		return
	case "update":
		body["apiVersion"], body["kind"] = gv, kind
		want, _ := at(body, "metadata")["resourceVersion"].(string)
		if old != nil && want != "" && want != at(old, "metadata")["resourceVersion"] {
			fail(w, http.StatusConflict, "Conflict", "the object has been modified")
			return
		}
		if old != nil {
			s.log = append(s.log, "update "+path)
			old = s.store(path, body)
		}
	case "delete":
		if pre, ok := body["preconditions"].(Object); ok && old != nil {
			m := at(old, "metadata")
			if uid := pre["uid"]; uid != nil && uid != m["uid"] || pre["resourceVersion"] != nil && pre["resourceVersion"] != m["resourceVersion"] {
				fail(w, http.StatusConflict, "Conflict", "precondition failed")
				return
			}
		}
		if old != nil {
			s.log = append(s.log, "delete "+path)
			delete(s.objects, path)
		}
	}
	s.answer(w, old)
}

func (s *Server) list(w http.ResponseWriter, r *http.Request, gv, kind, plural, namespace string) {
	selector, err := labels.Parse(r.URL.Query().Get("labelSelector"))
	if err != nil {
		fail(w, http.StatusBadRequest, "BadRequest", err.Error())
		return
	}
	field, value, _ := strings.Cut(r.URL.Query().Get("fieldSelector"), "=")
	items := []any{}
	for _, path := range slices.Sorted(maps.Keys(s.objects)) {
		o := s.objects[path]
		m := at(o, "metadata")
		parts := strings.Split(path, "/")
		own := labels.Set{}
		for k, v := range asObject(m["labels"]) {
			own[k], _ = v.(string)
		}
		switch {
		case o["apiVersion"] != gv, o["kind"] != kind, parts[len(parts)-2] != plural:
		case namespace != "" && m["namespace"] != namespace:
		case !selector.Matches(own):
		case field == "metadata.name" && m["name"] != value:
		case field == "spec.nodeName" && at(o, "spec")["nodeName"] != value:
		default:
			items = append(items, o)
		}
	}
	send(w, http.StatusOK, Object{"apiVersion": gv, "kind": kind + "List", "metadata": Object{}, "items": items})
}

func (s *Server) review(w http.ResponseWriter, r *http.Request) {
	o := read(r)
	attributes := asObject(at(o, "spec")["resourceAttributes"])
	verb, _ := attributes["verb"].(string)
	plural, _ := attributes["resource"].(string)
	o["status"] = Object{"allowed": s.Deny == nil || !s.Deny(verb, plural)}
	send(w, http.StatusCreated, o)
}

func (s *Server) answer(w http.ResponseWriter, o Object) {
	if o == nil {
		fail(w, http.StatusNotFound, "NotFound", "not found")
		return
	}
	send(w, http.StatusOK, o)
}

// kinds are those that this server serves.
func (s *Server) kinds() map[string]map[string]string {
	all := maps.Clone(kinds)
	if !s.GatewayAPI {
		delete(all, gatewayAPI)
	}
	return all
}

func (s *Server) discovered(w http.ResponseWriter, path string) bool {
	kinds := s.kinds()
	switch path {
	case "/version":
		send(w, http.StatusOK, Object{"major": "1", "minor": "36", "gitVersion": "v1.36.3"})
	case "/api":
		send(w, http.StatusOK, Object{"kind": "APIVersions", "versions": []string{"v1"}})
	case "/apis":
		groups := []any{}
		for _, gv := range slices.Sorted(maps.Keys(kinds)) {
			if group, version, ok := strings.Cut(gv, "/"); ok {
				v := Object{"groupVersion": gv, "version": version}
				groups = append(groups, Object{"name": group, "versions": []any{v}, "preferredVersion": v})
			}
		}
		send(w, http.StatusOK, Object{"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
	default:
		gv := strings.TrimPrefix(strings.TrimPrefix(path, "/apis/"), "/api/")
		plurals, ok := kinds[gv]
		if !ok {
			return false
		}
		resources := []any{}
		for _, plural := range slices.Sorted(maps.Keys(plurals)) {
			kind, cluster := strings.CutPrefix(plurals[plural], "*")
			resources = append(resources, Object{"name": plural, "kind": kind, "namespaced": !cluster,
				"verbs": []string{"get", "list", "create", "update", "patch", "delete"}})
		}
		send(w, http.StatusOK, Object{"kind": "APIResourceList", "groupVersion": gv, "resources": resources})
	}
	return true
}

func fail(w http.ResponseWriter, code int, reason, message string) {
	send(w, code, Object{"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message})
}

func send(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v) // a client that went away is its own business
}

func read(r *http.Request) Object {
	o := Object{}
	_ = json.NewDecoder(r.Body).Decode(&o) // a request without a body has none
	return o
}

func at(o Object, key string) Object {
	m, ok := o[key].(Object)
	if !ok {
		m = Object{}
		o[key] = m
	}
	return m
}

func asObject(v any) Object { m, _ := v.(Object); return m }

func merge(into, from Object) Object {
	if into == nil {
		into = Object{}
	}
	for k, v := range from {
		if sub, ok := v.(Object); ok {
			old, _ := into[k].(Object)
			v = merge(old, sub)
		}
		into[k] = v
	}
	return into
}

// copied is a deep copy, in the types that JSON decodes to.
func copied(o Object) Object {
	if o == nil {
		return nil
	}
	b, err := json.Marshal(o)
	if err != nil {
		panic(err) // it came from JSON
	}
	var c Object
	if err := json.Unmarshal(b, &c); err != nil {
		panic(err)
	}
	return c
}
