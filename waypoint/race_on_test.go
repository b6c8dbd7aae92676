//go:build race

package waypoint

// Race is whether the race detector runs, which makes pools forget and everything slow.
const Race = true
