package apply

import (
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/mistnet/mistnet/cni/rules"
)

// program is iptables-save or iptables-restore of one family and kind.
type program struct{ path, name string }

// sibling finds the program whose name is that of iptables and an ending. Where it is not installed by that name it is
// part of iptables itself, which does what it is called by.
func sibling(iptables, ending string) (program, error) {
	if path, err := exec.LookPath(iptables + ending); err == nil {
		return program{path, filepath.Base(path)}, nil
	}
	path, err := exec.LookPath(iptables)
	if err != nil {
		return program{}, err
	}
	name := filepath.Base(iptables) + ending
	out, err := (&exec.Cmd{Path: path, Args: []string{name, "--version"}}).Output()
	said, _, _ := strings.Cut(string(out), " ") // legacy ones leave their kind out
	if err != nil || !strings.HasPrefix(said, "ip") || !strings.HasSuffix(said, ending) {
		return program{}, fmt.Errorf("%s is missing beside %s", name, path)
	}
	return program{path, name}, nil
}

func (p program) command(args ...string) *exec.Cmd {
	return &exec.Cmd{Path: p.path, Args: append([]string{p.name}, args...)}
}

// run feeds a script to iptables-restore, which leaves everything the script does not name as it is.
func (p program) run(script string) error {
	cmd := p.command("--noflush", "-w", strconv.Itoa(lockSeconds))
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", p.name, err, bytes.TrimSpace(out))
	}
	return nil
}

// saved is what a namespace holds of one family: rules by table and chain. Built-in chains are among them. A table that
// nobody used is missing.
type saved map[string]map[string][]rules.Rule

// read asks iptables-save.
func (f family) read() (saved, error) {
	cmd := f.save.command()
	var problem bytes.Buffer
	cmd.Stderr = &problem
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", f.save.name, err, bytes.TrimSpace(problem.Bytes()))
	}
	return parse(string(out)), nil
}

func parse(text string) saved {
	s := make(saved)
	var table map[string][]rules.Rule
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		switch {
		case len(words) == 0 || strings.HasPrefix(line, "#"):
		case line[0] == '*':
			table = make(map[string][]rules.Rule)
			s[words[0][1:]] = table
		case table == nil:
		case line[0] == ':':
			table[words[0][1:]] = nil
		case words[0] == "-A" && len(words) > 2:
			table[words[1]] = append(table[words[1]], words[2:])
		}
	}
	return s
}

func (s saved) has(table, chain string) bool {
	_, ok := s[table][chain]
	return ok
}

// any reports whether there is something of ours, finished or staged.
func (s saved) any(f familyRules) bool {
	for _, table := range f.tables {
		for _, name := range f.owned {
			if s.has(table, name) || s.has(table, staged(name)) {
				return true
			}
		}
	}
	return false
}

// holds reports whether the chain has the rules it should, in order.
func (s saved) holds(c rules.Chain) bool {
	return slices.EqualFunc(s[c.Table][c.Name], c.Rules, rules.Same)
}

func (s saved) verify(c rules.Chain) error {
	if !s.holds(c) {
		return fmt.Errorf("chain %s of table %s holds other rules", c.Name, c.Table)
	}
	if !slices.Equal(positions(s[c.Table][c.From], c.Name), []int{1}) {
		return fmt.Errorf("chain %s of table %s does not begin with a jump to %s", c.From, c.Table, c.Name)
	}
	return nil
}

// positions returns where, from 1, rules jump to target without a condition.
func positions(have []rules.Rule, target string) []int {
	var at []int
	for i, r := range have {
		if slices.Equal(r, rules.Rule{"-j", target}) {
			at = append(at, i+1)
		}
	}
	return at
}
