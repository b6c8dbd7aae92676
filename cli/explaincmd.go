package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/mistnet/mistnet/cli/cluster"
	"github.com/mistnet/mistnet/cli/explain"
)

// meshRead are the flags that say of which mesh a question is.
type meshRead struct {
	cluster cluster.Options
	live    bool
}

func (r *meshRead) bind(f *pflag.FlagSet) {
	r.cluster.Bind(f)
	f.BoolVar(&r.live, "live", false, "with files: take them as applied to the cluster, instead of as all there is")
}

// read reads the files alone; without any, or with -live, what the cluster has.
func (r *meshRead) read(ctx context.Context, files []string) (*explain.Mesh, error) {
	if len(files) > 0 && !r.live {
		return explain.Read(ctx, files...)
	}
	c, err := cluster.Connect(r.cluster)
	if err != nil {
		return nil, err
	}
	return explain.ReadCluster(ctx, c, files...)
}

func analyzeCommand(out io.Writer) *cobra.Command {
	var (
		from      meshRead
		namespace string
	)
	cmd := &cobra.Command{
		Use:   "analyze [FILE|DIRECTORY...]",
		Short: "Say what in the cluster, or in YAML files, does not do what it says",
		Long: `Reads what the cluster has, or Kubernetes YAML, as istiod would and lists every object that is refused, ignored, or served
otherwise than written, and every rule that no request ever reaches. The exit status is 1 when there is any. Files are read
without a cluster, unless --live asks what they would do in it.`,
		Example: "  mistctl analyze -n shop\n  mistctl analyze manifests/\n  mistctl analyze --live new.yaml",
		RunE: func(cmd *cobra.Command, args []string) error {
			m, err := from.read(cmd.Context(), args)
			if err != nil {
				return err
			}
			problems := m.Problems()
			if namespace != "" {
				problems = slices.DeleteFunc(problems, func(p explain.Problem) bool { return !strings.Contains(p.Object, " "+namespace+"/") })
			}
			for _, p := range problems {
				fmt.Fprintf(out, "%s: %s: %s\n", p.Object, p.Reason, p.What)
			}
			switch len(problems) {
			case 0:
				fmt.Fprintln(out, "no problem found")
				return nil
			case 1:
				return errors.New("1 problem")
			}
			return fmt.Errorf("%d problems", len(problems))
		},
	}
	from.bind(cmd.Flags())
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "only what is wrong in this namespace (default: all)")
	return cmd
}

func explainCommand(out io.Writer) *cobra.Command {
	var (
		from           meshRead
		files, headers []string
		q              explain.Question
	)
	cmd := &cobra.Command{
		Use:   "explain METHOD URL [-f FILE|DIRECTORY]",
		Short: "Say what becomes of a request at the waypoint, by what the cluster has, or by YAML files",
		Long: `Names the rule that decides about a request and what follows from it. METHOD is one of HTTP, or GRPC, or TCP or TLS
for a connection; the URL's host is a service: NAME, NAME.NAMESPACE or its full name. With -f no cluster is needed.`,
		Example: "  mistctl explain GET http://reviews.shop/v2\n" +
			"  mistctl explain GET http://reviews.shop/v2 -H 'x-user: tester' -f manifests/\n" +
			"  mistctl explain TLS db.shop:443 --sni db.example -f manifests/",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return errors.New("want METHOD and URL, as in mistctl explain GET http://cart.shop/v2")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			q.Method, q.URL, q.Headers = args[0], args[1], make(map[string]string, len(headers))
			for _, h := range headers {
				name, value, found := strings.Cut(h, ":")
				if !found {
					return fmt.Errorf("-H %q: want NAME: VALUE", h)
				}
				q.Headers[strings.TrimSpace(name)] = strings.TrimSpace(value)
			}
			m, err := from.read(cmd.Context(), files)
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
	from.bind(f)
	f.StringSliceVarP(&files, "filename", "f", nil, "file or directory of YAML; may be given more than once")
	f.StringArrayVarP(&headers, "header", "H", nil, "a header of the request, NAME: VALUE; may be given more than once")
	f.StringVar(&q.From, "from", "", "the client's namespace (default: the service's)")
	f.StringToStringVar(&q.Labels, "labels", nil, "the client's labels")
	f.StringVar(&q.SNI, "sni", "", "the server name in a TLS handshake")
	return cmd
}
