// Package kube reads a mesh from the Kubernetes API server, and writes there what proxies need of it.
package kube
