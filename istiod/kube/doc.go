// Package kube reads a mesh from the Kubernetes API server, and writes there what proxies need of it. It is the only
// part of istiod that speaks to an API server.
//
// Reading: one reflector per kind (list, then watch, from then on until istiod stops) trims objects at the edge and
// hands them on as index events, in the same form as package files does. Objects are kept by the index alone. Kinds of
// Istio's and of the Gateway API may be absent, and appear or vanish while istiod runs; routes that have no service among
// their parents speak to gateways and are passed over. Whatever the API server does, what was read
// stays in force; /debug/objects and the metric istiod_source_failing tell what cannot be read. EndpointSlices that
// Kubernetes derives from a service's selector are not read: the selector says the same.
//
// Kinds that speak to a mesh and that this one does not honour yet are read for the names of their objects, which
// /debug/problems lists and istiod_objects_not_honoured counts. Nothing waits for them.
//
// The ConfigMap istio (key mesh) is an object like any other, but for rootNamespace and trustDomain, which are taken once.
// What lies in other namespaces than those selected, and the root namespace, is not known to the mesh.
//
// Writing: every replica serves; the one that holds the Lease istio-leader writes the ConfigMap istio-ca-root-cert of
// every namespace, the condition ZtunnelAccepted of every AuthorizationPolicy, and what became of the Gateway API's routes below
// services (status.parents, under the name istio.io/mesh-controller, or mistnet.io/mesh-controller where Istio's Gateways are
// left to Istio). All writes are server-side apply as mistnet-istiod. The Secret istio-ca-secret is created by whichever replica is first, and changed when its certificate is
// about to expire. Secrets of the authority are looked at every few seconds rather than watched: so little is asked that a
// watch, which can fall silent, is not worth it. Secrets that DestinationRules name are watched, each by its name and as long as one
// does; what of them goes to whom, package translate says.
//
// It also makes every Gateway of a waypoint's class a running waypoint (package gateway says what that is): ServiceAccount,
// Deployment and Service, and what overlays ask for, applied again when somebody changes them and removed when the Gateway
// does not ask for them any more. With the Gateway they go, which owns them. Of objects that run Gateways only those with the
// label gateway.istio.io/managed are ever written; they are applied as istio.io/gateway-controller, so that this control plane
// and Istio's can take over from each other. ConfigMaps that Gateways name as parameters, and Services of Gateways that
// somebody else runs, are looked at every ten seconds.
//
// Several control planes may share a cluster (label istio.io/rev, see type revisions): each runs the Gateways, and writes the statuses, of
// what is its own, and passes over objects of configuration that are labelled as another's. Gateways are read of all of them.
// Those of each revision have a Lease of their own. Root certificates are written over only where they are other ones, and, by
// another revision than the default one, only in its own namespaces.
//
// ServiceAccounts of applications are not read. Who calls is said by TokenReview, which fails for an account that is gone; which accounts
// run on a node is said by its pods, and a pod cannot be made without its account. Nothing the data plane honours is
// written on a ServiceAccount.
//
// Callers are known by TokenReview, with the audience istio-ca.
//
// # Permissions
//
// istiod needs exactly these; testdata/rbac.yaml has them as YAML, and the tests run with nothing else. In the whole
// cluster (ClusterRole):
//
//	list watch: namespaces nodes pods services
//	get: pods
//	list watch: endpointslices.discovery.k8s.io
//	list watch: authorizationpolicies.security.istio.io peerauthentications.security.istio.io
//	list watch: serviceentries.networking.istio.io workloadentries.networking.istio.io virtualservices.networking.istio.io destinationrules.networking.istio.io
//	list watch: gatewayclasses.gateway.networking.k8s.io gateways.gateway.networking.k8s.io httproutes.gateway.networking.k8s.io grpcroutes.gateway.networking.k8s.io tlsroutes.gateway.networking.k8s.io tcproutes.gateway.networking.k8s.io referencegrants.gateway.networking.k8s.io backendtlspolicies.gateway.networking.k8s.io
//	list watch: xbackendtrafficpolicies.gateway.networking.x-k8s.io
//	list watch: gateways.networking.istio.io sidecars.networking.istio.io workloadgroups.networking.istio.io envoyfilters.networking.istio.io proxyconfigs.networking.istio.io
//	list watch: requestauthentications.security.istio.io
//	list watch: telemetries.telemetry.istio.io
//	list watch: wasmplugins.extensions.istio.io
//	create: gatewayclasses.gateway.networking.k8s.io
//	patch: gateways/status.gateway.networking.k8s.io gatewayclasses/status.gateway.networking.k8s.io
//	get list watch create patch delete: serviceaccounts services
//	get list watch create patch delete: deployments.apps
//	get list watch create patch delete: horizontalpodautoscalers.autoscaling
//	get list watch create patch delete: poddisruptionbudgets.policy
//	get list watch: configmaps
//	patch: authorizationpolicies/status.security.istio.io
//	patch: services/status
//	patch: serviceentries/status.networking.istio.io virtualservices/status.networking.istio.io destinationrules/status.networking.istio.io
//	patch: httproutes/status.gateway.networking.k8s.io grpcroutes/status.gateway.networking.k8s.io tlsroutes/status.gateway.networking.k8s.io tcproutes/status.gateway.networking.k8s.io backendtlspolicies/status.gateway.networking.k8s.io
//	create: tokenreviews.authentication.k8s.io
//	get list watch patch: configmaps (istio-ca-root-cert)
//	create: configmaps
//
// Only where that is bound (ClusterRole istiod-credentials), for Secrets that DestinationRules name by credentialName. Each is listed
// and watched by its name, so that a Role with resourceNames does as well:
//
//	list watch: secrets
//
// In its own namespace (Role); a revision other than default reads the ConfigMap istio-<revision> and has the Lease
// mistnet-leader-<revision>:
//
//	get list watch: configmaps (istio)
//	get: secrets (cacerts istio-ca-secret)
//	update: secrets (istio-ca-secret)
//	create: secrets
//	get update: leases.coordination.k8s.io (istio-leader)
//	create: leases.coordination.k8s.io
//
// What is about Gateways the chart has in a ClusterRole of its own: without it no waypoint is started, and the rest works.
// pods/get is used only with API servers that do not tell a token's node (before 1.30); configmaps/create and
// secrets/create cannot be limited to a name. cacerts need not be readable when it is mounted (-ca-dir).
package kube
