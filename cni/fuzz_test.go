package cni_test

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/cni"
	"github.com/mistnet/mistnet/cni/plugin"
)

// FuzzPluginAPI sends the agent bodies no plugin of ours would. It must answer each, refuse names that are none, and
// take no pod it knows nothing of.
func FuzzPluginAPI(f *testing.F) {
	paths := []string{plugin.PathAdd, plugin.PathDel, plugin.PathCheck, plugin.PathGC}
	for i := range paths {
		for _, body := range []string{
			"", "null", "[]", `"x"`, "{", `{"Netns":1}`, "\xff", `{"PodName":"web","PodNamespace":"shop"}`,
			`{"Netns":"/proc/self/ns/net","PodName":"web","PodNamespace":"shop","IPs":[{"Address":"10.0.0.1/24","Gateway":""}]}`,
			`{"Netns":"/nowhere","PodName":"../web","PodNamespace":"shop"}`,
			`{"Attachments":[{"ContainerID":"c","IfName":"eth0"},null]}`, `{"Attachments":{}}`,
			`{"IPs":[{"Address":"fe80::1%eth0/64"}],"PodName":"a","PodNamespace":"b","PodUID":"\u0000"}`,
		} {
			f.Add(i, []byte(body))
		}
	}
	h, known, err := cni.PluginAPI(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // nothing is waited for
	f.Fuzz(func(t *testing.T, which int, body []byte) {
		path := paths[uint(which)%uint(len(paths))]
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(ctx, http.MethodPost, path, bytes.NewReader(body)))
		if want := []int{200, 400, 409, 503}; !slices.Contains(want, w.Code) {
			t.Errorf("POST %s %q = %d, want one of %v", path, body, w.Code, want)
		}
		var ev plugin.Event
		bad := json.NewDecoder(bytes.NewReader(body)).Decode(&ev) != nil || strings.ContainsAny(ev.PodName+ev.PodNamespace, "/_\\ \x00")
		if bad && path != plugin.PathGC && w.Code != http.StatusBadRequest {
			t.Errorf("POST %s %q = %d, want 400", path, body, w.Code)
		}
		if path == plugin.PathAdd && w.Code == http.StatusOK {
			t.Errorf("POST %s %q = 200: there is no such pod", path, body)
		}
		if got := known(); len(got) > 0 {
			t.Errorf("after POST %s %q the agent knows %v", path, body, got)
		}
	})
}
