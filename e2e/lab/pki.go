package lab

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// validity of every certificate of a lab.
const validity = 10 * 365 * 24 * time.Hour

// authority signs certificates and writes them to dir as NAME.crt and NAME.key.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

// subject is whom a certificate is for. A serving certificate has names or addresses, a client's has neither.
type subject struct {
	file, commonName, organization string
	names                          []string
	ips                            []netip.Addr
}

func newAuthority(dir, file, name string) (*authority, error) {
	key, err := newKey(filepath.Join(dir, file+".key"))
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(validity),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
		IsCA:     true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate of %s: %w", name, err)
	}
	a := &authority{dir: dir, key: key, pem: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	return a, os.WriteFile(filepath.Join(dir, file+".crt"), a.pem, 0o644)
}

func (a *authority) issue(s subject) error {
	key, err := newKey(filepath.Join(a.dir, s.file+".key"))
	if err != nil {
		return err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: s.commonName},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(validity),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true, DNSNames: s.names,
	}
	if s.organization != "" {
		tmpl.Subject.Organization = []string{s.organization}
	}
	for _, ip := range s.ips {
		tmpl.IPAddresses = append(tmpl.IPAddresses, net.IP(ip.AsSlice()))
	}
	if len(s.names)+len(s.ips) > 0 {
		tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		return fmt.Errorf("sign certificate of %s: %w", s.commonName, err)
	}
	return os.WriteFile(filepath.Join(a.dir, s.file+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
}

func newKey(path string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600)
}

func serial() *big.Int {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails
	return new(big.Int).SetBytes(b)
}

// writePKI makes every key, certificate and kubeconfig of the cluster.
func (l *Lab) writePKI() error {
	dir := l.path("pki")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	ca, err := newAuthority(dir, "ca", "mistnet-e2e-"+l.state.Name)
	if err != nil {
		return err
	}
	front, err := newAuthority(dir, "front", "front-proxy-ca")
	if err != nil {
		return err
	}
	sa, err := newKey(filepath.Join(dir, "sa.key"))
	if err != nil {
		return err
	}
	pub, err := x509.MarshalPKIXPublicKey(sa.Public())
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "sa.pub"), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pub}), 0o644); err != nil {
		return err
	}
	if err := front.issue(subject{file: "front-client", commonName: "front-proxy-client"}); err != nil {
		return err
	}
	subjects := []subject{
		{file: "apiserver", commonName: "kube-apiserver",
			names: []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost"},
			ips:   []netip.Addr{netip.MustParseAddr("127.0.0.1"), controlPlaneIP, controlPlaneIP6, serviceIP, serviceIP6}},
		{file: "apiserver-kubelet", commonName: "kube-apiserver-kubelet-client", organization: "system:masters"},
		{file: "admin", commonName: "admin", organization: "system:masters"},
		{file: "kube-controller-manager", commonName: "system:kube-controller-manager"},
		{file: "kube-scheduler", commonName: "system:kube-scheduler"},
		{file: "kube-proxy", commonName: "system:kube-proxy"},
	}
	kubeconfigs := []string{"admin", "kube-controller-manager", "kube-scheduler", "kube-proxy"}
	for _, n := range l.Nodes {
		subjects = append(subjects,
			subject{file: n.Name, commonName: "system:node:" + n.Name, organization: "system:nodes"},
			subject{file: n.Name + "-serving", commonName: "system:node:" + n.Name, organization: "system:nodes",
				names: []string{n.Name}, ips: []netip.Addr{n.IP, n.IP6}})
		kubeconfigs = append(kubeconfigs, n.Name)
	}
	for _, s := range subjects {
		if err := ca.issue(s); err != nil {
			return err
		}
	}
	for _, file := range kubeconfigs {
		if err := l.writeKubeconfig(ca.pem, file); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) writeKubeconfig(ca []byte, file string) error {
	cert, err := os.ReadFile(l.path("pki", file+".crt"))
	if err != nil {
		return err
	}
	key, err := os.ReadFile(l.path("pki", file+".key"))
	if err != nil {
		return err
	}
	cfg := clientcmdapi.NewConfig()
	cfg.Clusters["lab"] = &clientcmdapi.Cluster{Server: "https://" + netip.AddrPortFrom(controlPlaneIP, apiPort).String(), CertificateAuthorityData: ca}
	cfg.AuthInfos[file] = &clientcmdapi.AuthInfo{ClientCertificateData: cert, ClientKeyData: key}
	cfg.Contexts["lab"] = &clientcmdapi.Context{Cluster: "lab", AuthInfo: file}
	cfg.CurrentContext = "lab"
	return clientcmd.WriteToFile(*cfg, l.path("pki", file+".kubeconfig"))
}
