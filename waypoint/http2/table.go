package http2

// Indexes of the static table that are used by number.
const (
	indexAuthority  = 1
	indexGET        = 2
	indexPOST       = 3
	indexPath       = 4 // "/"
	indexHTTP       = 6
	indexHTTPS      = 7
	indexStatus     = 8 // 200; 204, 206, 304, 400, 404, 500 follow
	indexLength     = 28
	indexDate       = 33
	indexMethodName = 2
	indexSchemeName = 6
)

type staticField struct{ name, value []byte }

// staticTable is RFC 7541, Appendix A. Nobody writes to it.
var staticTable = func() (t [62]staticField) {
	for i, f := range [...][2]string{
		1: {":authority", ""}, 2: {":method", "GET"}, 3: {":method", "POST"}, 4: {":path", "/"}, 5: {":path", "/index.html"},
		6: {":scheme", "http"}, 7: {":scheme", "https"}, 8: {":status", "200"}, 9: {":status", "204"}, 10: {":status", "206"},
		11: {":status", "304"}, 12: {":status", "400"}, 13: {":status", "404"}, 14: {":status", "500"}, 15: {"accept-charset", ""},
		16: {"accept-encoding", "gzip, deflate"}, 17: {"accept-language", ""}, 18: {"accept-ranges", ""}, 19: {"accept", ""},
		20: {"access-control-allow-origin", ""}, 21: {"age", ""}, 22: {"allow", ""}, 23: {"authorization", ""},
		24: {"cache-control", ""}, 25: {"content-disposition", ""}, 26: {"content-encoding", ""}, 27: {"content-language", ""},
		28: {"content-length", ""}, 29: {"content-location", ""}, 30: {"content-range", ""}, 31: {"content-type", ""},
		32: {"cookie", ""}, 33: {"date", ""}, 34: {"etag", ""}, 35: {"expect", ""}, 36: {"expires", ""}, 37: {"from", ""},
		38: {"host", ""}, 39: {"if-match", ""}, 40: {"if-modified-since", ""}, 41: {"if-none-match", ""}, 42: {"if-range", ""},
		43: {"if-unmodified-since", ""}, 44: {"last-modified", ""}, 45: {"link", ""}, 46: {"location", ""}, 47: {"max-forwards", ""},
		48: {"proxy-authenticate", ""}, 49: {"proxy-authorization", ""}, 50: {"range", ""}, 51: {"referer", ""}, 52: {"refresh", ""},
		53: {"retry-after", ""}, 54: {"server", ""}, 55: {"set-cookie", ""}, 56: {"strict-transport-security", ""},
		57: {"transfer-encoding", ""}, 58: {"user-agent", ""}, 59: {"vary", ""}, 60: {"via", ""}, 61: {"www-authenticate", ""},
	} {
		t[i] = staticField{[]byte(f[0]), []byte(f[1])}
	}
	return t
}()

// staticName is the index of a name that is worth looking for; 0: none.
func staticName(name string) int {
	switch name {
	case "accept-encoding":
		return 16
	case "accept-language":
		return 17
	case "accept":
		return 19
	case "authorization":
		return 23
	case "cache-control":
		return 24
	case "content-encoding":
		return 26
	case "content-type":
		return 31
	case "cookie":
		return 32
	case "date":
		return indexDate
	case "etag":
		return 34
	case "last-modified":
		return 44
	case "location":
		return 46
	case "referer":
		return 51
	case "server":
		return 54
	case "set-cookie":
		return 55
	case "user-agent":
		return 58
	case "vary":
		return 59
	}
	return 0
}
