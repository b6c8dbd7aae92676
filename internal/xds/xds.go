// Package xds is delta xDS (envoy.service.discovery.v3, DeltaAggregatedResources), both sides: the client of a proxy and
// the server of the control plane.
//
// It hides subscriptions, nonces, versions, acknowledgement, reconnection and back-pressure. It knows resources as named
// bytes of a type and never looks inside: packages wds and api do. What a client knows and says next is a pure state
// machine (subscription.go); client.go is the shell that dials, sends and receives.
package xds

import (
	"errors"
	"slices"
	"strconv"
	"strings"

	"github.com/cespare/xxhash/v2"
)

// Wildcard is the name that subscribes to every resource of a type.
const Wildcard = "*"

// ErrStopped is why a stream ends when its server goes away; the client should reconnect.
var ErrStopped = errors.New("server is stopping")

// ErrUnavailable says that a caller could not be authenticated now, and may be later: it should try again.
var ErrUnavailable = errors.New("callers cannot be authenticated now")

// Resource is one named piece of configuration of a type.
type Resource struct {
	Name    string
	Version string   // what tells one content from another; on Publish, empty means the hash of Body
	Aliases []string // further names a client may subscribe by
	Body    []byte   // the message: the value of the Any
	// Private keeps the resource from everybody but Readers: for others it does not exist. Readers are compared with what
	// Authenticate said, up to an "@" in that.
	Private bool
	Readers []string
	// Follows are names whose subscribers get this resource too, as those of a service get its endpoints. It stays on
	// the server.
	Follows []string
}

// Update is what one response changes. A name is in at most one of the two lists.
type Update struct {
	TypeURL string
	Upserts []Resource
	Removes []string
	First   bool // the first response of the type on this client
}

// Rejection is a resource that could not be applied, and why.
type Rejection struct {
	Name string
	Err  error
}

// Change is what one Publish does to the resources of a type.
type Change struct {
	TypeURL string
	Upserts []Resource
	Removes []string
}

// featureChunks is the client feature (core.v3.Node) that says: the first answer to a wildcard may come in several
// responses, all but the last marked partial. A client without it would think itself ready after the first of them.
const featureChunks = "io.mistnet.chunked-sync"

// partial marks a response (its system_version_info) that more of the same answer will follow.
const partial = "partial"

// version is the hexadecimal xxHash64 of a message.
func version(body []byte) string { return strconv.FormatUint(xxhash.Sum64(body), 16) }

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, strings.Compare)
	return keys
}
