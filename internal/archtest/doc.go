// Package archtest holds the architecture in tests: who may import whom, what pure code may touch, and how the tree is
// kept readable. Every ban comes with its reason, which is what the failing test prints. It has no code of its own.
//
// docs/architecture.md tells the same in prose. A package that is not in the table yet needs a line in it: say on which
// layer it stands.
package archtest
