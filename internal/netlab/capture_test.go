package netlab

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"
)

// The parser of frames is not exported, so its tests live inside the package.

var (
	srcPort = netip.MustParseAddrPort("10.0.0.1:1000")
	dstPort = netip.MustParseAddrPort("10.0.0.2:80")
)

// tcpFrame builds an Ethernet frame with an IPv4 TCP segment, padded as short frames on a cable are.
func tcpFrame(seq uint32, data string) []byte {
	b := make([]byte, 14+20+20)
	binary.BigEndian.PutUint16(b[12:], 0x0800)
	ip := b[14:]
	ip[0], ip[9] = 0x45, 6
	binary.BigEndian.PutUint16(ip[2:], uint16(40+len(data)))
	copy(ip[12:], srcPort.Addr().AsSlice())
	copy(ip[16:], dstPort.Addr().AsSlice())
	tcp := ip[20:]
	binary.BigEndian.PutUint16(tcp, srcPort.Port())
	binary.BigEndian.PutUint16(tcp[2:], dstPort.Port())
	binary.BigEndian.PutUint32(tcp[4:], seq)
	tcp[12] = 5 << 4
	b = append(b, data...)
	for len(b) < 60 {
		b = append(b, 0xee)
	}
	return b
}

func TestCaptureFollowsStreams(t *testing.T) {
	type segment struct {
		seq  uint32
		data string
	}
	tests := []struct {
		name     string
		segments []segment
		want     string
	}{
		{"one segment without its padding", []segment{{100, "ab"}}, "ab"},
		{"spread over segments", []segment{{100, "secr"}, {104, "et"}}, "secret"},
		{"sent again", []segment{{100, "secr"}, {100, "secr"}, {104, "et"}}, "secret"},
		{"sent again with more", []segment{{100, "secr"}, {100, "secret"}}, "secret"},
		{"empty segments between", []segment{{100, "secr"}, {104, ""}, {103, ""}, {104, "et"}}, "secret"},
		{"sequence numbers wrap", []segment{{0xfffffffe, "secr"}, {2, "et"}}, "secret"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := &Capture{flows: map[flowKey]*flow{}}
			for _, s := range tt.segments {
				c.frame(tcpFrame(s.seq, s.data))
			}
			f := c.flows[flowKey{6, srcPort, dstPort}]
			if f == nil || len(c.flows) != 1 {
				t.Fatalf("flows = %v, want one", c.flows)
			}
			if string(f.payload) != tt.want || f.bytes != len(tt.want) || f.frames != len(tt.segments) {
				t.Errorf("captured %q, %d bytes, %d frames; want %q, %d frames", f.payload, f.bytes, f.frames, tt.want, len(tt.segments))
			}
		})
	}
}

func FuzzCaptureFrame(f *testing.F) {
	f.Add(tcpFrame(1, "hello"))
	f.Add(tcpFrame(1, strings.Repeat("x", 3000))[:40])
	f.Add([]byte{})
	v6 := make([]byte, 80)
	v6[12], v6[13], v6[14], v6[20] = 0x86, 0xdd, 0x60, 17
	f.Add(v6)
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &Capture{flows: map[flowKey]*flow{}}
		c.frame(b)
		c.frame(b)
		for k, fl := range c.flows {
			if len(fl.payload) > 2*len(b) || fl.bytes != len(fl.payload) {
				t.Errorf("flow %v holds %d bytes, counts %d, of two frames of %d", k, len(fl.payload), fl.bytes, len(b))
			}
		}
	})
}
