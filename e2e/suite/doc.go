// Package suite holds the tests that show the mesh on a real Kubernetes cluster: made by e2e/lab, with this tree's images,
// installed by this tree's mistctl, and observed from outside only: through the API server, from pods, and on the wire.
//
// They run with MISTNET_E2E=1 and need root. MISTNET_E2E_NODES, MISTNET_E2E_PROXY (nftables, iptables) and
// MISTNET_E2E_DUAL=1 choose the cluster. Who writes tests keeps one up, and names it:
//
//	go run ./e2e/cmd/lab up
//	MISTNET_E2E=1 MISTNET_E2E_LAB=lab go test ./e2e/suite -count=1 -v -run Enrol
//
// The first run installs the mesh there; MISTNET_E2E_INSTALLED=1 says that it is installed, and as it should be.
package suite
