// Package wds translates between the nouns of package mesh and Istio ambient's workload and authorization messages, in
// both directions, and turns a batch of resources from the wire into the mesh.Delta that applies it.
//
// It hides every convention of the encoding: elided defaults, address bytes, optional prefix lengths, enumerations. It
// refuses what it cannot represent, naming the field, so that nothing malformed reaches a Snapshot. It is pure: it does
// not know how resources travel (package xds does) and does not keep them.
package wds
