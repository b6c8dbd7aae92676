//go:build !race

package hbone_test

const raceAllocs = 0
