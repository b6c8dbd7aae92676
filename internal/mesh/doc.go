// Package mesh holds the nouns of the mesh and the one value that crosses from control to data: the Snapshot.
//
// It is pure: no I/O, no clock, no locks. Everything of ours may import it; it imports nothing of ours. A value inside
// a Snapshot is read-only forever: copy to change.
package mesh
