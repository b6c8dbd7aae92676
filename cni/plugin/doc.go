// Package plugin is the CNI plugin: it stands last in the chain that sets up a pod's network, tells the node agent about
// every pod that comes and goes, and passes the result of the plugins before it through unchanged.
//
// It decides next to nothing, and knows nothing of Kubernetes: whether a pod is in the mesh is the agent's decision. What
// it does guarantee is that no pod starts before the agent has answered. Without an answer ADD fails with CNI's "try
// again later", and the runtime does.
//
// A process of it runs for every pod that starts, so it links little and keeps nothing but a bounded log file.
package plugin
