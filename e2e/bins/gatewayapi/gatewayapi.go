// Package gatewayapi pins the Gateway API that suites run with: its definitions (CRDs) are taken from the module itself, as
// its people wrote them. Nothing is built here, and no other module of the repository comes to depend on it.
package gatewayapi

import "sigs.k8s.io/gateway-api/pkg/consts"

// Version is what the definitions say they are.
const Version = consts.BundleVersion
