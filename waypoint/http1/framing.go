package http1

import "errors"

// framing is how a body ends.
type framing uint8

const (
	bodyNone framing = iota
	bodyLength
	bodyChunked
	bodyToClose
)

var (
	errBothLengths = errors.New("Content-Length beside Transfer-Encoding")
	errLengths     = errors.New("more than one Content-Length")
	errLength      = errors.New("Content-Length is no number of at most 18 digits")
	errCoding      = errors.New("Transfer-Encoding is not chunked")
	errCodings     = errors.New("transfer codings besides chunked")
	errOldCoding   = errors.New("Transfer-Encoding in HTTP/1.0")
)

// framed reads what the fields say of the body's length (RFC 9112, 6.3); bodyNone when they say nothing.
func (f *Fields) framed(http10 bool) (framing, int64, error) {
	lengths, codings := f.count[nameContentLength], f.count[nameTransferEncoding]
	switch {
	case lengths == 0 && codings == 0:
		return bodyNone, 0, nil
	case lengths > 0 && codings > 0:
		return bodyNone, 0, errBothLengths
	case lengths > 1:
		return bodyNone, 0, errLengths
	case lengths == 1:
		v, _ := f.known(nameContentLength)
		n, ok := decimal(v)
		if !ok {
			return bodyNone, 0, errLength
		}
		return bodyLength, n, nil
	case http10:
		return bodyNone, 0, errOldCoding
	}
	v, _ := f.known(nameTransferEncoding)
	if codings == 1 && fold(v, "chunked") {
		return bodyChunked, 0, nil
	}
	if cut := len(v) - len("chunked"); codings == 1 && cut > 0 && fold(v[cut:], "chunked") && onlyCodings(v[:cut]) {
		return bodyNone, 0, errCodings
	}
	return bodyNone, 0, errCoding
}

// onlyCodings reports whether s is a list of tokens that ends in a comma, none of them chunked: codings that exist and
// that we do not know.
func onlyCodings(s string) bool {
	s = trim(s)
	if s == "" || s[len(s)-1] != ',' {
		return false
	}
	for rest := s[:len(s)-1]; ; {
		i := 0
		for i < len(rest) && rest[i] != ',' {
			i++
		}
		coding := trim(rest[:i])
		if coding == "" || !all(coding, inToken) || fold(coding, "chunked") || fold(coding, "identity") {
			return false
		}
		if i == len(rest) {
			return true
		}
		rest = rest[i+1:]
	}
}

// decimal reads 1 to 18 digits and nothing else.
func decimal(s string) (n int64, ok bool) {
	if s == "" || len(s) > 18 {
		return 0, false
	}
	for i := 0; i < len(s); i++ {
		d := s[i] - '0'
		if d > 9 {
			return 0, false
		}
		n = n*10 + int64(d)
	}
	return n, true
}
