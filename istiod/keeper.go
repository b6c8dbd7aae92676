package istiod

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/istiod/ca"
	"github.com/mistnet/mistnet/istiod/kube"
)

const (
	keepEvery  = 10 * time.Second // how often the authority's files are looked at
	renewEvery = time.Hour        // and whether a root of our own nears its end
	keepWithin = 10 * time.Second // for one look
)

// keeper keeps the authority as what people plugged in says, and its roots where node proxies find them. What cannot be
// read, or is faulty, changes nothing.
type keeper struct {
	authority *ca.Authority
	dir       string // where an authority may be mounted
	kube      kube.Config
	write     func(rootPEM []byte)
	log       *zap.Logger

	mu    sync.Mutex
	fault error
}

func (k *keeper) run(ctx context.Context) {
	var renewed time.Time
	for ctx.Err() == nil {
		once, cancel := context.WithTimeout(ctx, keepWithin)
		err := k.look(once)
		if time.Since(renewed) > renewEvery && err == nil {
			_, err = kube.RenewCA(once, k.kube)
			renewed = time.Now()
		}
		cancel()
		if ctx.Err() == nil {
			k.note(err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(keepEvery/2 + rand.N(keepEvery/2)):
		}
	}
}

// look takes in what is there now.
func (k *keeper) look(ctx context.Context) error {
	files, err := ca.Files(k.dir)
	if err != nil {
		return fmt.Errorf("read the certificate authority (-ca-dir): %w", err)
	}
	if len(files) == 0 {
		files, err = kube.PresentCAFiles(ctx, k.kube)
	}
	if err == nil && len(files) == 0 {
		err = fmt.Errorf("secrets %s and %s are gone: this replica goes on with the keys it has, another would make new ones",
			kube.SecretPlugged, kube.SecretSelfSigned)
	}
	if err == nil {
		_, err = k.authority.Replace(files)
	}
	k.write(k.authority.RootPEM()) // they change as time goes by too
	return err
}

func (k *keeper) note(err error) {
	k.mu.Lock()
	before := k.fault
	k.fault = err
	k.mu.Unlock()
	switch {
	case err != nil && (before == nil || before.Error() != err.Error()):
		k.log.Error("certificate authority cannot be read anew, it goes on as it is", zap.Error(err))
	case err == nil && before != nil:
		k.log.Info("certificate authority can be read again")
	}
}

// problem is why the authority is not as what was plugged in says; nil when it is.
func (k *keeper) problem() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.fault
}
