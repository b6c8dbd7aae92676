package files_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/files"
	"github.com/mistnet/mistnet/istiod/index"
)

func write(t *testing.T, path, content string) {
	t.Helper()
	temp := filepath.Join(filepath.Dir(path), ".new")
	if err := os.WriteFile(temp, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temp, path); err != nil {
		t.Fatal(err)
	}
}

func next(t *testing.T, events <-chan []index.Event) []index.Event {
	t.Helper()
	select {
	case ev := <-events:
		return ev
	case <-time.After(10 * time.Second):
		t.Fatal("no event within 10 s")
		return nil
	}
}

const (
	written = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop, annotations: {mine: x}}\nspec: {nodeName: n1}\n"
	state   = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop, annotations: {ambient.istio.io/redirection: enabled}}\n" +
		"status: {phase: Running, podIP: 10.0.0.1}\n"
)

func TestStateOverlaysPods(t *testing.T) {
	dir, status := t.TempDir(), filepath.Join(t.TempDir(), "made", "for", "it")
	write(t, filepath.Join(dir, "web.yaml"), written)
	s := files.New(files.Config{Dir: dir, StatusDir: status})
	events := make(chan []index.Event, 10)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, func(ev []index.Event) { events <- ev }) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v, want nil", err)
		}
	}()

	pod := func() *corev1.Pod {
		t.Helper()
		ev := next(t, events)
		if len(ev) != 1 || ev[0].Kind != index.Pod || ev[0].Name.Name != "web" {
			t.Fatalf("events = %v, want one of pod web", ev)
		}
		p, _ := ev[0].Object.(*corev1.Pod)
		return p
	}
	if p := pod(); p.Status.PodIP != "" {
		t.Errorf("address = %q, want none before the agent told", p.Status.PodIP)
	}
	write(t, filepath.Join(status, "shop_web.yaml"), state)
	p := pod()
	if p.Status.PodIP != "10.0.0.1" || p.Annotations[mesh.AnnotationRedirection] != "enabled" || p.Annotations["mine"] != "x" || p.Spec.NodeName != "n1" {
		t.Errorf("pod = %+v, want the written one with the agent's annotation and status", p)
	}
	write(t, filepath.Join(status, "shop_other.yaml"), strings.ReplaceAll(state, "web", "other"))
	if ev := next(t, events); len(ev) != 1 || ev[0].Object != nil {
		t.Errorf("events = %v, want no pod from state alone", ev)
	}
	if err := os.Remove(filepath.Join(status, "shop_web.yaml")); err != nil {
		t.Fatal(err)
	}
	if p := pod(); p.Status.PodIP != "" || p.Annotations[mesh.AnnotationRedirection] != "" {
		t.Errorf("pod = %+v, want it as written once its state is gone", p)
	}
	if got := s.Places(); len(got) != 1 || got[0].File != filepath.Join(dir, "web.yaml") || got[0].Line != 1 {
		t.Errorf("Places = %v, want the written pod only", got)
	}
}

func TestStatusDirInsideDirIsRefused(t *testing.T) {
	dir := t.TempDir()
	err := files.New(files.Config{Dir: dir, StatusDir: filepath.Join(dir, "status")}).Run(t.Context(), func([]index.Event) {})
	if err == nil || !strings.Contains(err.Error(), "outside") {
		t.Errorf("Run = %v, want an error that says where it must lie", err)
	}
}
