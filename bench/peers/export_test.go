package peers

// ConnectedTo is connectedTo, for tests.
var ConnectedTo = connectedTo
