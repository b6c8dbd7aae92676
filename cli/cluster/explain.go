package cluster

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"regexp"
	"strings"
	"syscall"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/client-go/tools/clientcmd"
)

// Hint is an error with what its reader can do about it.
type Hint struct {
	Err error
	Fix string
}

// Error is the error and the fix, in one line.
func (h *Hint) Error() string { return h.Err.Error() + ": " + h.Fix }

// Unwrap returns the error without its fix.
func (h *Hint) Unwrap() error { return h.Err }

func explainConfig(err error, file string) error {
	var denied *fs.PathError
	switch {
	case clientcmd.IsEmptyConfig(err):
		return &Hint{fmt.Errorf("there is no kubeconfig at %s", file), "name one with --kubeconfig or $KUBECONFIG"}
	case errors.As(err, &denied):
		return &Hint{fmt.Errorf("read the kubeconfig: %w", denied), "name a readable one with --kubeconfig"}
	}
	return &Hint{fmt.Errorf("understand the kubeconfig: %s", oneLine(err.Error())), "mend it, or name another with --kubeconfig"}
}

// cannot is how the API server words a missing permission.
var cannot = regexp.MustCompile(`User "([^"]*)" cannot (\S+) (?:resource|path) "([^"]*)"(?: in API group "([^"]*)")?(?: in the namespace "([^"]*)")?`)

// Explain adds the fix to an error of the API server or of the way to it, where there is one.
func Explain(err error) error {
	if err == nil {
		return nil
	}
	if _, known := errors.AsType[*Hint](err); known {
		return err
	}
	if fix := fixFor(err); fix != "" {
		return &Hint{errors.New(oneLine(err.Error())), fix}
	}
	return err
}

func fixFor(err error) string {
	var (
		unknownCA x509.UnknownAuthorityError
		hostname  x509.HostnameError
		expired   x509.CertificateInvalidError
		dns       *net.DNSError
		timeout   net.Error
	)
	switch {
	case errors.Is(err, context.Canceled):
		return ""
	case apierrors.IsForbidden(err):
		return forbiddenFix(err)
	case apierrors.IsUnauthorized(err):
		return "the kubeconfig's credentials are refused or have expired: log in to the cluster again"
	case apierrors.IsConflict(err):
		return "another tool manages these fields: run again with --force to take them over"
	case meta.IsNoMatchError(err):
		return "the cluster does not serve this kind: mistctl check --pre says what is missing"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "nothing listens there: is the cluster up, and this the right --context?"
	case errors.As(err, &dns):
		return "the server's name does not resolve: is this the right --context, and the VPN up?"
	case errors.As(err, &unknownCA), errors.As(err, &hostname), errors.As(err, &expired):
		return "the kubeconfig's certificate-authority-data does not fit this server: fetch the kubeconfig again"
	case errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, context.DeadlineExceeded):
		return "no answer in time: is a firewall in the way?"
	}
	return ""
}

func forbiddenFix(err error) string {
	m := cannot.FindStringSubmatch(err.Error())
	if m == nil {
		return "the account lacks a permission: ask a cluster administrator, or use another --context"
	}
	user, verb, resource, group, namespace := m[1], m[2], m[3], m[4], m[5]
	if group != "" {
		resource += "." + group
	}
	where := "in the whole cluster"
	if namespace != "" {
		where = "in namespace " + namespace
	}
	return fmt.Sprintf("account %s needs verb %q on %s %s: have a cluster administrator grant it, or use another --context", user, verb, resource, where)
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
