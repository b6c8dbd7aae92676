// Package meshtest is what tests of several packages share: a real certificate authority in memory and the like. Only
// tests import it.
package meshtest
