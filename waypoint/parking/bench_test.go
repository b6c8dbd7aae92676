package parking_test

import (
	"net"
	"testing"
	"time"
)

// BenchmarkRound is one byte there and back: to a goroutine that waits, and to a connection that is parked again after each.
func BenchmarkRound(b *testing.B) {
	b.Run("waiting", func(b *testing.B) {
		client, server := pairOf(b)
		go func() {
			var p [1]byte
			for {
				if _, err := server.Read(p[:]); err != nil {
					return
				}
				_, _ = server.Write(p[:])
			}
		}()
		rounds(b, client)
	})
	b.Run("parked", func(b *testing.B) {
		client, server := pairOf(b)
		l := lotOf(b, time.Hour)
		g := &guest{conn: server, ended: make(chan string, 1)}
		g.resumed = func(g *guest) {
			var p [1]byte
			if _, err := server.Read(p[:]); err == nil {
				_, _ = server.Write(p[:])
				l.Park(g, server, time.Hour)
			}
		}
		if !l.Park(g, server, time.Hour) {
			b.Fatal("Park() = false")
		}
		rounds(b, client)
	})
}

func rounds(b *testing.B, client net.Conn) {
	b.ReportAllocs()
	var p [1]byte
	for b.Loop() {
		if _, err := client.Write(p[:]); err != nil {
			b.Fatal(err)
		}
		if _, err := client.Read(p[:]); err != nil {
			b.Fatal(err)
		}
	}
}
