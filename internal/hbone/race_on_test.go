//go:build race

package hbone_test

// raceAllocs is what the race detector adds to a round trip: it empties sync.Pool, where crypto/tls keeps its output
// buffers, at random.
const raceAllocs = 2
