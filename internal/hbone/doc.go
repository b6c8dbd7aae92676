// Package hbone carries TCP connections through HTTP/2 CONNECT over mutual TLS, as Istio's ambient mesh does ("HBONE").
//
// It is an HTTP/2 engine of its own that knows one method well. A client Pool keeps connections per peer and opens a
// Stream for each tunnelled connection; a Server hands every request to Handle, which accepts it as a Stream or rejects
// it. The package hides framing, header compression, flow control, keep-alive, connection reuse, TLS records and the
// batching of system calls. It does not decide whom to trust (the TLS configuration it is given does), where to
// connect, or what the bytes mean.
//
// Who does TLS. crypto/tls does every handshake, and the configuration decides it. After a handshake of TLS 1.3 that
// agreed on AES-GCM, package record takes over both directions with the secrets of that connection; any other connection
// stays with crypto/tls, as do all with StdlibRecords, of a configuration that has a KeyLogWriter of its own, or in FIPS
// 140 mode. A connection ends with close_notify; one that is cut off without it while streams are open ends with
// ErrTruncated.
//
// How bytes move. Records are decrypted from the connection's input into one buffer, behind one another, and the
// connection's only reader goroutine hands DATA payload on as slices of that buffer; with Stream.Receive it writes them
// straight to the application's socket. What is sent goes from the application's buffer into the output, where it is
// encrypted.
// Whoever wants to send appends to the connection's pending work, and the first to find nobody writing encrypts all that
// is pending and writes it with one system call; there is no writer goroutine. Nothing that is idle holds a buffer.
//
// How memory is bounded. A stream buffers no more than its receive window, which reopens only when the application has
// taken the bytes. The connection's window reopens on receipt, so that a stream nobody reads cannot stop its neighbours,
// unless more than maxConnBuffered bytes wait on the connection. What all connections hold together is bounded by a
// memlimit.Budget, if there is one: windows become smaller then, or stay shut.
package hbone
