//go:build race

package http2_test

// raced says that the race detector is on: sync.Pool, from which Huffman coding takes its buffers, then forgets at random.
const raced = true
