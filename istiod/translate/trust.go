package translate

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// keyCA is where a ConfigMap has certificates that are trusted. Gateway API: "ca.crt".
const keyCA = "ca.crt"

// TrustedConfigMaps are the ConfigMaps that a BackendTLSPolicy refers to, of its own namespace as all it may refer to is.
func TrustedConfigMaps(p *BackendTLSPolicy) (names []Name) {
	for _, ref := range p.Spec.Validation.CACertificateRefs {
		n := Name{p.Namespace, string(ref.Name)}
		if isConfigMap(string(ref.Group), string(ref.Kind)) && !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	return names
}

func isConfigMap(group, kind string) bool { return group == corev1.GroupName && kind == "ConfigMap" }

// trusted are the certificates that a BackendTLSPolicy refers to, and what is wrong with those of its references that lead to none.
// Gateway API: what is wrong with some keeps nobody from trusting the others.
func trusted(p *BackendTLSPolicy, configMaps map[Name]*corev1.ConfigMap) (bundle []byte, wrong []string) {
	for i, ref := range p.Spec.Validation.CACertificateRefs {
		at := fmt.Sprintf("validation.caCertificateRefs[%d]: ", i)
		cm := configMaps[Name{p.Namespace, string(ref.Name)}]
		switch {
		case !isConfigMap(string(ref.Group), string(ref.Kind)):
			wrong = append(wrong, at+"only a ConfigMap can be referred to, not a "+string(ref.Kind))
			continue
		case cm == nil:
			wrong = append(wrong, at+"there is no ConfigMap "+string(ref.Name))
			continue
		}
		text, ok := cm.Data[keyCA]
		if !ok {
			wrong = append(wrong, at+"ConfigMap "+string(ref.Name)+" has no key "+keyCA)
			continue
		}
		found, err := certificates([]byte(text))
		if err != nil {
			wrong = append(wrong, at+keyCA+" of ConfigMap "+string(ref.Name)+": "+err.Error())
			continue
		}
		bundle = append(bundle, found...)
	}
	return bundle, wrong
}

// certificates are those in a text, and nothing else that may stand there: what is handed to waypoints is for all to see.
func certificates(text []byte) (only []byte, err error) {
	for n := 1; ; n++ {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return nil, fmt.Errorf("certificate %d cannot be read: %w", n, err)
		}
		only = append(only, pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes})...)
	}
	if len(only) == 0 {
		return nil, errors.New("there is no certificate in it")
	}
	return only, nil
}
