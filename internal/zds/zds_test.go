package zds_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	zdsapi "github.com/mistnet/mistnet/api/zds"
	"github.com/mistnet/mistnet/internal/zds"
)

// pods is a ztunnel's side that records what it is asked, and answers by fail.
type pods struct {
	calls chan string // one line per call, with room for all of a test
	mu    sync.Mutex
	fail  error
}

func newPods() *pods { return &pods{calls: make(chan string, 1000)} }

func (p *pods) answer(line string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.calls <- line
	return p.fail
}

func (p *pods) setFail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fail = err
}

func (p *pods) Add(_ context.Context, i zds.Info, f *os.File) error {
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 100))
	if err != nil {
		return err
	}
	return p.answer(fmt.Sprintf("add %s %s/%s/%s %s", i.UID, i.Namespace, i.Name, i.ServiceAccount, b))
}
func (p *pods) Keep(_ context.Context, uid string) error { return p.answer("keep " + uid) }
func (p *pods) Del(_ context.Context, uid string) error  { return p.answer("del " + uid) }
func (p *pods) Synced(_ context.Context, uids []string) error {
	return p.answer("synced " + strings.Join(uids, ","))
}

// next returns the following call.
func (p *pods) next(t testing.TB) string {
	t.Helper()
	select {
	case line := <-p.calls:
		return line
	case <-time.After(10 * time.Second):
		t.Fatal("no call in 10 s")
		return ""
	}
}

func (p *pods) want(t testing.TB, lines ...string) {
	t.Helper()
	for _, want := range lines {
		if got := p.next(t); got != want {
			t.Fatalf("call = %q, want %q", got, want)
		}
	}
}

// pod offers a plain file as its namespace; what matters is that the same open file arrives.
func pod(t testing.TB, uid string) zds.Pod {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), uid))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteString("netns of " + uid); err != nil {
		t.Fatal(err)
	}
	return zds.Pod{Info: zds.Info{UID: uid, Name: "web", Namespace: "shop", ServiceAccount: "sa"}, NetNS: f}
}

func addLine(uid string) string { return "add " + uid + " shop/web/sa netns of " + uid }

// start runs fn until the test's end and checks that it then returns nil.
func start(t testing.TB, fn func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- fn(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(10 * time.Second):
			t.Error("did not stop in 10 s")
		}
	})
	t.Cleanup(stop)
	return stop
}

func socketPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "zds") // t.TempDir may be too long for a socket's name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "ztunnel.sock")
}

// startServer runs s and returns when its socket answers.
func startServer(t testing.TB, s *zds.Server) (stop func()) {
	t.Helper()
	if s.Snapshot == nil {
		s.Snapshot = func() []zds.Pod { return nil }
	}
	stop = start(t, s.Run)
	dial(t, s.Path).Close()
	return stop
}

// dial connects a raw peer, waiting for the listener.
func dial(t testing.TB, path string) *net.UnixConn {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for range 5000 {
		c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
		if err == nil {
			t.Cleanup(func() { c.Close() })
			if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			return c
		}
		<-tick.C
	}
	t.Fatalf("nobody listens on %s", path)
	return nil
}

func TestSnapshotThenChanges(t *testing.T) {
	a, b, c := pod(t, "a"), pod(t, "b"), pod(t, "c")
	closed := pod(t, "closed")
	closed.NetNS.Close()
	big := pod(t, "big")
	big.Info.Name = strings.Repeat("x", 2000)
	s := &zds.Server{Path: socketPath(t), Snapshot: func() []zds.Pod {
		return []zds.Pod{a, {Info: zds.Info{UID: "kept"}}, closed, big, b}
	}}
	startServer(t, s)
	if err := s.Add(t.Context(), c); !errors.Is(err, zds.ErrNotConnected) {
		t.Errorf("Add without a ztunnel = %v, want ErrNotConnected", err)
	}
	if err := s.Del(t.Context(), "c"); err != nil {
		t.Errorf("Del without a ztunnel = %v, want nil", err)
	}
	p := newPods()
	connected := make(chan bool, 10)
	start(t, (&zds.Client{Path: s.Path, Pods: p, OnConnected: func(up bool) { connected <- up }}).Run)
	if !<-connected {
		t.Error("OnConnected(false) before true")
	}
	p.want(t, addLine("a"), "keep kept", addLine("b"), "synced a,kept,b")
	if err := s.Add(t.Context(), c); err != nil {
		t.Error(err)
	}
	if err := s.Del(t.Context(), "a"); err != nil {
		t.Error(err)
	}
	p.want(t, addLine("c"), "del a")

	p.setFail(errors.New("no such thing"))
	var refused *zds.RefusedError
	if err := s.Add(t.Context(), c); !errors.As(err, &refused) || refused.Reason != "no such thing" {
		t.Errorf("refused Add = %v, want the reason", err)
	}
	p.setFail(nil)
	if err := s.Add(t.Context(), big); err == nil {
		t.Error("Add of a pod larger than a packet succeeded")
	}
	if err := s.Add(t.Context(), closed); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Add with a closed file = %v, want os.ErrClosed", err)
	}
	if err := s.Add(t.Context(), zds.Pod{Info: a.Info}); err == nil {
		t.Error("Add without a namespace succeeded")
	}
	if err := s.Add(t.Context(), c); err != nil {
		t.Errorf("Add after failures on the same connection: %v", err)
	}
	p.want(t, addLine("c"), addLine("c"))
	if n := s.Connected(); n != 1 {
		t.Errorf("Connected() = %d, want 1", n)
	}
}

func TestAddGoesToTheNewestAndDelToAll(t *testing.T) {
	s := &zds.Server{Path: socketPath(t)}
	startServer(t, s)
	older, newer := newPods(), newPods()
	start(t, (&zds.Client{Path: s.Path, Pods: older}).Run)
	older.want(t, "synced ")
	stopNewer := start(t, (&zds.Client{Path: s.Path, Pods: newer}).Run)
	newer.want(t, "synced ")
	if err := s.Add(t.Context(), pod(t, "a")); err != nil {
		t.Fatal(err)
	}
	newer.want(t, addLine("a"))
	if err := s.Del(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	newer.want(t, "del a")
	older.want(t, "del a") // and no add before it
	stopNewer()
	// The server notices at once, not at the next request: retry only while the news travels.
	a := pod(t, "a")
	for s.Connected() > 1 {
		<-time.After(time.Millisecond)
	}
	if err := s.Add(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	older.want(t, addLine("a"))
}

func TestClientComesBack(t *testing.T) {
	path := socketPath(t)
	p := newPods()
	connected := make(chan bool, 100)
	start(t, (&zds.Client{Path: path, Pods: p, OnConnected: func(up bool) { connected <- up }}).Run)
	for range 3 {
		stop := startServer(t, &zds.Server{Path: path})
		p.want(t, "synced ")
		stop()
		if up, down := <-connected, <-connected; !up || down {
			t.Fatalf("OnConnected = %v, %v; want true, false", up, down)
		}
	}
}

func TestSocketTaken(t *testing.T) {
	path := socketPath(t)
	stop := startServer(t, &zds.Server{Path: path})
	second := &zds.Server{Path: path, Snapshot: func() []zds.Pod { return nil }}
	if err := second.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("second Run = %v, want a word about the other agent", err)
	}
	stop()
	// What an agent that was killed leaves behind.
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	startServer(t, &zds.Server{Path: path})()

	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := second.Run(t.Context()); err == nil {
		t.Error("Run over a plain file succeeded")
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "precious" {
		t.Errorf("the plain file is now %q, %v", b, err)
	}
	if err := (&zds.Server{}).Run(t.Context()); err == nil {
		t.Error("Run of an empty Server succeeded")
	}
	if err := (&zds.Client{}).Run(t.Context()); err == nil {
		t.Error("Run of an empty Client succeeded")
	}
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// ended checks that the other side closes the connection; what it still sends is passed over.
func ended(t testing.TB, c *net.UnixConn) {
	t.Helper()
	for {
		n, err := c.Read(make([]byte, 2048))
		if n == 0 && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)) {
			return
		}
		if err != nil {
			t.Fatalf("connection not closed: %v", err)
		}
	}
}

func send(t testing.TB, c *net.UnixConn, b []byte, files ...*os.File) {
	t.Helper()
	var oob []byte
	if len(files) > 0 {
		var fds []int
		for _, f := range files {
			fds = append(fds, int(f.Fd()))
		}
		oob = syscall.UnixRights(fds...)
	}
	if _, _, err := c.WriteMsgUnix(b, oob, nil); err != nil {
		t.Fatal(err)
	}
}

func openFDs(t testing.TB) int {
	t.Helper()
	e, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(e)
}

// settled waits until no more descriptors are open than want, for closing happens on other goroutines.
func settled(t testing.TB, want int) {
	t.Helper()
	got := 0
	for range 500 {
		if got = openFDs(t); got <= want {
			return
		}
		<-time.After(10 * time.Millisecond)
	}
	t.Errorf("%d descriptors open, want at most %d", got, want)
}

func TestServerRefusesBadZtunnels(t *testing.T) {
	s := &zds.Server{Path: socketPath(t), Timeout: 200 * time.Millisecond}
	startServer(t, s)
	f := pod(t, "extra").NetNS
	hello := marshal(t, &zdsapi.ZdsHello{Version: zdsapi.Version_V1})
	ack := marshal(t, &zdsapi.WorkloadResponse{Payload: &zdsapi.WorkloadResponse_Ack{Ack: &zdsapi.Ack{}}})
	synced := marshal(t, &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_SnapshotSent{SnapshotSent: &zdsapi.SnapshotSent{}}})
	read := func(t *testing.T, c *net.UnixConn) {
		t.Helper()
		b := make([]byte, 2048)
		n, err := c.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(synced, b[:n]); diff != "" {
			t.Errorf("first request (-want +got):\n%s", diff)
		}
	}
	before := openFDs(t)
	tests := []struct {
		name string
		peer func(t *testing.T, c *net.UnixConn)
	}{
		{"garbage instead of hello", func(t *testing.T, c *net.UnixConn) { send(t, c, []byte("GET / HTTP/1.1\r\n\r\n")) }},
		{"hello of another version", func(t *testing.T, c *net.UnixConn) { send(t, c, []byte{0x08, 0x07}) }},
		{"hello with a descriptor", func(t *testing.T, c *net.UnixConn) { send(t, c, hello, f) }},
		{"oversize hello", func(t *testing.T, c *net.UnixConn) { send(t, c, make([]byte, 1500), f) }},
		{"no hello at all", func(t *testing.T, c *net.UnixConn) {}},
		{"no answer", func(t *testing.T, c *net.UnixConn) { send(t, c, hello); read(t, c) }},
		{"answer before the question", func(t *testing.T, c *net.UnixConn) {
			send(t, c, hello)
			send(t, c, ack)
			send(t, c, ack)
			send(t, c, ack)
		}},
		{"two answers", func(t *testing.T, c *net.UnixConn) {
			send(t, c, hello)
			read(t, c)
			send(t, c, ack)
			send(t, c, ack)
			send(t, c, ack)
		}},
		{"garbage answer", func(t *testing.T, c *net.UnixConn) { send(t, c, hello); read(t, c); send(t, c, []byte{0xff, 0xff}) }},
		{"answer of an unknown kind", func(t *testing.T, c *net.UnixConn) { send(t, c, hello); read(t, c); send(t, c, []byte{0x7a, 0x00}) }},
		{"answer with descriptors", func(t *testing.T, c *net.UnixConn) { send(t, c, hello); read(t, c); send(t, c, ack, f, f) }},
		{"oversize answer", func(t *testing.T, c *net.UnixConn) { send(t, c, hello); read(t, c); send(t, c, make([]byte, 1025), f) }},
		{"empty packet with a descriptor", func(t *testing.T, c *net.UnixConn) { send(t, c, hello); read(t, c); send(t, c, nil, f) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := dial(t, s.Path)
			defer c.Close()
			tt.peer(t, c)
			ended(t, c)
		})
	}
	settled(t, before)
	p := newPods()
	start(t, (&zds.Client{Path: s.Path, Pods: p}).Run)
	p.want(t, "synced ") // and it still serves
}

// TestUnansweredAddFails has a ztunnel that takes requests and says nothing.
func TestUnansweredAddFails(t *testing.T) {
	s := &zds.Server{Path: socketPath(t), Timeout: time.Second}
	startServer(t, s)
	c := dial(t, s.Path)
	send(t, c, marshal(t, &zdsapi.ZdsHello{Version: zdsapi.Version_V1}))
	if _, err := c.Read(make([]byte, 1024)); err != nil {
		t.Fatal(err)
	}
	send(t, c, marshal(t, &zdsapi.WorkloadResponse{Payload: &zdsapi.WorkloadResponse_Ack{Ack: &zdsapi.Ack{}}}))
	begin := time.Now()
	if err := s.Add(t.Context(), pod(t, "a")); err == nil || errors.Is(err, zds.ErrNotConnected) {
		t.Errorf("Add = %v, want a timeout", err)
	}
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("Add took %v", took)
	}
	ended(t, c)
}

func TestClientRefusesBadAgents(t *testing.T) {
	f := pod(t, "extra").NetNS
	add := marshal(t, &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_Add{Add: &zdsapi.AddWorkload{
		Uid: "u", WorkloadInfo: &zdsapi.WorkloadInfo{Name: "n", Namespace: "ns", ServiceAccount: "sa"},
	}}})
	bare := marshal(t, &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_Add{Add: &zdsapi.AddWorkload{Uid: "u"}}})
	nameless := marshal(t, &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_Add{Add: &zdsapi.AddWorkload{WorkloadInfo: &zdsapi.WorkloadInfo{}}}})
	del := marshal(t, &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_Del{Del: &zdsapi.DelWorkload{Uid: "u"}}})
	keep := marshal(t, &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_Keep{Keep: &zdsapi.KeepWorkload{Uid: "u"}}})
	synced := marshal(t, &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_SnapshotSent{SnapshotSent: &zdsapi.SnapshotSent{}}})
	type packet struct {
		b     []byte
		files []*os.File
	}
	tests := []struct {
		name    string
		packets []packet // the last one ends the connection
	}{
		{"garbage", []packet{{b: []byte("garbage")}}},
		{"garbage with a descriptor", []packet{{[]byte("garbage"), []*os.File{f}}}},
		{"truncated add", []packet{{add[:len(add)-2], []*os.File{f}}}},
		{"oversize", []packet{{append(slices.Clone(add), make([]byte, 1024)...), []*os.File{f}}}},
		{"add without a descriptor", []packet{{b: add}}},
		{"add with two descriptors", []packet{{add, []*os.File{f, f}}}},
		{"add with more descriptors than are looked at", []packet{{add, slices.Repeat([]*os.File{f}, 20)}}},
		{"add without workload_info", []packet{{bare, []*os.File{f}}}},
		{"add without uid", []packet{{nameless, []*os.File{f}}}},
		{"del with a descriptor", []packet{{del, []*os.File{f}}}},
		{"unknown request", []packet{{b: []byte{0x7a, 0x00}}}},
		{"empty packet with a descriptor", []packet{{nil, []*os.File{f}}}},
		{"second snapshot sent", []packet{{b: synced}, {b: synced}}},
		{"keep after snapshot sent", []packet{{b: keep}, {b: synced}, {b: keep}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := socketPath(t)
			l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			before := openFDs(t)
			stop := start(t, (&zds.Client{Path: path, Pods: newPods()}).Run)
			for range 2 { // it comes back and is as strict the second time
				c, err := l.AcceptUnix()
				if err != nil {
					t.Fatal(err)
				}
				if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
					t.Fatal(err)
				}
				b := make([]byte, 1024)
				if n, err := c.Read(b); err != nil || !cmp.Equal(b[:n], []byte{0x08, 0x01}) {
					t.Fatalf("hello = %x, %v; want 0801", b[:n], err)
				}
				for i, p := range tt.packets {
					send(t, c, p.b, p.files...)
					if i == len(tt.packets)-1 {
						break
					}
					if n, err := c.Read(b); err != nil || !cmp.Equal(b[:n], []byte{0x0a, 0x00}) {
						t.Fatalf("answer %d = %x, %v; want 0a00", i, b[:n], err)
					}
				}
				ended(t, c)
				c.Close()
			}
			stop()
			settled(t, before)
		})
	}
}

// TestDescriptorsDoNotLeak sends many pods over many connections, with refusals.
func TestDescriptorsDoNotLeak(t *testing.T) {
	a, b := pod(t, "a"), pod(t, "b")
	s := &zds.Server{Path: socketPath(t), Snapshot: func() []zds.Pod { return []zds.Pod{a, b} }}
	startServer(t, s)
	before := openFDs(t)
	for round := range 4 {
		p := newPods()
		if round%2 == 1 {
			p.setFail(errors.New("not today"))
		}
		stop := start(t, (&zds.Client{Path: s.Path, Pods: p}).Run)
		p.want(t, addLine("a"), addLine("b"), "synced a,b")
		for range 50 {
			if err := s.Add(t.Context(), a); (err != nil) != (round%2 == 1) {
				t.Fatal(err)
			}
			p.want(t, addLine("a"))
		}
		stop()
		for s.Connected() > 0 {
			<-time.After(time.Millisecond)
		}
	}
	settled(t, before)
}
