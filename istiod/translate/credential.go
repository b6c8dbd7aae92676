package translate

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"

	networkingapi "istio.io/api/networking/v1alpha3"
	corev1 "k8s.io/api/core/v1"

	"github.com/mistnet/mistnet/internal/mesh"
)

// What a DestinationRule names by credentialName lies in its own namespace: a Secret, of which the waypoints of that namespace
// are told and nobody else, or a ConfigMap of certificates, which are for all to see.

// Where a Secret has what; the first of each pair is that of an Opaque one, and wins as in Istio.
var (
	keysCertificate = [2]string{"cert", corev1.TLSCertKey}
	keysPrivate     = [2]string{"key", corev1.TLSPrivateKeyKey}
	keysRoots       = [2]string{"cacert", keyCA}
	keysCRL         = [2]string{"crl", "ca.crl"}
)

// CredentialKeys are the keys of a Secret, or ConfigMap, that are looked at.
func CredentialKeys() []string {
	return slices.Concat(keysCertificate[:], keysPrivate[:], keysRoots[:], keysCRL[:])
}

// TrimSecret leaves of a Secret what is looked at, and its name.
func TrimSecret(s *corev1.Secret) *corev1.Secret {
	t := &corev1.Secret{Data: make(map[string][]byte)}
	t.Namespace, t.Name, t.ResourceVersion = s.Namespace, s.Name, s.ResourceVersion
	for _, key := range CredentialKeys() {
		if v, ok := s.Data[key]; ok {
			t.Data[key] = v
		}
		if v, ok := s.StringData[key]; ok { // as an API server takes it
			t.Data[key] = []byte(v)
		}
	}
	return t
}

// suffixRoots is what a Secret's name has more that holds the roots for that one.
const suffixRoots = "-cacert"

// Credential is what waypoints are given of a Secret, and which may have it.
type Credential struct {
	mesh.Credential
	Readers []string // namespace/account, sorted; never none
}

// credentialRef is what a credentialName leads to.
type credentialRef struct {
	name      Name
	configMap bool
}

func parseCredential(namespace, text string) (ref credentialRef, err error) {
	const secret, configMap = "kubernetes://", "configmap://"
	rest, ok := strings.CutPrefix(text, configMap)
	if ref.configMap = ok; !ok {
		if rest, ok = strings.CutPrefix(text, secret); !ok {
			if scheme, _, other := strings.Cut(text, "://"); other {
				return ref, fmt.Errorf("nothing is known of %s://: name a Secret, or a ConfigMap by %sNAMESPACE/NAME", scheme, configMap)
			}
			rest = text
		}
	}
	ns, name, found := strings.Cut(rest, "/")
	if !found {
		ns, name = namespace, rest
		if ref.configMap {
			return ref, fmt.Errorf("write %sNAMESPACE/NAME", configMap)
		}
	}
	switch {
	case name == "" || strings.Contains(name, "/"):
		return ref, fmt.Errorf("%q names nothing", text)
	case ns != namespace:
		return ref, fmt.Errorf("it must lie in the rule's own namespace, %s", namespace)
	}
	ref.name = Name{ns, name}
	return ref, nil
}

// originating yields what a DestinationRule says of TLS that is begun with the help of a credentialName.
func originating(dr *DestinationRule) iter.Seq[*networkingapi.ClientTLSSettings] {
	return func(yield func(*networkingapi.ClientTLSSettings) bool) {
		if dr == nil || dr.Spec.WorkloadSelector != nil {
			return
		}
		policies := []*networkingapi.TrafficPolicy{dr.Spec.TrafficPolicy}
		for _, s := range dr.Spec.Subsets {
			policies = append(policies, s.GetTrafficPolicy())
		}
		for _, p := range policies {
			all := []*networkingapi.ClientTLSSettings{p.GetTls()}
			for _, port := range p.GetPortLevelSettings() {
				all = append(all, port.GetTls())
			}
			for _, t := range all {
				if t.GetCredentialName() != "" && begins(t) && !yield(t) {
					return
				}
			}
		}
	}
}

func begins(t *networkingapi.ClientTLSSettings) bool {
	return t.GetMode() == networkingapi.ClientTLSSettings_SIMPLE || t.GetMode() == networkingapi.ClientTLSSettings_MUTUAL
}

// NamedCredentials are the Secrets whose contents a DestinationRule wants, without those that may have the roots for one.
func NamedCredentials(dr *DestinationRule) (names []Name) {
	for t := range originating(dr) {
		if ref, err := parseCredential(dr.Namespace, t.GetCredentialName()); err == nil && !ref.configMap && !slices.Contains(names, ref.name) {
			names = append(names, ref.name)
		}
	}
	return names
}

// CredentialSecrets are the Secrets that must be read for a DestinationRule.
func CredentialSecrets(dr *DestinationRule) (names []Name) {
	for _, n := range NamedCredentials(dr) {
		names = append(names, n, rootsOf(n))
	}
	return names
}

// CredentialConfigMaps are the ConfigMaps that must be read for a DestinationRule.
func CredentialConfigMaps(dr *DestinationRule) (names []Name) {
	for t := range originating(dr) {
		if ref, err := parseCredential(dr.Namespace, t.GetCredentialName()); err == nil && ref.configMap && !slices.Contains(names, ref.name) {
			names = append(names, ref.name)
		}
	}
	return names
}

func rootsOf(n Name) Name { return Name{n.Namespace, n.Name + suffixRoots} }

// MakeCredential is what waypoints get of a Secret for these DestinationRules, which name it, or nil when there is nothing for
// them. What none of the rules can use is not in it: no private key where nobody shows a certificate.
func MakeCredential(n Name, secrets map[Name]*corev1.Secret, rules []*DestinationRule, readers []string) *Credential {
	if len(readers) == 0 {
		return nil
	}
	c := &Credential{Credential: mesh.Credential{Namespace: n.Namespace, Name: n.Name}, Readers: readers}
	var fine bool
	for _, dr := range rules {
		for t := range originating(dr) {
			ref, err := parseCredential(dr.Namespace, t.GetCredentialName())
			if err != nil || ref.configMap || ref.name != n {
				continue
			}
			got, err := readCredential(n, secrets, t)
			if err != nil {
				continue
			}
			fine = true
			if len(got.Certificate) > 0 {
				c.Certificate, c.PrivateKey = got.Certificate, got.PrivateKey
			}
			if len(got.Roots) > 0 {
				c.Roots, c.CRL = got.Roots, got.CRL
			}
		}
	}
	if !fine {
		return nil
	}
	return c
}

// readCredential reads what settings that name a Secret need of it. Errors quote nothing of what is in it.
func readCredential(n Name, secrets map[Name]*corev1.Secret, t *networkingapi.ClientTLSSettings) (c mesh.Credential, err error) {
	own, beside := secrets[n], secrets[rootsOf(n)]
	mutual, verified := t.GetMode() == networkingapi.ClientTLSSettings_MUTUAL, !t.GetInsecureSkipVerify().GetValue()
	if own == nil && (mutual || beside == nil) {
		return c, fmt.Errorf("there is no Secret %s that istiod may read", n)
	}
	if mutual {
		if c.Certificate, c.PrivateKey, err = keyPair(own.Data); err != nil {
			return c, fmt.Errorf("in Secret %s: %w", n, err)
		}
	}
	if !verified {
		return c, nil
	}
	at, from := rootsOf(n), beside
	if from == nil {
		at, from = n, own
	}
	if c.Roots, c.CRL, err = roots(from.Data); err != nil {
		return c, fmt.Errorf("in Secret %s: %w", at, err)
	}
	return c, nil
}

// value is the first of a pair that there is.
func value(data map[string][]byte, keys [2]string) []byte {
	if v := data[keys[0]]; len(v) > 0 {
		return v
	}
	return data[keys[1]]
}

func keyPair(data map[string][]byte) (certificate []byte, key mesh.PrivateKey, err error) {
	for i := range keysCertificate {
		if cert, private := data[keysCertificate[i]], data[keysPrivate[i]]; len(cert) > 0 && len(private) > 0 {
			certificate, key = cert, private
			break
		}
	}
	if certificate == nil {
		return nil, nil, fmt.Errorf("it has neither %s and %s nor %s and %s", keysCertificate[1], keysPrivate[1], keysCertificate[0], keysPrivate[0])
	}
	if certificate, err = certificates(certificate); err != nil {
		return nil, nil, fmt.Errorf("the certificate to show: %w", err)
	}
	block, _ := pem.Decode(certificate)
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, nil, fmt.Errorf("the certificate to show: %w", err)
	}
	if !fits(leaf, key) {
		return nil, nil, errors.New("the private key cannot be read, or is not that of the certificate")
	}
	return certificate, key, nil
}

// fits reports whether a text has the private key of a certificate.
func fits(leaf *x509.Certificate, text []byte) bool {
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return false
		}
		if block.Type != "PRIVATE KEY" && !strings.HasSuffix(block.Type, " PRIVATE KEY") {
			continue
		}
		var key any
		var err error
		if key, err = x509.ParsePKCS8PrivateKey(block.Bytes); err != nil {
			if key, err = x509.ParsePKCS1PrivateKey(block.Bytes); err != nil {
				if key, err = x509.ParseECPrivateKey(block.Bytes); err != nil {
					return false
				}
			}
		}
		signer, ok := key.(crypto.Signer)
		if !ok {
			return false
		}
		public, ok := signer.Public().(interface{ Equal(crypto.PublicKey) bool })
		return ok && public.Equal(leaf.PublicKey)
	}
}

func roots(data map[string][]byte) (bundle, crl []byte, err error) {
	text := value(data, keysRoots)
	if len(text) == 0 {
		return nil, nil, fmt.Errorf("it has no %s or %s, by which the application is verified", keysRoots[1], keysRoots[0])
	}
	if bundle, err = certificates(text); err != nil {
		return nil, nil, fmt.Errorf("%s or %s: %w", keysRoots[1], keysRoots[0], err)
	}
	if text := value(data, keysCRL); len(text) > 0 {
		if crl, err = revocations(text); err != nil {
			return nil, nil, fmt.Errorf("%s or %s: %w", keysCRL[1], keysCRL[0], err)
		}
	}
	return bundle, crl, nil
}

// revocations are the revocation lists in a text, and nothing else.
func revocations(text []byte) (only []byte, err error) {
	for n := 1; ; n++ {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != "X509 CRL" {
			continue
		}
		if _, err := x509.ParseRevocationList(block.Bytes); err != nil {
			return nil, fmt.Errorf("list %d cannot be read: %w", n, err)
		}
		only = append(only, pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes})...)
	}
	if len(only) == 0 {
		return nil, errors.New("there is no revocation list in it")
	}
	return only, nil
}

// credential reads a credentialName into what it is about. False: the service is closed.
func (r *ruleReader) credential(at string, t *networkingapi.ClientTLSSettings, out *mesh.UpstreamTLS) bool {
	ref, err := parseCredential(r.dr.Namespace, t.GetCredentialName())
	switch {
	case t.GetClientCertificate() != "" || t.GetPrivateKey() != "" || t.GetCaCertificates() != "" || t.GetCaCrl() != "":
		r.closed(Invalid, at, "credentialName stands instead of clientCertificate, privateKey, caCertificates and caCrl: leave those out")
		return false
	case err != nil:
		r.closed(Invalid, at+".credentialName", "%v", err)
		return false
	case ref.configMap && out.Mode == mesh.TLSMutual:
		r.closed(Invalid, at+".credentialName", "a ConfigMap has no certificate to show: name a Secret")
		return false
	case ref.configMap:
		err = r.publicRoots(ref.name, out)
	case r.noSecrets && r.secrets[ref.name] == nil && r.secrets[rootsOf(ref.name)] == nil:
		out.Credential = ref.name.String()
	default:
		out.Credential = ref.name.String()
		_, err = readCredential(ref.name, r.secrets, t)
	}
	if err != nil {
		r.closed(Invalid, at+".credentialName", "%v", err)
	}
	return err == nil
}

func (r *ruleReader) publicRoots(n Name, out *mesh.UpstreamTLS) (err error) {
	cm := r.configMaps[n]
	if cm == nil {
		return fmt.Errorf("there is no ConfigMap %s", n)
	}
	data := make(map[string][]byte, len(cm.Data))
	for k, v := range cm.Data {
		data[k] = []byte(v)
	}
	if out.InsecureSkipVerify {
		return nil
	}
	if out.CAPEM, out.CRLPEM, err = roots(data); err != nil {
		return fmt.Errorf("in ConfigMap %s: %w", n, err)
	}
	return nil
}

// Reader is who a pod is to whom a waypoint's credentials are given, as namespace/account; "" when it is no waypoint's.
func (o Objects) Reader(pod *corev1.Pod) string {
	if o.waypointOf(&pod.ObjectMeta) == nil {
		return ""
	}
	return pod.Namespace + "/" + ServiceAccount(pod)
}

// credentials adds what waypoints are given of Secrets.
func (o Objects) credentials(n Nouns) {
	rules := make(map[Name][]*DestinationRule)
	for _, dr := range o.DestinationRules {
		for _, name := range NamedCredentials(dr) {
			rules[name] = append(rules[name], dr)
		}
	}
	for name, named := range rules {
		var readers []string
		for _, pod := range o.Pods {
			if who := o.Reader(pod); pod.Namespace == name.Namespace && who != "" {
				readers = append(readers, who)
			}
		}
		if c := MakeCredential(name, o.Secrets, named, sortedSet(readers)); c != nil {
			n.Credentials[c.Key()] = c
		}
	}
}
