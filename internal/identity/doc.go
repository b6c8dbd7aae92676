// Package identity gives a program its X.509 SVIDs and the TLS configurations made from them.
//
// It hides how a certificate is asked for, renewed and verified: callers ask a Manager for the current SVID of an
// identity and never hear of rotation. It does not decide who may talk to whom beyond "a member of this mesh" (server
// side) and "one of the identities I expect" (client side); that is the work of package authz.
package identity
