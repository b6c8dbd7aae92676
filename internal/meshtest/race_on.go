//go:build race

package meshtest

// Race is whether the race detector runs, which makes pools forget and everything slow.
const Race = true
