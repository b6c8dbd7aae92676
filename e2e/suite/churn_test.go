package suite_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/mistnet/mistnet/e2e/lab"
)

// TestChurn: servers come and go under load, and no request fails that would not fail without the mesh: beside the namespace
// in the mesh the same happens in one outside. Afterwards nothing is left of those that went.
//
// MISTNET_E2E_CHURN is for how long at least (1m), MISTNET_E2E_CHURN_PODS how many servers each namespace has (12).
func TestChurn(t *testing.T) {
	duration, pods := time.Minute, 12
	if text := os.Getenv("MISTNET_E2E_CHURN"); text != "" {
		var err error
		if duration, err = time.ParseDuration(text); err != nil {
			t.Fatal("MISTNET_E2E_CHURN:", err)
		}
	}
	if text := os.Getenv("MISTNET_E2E_CHURN_PODS"); text != "" {
		var err error
		if pods, err = strconv.Atoi(text); err != nil || pods < 2 {
			t.Fatalf("MISTNET_E2E_CHURN_PODS=%q: want 2 or more", text)
		}
	}
	meshed, control := newSpace(t, "e2e-churn", true), newSpace(t, "e2e-churn-control", false)
	meshed.policy("PeerAuthentication", "default", `
  mtls: {mode: STRICT}`)
	both := []*space{meshed, control}
	for _, s := range both {
		s.farm(pods)
	}
	for _, s := range both {
		s.settled(pods)
	}
	meshed.redirected(true)
	before := accounts(meshed)

	for _, s := range both {
		service, err := cluster.Client().CoreV1().Services(s.name).Get(t.Context(), "server", metav1.GetOptions{})
		s.must(err)
		url := "http://" + bracketed(service.Spec.ClusterIP) + "/" // DNS is not what is tried
		s.deploy(
			workload{name: "load1", node: cluster.Node(1), args: []string{"load", url, "10"}},
			workload{name: "load2", node: cluster.Node(2), args: []string{"load", url, "10"}},
		)
	}
	gone := make([]int, len(both))
	ok := t.Run("servers come and go", func(t *testing.T) {
		for i, s := range both {
			t.Run(s.name, func(t *testing.T) {
				t.Parallel()
				gone[i] = (&space{t, s.name}).churn(duration, pods)
			})
		}
	})
	if !ok {
		return
	}
	sent, failed := make([]int, len(both)), make([]int, len(both))
	for i, s := range both {
		for _, pod := range []string{"load1", "load2"} {
			n, f := s.load(pod)
			sent[i], failed[i] = sent[i]+n, failed[i]+f
		}
		t.Logf("%s: %d servers went, %d of %d requests failed", s.name, gone[i], failed[i], sent[i])
		s.undisturbed()
	}
	if failed[0] > failed[1] {
		for _, pod := range []string{"load1", "load2"} {
			logs, _ := cluster.Kubectl(t.Context(), "-n", meshed.name, "logs", pod)
			t.Errorf("%s in the mesh says\n%s", pod, complaints(logs))
		}
		t.Errorf("in the mesh %d of %d requests failed, outside %d of %d", failed[0], sent[0], failed[1], sent[1])
	}
	for _, s := range both {
		for _, pod := range []string{"load1", "load2"} {
			s.must(cluster.Client().CoreV1().Pods(s.name).Delete(t.Context(), pod, metav1.DeleteOptions{}))
		}
	}
	for _, s := range both {
		s.settled(pods)
	}
	meshed.eventually("what the programs hold is what they held before", func() error {
		var grown []string
		now := accounts(meshed)
		for _, what := range slices.Sorted(maps.Keys(now)) {
			if now[what] > before[what]+slack {
				grown = append(grown, fmt.Sprintf("%s: %d, before %d", what, now[what], before[what]))
			}
		}
		if len(grown) > 0 {
			return fmt.Errorf("after %d servers went:\n%s", gone[0], strings.Join(grown, "\n"))
		}
		return nil
	})
	for what, n := range accounts(meshed) {
		t.Logf("%s: %d, before %d", what, n, before[what])
	}
	meshed.onlyTheLiving()
}

// slack is by how much what a program holds may differ between two moments of rest: connections that are just being made
// anew, timers, a scrape. Seen were differences of one.
const slack = 5

// enough is how many servers must go for what each of them leaves behind to be more than that by far.
const enough = 2 * (slack + 1)

func complaints(logs string) string {
	var b strings.Builder
	for line := range strings.Lines(logs) {
		if !totals.MatchString(line) {
			b.WriteString(line)
		}
	}
	return b.String()
}

// farm deploys servers that end gracefully, behind one service.
func (s *space) farm(pods int) {
	s.Helper()
	manifest := fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: server, namespace: %[1]s}
spec: {selector: {app: server}, ports: [{name: http, port: 80, targetPort: 8080}]}
`, s.name)
	for _, name := range farms {
		manifest += fmt.Sprintf(`---
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s, namespace: %[2]s}
spec:
  replicas: %[3]d
  selector: {matchLabels: {app: server, farm: %[1]s}}
  strategy: {rollingUpdate: {maxUnavailable: 0, maxSurge: 50%%}}
  template:
    metadata: {labels: {app: server, farm: %[1]s}}
    spec:
      terminationGracePeriodSeconds: 90
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: ScheduleAnyway, labelSelector: {matchLabels: {farm: %[1]s}}}
      containers:
      - {name: app, image: %[4]q, args: [serve], env: [{name: DRAIN, value: 15s}],
         readinessProbe: {httpGet: {path: /readyz, port: 8080}, periodSeconds: 1, timeoutSeconds: 5}}
`, name, s.name, pods/len(farms), lab.AppImage)
	}
	s.must(cluster.Apply(s.Context(), manifest))
}

var farms = []string{"left", "right"}

// settled waits until there are as many servers as there should be, all ready, and none that is ending.
func (s *space) settled(pods int) {
	s.Helper()
	want := pods / len(farms) * len(farms)
	s.inTime(patience+time.Duration(pods)*10*time.Second, fmt.Sprintf("%d servers in %s", want, s.name), func() error {
		ready := 0
		all := s.pods()
		for _, p := range all {
			for _, c := range p.Status.Conditions {
				if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue && p.DeletionTimestamp == nil {
					ready++
				}
			}
		}
		if ready != want || len(all) != want {
			return fmt.Errorf("%d of %d are ready", ready, len(all))
		}
		return nil
	})
}

// churn rolls, scales and deletes servers for a while, one thing at a time, and says how many went. The names are random,
// what is done is not.
func (s *space) churn(duration time.Duration, pods int) (gone int) {
	seen := map[types.UID]bool{}
	look := func() {
		for _, p := range s.pods() {
			if p.Labels["app"] == "server" {
				seen[p.UID] = true
			}
		}
	}
	ctx, half := s.Context(), pods/len(farms)
	deployments := cluster.Client().AppsV1().Deployments(s.name)
	patch := func(farm, body string) {
		_, err := deployments.Patch(ctx, farm, types.StrategicMergePatchType, []byte(body), metav1.PatchOptions{})
		s.must(err)
	}
	// Not between two steps that undo each other.
	for began, n := time.Now(), 0; time.Since(began) < duration || len(seen)-half*len(farms) < enough || n%4 != 0; n++ {
		farm := farms[n/4%len(farms)]
		switch n % 4 {
		case 0:
			patch(farm, fmt.Sprintf(`{"spec":{"template":{"metadata":{"annotations":{"rolled":"%d"}}}}}`, n))
		case 1:
			patch(farm, fmt.Sprintf(`{"spec":{"replicas":%d}}`, half+half/2))
		case 2:
			victims := slices.DeleteFunc(s.pods(), func(p corev1.Pod) bool { return p.Labels["farm"] != farm || p.DeletionTimestamp != nil })
			if len(victims) > 0 {
				s.must(cluster.Client().CoreV1().Pods(s.name).Delete(ctx, victims[rand.IntN(len(victims))].Name, metav1.DeleteOptions{}))
			}
		case 3:
			patch(farm, fmt.Sprintf(`{"spec":{"replicas":%d}}`, half))
		}
		s.inTime(patience+time.Duration(pods)*10*time.Second, farm+" has done what it was told", func() error {
			look()
			d, err := deployments.Get(ctx, farm, metav1.GetOptions{})
			if err != nil {
				return err
			}
			want, st := *d.Spec.Replicas, d.Status
			if st.ObservedGeneration < d.Generation || st.Replicas != want || st.UpdatedReplicas != want || st.AvailableReplicas != want {
				return fmt.Errorf("want %d: %+v", want, st)
			}
			return nil
		})
	}
	return len(seen) - half*len(farms)
}

// inTime is eventually with a limit of its own, and less eager, for what takes many pods.
func (s *space) inTime(limit time.Duration, what string, fn func() error) {
	s.Helper()
	for deadline := time.Now().Add(limit); ; {
		err := fn()
		if err == nil {
			return
		}
		if time.Now().After(deadline) || s.Context().Err() != nil {
			s.Fatalf("%s: %v", what, err)
		}
		select {
		case <-s.Context().Done():
		case <-time.After(500 * time.Millisecond):
		}
	}
}

var (
	goroutines = regexp.MustCompile(`(?m)^go_goroutines (\d+)$`)
	openFiles  = regexp.MustCompile(`(?m)^process_open_fds (\d+)$`)
	// Kinds that were defined a moment ago: Kubernetes' own controllers begin to watch them when they come to it.
	custom  = regexp.MustCompile(`(?m)^apiserver_longrunning_requests\{.*group="([^"]*\.istio\.io|gateway\.networking\.k8s\.io)".*\n`)
	watches = regexp.MustCompile(`(?m)^apiserver_longrunning_requests\{.*verb="WATCH".*\} (\d+)$`)
)

// accounts tells what every program of the mesh holds, on all nodes together: the scheduler may spread the servers otherwise.
func accounts(s *space) map[string]int {
	s.Helper()
	has := map[string]int{}
	count := func(what, page string, re *regexp.Regexp) {
		matches := re.FindAllStringSubmatch(page, -1)
		if len(matches) == 0 {
			s.Fatalf("%s: nothing matches %s in\n%.500s", what, re, page)
		}
		for _, m := range matches {
			n, err := strconv.Atoi(m[1])
			s.must(err)
			has[what] += n
		}
	}
	for _, program := range []struct{ name, label, port string }{
		{"istiod", "app=istiod", "15014"}, {"cni agent", "k8s-app=istio-cni-node", "15014"}, {"ztunnel", "app=ztunnel", "15020"},
	} {
		pods, err := cluster.Client().CoreV1().Pods("istio-system").List(s.Context(), metav1.ListOptions{LabelSelector: program.label})
		s.must(err)
		if len(pods.Items) == 0 {
			s.Fatalf("there is no %s", program.name)
		}
		for _, p := range pods.Items {
			page := fetch(s, "http://"+bracketed(p.Status.PodIP)+":"+program.port+"/metrics")
			count(program.name+", goroutines", page, goroutines)
			count(program.name+", open files", page, openFiles)
		}
	}
	raw, err := cluster.Client().RESTClient().Get().AbsPath("/metrics").DoRaw(s.Context())
	s.must(err)
	count("API server, watches", custom.ReplaceAllString(string(raw), ""), watches)
	return has
}

func bracketed(ip string) string {
	if strings.Contains(ip, ":") {
		return "[" + ip + "]"
	}
	return ip
}

// fetch gets a page from the network the nodes are on.
func fetch(s *space, url string) string {
	s.Helper()
	var page string
	s.eventually("get "+url, func() error {
		ctx, cancel := context.WithTimeout(s.Context(), 20*time.Second)
		defer cancel()
		client := http.Client{Transport: &http.Transport{DialContext: cluster.DialContext, DisableKeepAlives: true}}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if page = string(body); err == nil && resp.StatusCode != http.StatusOK {
			err = errors.New(resp.Status)
		}
		return err
	})
	return page
}

// onlyTheLiving fails unless each ztunnel has exactly its node's pods of the namespace, and knows of exactly those there are.
func (s *space) onlyTheLiving() {
	s.Helper()
	for _, n := range cluster.Nodes {
		s.eventually("ztunnel on "+n.Name+" has the pods that are there", func() error {
			// Its administration answers inside its own network namespace only.
			out, err := n.Exec(s.Context(), "bash", "-c", `exec nsenter -t "$(pidof ztunnel)" -n curl -sS -m 20 http://127.0.0.1:15000/config_dump`)
			if err != nil {
				return err
			}
			var dump struct {
				Workloads []struct{ Name, Namespace string }
				// keyed by UID
				WorkloadState map[string]struct {
					Info struct{ Name, Namespace string }
				}
			}
			if err := json.Unmarshal([]byte(out), &dump); err != nil {
				return fmt.Errorf("%w: %.300s", err, out)
			}
			var here, all, served, known []string
			for _, p := range s.pods() {
				all = append(all, p.Name)
				if p.Spec.NodeName == n.Name {
					here = append(here, string(p.UID))
				}
			}
			for uid, w := range dump.WorkloadState {
				if w.Info.Namespace == s.name {
					served = append(served, uid)
				}
			}
			for _, w := range dump.Workloads {
				if w.Namespace == s.name {
					known = append(known, w.Name)
				}
			}
			for _, l := range [][]string{here, all, served, known} {
				slices.Sort(l)
			}
			if !slices.Equal(here, served) {
				return fmt.Errorf("it serves %q, and there are %q", served, here)
			}
			if !slices.Equal(all, known) {
				return fmt.Errorf("it knows of %q, and there are %q", known, all)
			}
			return nil
		})
	}
}
