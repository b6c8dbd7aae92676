package record_test

import (
	"bytes"
	"testing"

	"github.com/mistnet/mistnet/internal/hbone/record"
)

// FuzzContents feeds well-protected records of any content: length, bytes, length, bytes ...
func FuzzContents(f *testing.F) {
	f.Add([]byte{3, 1, 2, 23, 2, 1, 23})
	f.Add([]byte{7, 4, 0, 0, 2, 0, 0, 22, 2, 1, 23})
	f.Add([]byte{6, 24, 0, 0, 1, 1, 22})
	f.Add([]byte{3, 24, 0, 22, 4, 0, 1, 0, 22})
	f.Add([]byte{3, 1, 0, 21, 2, 1, 23})
	f.Add([]byte{3, 23, 0, 0, 1, 0})
	f.Fuzz(func(t *testing.T, script []byte) {
		for _, role := range []record.Role{record.Client, record.Server} {
			o := rfcOpener(t, role)
			dst := make([]byte, record.OpenRoom)
			var fg forge
			var failed error
			for rest := script; len(rest) > 0; {
				n := min(int(rest[0]), len(rest)-1)
				inner := rest[1 : 1+n]
				rest = rest[1+n:]
				got, err := o.Open(dst, fg.record(inner))
				if failed != nil && err != failed {
					t.Fatalf("after %v Open = %v", failed, err)
				}
				if failed = err; err != nil && got != 0 {
					t.Fatalf("Open = %d, %v", got, err)
				}
				if got > 0 {
					content := bytes.TrimRight(inner, "\x00")
					if want := content[:len(content)-1]; content[len(content)-1] != 23 || !bytes.Equal(dst[:got], want) {
						t.Fatalf("Open of % x = % x", inner, dst[:got])
					}
				}
				o.Owed()
			}
		}
	})
}

// FuzzRecords feeds bytes that nobody protected: none opens, and none breaks anything but the connection.
func FuzzRecords(f *testing.F) {
	f.Add(append([]byte{23, 3, 3, 0, 32}, make([]byte, 32)...))
	f.Add([]byte{21, 3, 3, 0, 2, 2, 40})
	f.Fuzz(func(t *testing.T, rec []byte) {
		if len(rec) < record.HeaderBytes || record.CheckHeader(rec) != nil {
			return
		}
		n, err := rfcOpener(t, record.Client).Open(make([]byte, record.OpenRoom), rec)
		if genuine := n == 50; !genuine && (n != 0 || err == nil) {
			t.Fatalf("Open of % x = %d, %v", rec, n, err)
		}
	})
}
