// Package route decides what happens to a request or connection that reached a waypoint: it compiles mesh.Routes into a
// Table, finds the one Rule that matches, and computes everything that Rule asks for: which backend, which path and
// headers, which redirect, delay, CORS answer, timeout, and whether and when to try again.
//
// It is pure. Randomness comes in as numbers, time goes out as durations; bytes are moved by package waypoint.
//
// # Order
//
// The rules of one service and port stand in one total order; the first that matches decides:
//
//  1. Gateway API routes for clients of one namespace (consumer routes), then
//  2. Gateway API routes for everybody. In both: exact path, longest prefix, longest regex; with a method; more headers;
//     more query parameters; older; namespace/name; rule; match.
//  3. VirtualServices: older; namespace/name; each from top to bottom.
//
// Compile reports the matches that this order never reaches.
//
// A rule that cannot be understood refuses the requests it would have matched: handing them to the next rule could let
// through what it was there to stop.
package route
