package cli

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/mistnet/mistnet/cli/explain"
)

func analyzeCommand(out io.Writer) *cobra.Command {
	return &cobra.Command{
		Use:   "analyze FILE|DIRECTORY...",
		Short: "Say what in YAML files does not do what it says, without a cluster",
		Long: `Reads Kubernetes YAML as istiod would and lists every object that is refused, ignored, or served otherwise than
written, and every rule that no request ever reaches. The exit status is 1 when there is any. What a running istiod
thinks of its cluster stands on the objects' status, and all in one place on its page /debug/problems.`,
		Example: "  mistctl analyze manifests/\n  kubectl get svc,vs,dr,httproute -A -o yaml | mistctl analyze /dev/stdin",
		Args:    cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			m, err := explain.Read(cmd.Context(), args...)
			if err != nil {
				return err
			}
			problems := m.Problems()
			for _, p := range problems {
				fmt.Fprintf(out, "%s: %s: %s\n", p.Object, p.Reason, p.What)
			}
			if len(problems) > 0 {
				return fmt.Errorf("%d problems", len(problems))
			}
			fmt.Fprintln(out, "no problem found")
			return nil
		},
	}
}

func explainCommand(out io.Writer) *cobra.Command {
	var (
		files, headers []string
		q              explain.Question
	)
	cmd := &cobra.Command{
		Use:   "explain METHOD URL -f FILE|DIRECTORY",
		Short: "Say what becomes of a request at the waypoint, from YAML files, without a cluster",
		Long: `Names the rule that decides about a request and what follows from it. METHOD is one of HTTP, or GRPC, or TCP or TLS
for a connection; the URL's host is a service: NAME, NAME.NAMESPACE or its full name.`,
		Example: "  mistctl explain GET http://reviews.shop/v2 -H 'x-user: tester' -f manifests/\n" +
			"  mistctl explain TLS db.shop:443 --sni db.example -f manifests/",
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(files) == 0 {
				return errors.New("-f says where the YAML is: a file or directory")
			}
			q.Method, q.URL, q.Headers = args[0], args[1], make(map[string]string, len(headers))
			for _, h := range headers {
				name, value, found := strings.Cut(h, ":")
				if !found {
					return fmt.Errorf("-H %q: want NAME: VALUE", h)
				}
				q.Headers[strings.TrimSpace(name)] = strings.TrimSpace(value)
			}
			m, err := explain.Read(cmd.Context(), files...)
			if err != nil {
				return err
			}
			rule, what, err := m.Explain(q)
			if err != nil {
				return err
			}
			if rule == "" {
				rule = "none"
			}
			fmt.Fprintf(out, "rule: %s\n%s\n", rule, what)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringSliceVarP(&files, "filename", "f", nil, "file or directory of YAML; may be given more than once")
	f.StringArrayVarP(&headers, "header", "H", nil, "a header of the request, NAME: VALUE; may be given more than once")
	f.StringVar(&q.From, "from", "", "the client's namespace (default: the service's)")
	f.StringToStringVar(&q.Labels, "labels", nil, "the client's labels")
	f.StringVar(&q.SNI, "sni", "", "the server name in a TLS handshake")
	return cmd
}
