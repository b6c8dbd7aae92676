//go:build !race

package http2_test

const raced = false
