// Package grpcweb translates the bodies of gRPC-Web (grpc/grpc, PROTOCOL-WEB.md), which browsers speak, to those of gRPC and back, as
// they pass: a request that is text from base64, and a response with its trailers as the last of its messages, in base64 if that is
// asked for. However long a message is, no more of it is held than one buffer.
//
// It knows nothing of heads, and does not look into messages: what they say, and whether they are whole, is for the two ends.
package grpcweb

// The types of bodies that are translated, as Envoy has them: others are none, those with parameters too.
const (
	binary      = "application/grpc-web"
	binaryProto = "application/grpc-web+proto"
	text        = "application/grpc-web-text"
	textProto   = "application/grpc-web-text+proto"
)

// Parse reports whether a content-type, or an Accept, is one of gRPC-Web, and whether that is text.
func Parse(contentType string) (isText, ok bool) {
	switch contentType {
	case binary, binaryProto:
		return false, true
	case text, textProto:
		return true, true
	}
	return false, false
}

// ContentType is that of a response.
func ContentType(isText bool) string {
	if isText {
		return textProto
	}
	return binaryProto
}

// bufferBytes is how much is translated at once: so many letters of base64.
const bufferBytes = 16 << 10
