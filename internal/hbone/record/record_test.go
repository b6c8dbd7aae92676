package record_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/mistnet/mistnet/internal/hbone/record"
)

func sequence(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i)
	}
	return b
}

func TestARecordIsThatOfRFC8448(t *testing.T) {
	want := unhex("1703030043a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f2b9819a8a5b46b395bd54a9a20441e2b62974e1f5a6292a2977014bd1e3deae63aeebb21694915e4")
	got, err := rfcSealer(t).Seal(nil, sequence(20), sequence(50)[20:])
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("Seal = %x, %v, want %x", got, err, want)
	}
	dst := make([]byte, record.OpenRoom)
	n, err := rfcOpener(t, record.Server).Open(dst, want)
	if err != nil || !bytes.Equal(dst[:n], sequence(50)) {
		t.Fatalf("Open = %x, %v", dst[:n], err)
	}
}

func TestWhatIsSealedOpensInPlaceAndBeside(t *testing.T) {
	for _, suite := range []struct {
		id     uint16
		secret int
	}{{tls.TLS_AES_128_GCM_SHA256, 32}, {tls.TLS_AES_256_GCM_SHA384, 48}} {
		secret := sequence(suite.secret)
		s, err := record.NewSealer(suite.id, secret)
		if err != nil {
			t.Fatal(err)
		}
		o, err := record.NewOpener(suite.id, secret, record.Client)
		if err != nil {
			t.Fatal(err)
		}
		record.UpdateAfter(s, 7)
		rng := rand.New(rand.NewPCG(1, 2))
		dst := make([]byte, record.OpenRoom)
		for _, size := range []int{0, 1, 9, 16383, 16384, 16385, 3*16384 - 9, 65527, 200_000} {
			a, b := sequence(9), make([]byte, size)
			for i := range b {
				b[i] = byte(rng.Uint32())
			}
			out, err := s.Seal([]byte("before"), a, b)
			if err != nil {
				t.Fatal(err)
			}
			out = out[len("before"):]
			var got []byte
			data := 0
			for inPlace := false; len(out) > 0; inPlace = !inPlace {
				rec := out[:record.Length(out)]
				out = out[len(rec):]
				to := dst
				if inPlace {
					to = rec[record.HeaderBytes:]
				}
				n, err := o.Open(to, rec)
				if err != nil {
					t.Fatalf("Open: %v", err)
				}
				if n > 0 {
					data++
				}
				got = append(got, to[:n]...)
			}
			if want := append(a, b...); !bytes.Equal(got, want) {
				t.Fatalf("%d bytes came back as %d others", len(want), len(got))
			}
			if want := (size + 9 + 16383) / 16384; data != want {
				t.Errorf("%d bytes took %d records, want %d", size+9, data, want)
			}
		}
	}
}

func TestSealingAndOpeningDoNotAllocate(t *testing.T) {
	s, o := rfcSealer(t), rfcOpener(t, record.Server)
	a, b := make([]byte, 9), make([]byte, 65527)
	out, dst := make([]byte, 0, 70_000), make([]byte, record.OpenRoom)
	if n := testing.AllocsPerRun(100, func() {
		out, _ = s.Seal(out[:0], a, b)
		for rest := out; len(rest) > 0; {
			rec := rest[:record.Length(rest)]
			rest = rest[len(rec):]
			if _, err := o.Open(dst, rec); err != nil {
				t.Fatal(err)
			}
		}
	}); n != 0 {
		t.Errorf("a frame of four records allocates %v times", n)
	}
}

// A case is a series of records, of which the last makes the opener answer want: "" for none, "EOF", or what the error
// says; the alert for it is checked too.
func TestWhatAPeerMaySend(t *testing.T) {
	ticket := func(n int) []byte { return append([]byte{4, byte(n >> 16), byte(n >> 8), byte(n)}, make([]byte, n)...) }
	update := func(request byte) []byte { return []byte{24, 0, 0, 1, request} }
	flip := func(rec []byte, at int) []byte { rec[at] ^= 1; return rec }
	type recs = [][]byte
	times := func(n int, make func() []byte) (all recs) {
		for range n {
			all = append(all, make())
		}
		return all
	}
	for _, tc := range []struct {
		name  string
		role  record.Role
		send  func(f *forge) recs
		want  string
		alert record.Alert
	}{
		{"data", record.Server, func(f *forge) recs { return recs{f.of(23, 1)} }, "", 0},
		{"data with padding", record.Server, func(f *forge) recs { return recs{f.record(append([]byte{1, 2, 23}, make([]byte, 300)...))} }, "", 0},
		{"data that ends in zeros", record.Server, func(f *forge) recs { return recs{f.of(23, 0, 0, 0)} }, "", 0},
		{"the largest record", record.Server, func(f *forge) recs { return recs{f.of(23, make([]byte, 1<<14)...)} }, "", 0},
		{"the largest record by padding", record.Server, func(f *forge) recs { return recs{f.record(append([]byte{1, 23}, make([]byte, 1<<14-1)...))} }, "", 0},
		{"one byte of padding too much", record.Server, func(f *forge) recs { return recs{f.record(append([]byte{1, 23}, make([]byte, 1<<14)...))} }, "content", record.RecordOverflow},
		{"one byte of content too much", record.Server, func(f *forge) recs { return recs{f.of(23, make([]byte, 1<<14+1)...)} }, "content", record.RecordOverflow},
		{"a record too long to exist", record.Server, func(f *forge) recs { return recs{f.of(23, make([]byte, 1<<14+256)...)} }, "record of 16657 bytes", record.RecordOverflow},
		{"a record shorter than its tag", record.Server, func(*forge) recs { return recs{{23, 3, 3, 0, 3, 1, 2, 3}} }, "record of 3 bytes", record.BadRecordMAC},
		{"nothing but a tag", record.Server, func(f *forge) recs { return recs{f.record(nil)} }, "without content type", record.UnexpectedMessage},
		{"nothing but padding", record.Server, func(f *forge) recs { return recs{f.record(make([]byte, 40))} }, "without content type", record.UnexpectedMessage},
		{"an empty record", record.Server, func(f *forge) recs { return recs{f.of(23)} }, "", 0},
		{"empty records with data between", record.Server, func(f *forge) recs {
			return append(append(times(16, func() []byte { return f.of(23) }), f.of(23, 1)), times(16, func() []byte { return f.of(23) })...)
		}, "", 0},
		{"too many empty records", record.Server, func(f *forge) recs { return times(17, func() []byte { return f.of(23) }) }, "too many", record.UnexpectedMessage},

		{"a broken tag", record.Server, func(f *forge) recs { r := f.of(23, 1, 2); return recs{flip(r, len(r)-1)} }, "authentication", record.BadRecordMAC},
		{"a broken body", record.Server, func(f *forge) recs { return recs{flip(f.of(23, 1, 2), 6)} }, "authentication", record.BadRecordMAC},
		{"another version in the header", record.Server, func(f *forge) recs { return recs{flip(f.of(23, 1, 2), 2)} }, "authentication", record.BadRecordMAC},
		{"a replay", record.Server, func(f *forge) recs { r := f.of(23, 1); return recs{r, bytes.Clone(r)} }, "authentication", record.BadRecordMAC},
		{"a record left out", record.Server, func(f *forge) recs { f.seq++; return recs{f.of(23, 1)} }, "authentication", record.BadRecordMAC},
		{"records out of order", record.Server, func(f *forge) recs { a, b := f.of(23, 1), f.of(23, 2); return recs{b, a} }, "authentication", record.BadRecordMAC},

		{"ChangeCipherSpec", record.Client, func(*forge) recs { return recs{{20, 3, 3, 0, 1, 1}} }, "unprotected record of type 20", record.UnexpectedMessage},
		{"protected ChangeCipherSpec", record.Client, func(f *forge) recs { return recs{f.of(20, 1)} }, "content type 20", record.UnexpectedMessage},
		{"an unprotected alert", record.Client, func(*forge) recs { return recs{{21, 3, 3, 0, 2, 1, 0}} }, "unprotected record of type 21", record.UnexpectedMessage},
		{"an unknown content type", record.Client, func(f *forge) recs { return recs{f.of(99, 1)} }, "content type 99", record.UnexpectedMessage},

		{"close_notify", record.Server, func(f *forge) recs { return recs{f.of(21, 1, 0)} }, "EOF", 0},
		{"close_notify called fatal", record.Server, func(f *forge) recs { return recs{f.of(21, 2, 0)} }, "EOF", 0},
		{"user_canceled", record.Server, func(f *forge) recs { return recs{f.of(21, 1, 90)} }, "", 0},
		{"too many user_canceled", record.Server, func(f *forge) recs { return times(17, func() []byte { return f.of(21, 1, 90) }) }, "too many", record.UnexpectedMessage},
		{"an alert", record.Server, func(f *forge) recs { return recs{f.of(21, 2, 42)} }, "remote error: tls: bad certificate", 0},
		{"an alert called a warning", record.Server, func(f *forge) recs { return recs{f.of(21, 1, 42)} }, "remote error: tls: bad certificate", 0},
		{"half an alert", record.Server, func(f *forge) recs { return recs{f.of(21, 1)} }, "alert of 1 bytes", record.DecodeError},
		{"two alerts", record.Server, func(f *forge) recs { return recs{f.of(21, 1, 90, 1, 0)} }, "alert of 4 bytes", record.DecodeError},

		{"a session ticket", record.Client, func(f *forge) recs { return recs{f.of(22, ticket(200)...)} }, "", 0},
		{"two session tickets in a record", record.Client, func(f *forge) recs { return recs{f.of(22, append(ticket(200), ticket(10)...)...)} }, "", 0},
		{"a session ticket and a half", record.Client, func(f *forge) recs {
			b := append(ticket(200), ticket(10)...)
			return recs{f.of(22, b[:206]...), f.of(22, b[206:]...), f.of(23, 1)}
		}, "", 0},
		{"a session ticket byte by byte", record.Client, func(f *forge) (all recs) {
			for _, b := range ticket(12) {
				all = append(all, f.of(22, b))
			}
			return all
		}, "", 0},
		{"data within a session ticket", record.Client, func(f *forge) recs { return recs{f.of(22, ticket(200)[:50]...), f.of(23, 1)} }, "within a handshake message", record.UnexpectedMessage},
		{"data within a message's header", record.Client, func(f *forge) recs { return recs{f.of(22, 4, 0), f.of(23, 1)} }, "within a handshake message", record.UnexpectedMessage},
		{"an alert within a session ticket", record.Client, func(f *forge) recs { return recs{f.of(22, ticket(200)[:50]...), f.of(21, 1, 0)} }, "within a handshake message", record.UnexpectedMessage},
		{"a huge session ticket", record.Client, func(f *forge) recs { return recs{f.of(22, 4, 1, 0, 1)} }, "session ticket of 65537", record.DecodeError},
		{"an empty session ticket", record.Client, func(f *forge) recs { return recs{f.of(22, 4, 0, 0, 0)} }, "type 4", record.UnexpectedMessage},
		{"a session ticket for a server", record.Server, func(f *forge) recs { return recs{f.of(22, ticket(200)...)} }, "type 4", record.UnexpectedMessage},
		{"too many session tickets", record.Client, func(f *forge) recs { return times(17, func() []byte { return f.of(22, ticket(9)...) }) }, "too many", record.UnexpectedMessage},
		{"an empty handshake record", record.Client, func(f *forge) recs { return recs{f.of(22)} }, "empty handshake", record.UnexpectedMessage},
		{"a request for a certificate", record.Client, func(f *forge) recs { return recs{f.of(22, 13, 0, 0, 3, 0, 0, 0)} }, "type 13", record.UnexpectedMessage},
		{"a new handshake", record.Server, func(f *forge) recs { return recs{f.of(22, 1, 0, 0, 3, 0, 0, 0)} }, "type 1", record.UnexpectedMessage},

		{"a key update", record.Server, func(f *forge) recs { return recs{f.of(22, update(0)...)} }, "", 0},
		{"a key update in two pieces", record.Server, func(f *forge) recs { return recs{f.of(22, 24, 0, 0, 1), f.of(22, 1)} }, "", 0},
		{"the old key after a key update", record.Server, func(f *forge) recs { return recs{f.of(22, update(0)...), f.of(23, 1)} }, "authentication", record.BadRecordMAC},
		{"a key update that asks for something else", record.Server, func(f *forge) recs { return recs{f.of(22, update(2)...)} }, "request 2", record.IllegalParameter},
		{"a long key update", record.Server, func(f *forge) recs { return recs{f.of(22, 24, 0, 0, 2, 0, 0)} }, "key update of 2 bytes", record.DecodeError},
		{"a message behind a key update", record.Client, func(f *forge) recs { return recs{f.of(22, append(update(0), ticket(9)...)...)} }, "behind a key update", record.UnexpectedMessage},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := rfcOpener(t, tc.role)
			dst := make([]byte, record.OpenRoom)
			all := tc.send(new(forge))
			for i, rec := range all {
				n, err := o.Open(dst, bytes.Clone(rec))
				if err == nil && tc.want == "" {
					continue
				}
				if i < len(all)-1 && err != nil && tc.name != "records out of order" {
					t.Fatalf("record %d of %d: %v", i+1, len(all), err)
				}
				if i < len(all)-1 {
					continue
				}
				if err == nil || !strings.Contains(err.Error(), tc.want) || n != 0 {
					t.Fatalf("Open = %d, %v, want %q", n, err, tc.want)
				}
				if e, ok := errors.AsType[*record.Error](err); ok != (tc.alert != 0) || ok && e.Alert != tc.alert {
					t.Errorf("error %#v, want alert %d", err, tc.alert)
				}
				if tc.want == "EOF" && err != io.EOF {
					t.Errorf("error %v, want io.EOF itself", err)
				}
				if _, again := o.Open(dst, new(forge).of(23, 1)); again != err {
					t.Errorf("after that Open = %v, want the same error", again)
				}
			}
		})
	}
}

func TestDataOfARecordWithPaddingIsExact(t *testing.T) {
	var f forge
	o := rfcOpener(t, record.Server)
	dst := make([]byte, record.OpenRoom)
	n, err := o.Open(dst, f.record([]byte{7, 0, 8, 0, 23, 0, 0}))
	if err != nil || !bytes.Equal(dst[:n], []byte{7, 0, 8, 0}) {
		t.Errorf("Open = %v, %v", dst[:n], err)
	}
}

func TestAFailedRecordReleasesNothing(t *testing.T) {
	var f forge
	rec := f.of(23, bytes.Repeat([]byte("secret"), 1000)...)
	rec[len(rec)-1] ^= 1
	dst := make([]byte, record.OpenRoom)
	if _, err := rfcOpener(t, record.Server).Open(dst, rec); err == nil {
		t.Fatal("Open accepted a broken tag")
	}
	if bytes.Contains(dst, []byte("secret")) {
		t.Error("the content is in the destination")
	}
}

func TestKeysAreRenewed(t *testing.T) {
	s, o := rfcSealer(t), rfcOpener(t, record.Server)
	record.UpdateAfter(s, 3)
	dst := make([]byte, record.OpenRoom)
	updates := 0
	for i := range 20 {
		out, err := s.Seal(nil, []byte{byte(i)}, nil)
		if err != nil {
			t.Fatal(err)
		}
		for len(out) > 0 {
			rec := out[:record.Length(out)]
			out = out[len(rec):]
			n, err := o.Open(dst, rec)
			if err != nil {
				t.Fatal(err)
			}
			if n == 0 {
				updates++
			} else if n != 1 || dst[0] != byte(i) {
				t.Fatalf("message %d came as %v", i, dst[:n])
			}
		}
	}
	if updates != 6 {
		t.Errorf("20 records under keys for 3 took %d updates, want 6", updates)
	}
	if owed := o.Owed(); owed != record.Nothing {
		t.Errorf("Owed = %v, though nothing was asked for", owed)
	}
}

func TestAKeyUpdateIsAnsweredOnce(t *testing.T) {
	var f forge
	o := rfcOpener(t, record.Server)
	dst := make([]byte, record.OpenRoom)
	if _, err := o.Open(dst, f.of(22, 24, 0, 0, 1, 1)); err != nil {
		t.Fatal(err)
	}
	if a, b := o.Owed(), o.Owed(); a != record.Update || b != record.Nothing {
		t.Errorf("Owed = %v, then %v", a, b)
	}
}

func TestAPeerThatNeverRenewsItsKeyIsAskedOnce(t *testing.T) {
	o := rfcOpener(t, record.Server)
	f := forge{seq: 1<<23 + 1<<20 - 2}
	record.SetSequence(o, f.seq)
	dst := make([]byte, record.OpenRoom)
	var got []record.Owed
	for range 4 {
		if _, err := o.Open(dst, f.of(23, 1)); err != nil {
			t.Fatal(err)
		}
		got = append(got, o.Owed())
	}
	want := []record.Owed{record.Nothing, record.AskUpdate, record.Nothing, record.Nothing}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("after each record Owed = %v, want %v", got, want)
		}
	}
}

func TestNothingFollowsAnAlert(t *testing.T) {
	s := rfcSealer(t)
	if out, err := s.Alert(nil, record.CloseNotify); err != nil || len(out) == 0 {
		t.Fatalf("Alert = %x, %v", out, err)
	}
	if out, err := s.Alert(nil, record.InternalError); err != nil || len(out) != 0 {
		t.Errorf("second Alert = %x, %v", out, err)
	}
	if _, err := s.Seal(nil, []byte{1}, nil); err == nil {
		t.Error("Seal goes on after close_notify")
	}
}

func TestTakeRefusesWhatItCannotCarryOn(t *testing.T) {
	good := tls.ConnectionState{Version: tls.VersionTLS13, CipherSuite: tls.TLS_AES_128_GCM_SHA256, HandshakeComplete: true}
	secret := strings.Repeat("ab", 32)
	lines := []string{"CLIENT_TRAFFIC_SECRET_0 00 " + secret + "\n", "SERVER_TRAFFIC_SECRET_0 00 " + secret + "\n"}
	for _, tc := range []struct {
		name   string
		change func(st *tls.ConnectionState)
		lines  []string
		ok     bool
	}{
		{"what it can", nil, lines, true},
		{"what comes with handshake secrets", nil, append([]string{"CLIENT_HANDSHAKE_TRAFFIC_SECRET 00 11\n"}, lines...), true},
		{"TLS 1.2", func(st *tls.ConnectionState) { st.Version = tls.VersionTLS12 }, lines, false},
		{"ChaCha20", func(st *tls.ConnectionState) { st.CipherSuite = tls.TLS_CHACHA20_POLY1305_SHA256 }, lines, false},
		{"secrets of the wrong length", func(st *tls.ConnectionState) { st.CipherSuite = tls.TLS_AES_256_GCM_SHA384 }, lines, false},
		{"an unfinished handshake", func(st *tls.ConnectionState) { st.HandshakeComplete = false }, lines, false},
		{"one secret", nil, lines[:1], false},
		{"no secret", nil, nil, false},
		{"three secrets", nil, append(lines[:2:2], lines[0]), false},
		{"nonsense", nil, []string{lines[0], "SERVER_TRAFFIC_SECRET_0 00 zz\n"}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var log record.Secrets
			for _, l := range tc.lines {
				b := []byte(l)
				if n, err := log.Write(b); n != len(l) || err != nil {
					t.Fatalf("Write = %d, %v", n, err)
				}
				if !bytes.Equal(b, make([]byte, len(l))) {
					t.Error("the line is still there")
				}
			}
			st := good
			if tc.change != nil {
				tc.change(&st)
			}
			for _, role := range []record.Role{record.Client} {
				if s, o, ok := log.Take(role, st); ok != tc.ok || ok != (s != nil && o != nil) {
					t.Errorf("Take = %v, %v, %v, want %v", s, o, ok, tc.ok)
				}
			}
			if _, _, ok := log.Take(record.Client, st); ok {
				t.Error("the secrets are still there after Take")
			}
		})
	}
}
