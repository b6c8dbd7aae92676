package lab

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
)

const usage = `usage: lab COMMAND [flags]
  up              start a cluster and leave it running
  down            remove it
  status          list clusters, their nodes and pods
  build           only build the programs a cluster needs
  shell NODE      a shell, or the command that follows, on a node
  load ARCHIVE... load image archives on every node; without archives, the lab's own images, made anew
  off|on NODE     pull a node's plug, or put it back in
  kubectl ...     kubectl as administrator, also of a lab that is not linked to the machine
  run CMD...      the same with any command: mistctl, say
Flags: lab COMMAND -h`

// Main runs the lab command.
func Main(ctx context.Context, args []string, out io.Writer) error {
	if len(args) == 0 {
		return errors.New(usage)
	}
	cfg := Config{Keep: true, MachineLink: true, Progress: out}
	flags := flag.NewFlagSet("lab "+args[0], flag.ContinueOnError)
	flags.SetOutput(out)
	flags.StringVar(&cfg.Name, "name", "lab", "which lab")
	if args[0] == "up" {
		flags.IntVar(&cfg.Nodes, "nodes", 2, "how many nodes, 1 to 9")
		flags.BoolVar(&cfg.DualStack, "dual-stack", false, "IPv6 besides IPv4")
		flags.StringVar(&cfg.ProxyMode, "proxy-mode", "nftables", "kube-proxy's mode, nftables or iptables")
		flags.BoolVar(&cfg.MachineLink, "link", true, "connect this machine with nodes and pods; one lab at a time")
	}
	if err := flags.Parse(args[1:]); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	rest := flags.Args()
	switch args[0] {
	case "up":
		return up(ctx, cfg, out)
	case "down":
		return Remove(ctx, "", cfg.Name)
	case "status":
		return status(ctx, out)
	case "build":
		_, err := Build(ctx, "", out)
		return err
	}
	l, err := Open("", cfg.Name)
	if err != nil {
		return fmt.Errorf("%w: start it with: lab up", err)
	}
	defer l.CloseHandle()
	switch args[0] {
	case "load":
		if len(rest) == 0 {
			return l.loadOwn(ctx, out)
		}
		return l.LoadImages(ctx, rest...)
	case "kubectl":
		return interactive(l.Command(ctx, append([]string{"kubectl"}, rest...)...))
	case "run":
		if len(rest) == 0 {
			return errors.New("lab run: which command?")
		}
		return interactive(l.Command(ctx, rest...))
	case "shell", "off", "on":
		return l.onNode(ctx, args[0], rest)
	}
	return fmt.Errorf("no command %q\n%s", args[0], usage)
}

func (l *Lab) onNode(ctx context.Context, what string, args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("lab %s: which node?", what)
	}
	for _, n := range l.Nodes {
		if n.Name != args[0] {
			continue
		}
		switch what {
		case "off":
			return n.PowerOff(ctx)
		case "on":
			return n.PowerOn(ctx)
		}
		if len(args) == 1 {
			args = append(args, "bash")
		}
		cmd, err := n.Command(ctx, args[1:]...)
		if err != nil {
			return err
		}
		return interactive(cmd)
	}
	return fmt.Errorf("no node %q: there are node1 to node%d", args[0], len(l.Nodes))
}

func interactive(cmd *exec.Cmd) error {
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}

func up(ctx context.Context, cfg Config, out io.Writer) error {
	l, err := Start(ctx, cfg)
	if err != nil {
		return err
	}
	defer l.CloseHandle()
	nodes, err := l.Kubectl(ctx, "get", "nodes", "-o", "wide")
	if err != nil {
		return err
	}
	fmt.Fprint(out, "\n", nodes, "\n")
	fmt.Fprint(out, whatNext(l.Name(), l.Kubeconfig(), l.Bin(), cfg.MachineLink))
	return nil
}

// whatNext tells how to use a lab. One that is not linked to the machine is reached through lab only.
func whatNext(name, kubeconfig, bin string, linked bool) string {
	suffix := ""
	if name != "lab" {
		suffix = " -name " + name
	}
	const lab = "  go run ./e2e/cmd/lab "
	pods, install := fmt.Sprintf("  export KUBECONFIG=%s PATH=%s:$PATH\n  kubectl get pods -A\n", kubeconfig, bin), "  bin/mistctl install\n"
	if !linked {
		pods, install = lab+"kubectl"+suffix+" get pods -A\n", lab+"run"+suffix+" bin/mistctl install\n"
	}
	return pods + "\nTo put the mesh in, from where the Makefile is (docs/install.md goes on from there):\n" +
		"  make build images\n" +
		lab + "load" + suffix + " bin/images/*.tar    # nodes cannot pull images\n" +
		install + "\nBesides:\n" +
		lab + "shell" + suffix + " node1    # look around on a node\n" +
		lab + "down" + suffix + "           # remove it, nothing is left\n"
}

func status(ctx context.Context, out io.Writer) error {
	names, err := Names("")
	if err != nil {
		return err
	}
	if len(names) == 0 {
		fmt.Fprintln(out, "no lab runs")
	}
	for _, name := range names {
		l, err := Open("", name)
		if err != nil {
			fmt.Fprintf(out, "%s: %v; remove it with: lab down -name %s\n", name, err, name)
			continue
		}
		var on []string
		for _, n := range l.Nodes {
			if n.running() {
				on = append(on, n.Name)
			}
		}
		fmt.Fprintf(out, "%s: %s on; kube-proxy %s; KUBECONFIG=%s\n", name, strings.Join(on, ", "), l.ProxyMode(), l.Kubeconfig())
		pods, err := l.Kubectl(ctx, "get", "nodes,pods", "-A", "-o", "wide", "--request-timeout=5s")
		if err != nil {
			fmt.Fprintln(out, err)
		}
		fmt.Fprintln(out, pods)
		if err := l.CloseHandle(); err != nil {
			return err
		}
	}
	return nil
}
