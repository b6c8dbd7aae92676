package identity

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"
)

// rootEvery is how often a RootFile is looked at: a mounted ConfigMap changes once in months, and may be replaced in a way
// that file notifications miss.
const rootEvery = 5 * time.Second

// RootFile is a PEM file with the roots that istiod is known by, which changes while they are rotated. What cannot be read
// changes nothing.
type RootFile struct {
	path string
	log  *zap.Logger

	mu    sync.Mutex
	text  []byte
	pool  *x509.CertPool
	fault string // of the last attempt to read it again
}

// OpenRootFile reads the file for the first time: it must hold certificates then. A nil logger is none.
func OpenRootFile(path string, log *zap.Logger) (*RootFile, error) {
	if log == nil {
		log = zap.NewNop()
	}
	f := &RootFile{path: path, log: log}
	if _, err := f.read(); err != nil {
		return nil, fmt.Errorf("read istiod's root certificate: %w", err)
	}
	return f, nil
}

// read takes in the file as it is, and reports whether it is another than before.
func (f *RootFile) read() (bool, error) {
	text, err := os.ReadFile(f.path)
	if err != nil {
		return false, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.pool != nil && bytes.Equal(text, f.text) {
		return false, nil
	}
	roots, err := parseCertificates(string(text))
	if err != nil {
		return false, fmt.Errorf("%s: %w", f.path, err)
	}
	f.text, f.pool = text, (*Trust)(nil).pool(roots)
	return true, nil
}

// reread is read, for what goes on with what it has.
func (f *RootFile) reread() (changed bool) {
	changed, err := f.read()
	fault := ""
	if err != nil {
		fault = err.Error()
	}
	f.mu.Lock()
	told := fault == f.fault
	f.fault = fault
	f.mu.Unlock()
	if fault != "" && !told {
		f.log.Warn("root certificates cannot be read again, those that were read stay in force", zap.String("error", fault))
	}
	return changed
}

func (f *RootFile) roots() *x509.CertPool {
	f.reread() // handshakes with istiod are rare, and must not fail for seconds of delay
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.pool
}

// Config is ControlPlaneConfig with the roots that are in the file at the time of each handshake.
func (f *RootFile) Config(serverName string) (*tls.Config, error) {
	if serverName == "" {
		return nil, errors.New("configure TLS to istiod: no server name given")
	}
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		ServerName:         serverName,
		NextProtos:         []string{alpnH2},
		InsecureSkipVerify: true, // VerifyConnection does the same with the roots of now
		VerifyConnection: func(cs tls.ConnectionState) error {
			intermediates := x509.NewCertPool()
			for _, c := range cs.PeerCertificates[1:] {
				intermediates.AddCert(c)
			}
			_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{
				DNSName: serverName, Roots: f.roots(), Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
			})
			return err
		},
	}, nil
}

// Watch calls changed after every change of the roots until ctx is done.
func (f *RootFile) Watch(ctx context.Context, changed func()) {
	f.mu.Lock()
	known := f.text
	f.mu.Unlock()
	tick := time.NewTicker(rootEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		f.reread()
		f.mu.Lock()
		same := bytes.Equal(known, f.text)
		known = f.text
		f.mu.Unlock()
		if !same {
			f.log.Info("root certificates changed")
			changed()
		}
	}
}
