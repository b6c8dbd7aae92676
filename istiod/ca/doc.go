// Package ca is the certificate authority of the mesh: it signs the SVIDs of workloads, and istiod's own certificate.
//
// It believes nothing of a certificate request but its key: which identity goes into the certificate follows from who
// asks, and for whom that caller may ask. It does not know pods or nodes; NodeWorkloads tells it what runs where.
package ca
