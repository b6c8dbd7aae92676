package mesh

import (
	"fmt"
	"regexp/syntax"
)

// Bounds of a regular expression in a route. Matching takes time in proportion to the program it is compiled to, at every request, and
// its compilation memory: 4 KiB of text such as (a…){1000} are a program of 100 MiB, in istiod and in every waypoint.
const (
	maxRegexBytes = 4 << 10 // of text
	maxRegexSize  = 8 << 10 // about how many instructions
)

// CheckRegex says what is wrong with an expression of RE2's language: it is none, or too costly. It compiles nothing.
func CheckRegex(expr string) error {
	if len(expr) > maxRegexBytes {
		return fmt.Errorf("an expression of %d bytes: want no more than %d", len(expr), maxRegexBytes)
	}
	re, err := syntax.Parse(expr, syntax.Perl)
	if err != nil {
		return err
	}
	if n := regexSize(re); n > maxRegexSize {
		return fmt.Errorf("an expression that compiles to a program of about %d instructions, as repetitions of repetitions do: want no more than %d",
			n, maxRegexSize)
	}
	return nil
}

// regexSize is about how many instructions an expression compiles to. Sets of characters count by their ranges, too, which take memory.
func regexSize(re *syntax.Regexp) int {
	n := 1
	switch re.Op {
	case syntax.OpLiteral:
		n = len(re.Rune)
	case syntax.OpCharClass:
		n += len(re.Rune) / 16
	default:
	}
	for _, sub := range re.Sub {
		n += regexSize(sub)
	}
	if re.Op == syntax.OpRepeat { // at most 1000 times, of which Parse sees to repetitions of repetitions
		n *= max(re.Min, re.Max, 1)
	}
	return n
}
