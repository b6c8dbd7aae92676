package kube

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mistnet/mistnet/istiod/ca"
	"github.com/mistnet/mistnet/istiod/translate"
)

// The Secrets that hold the authority's keys, under Istio's names and keys.
const (
	SecretPlugged    = "cacerts"         // put there by people; it counts if it is there
	SecretSelfSigned = "istio-ca-secret" // else the root that the first replica makes
)

const typeCARoot = "istio.io/ca-root" // of SecretSelfSigned, as Istio has it

// ReadMesh returns the mesh's configuration with what its ConfigMap says instead of that which must not change while istiod runs:
// its trust domain and its root namespace. What else is there, a Source tells. It waits for the API server.
func ReadMesh(ctx context.Context, cfg Config) (translate.Config, error) {
	cfg = cfg.withDefaults()
	name := cfg.meshConfigMap()
	var cm *corev1.ConfigMap
	err := retry(withLog(ctx, cfg.Log), cfg.Log, "get configmap "+cfg.Namespace+"/"+name, func(ctx context.Context) (err error) {
		cm, err = cfg.Clients.Kube.CoreV1().ConfigMaps(cfg.Namespace).Get(ctx, name, metav1.GetOptions{})
		return err
	}, apierrors.IsNotFound)
	if apierrors.IsNotFound(err) {
		cfg.Log.Info("there is no mesh configuration, its defaults hold", zap.String("configmap", cfg.Namespace+"/"+name))
		return cfg.Mesh, nil
	}
	if err != nil {
		return cfg.Mesh, fmt.Errorf("read the mesh's configuration: %w", err)
	}
	m, err := readMeshConfig(cm)
	if err != nil {
		return cfg.Mesh, fmt.Errorf("ConfigMap %s/%s: %w", cfg.Namespace, name, err)
	}
	cfg.Mesh.RootNamespace = cmp.Or(m.RootNamespace, cfg.Mesh.RootNamespace)
	cfg.Mesh.TrustDomain = cmp.Or(m.TrustDomain, cfg.Mesh.TrustDomain)
	return cfg.Mesh, nil
}

// CAFiles returns the authority's files, from the Secret that people plugged in or from the one that the first of all
// replicas makes. It waits for the API server.
func CAFiles(ctx context.Context, cfg Config) (map[string][]byte, error) {
	cfg = cfg.withDefaults()
	for {
		for _, name := range []string{SecretPlugged, SecretSelfSigned} {
			secret, err := cfg.secret(ctx, name)
			if err != nil {
				return nil, err
			}
			if secret == nil {
				continue
			}
			files := ca.SecretFiles(secret.Data)
			if len(files) == 0 {
				return nil, fmt.Errorf("secret %s/%s has no keys of an authority, only %v: delete it, or put ca-cert.pem, ca-key.pem and root-cert.pem there",
					cfg.Namespace, name, slices.Sorted(maps.Keys(secret.Data)))
			}
			cfg.Log.Info("certificate authority found", zap.String("secret", cfg.Namespace+"/"+name))
			return files, nil
		}
		if err := cfg.makeRoot(ctx); err != nil {
			return nil, err
		}
	}
}

// PresentCAFiles returns the authority's files as they are now in Secrets: nothing when there are none. It does not wait
// for the API server.
func PresentCAFiles(ctx context.Context, cfg Config) (map[string][]byte, error) {
	cfg = cfg.withDefaults()
	for _, name := range []string{SecretPlugged, SecretSelfSigned} {
		secret, err := cfg.Clients.Kube.CoreV1().Secrets(cfg.Namespace).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("get secret %s/%s: %w", cfg.Namespace, name, err)
		}
		if files := ca.SecretFiles(secret.Data); len(files) > 0 {
			return files, nil
		}
		return nil, fmt.Errorf("secret %s/%s has no keys of an authority", cfg.Namespace, name)
	}
	return nil, nil
}

// RenewCA renews the root in the Secret that the first replica made, when little of its life is left. Of several replicas
// that do so at once one succeeds. It reports whether it did.
func RenewCA(ctx context.Context, cfg Config) (bool, error) {
	cfg = cfg.withDefaults()
	secrets := cfg.Clients.Kube.CoreV1().Secrets(cfg.Namespace)
	secret, err := secrets.Get(ctx, SecretSelfSigned, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("get secret %s/%s: %w", cfg.Namespace, SecretSelfSigned, err)
	}
	files, err := ca.RenewRoot(ca.SecretFiles(secret.Data), time.Now())
	if files == nil || err != nil {
		return false, err
	}
	maps.Copy(secret.Data, files)
	_, err = secrets.Update(ctx, secret, metav1.UpdateOptions{FieldManager: fieldManager}) // with the version that was read
	if apierrors.IsConflict(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("renew root certificate in secret %s/%s: %w", cfg.Namespace, SecretSelfSigned, err)
	}
	cfg.Log.Info("root certificate renewed", zap.String("secret", cfg.Namespace+"/"+SecretSelfSigned))
	return true, nil
}

func (c Config) secret(ctx context.Context, name string) (*corev1.Secret, error) {
	var secret *corev1.Secret
	err := retry(ctx, c.Log, "get secret "+c.Namespace+"/"+name, func(ctx context.Context) (err error) {
		secret, err = c.Clients.Kube.CoreV1().Secrets(c.Namespace).Get(ctx, name, metav1.GetOptions{})
		return err
	}, apierrors.IsNotFound)
	if apierrors.IsNotFound(err) {
		return nil, nil //nolint:nilnil // there is none
	}
	return secret, err
}

// makeRoot makes a root and its Secret. Of several replicas that do so at once one succeeds; all read it again.
func (c Config) makeRoot(ctx context.Context) error {
	files, err := ca.NewRoot(c.Mesh.TrustDomain)
	if err != nil {
		return err
	}
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: SecretSelfSigned, Namespace: c.Namespace}, Type: typeCARoot, Data: files,
	}
	err = retry(ctx, c.Log, "create secret "+c.Namespace+"/"+SecretSelfSigned, func(ctx context.Context) error {
		_, err := c.Clients.Kube.CoreV1().Secrets(c.Namespace).Create(ctx, secret, metav1.CreateOptions{FieldManager: fieldManager})
		return err
	}, apierrors.IsAlreadyExists)
	switch {
	case apierrors.IsAlreadyExists(err):
		return nil
	case err != nil:
		return errors.Join(errors.New("keep the new root certificate"), err)
	}
	c.Log.Info("root certificate made", zap.String("secret", c.Namespace+"/"+SecretSelfSigned))
	return nil
}

// WriteRoot makes every namespace hold the root certificates, from now on.
func (s *Source) WriteRoot(pem []byte) { s.roots.want(string(pem)) }
