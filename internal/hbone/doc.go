// Package hbone carries TCP connections through HTTP/2 CONNECT over mutual TLS, as Istio's ambient mesh does ("HBONE").
//
// It is an HTTP/2 engine of its own that knows one method well. A client Pool keeps connections per peer and opens a
// Stream for each tunnelled connection; a Server hands every request to Handle, which accepts it as a Stream or rejects
// it. The package hides framing, header compression, flow control, keep-alive, connection reuse and the batching of
// system calls beneath crypto/tls. It does not decide whom to trust (the TLS configuration it is given does), where to
// connect, or what the bytes mean.
//
// How bytes move. Records are decrypted into one buffer per connection, and the connection's only reader goroutine hands
// DATA payload on as slices of that buffer; with Stream.Receive it writes them straight to the application's socket.
// Whoever wants to send appends to the connection's pending work, and the first to find nobody writing encrypts all that
// is pending and writes it with one system call; there is no writer goroutine. Nothing that is idle holds a buffer.
//
// How memory is bounded. A stream buffers no more than its receive window, which reopens only when the application has
// taken the bytes. The connection's window reopens on receipt, so that a stream nobody reads cannot stop its neighbours,
// unless more than maxConnBuffered bytes wait on the connection.
package hbone
