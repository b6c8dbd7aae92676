package load

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// Serve answers on ln until ctx is done. A broken connection is the client's business and ends only itself.
func Serve(ctx context.Context, ln net.Listener) error {
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fmt.Errorf("accept: %w", err)
		}
		wg.Go(func() {
			closeOnDone := context.AfterFunc(ctx, func() { c.Close() })
			defer closeOnDone()
			defer c.Close()
			_ = serveConn(c)
		})
	}
}

func serveConn(c net.Conn) error {
	var mode [1]byte
	if _, err := io.ReadFull(c, mode[:]); err != nil {
		return err
	}
	switch mode[0] {
	case modeBulk:
		return serveBulk(c)
	case modeEcho:
		return serveEcho(c)
	case modeConnect:
		if _, err := c.Write(mode[:]); err != nil {
			return err
		}
		_, err := c.Read(mode[:]) // the client's reset
		return err
	case 'G', 'P':
		return serveHTTP(c, mode[0])
	}
	return fmt.Errorf("unknown mode %q", mode[0])
}

// serveBulk swallows blocks, and answers a counting block with the bytes of all blocks so far.
func serveBulk(c net.Conn) error {
	buf := make([]byte, bulkBlockBytes)
	var count uint64
	for {
		if _, err := io.ReadFull(c, buf); err != nil {
			return err
		}
		count += bulkBlockBytes
		if buf[0] != blockCount {
			continue
		}
		var answer [8]byte
		binary.BigEndian.PutUint64(answer[:], count)
		if _, err := c.Write(answer[:]); err != nil {
			return err
		}
	}
}

// serveEcho sends back messages of the size the client announces first.
func serveEcho(c net.Conn) error {
	var head [4]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size == 0 || size > 1<<20 {
		return fmt.Errorf("echo of %d bytes", size)
	}
	buf := make([]byte, size)
	for {
		if _, err := io.ReadFull(c, buf); err != nil {
			return err
		}
		if _, err := c.Write(buf); err != nil {
			return err
		}
	}
}
