// Package install puts the mesh into a cluster from its Helm charts, without Helm: it renders them, applies the objects in
// the order in which the programs need each other, waits until they work, and remembers what it applied so that exactly
// that can be upgraded or taken away. It does not read or write Helm's releases.
package install
