package daemon

import (
	"flag"
	"fmt"
	"io"
	"strings"
	"time"
)

// FlagSet is a set of flags, each of which may also be set by an environment variable. A flag on the command line wins.
type FlagSet struct {
	fs  *flag.FlagSet
	env map[string]string // flag name → environment variable
}

// NewFlagSet returns an empty set for the program of that name.
func NewFlagSet(name string) *FlagSet {
	fs := flag.NewFlagSet(name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	return &FlagSet{fs: fs, env: make(map[string]string)}
}

// StringVar declares a string flag. env is its environment variable, or "".
func (f *FlagSet) StringVar(p *string, name, value, env, usage string) {
	f.fs.StringVar(p, name, value, usage)
	f.bind(name, env)
}

// BoolVar declares a boolean flag.
func (f *FlagSet) BoolVar(p *bool, name string, value bool, env, usage string) {
	f.fs.BoolVar(p, name, value, usage)
	f.bind(name, env)
}

// IntVar declares a whole-number flag.
func (f *FlagSet) IntVar(p *int, name string, value int, env, usage string) {
	f.fs.IntVar(p, name, value, usage)
	f.bind(name, env)
}

// DurationVar declares a duration flag, written as 5s or 1m30s.
func (f *FlagSet) DurationVar(p *time.Duration, name string, value time.Duration, env, usage string) {
	f.fs.DurationVar(p, name, value, usage)
	f.bind(name, env)
}

// ListVar declares a flag that takes comma-separated values.
func (f *FlagSet) ListVar(p *[]string, name, env, usage string) {
	f.fs.Func(name, usage, func(s string) error {
		*p = nil
		for v := range strings.SplitSeq(s, ",") {
			if v = strings.TrimSpace(v); v != "" {
				*p = append(*p, v)
			}
		}
		return nil
	})
	f.bind(name, env)
}

// Bool declares a boolean flag that no environment variable sets.
func (f *FlagSet) Bool(name string, value bool, usage string) *bool {
	return f.fs.Bool(name, value, usage)
}

func (f *FlagSet) bind(name, env string) {
	if env != "" {
		f.env[name] = env
	}
}

// Parse reads args, then, for every flag that args do not set, its environment variable.
func (f *FlagSet) Parse(args []string, lookup func(string) (string, bool)) error {
	if err := f.fs.Parse(args); err != nil {
		return f.explain(err)
	}
	if rest := f.fs.Args(); len(rest) > 0 {
		return fmt.Errorf("unexpected argument %q: flags are written -name=value", rest[0])
	}
	set := make(map[string]bool)
	f.fs.Visit(func(fl *flag.Flag) { set[fl.Name] = true })
	var err error
	f.fs.VisitAll(func(fl *flag.Flag) {
		v, ok := lookup(f.env[fl.Name])
		if err != nil || set[fl.Name] || f.env[fl.Name] == "" || !ok || v == "" {
			return
		}
		if e := f.fs.Set(fl.Name, v); e != nil {
			err = fmt.Errorf("environment variable %s=%q: %w", f.env[fl.Name], v, e)
		}
	})
	return err
}

// explain adds the nearest flag's name to the error about one that does not exist.
func (f *FlagSet) explain(err error) error {
	_, name, ok := strings.Cut(err.Error(), "flag provided but not defined: -")
	if !ok {
		return err
	}
	best, bestDistance := "", len(name)/2+1
	f.fs.VisitAll(func(fl *flag.Flag) {
		if d := editDistance(name, fl.Name); d < bestDistance {
			best, bestDistance = fl.Name, d
		}
	})
	if best == "" {
		return fmt.Errorf("unknown flag -%s", name)
	}
	return fmt.Errorf("unknown flag -%s: did you mean -%s?", name, best)
}

// Usage writes every flag with its default and environment variable.
func (f *FlagSet) Usage(w io.Writer) {
	fmt.Fprintf(w, "usage: %s [flags]\n\n", f.fs.Name())
	f.fs.VisitAll(func(fl *flag.Flag) {
		fmt.Fprintf(w, "  -%s\n        %s", fl.Name, fl.Usage)
		if fl.DefValue != "" && fl.DefValue != "false" {
			fmt.Fprintf(w, " (default %s)", fl.DefValue)
		}
		if env := f.env[fl.Name]; env != "" {
			fmt.Fprintf(w, " [$%s]", env)
		}
		fmt.Fprintln(w)
	})
}

// editDistance is the Levenshtein distance between two words.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
