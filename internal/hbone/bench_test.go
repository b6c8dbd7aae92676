package hbone_test

import (
	"io"
	"net"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"
)

// cpu returns the processor time this process has used: unlike the clock it tells the truth on a busy machine.
func cpu() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func BenchmarkBulk(b *testing.B) {
	for _, streams := range []int{1, 8} {
		name := map[int]string{1: "one stream", 8: "eight streams"}[streams]
		for _, upload := range []bool{true, false} {
			direction := map[bool]string{true: "up", false: "down"}[upload]
			b.Run(name+" "+direction, func(b *testing.B) {
				m := newTunnelled(b)
				const size = 256 << 10
				var work sync.WaitGroup
				b.SetBytes(size)
				var pairs [][2]net.Conn
				for range streams {
					c, s := m.connect(b)
					if !upload {
						c, s = s, c
					}
					pairs = append(pairs, [2]net.Conn{c, s})
				}
				b.ResetTimer()
				start := cpu()
				per := (b.N + streams - 1) / streams
				for _, p := range pairs {
					work.Go(func() {
						msg := make([]byte, size)
						for range per {
							p[0].Write(msg)
						}
					})
					work.Go(func() {
						buf := make([]byte, size)
						for left := per * size; left > 0; {
							n, err := p[1].Read(buf)
							if err != nil {
								b.Error(err)
								return
							}
							left -= n
						}
					})
				}
				work.Wait()
				b.ReportMetric((cpu()-start).Seconds()/(float64(b.N)*size/1e9), "cpu-s/GB")
			})
		}
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	m := newTunnelled(b)
	c, s := m.connect(b)
	var work sync.WaitGroup
	work.Go(func() {
		buf := make([]byte, 1024)
		for {
			if _, err := io.ReadFull(s, buf); err != nil {
				return
			}
			s.Write(buf)
		}
	})
	msg := make([]byte, 1024)
	b.ReportAllocs()
	b.ResetTimer()
	start := cpu()
	for b.Loop() {
		c.Write(msg)
		if _, err := io.ReadFull(c, msg); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64((cpu()-start).Microseconds())/float64(b.N), "cpu-µs/op")
	b.StopTimer()
	c.Close()
	work.Wait()
}

func BenchmarkOpen(b *testing.B) {
	m := newTunnelled(b)
	m.connect(b)
	one := make([]byte, 1)
	b.ReportAllocs()
	start := cpu()
	for b.Loop() {
		c, s := m.connect(b)
		c.Write(one)
		io.ReadFull(s, one)
		s.Write(one)
		io.ReadFull(c, one)
		c.SetLinger(0)
		c.Close()
		io.ReadFull(s, one)
		s.Close()
	}
	b.ReportMetric(float64((cpu()-start).Microseconds())/float64(b.N), "cpu-µs/op")
}

// BenchmarkIdle reports what an idle tunnelled connection costs both proxies together, without the kernel's share.
func BenchmarkIdle(b *testing.B) {
	m := newTunnelled(b)
	m.connect(b)
	used := func() (heap, stack float64) {
		for range 3 { // each cycle halves stacks that grew while the connection was busy
			runtime.GC()
		}
		var s runtime.MemStats
		runtime.ReadMemStats(&s)
		return float64(s.HeapAlloc), float64(s.StackInuse)
	}
	one := make([]byte, 1)
	for b.Loop() {
		const n = 500
		heap, stack := used()
		conns := make([]net.Conn, 0, 2*n)
		for range n {
			c, s := m.connect(b)
			c.Write(one)
			io.ReadFull(s, one)
			s.Write(one)
			io.ReadFull(c, one)
			conns = append(conns, c, s)
		}
		heapNow, stackNow := used()
		b.ReportMetric((heapNow-heap)/n, "heap-B/conn")
		b.ReportMetric((stackNow-stack)/n, "stack-B/conn")
		for _, c := range conns {
			c.Close()
		}
	}
}
