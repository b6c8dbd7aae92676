package grpcweb_test

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/mistnet/mistnet/waypoint/grpcweb"
	"github.com/mistnet/mistnet/waypoint/http1"
)

// translated gives a body to a translator in pieces of up to n bytes and returns what comes of it.
func translated(t http1.Translator, body string, n int, trailers *http1.Fields) (string, error) {
	var out []byte
	for len(body) > 0 {
		piece := []byte(body[:min(n, len(body))])
		body = body[len(piece):]
		for len(piece) > 0 {
			p, used, err := t.Translate(piece)
			if err != nil {
				return string(out), err
			}
			if used == 0 {
				return string(out), errors.New("nothing was used")
			}
			out, piece = append(out, p...), piece[used:]
		}
	}
	p, err := t.End(trailers)
	return string(append(out, p...)), err
}

// fields makes trailers of pairs.
func fields(t testing.TB, pairs ...string) *http1.Fields {
	t.Helper()
	var b http1.Builder
	var f http1.Fields
	b.BeginTrailers(&f)
	for i := 0; i < len(pairs); i += 2 {
		b.Field([]byte(pairs[i]), []byte(pairs[i+1]))
	}
	if err := b.EndTrailers(); err != nil {
		t.Fatal(err)
	}
	return &f
}

func message(flag byte, text string) string {
	return string(binary.BigEndian.AppendUint32([]byte{flag}, uint32(len(text)))) + text
}

func b64(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }

// sizes of the pieces that bodies come in.
var sizes = []int{1, 2, 3, 4, 5, 7, 16, 1 << 20}

func TestTypes(t *testing.T) {
	t.Parallel()
	for of, want := range map[string][2]bool{
		"application/grpc-web": {false, true}, "application/grpc-web+proto": {false, true},
		"application/grpc-web-text": {true, true}, "application/grpc-web-text+proto": {true, true},
		"application/grpc": {}, "application/grpc-web+json": {}, "application/grpc-web; charset=utf-8": {}, "application/grpc-webs": {}, "": {},
	} {
		text, ok := grpcweb.Parse(of)
		if got := [2]bool{text, ok}; got != want {
			t.Errorf("Parse(%q) = %v, want %v", of, got, want)
		}
	}
}

func TestRequestsInBase64(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("0123456789", 9_000)
	for _, c := range []struct {
		name, body, want string
		bad              bool
	}{
		{name: "empty"},
		{name: "one message", body: b64(message(0, "abc")), want: message(0, "abc")},
		{name: "without padding", body: b64("abcdef"), want: "abcdef"},
		{name: "messages that were encoded one by one", body: b64("a") + b64("bc") + b64("def") + b64("g"), want: "abcdefg"},
		{name: "a long one", body: b64(long), want: long},
		{name: "long ones behind each other", body: b64(long[1:]) + b64(long), want: long[1:] + long},
		{name: "padding that is missing", body: "YQ", bad: true},
		{name: "half of it", body: "YQ=", bad: true},
		{name: "too much", body: "YQ======", bad: true},
		{name: "padding inside of four", body: "Y=Q=", bad: true},
		{name: "nothing but padding", body: "====", bad: true},
		{name: "a letter of another alphabet", body: "YWJj_-==", bad: true},
		{name: "an end of line", body: "YWJj\r\n\r\n", bad: true},
		{name: "a space", body: "YWJj YWJ", bad: true},
		{name: "bits behind the end", body: "YR==", bad: true},
	} {
		for _, n := range sizes {
			got, err := translated(new(grpcweb.Decoder), c.body, n, nil)
			if (err != nil) != c.bad {
				t.Errorf("%s, in pieces of %d: %v, want an error: %v", c.name, n, err, c.bad)
			}
			if diff := cmp.Diff(c.want, got); !c.bad && diff != "" {
				t.Errorf("%s, in pieces of %d (-want +got):\n%s", c.name, n, diff)
			}
		}
	}
}

func TestResponses(t *testing.T) {
	t.Parallel()
	trailers := []string{"grpc-status", "0", "grpc-message", "", "X-Tr-bin", "AAH/"}
	end := message(0x80, "grpc-status:0\r\ngrpc-message:\r\nx-tr-bin:AAH/\r\n")
	long := message(1, strings.Repeat("0123456789", 9_001))
	for _, c := range []struct {
		name, body   string
		trailers     []string
		binary, text string
	}{
		{"nothing", "", nil, "", ""},
		{"a message", message(0, "\n\x03abc"), trailers, message(0, "\n\x03abc") + end, b64(message(0, "\n\x03abc")) + b64(end)},
		{"trailers alone", "", trailers, end, b64(end)},
		{"empty messages", message(0, "") + message(0, ""), trailers, message(0, "") + message(0, "") + end, b64(message(0, "")) + b64(message(0, "")) + b64(end)},
		{"long ones", long + long, trailers, long + long + end, b64(long) + b64(long) + b64(end)},
		{"one that is cut", message(0, "abc")[:7], trailers, message(0, "abc")[:7] + end, b64(message(0, "abc")[:7]) + b64(end)},
		{"without trailers", message(0, "abcd"), nil, message(0, "abcd"), b64(message(0, "abcd"))},
	} {
		for _, n := range sizes {
			for isText, want := range map[bool]string{false: c.binary, true: c.text} {
				got, err := translated(&grpcweb.Encoder{Text: isText}, c.body, n, fields(t, c.trailers...))
				if diff := cmp.Diff(want, got); diff != "" || err != nil {
					t.Errorf("%s, text %v, in pieces of %d: %v (-want +got):\n%s", c.name, isText, n, err, diff)
				}
			}
		}
	}
}

// TestMessagesLeaveWhenTheyAreWhole: a client of text need not wait for the next to read one.
func TestMessagesLeaveWhenTheyAreWhole(t *testing.T) {
	t.Parallel()
	e := &grpcweb.Encoder{Text: true}
	for _, text := range []string{"a", "ab", "abc", "", "abcd"} {
		out, used, err := e.Translate([]byte(message(0, text)))
		if string(out) != b64(message(0, text)) || used != 5+len(text) || err != nil {
			t.Errorf("%q: %q, %d, %v", text, out, used, err)
		}
	}
}

// TestAgain: a body that is read again is translated as if it had not been before.
func TestAgain(t *testing.T) {
	t.Parallel()
	d := new(grpcweb.Decoder)
	if _, _, err := d.Translate([]byte("YWJ")); err != nil {
		t.Fatal(err)
	}
	d.Restart()
	if got, err := translated(d, "YWJj", 9, nil); got != "abc" || err != nil {
		t.Errorf("read again: %q, %v", got, err)
	}
	e := &grpcweb.Encoder{Text: true}
	if _, _, err := e.Translate([]byte("\x00\x00\x00")); err != nil {
		t.Fatal(err)
	}
	e.Restart()
	if got, err := translated(e, message(0, "a"), 9, fields(t)); got != b64(message(0, "a")) || err != nil {
		t.Errorf("read again: %q, %v", got, err)
	}
}

// dumbDecode decodes four letters at a time.
func dumbDecode(s string) (out []byte, ok bool) {
	for ; len(s) >= 4; s = s[4:] {
		if strings.ContainsAny(s[:4], "\r\n") {
			return out, false
		}
		p, err := base64.StdEncoding.Strict().DecodeString(s[:4])
		if err != nil || len(p) == 0 {
			return out, false
		}
		out = append(out, p...)
	}
	return out, s == ""
}

// FuzzDecoder: however a body is cut into pieces, it is what four letters at a time are.
func FuzzDecoder(f *testing.F) {
	for _, s := range []string{"", "YWJj", "YQ==YmM=", "YQ=", "Y=Q=", "YWJj\n\n\n\n", "====", b64(strings.Repeat("x", 13_000))} {
		f.Add(s, uint64(1))
	}
	f.Fuzz(func(t *testing.T, body string, seed uint64) {
		g := rand.New(rand.NewPCG(seed, 1))
		got, err := translated(new(grpcweb.Decoder), body, 1+g.IntN(40_000), nil)
		want, ok := dumbDecode(body)
		if ok != (err == nil) {
			t.Fatalf("%q: %v, want no error: %v", body, err, ok)
		}
		if ok && got != string(want) || !bytes.HasPrefix(want, []byte(got)) {
			t.Fatalf("%q: %q, want %q", body, got, want)
		}
	})
}

// FuzzEncoder: a client that decodes what it is sent reads what the application wrote, and then the trailers, whatever it wrote.
func FuzzEncoder(f *testing.F) {
	for _, s := range []string{"", message(0, "abc"), message(0, "") + message(1, "ab"), "\x00\x00", "\xff\xff\xff\xff\xff\xff", message(0, strings.Repeat("x", 40_000))} {
		f.Add(s, uint64(1))
	}
	f.Fuzz(func(t *testing.T, body string, seed uint64) {
		g := rand.New(rand.NewPCG(seed, 1))
		n := 1 + g.IntN(40_000)
		trailers := fields(t, "grpc-status", "0")
		plain, err := translated(&grpcweb.Encoder{}, body, n, trailers)
		if want := body + message(0x80, "grpc-status:0\r\n"); plain != want || err != nil {
			t.Fatalf("binary: %q, %v, want %q", plain, err, want)
		}
		coded, err := translated(&grpcweb.Encoder{Text: true}, body, n, trailers)
		if err != nil {
			t.Fatal(err)
		}
		back, err := translated(new(grpcweb.Decoder), coded, 1+g.IntN(40_000), nil)
		if back != plain || err != nil {
			t.Fatalf("text: %q, %v, want %q", back, err, plain)
		}
	})
}

// TestNoMoreThanABuffer: what is handed out at once does not grow with what comes at once.
func TestNoMoreThanABuffer(t *testing.T) {
	big := []byte(strings.Repeat("AAAA", 1<<18))
	for _, tr := range []http1.Translator{new(grpcweb.Decoder), &grpcweb.Encoder{Text: true}} {
		out, used, err := tr.Translate(big)
		if cap(out) > 16<<10 || used > len(big)/2 || err != nil {
			t.Errorf("%T: %d bytes of %d, %v", tr, cap(out), used, err)
		}
	}
	r := strings.NewReader(string(big))
	d := new(grpcweb.Decoder)
	piece := make([]byte, 5000)
	if n := testing.AllocsPerRun(50, func() {
		if m, err := r.Read(piece); err != io.EOF {
			if _, _, err := d.Translate(piece[:m/4*4]); err != nil {
				t.Fatal(err)
			}
		}
	}); n != 0 {
		t.Errorf("%v allocations for a piece, want none", n)
	}
}
