package istiod

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/daemon"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/istiod/ca"
	"github.com/mistnet/mistnet/istiod/token"
)

// Secrets runs the subcommands that hand a node what it needs to join: "token" mints the token its proxy shows, "root"
// gives the certificates by which it knows istiod. handled is false when args name neither. They use the keys in the
// data directory, made when missing, so that they work before and while istiod runs.
func Secrets(args []string, stdout, stderr io.Writer) (code int, handled bool) {
	if len(args) == 0 {
		return 0, false
	}
	var run func([]string, io.Writer, io.Writer) error
	switch args[0] {
	case "token":
		run = mintToken
	case "root":
		run = showRoot
	default:
		return 0, false
	}
	err := run(args[1:], stdout, stderr)
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0, true
	}
	fmt.Fprintf(stderr, "istiod %s: %v\n", args[0], err)
	return 1, true
}

func mintToken(args []string, stdout, stderr io.Writer) error {
	fs := daemon.NewFlagSet("istiod token")
	var dir, node, account, pod, uid, out string
	var ttl time.Duration
	dataDirFlag(fs, &dir)
	fs.StringVar(&node, "node", "", "NODE_NAME", "the node the proxy serves")
	fs.StringVar(&account, "service-account", ca.DefaultTrustedAccount, "", "namespace/name of the account the proxy runs as")
	fs.StringVar(&pod, "pod", "", "POD_NAME", "the proxy's pod (default: the account's name and the node)")
	fs.StringVar(&uid, "pod-uid", "", "", "the UID of that pod (default: its name)")
	fs.DurationVar(&ttl, "ttl", 30*24*time.Hour, "", "how long the token is good for")
	fs.StringVar(&out, "out", "", "", "file to write the token to, for its owner only (default: standard output)")
	if err := parse(fs, args, stderr); err != nil {
		return err
	}
	namespace, name, found := strings.Cut(account, "/")
	switch {
	case node == "":
		return errors.New("-node is required: a token is good for one node")
	case !found || namespace == "" || name == "":
		return fmt.Errorf("-service-account %q: want namespace/name", account)
	case ttl <= 0:
		return fmt.Errorf("-ttl %s: want a positive duration", ttl)
	}
	issuer, err := token.OpenIssuer(dir)
	if err != nil {
		return err
	}
	if pod == "" {
		pod = name + "-" + node
	}
	if uid == "" {
		uid = pod
	}
	raw, err := issuer.Issue(token.Caller{Namespace: namespace, ServiceAccount: name, Pod: pod, PodUID: uid, Node: node}, ttl)
	if err != nil {
		return err
	}
	if out == "" {
		raw += "\n" // for a reader; in a file a token stands alone, as a kubelet writes it
	}
	return deliver(out, []byte(raw), 0o600, stdout)
}

func showRoot(args []string, stdout, stderr io.Writer) error {
	fs := daemon.NewFlagSet("istiod root")
	var dir, trustDomain, out string
	dataDirFlag(fs, &dir)
	fs.StringVar(&trustDomain, "trust-domain", mesh.DefaultTrustDomain, "TRUST_DOMAIN", "the trust domain of this mesh")
	fs.StringVar(&out, "out", "", "", "file to write the certificates to (default: standard output)")
	if err := parse(fs, args, stderr); err != nil {
		return err
	}
	a, err := openCA(Config{DataDir: dir, TrustDomain: trustDomain}, zap.NewNop())
	if err != nil {
		return err
	}
	return deliver(out, a.RootPEM(), 0o644, stdout)
}

func dataDirFlag(fs *daemon.FlagSet, dir *string) {
	fs.StringVar(dir, "data-dir", "/var/lib/mistnet/istiod", "DATA_DIR", "istiod's directory of keys")
}

func parse(fs *daemon.FlagSet, args []string, stderr io.Writer) error {
	err := fs.Parse(args, os.LookupEnv)
	if errors.Is(err, flag.ErrHelp) {
		fs.Usage(stderr)
	}
	return err
}

// deliver writes to the file at once, so that no reader sees half of it, or to stdout when there is no file.
func deliver(path string, content []byte, mode os.FileMode, stdout io.Writer) error {
	if path == "" {
		_, err := stdout.Write(content)
		return err
	}
	temp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, werr := temp.Write(content)
	if err := errors.Join(werr, temp.Chmod(mode), temp.Close()); err != nil {
		return errors.Join(err, os.Remove(temp.Name()))
	}
	return os.Rename(temp.Name(), path)
}
