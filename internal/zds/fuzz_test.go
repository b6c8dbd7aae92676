package zds

import (
	"errors"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	zdsapi "github.com/mistnet/mistnet/api/zds"
)

// The decoders are not exported, so their fuzz targets live inside the package.

func mustMarshal(tb testing.TB, m proto.Message) []byte {
	tb.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func FuzzDecodeRequest(f *testing.F) {
	for _, m := range []proto.Message{
		addRequest(Info{"u", "n", "ns", "sa"}), keepRequest("u"), delRequest("u"), snapshotSentRequest(),
		&zdsapi.WorkloadRequest{},
	} {
		for files := range 3 {
			f.Add(mustMarshal(f, m), files)
		}
	}
	f.Add([]byte{0x0a, 0xff}, 1)
	f.Add([]byte("garbage"), 0)
	f.Fuzz(func(t *testing.T, b []byte, files int) {
		s, err := decodeRequest(b, files)
		if err != nil {
			if !errors.Is(err, errProtocol) {
				t.Errorf("decodeRequest(%x) = %v, want a protocol error", b, err)
			}
			return
		}
		var again []byte
		switch s.kind {
		case stepAdd:
			again = mustMarshal(t, addRequest(s.info))
		case stepKeep:
			again = mustMarshal(t, keepRequest(s.info.UID))
		case stepDel:
			again = mustMarshal(t, delRequest(s.info.UID))
		case stepSnapshotSent:
			again = mustMarshal(t, snapshotSentRequest())
		case stepUnknown:
			t.Fatalf("decodeRequest(%x) = unknown without an error", b)
		}
		if (s.kind == stepAdd) != (files == 1) || files != 0 && files != 1 {
			t.Fatalf("decodeRequest(%x) took a %v with %d descriptors", b, s.kind, files)
		}
		if s2, err := decodeRequest(again, files); err != nil || s2 != s {
			t.Errorf("decoded again: %+v, %v; want %+v", s2, err, s)
		}
	})
}

func FuzzDecodeResponse(f *testing.F) {
	f.Add(mustMarshal(f, ackResponse(nil)))
	f.Add(mustMarshal(f, ackResponse(errors.New("no"))))
	f.Add([]byte{})
	f.Add([]byte{0x0a, 0x03, 0x0a, 0x01, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		reason, err := decodeResponse(b)
		if err != nil {
			if !errors.Is(err, errProtocol) {
				t.Errorf("decodeResponse(%x) = %v, want a protocol error", b, err)
			}
			return
		}
		if !utf8.ValidString(reason) {
			t.Errorf("decodeResponse(%x) = %q, not UTF-8", b, reason)
		}
	})
}

func FuzzDecodeHello(f *testing.F) {
	f.Add([]byte{0x08, 0x01})
	f.Add([]byte{0x08, 0x02})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := decodeHello(b); err != nil && !errors.Is(err, errProtocol) {
			t.Errorf("decodeHello(%x) = %v, want a protocol error", b, err)
		}
	})
}

func TestAckAlwaysFits(t *testing.T) {
	for _, reason := range []string{"", "x", strings.Repeat("ä", 4096), "\xff\xfe"} {
		b := mustMarshal(t, ackResponse(errors.New(reason)))
		if len(b) > maxPacketBytes {
			t.Errorf("ack of a complaint of %d bytes has %d bytes", len(reason), len(b))
		}
		if got, err := decodeResponse(b); err != nil || got == "" {
			t.Errorf("decodeResponse(ack of %.10q) = %q, %v; want a reason", reason, got, err)
		}
	}
}
