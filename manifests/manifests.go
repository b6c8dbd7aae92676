// Package manifests holds what Mistnet is installed with: the Helm charts, and beside them, for kubectl, what they render
// to with their defaults (kustomize) and things to try the mesh on (samples).
//
// It is data. Who installs renders the charts with an engine of its own; see package cli/install.
package manifests

import "embed"

// Files are the charts, each in charts/NAME: base, istiod, cni, ztunnel, and the umbrella ambient, whose parts are not
// inside it but beside it.
//
//go:embed all:charts
var Files embed.FS

// Samples are the files of samples/, in that directory: a shop to try the mesh on, and what can be said of it.
//
//go:embed samples/*.yaml
var Samples embed.FS
