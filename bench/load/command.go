package load

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
)

// Ready is the line a server prints once it listens.
const Ready = "ready"

// Main is the command line of the processes the bench starts inside namespaces: "server -listen ADDR" serves until in ends;
// "agent" reads orders from in and writes reports to out until in ends.
func Main(ctx context.Context, args []string, in io.Reader, out io.Writer) error {
	if len(args) == 0 {
		return errors.New("load: want server or agent")
	}
	switch args[0] {
	case "server":
		fl := flag.NewFlagSet("load server", flag.ContinueOnError)
		listen := fl.String("listen", ":7000", "address to listen on")
		if err := fl.Parse(args[1:]); err != nil {
			return err
		}
		return serverMain(ctx, *listen, in, out)
	case "agent":
		return agentMain(ctx, in, out)
	}
	return fmt.Errorf("load: unknown part %q", args[0])
}

func serverMain(ctx context.Context, listen string, in io.Reader, out io.Writer) error {
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", listen)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	served := make(chan error, 1) // one goroutine, one result
	go func() { served <- Serve(ctx, ln) }()
	if _, err := fmt.Fprintln(out, Ready); err != nil {
		return err
	}
	// The parent holds the other end of in: when it is gone, for whatever reason, so are we.
	_, _ = io.Copy(io.Discard, in)
	cancel()
	return <-served
}

func agentMain(ctx context.Context, in io.Reader, out io.Writer) error {
	orders, reports := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var o Order
		if err := orders.Decode(&o); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return fmt.Errorf("read order: %w", err)
		}
		if err := reports.Encode(Run(ctx, o)); err != nil {
			return fmt.Errorf("write report: %w", err)
		}
	}
}
