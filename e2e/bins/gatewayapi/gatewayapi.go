// Package gatewayapi pins the Gateway API that suites run with: its definitions (CRDs) are taken from the module itself, as
// its people wrote them, and so is their suite for meshes, which is this package's test. No other module of the repository
// comes to depend on either.
package gatewayapi

import "sigs.k8s.io/gateway-api/pkg/consts"

// Version is what the definitions say they are.
const Version = consts.BundleVersion
