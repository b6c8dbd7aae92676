package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"slices"

	"github.com/mistnet/mistnet/internal/hbone/record"
	"github.com/mistnet/mistnet/internal/memlimit"
)

// clientHandshake does the handshake of a client, which crypto/tls and cfg decide alone. std leaves the records after
// it to crypto/tls too.
func clientHandshake(ctx context.Context, raw net.Conn, cfg *tls.Config, std bool, mem *memlimit.Budget) (handshaken, error) {
	cfg = tuned(cfg, clientCurves)
	log := new(record.Secrets)
	if !std {
		listen(cfg, log)
	}
	bc := newBatchConn(raw, mem)
	return handshake(ctx, bc, tls.Client(bc, cfg), record.Client, log)
}

// serverHandshake is clientHandshake for a server; cfg is tuned already.
func serverHandshake(ctx context.Context, raw net.Conn, cfg *tls.Config, std bool, mem *memlimit.Budget) (handshaken, error) {
	log := new(record.Secrets)
	if !std {
		cfg = cfg.Clone()
		listen(cfg, log)
		if choose := cfg.GetConfigForClient; choose != nil {
			cfg.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
				c, err := choose(h)
				if c == nil || err != nil {
					return nil, err
				}
				c = c.Clone()
				listen(c, log)
				return c, nil
			}
		}
	}
	bc := newBatchConn(raw, mem)
	return handshake(ctx, bc, tls.Server(bc, cfg), record.Server, log)
}

// listen makes cfg, which belongs to one connection, tell that connection's secrets to log. A configuration that tells
// them to somebody already is left alone, and so crypto/tls keeps the records.
func listen(cfg *tls.Config, log *record.Secrets) {
	if cfg.KeyLogWriter != nil {
		return
	}
	cfg.KeyLogWriter = log
	cfg.SessionTicketsDisabled = true // a server's would take sequence numbers before we do
}

// handshake does the handshake and chooses who does the records after it.
func handshake(ctx context.Context, bc *batchConn, tc *tls.Conn, role record.Role, log *record.Secrets) (handshaken, error) {
	err := tc.HandshakeContext(ctx)
	state := tc.ConnectionState()
	if err == nil && state.NegotiatedProtocol != "h2" {
		err = errors.New("peer did not negotiate HTTP/2")
	}
	if err != nil {
		log.Wipe()
		bc.release()
		return handshaken{}, err
	}
	return handshaken{bc: bc, rec: newRecords(bc, tc, role, log), state: state}, nil
}

// tuned returns cfg with what this package needs: full-size records from the first byte, HTTP/2 by ALPN, and key shares
// that are cheap in Go (P-256 costs two thirds of X25519 there) unless the configuration names its own.
func tuned(cfg *tls.Config, curves []tls.CurveID) *tls.Config {
	c := cfg.Clone()
	c.DynamicRecordSizingDisabled = true
	if !slices.Contains(c.NextProtos, "h2") {
		c.NextProtos = append(slices.Clone(c.NextProtos), "h2")
	}
	if len(c.CurvePreferences) == 0 {
		c.CurvePreferences = curves
	}
	return c
}

// crypto/tls orders curves by its own preference, so a client that should send a P-256 share must offer nothing it
// prefers to that. Every peer of a mesh has P-256; servers take whatever the client likes best.
var (
	clientCurves = []tls.CurveID{tls.CurveP256, tls.CurveP384}
	serverCurves = []tls.CurveID{tls.CurveP256, tls.X25519, tls.CurveP384, tls.X25519MLKEM768}
)
