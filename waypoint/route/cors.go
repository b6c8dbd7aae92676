package route

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/mistnet/mistnet/internal/mesh"
)

// CORS decides about requests that pages of other origins make (Fetch standard, 3.2).
type CORS struct {
	origins     []text
	methods     string
	headers     string
	expose      string
	maxAge      string
	anyMethod   bool // * in AllowMethods
	anyHeader   bool // * in AllowHeaders
	credentials bool
	forward     bool
}

// CORSDecision is what CORS has to say of one request: the values of the access-control headers of the response, ""
// for those that are not to be written.
type CORSDecision struct {
	// Answer says that the request is a preflight, to be answered with 200 and the headers below rather than sent on.
	Answer bool

	AllowOrigin      string
	AllowMethods     string
	AllowHeaders     string
	ExposeHeaders    string
	MaxAge           string
	AllowCredentials bool // "true"
}

// Decide decides about a request. When the decision is not to answer, its headers are for the response of the backend
// and replace what that says.
func (c *CORS) Decide(r *Request) CORSDecision {
	if c == nil {
		return CORSDecision{}
	}
	origin, ok := r.header("origin")
	if !ok || origin == "" {
		return CORSDecision{}
	}
	asked, preflight := "", false
	if r.Method == "OPTIONS" {
		asked, preflight = r.header("access-control-request-method")
		preflight = preflight && asked != ""
	}
	if !c.allows(origin) {
		return CORSDecision{Answer: preflight && !c.forward}
	}
	d := CORSDecision{Answer: preflight, AllowOrigin: origin, AllowCredentials: c.credentials}
	if !preflight {
		d.ExposeHeaders = c.expose
		return d
	}
	d.AllowMethods, d.AllowHeaders, d.MaxAge = c.methods, c.headers, c.maxAge
	if c.anyMethod {
		d.AllowMethods = asked
	}
	if c.anyHeader {
		d.AllowHeaders, _ = r.header("access-control-request-headers")
	}
	return d
}

func (c *CORS) allows(origin string) bool {
	for i := range c.origins {
		if c.origins[i].match(origin) {
			return true
		}
	}
	return false
}

func compileCORS(m *mesh.CORS) (*CORS, error) {
	if m == nil {
		return nil, nil
	}
	c := &CORS{
		methods: strings.Join(m.AllowMethods, ","), headers: strings.Join(m.AllowHeaders, ","),
		expose: strings.Join(m.ExposeHeaders, ","), credentials: m.Credentials, forward: m.ForwardUnmatched,
	}
	for _, s := range m.AllowMethods {
		c.anyMethod = c.anyMethod || s == "*"
	}
	for _, s := range m.AllowHeaders {
		c.anyHeader = c.anyHeader || s == "*"
	}
	if m.MaxAge != nil {
		c.maxAge = strconv.FormatInt(int64(*m.MaxAge/time.Second), 10)
	}
	for i, o := range m.AllowOrigins {
		t, err := compileText(o, false)
		if err != nil {
			return nil, fmt.Errorf("allow_origins[%d]: %w", i, err)
		}
		c.origins = append(c.origins, t)
	}
	return c, nil
}
