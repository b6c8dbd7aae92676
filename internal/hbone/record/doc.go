// Package record protects bytes as TLS 1.3 records (RFC 8446, 5) with traffic secrets that a handshake elsewhere agreed.
//
// A Sealer turns bytes into records behind one another in a caller's buffer; an Opener turns one record at a time into
// bytes. Both know what may follow a handshake: alerts, session tickets and key updates. The package does no handshake,
// verifies nobody, does no I/O, and speaks AES-GCM only. Neither type is safe for concurrent use, and they share nothing,
// so that one goroutine may send while another receives.
//
// Secrets arrive through Secrets, which crypto/tls writes to as its key log. They stay in memory: nothing here prints or
// stores one, and what is not needed any more is overwritten.
package record
