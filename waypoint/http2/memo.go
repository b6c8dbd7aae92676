package http2

import (
	"bytes"

	"github.com/mistnet/mistnet/waypoint/http1"
)

// A client asks for much the same again and again, and an upstream answers alike: block by block the same bytes, where the
// peer indexes fields or says the same without. Such a head is copied instead of decoded. A block means the same as long as
// the table is the same, and it leaves the table alone if it did so before.

// Bounds of what is remembered. A block is looked for byte by byte, which costs little beside decoding it.
const (
	maxMemos     = 4
	maxMemoBytes = 512     // of a block
	maxMemoHead  = 2 << 10 // of the head it means
)

// memo is a block that came, and, once it came twice, the head it means.
type memo struct {
	block  []byte
	kind   kind
	end    bool   // nothing follows
	table  uint64 // decoder.changes
	known  bool   // the head is
	q      *http1.Request
	p      *http1.Response
	fields *http1.Fields
}

// memos are those of a connection. Of the reader goroutine.
type memos struct {
	all  []memo
	next int // to be replaced
}

// recall returns what is remembered of a block. It is empty if the block may be worth remembering, and nil if it is not.
func (m *memos) recall(k kind, end bool, table uint64, block []byte) *memo {
	if len(block) > maxMemoBytes {
		return nil
	}
	for i := range m.all {
		if x := &m.all[i]; x.kind == k && x.end == end && x.table == table && bytes.Equal(x.block, block) {
			return x
		}
	}
	if len(m.all) < maxMemos {
		m.all = append(m.all, memo{})
	}
	x := &m.all[m.next%len(m.all)]
	m.next = (m.next + 1) % maxMemos
	*x = memo{block: append(x.block[:0], block...), kind: k, end: end, table: table, q: x.q, p: x.p, fields: x.fields}
	return nil
}

// decodeRequest decodes a request's head, and says what is wrong with it.
func (c *ServerConn) decodeRequest(st *ServerStream, block []byte, end bool) (fault, err error) {
	m := c.memos.recall(ofRequest, end, c.dec.changes, block)
	if m != nil && m.known {
		st.req.Repeat(m.q, &st.stream)
		c.sink.has = 0 // it is no CONNECT
		return nil, nil
	}
	before := c.dec.changes
	c.sink.begin(ofRequest, &st.req, nil, nil)
	if err := c.dec.decode(block, &c.sink); err != nil {
		return nil, err
	}
	fault = c.sink.request(&st.stream, end)
	if m != nil && fault == nil && c.dec.changes == before && !c.sink.tunnel() && st.req.Size() <= maxMemoHead {
		if m.q == nil {
			m.q = new(http1.Request)
		}
		m.q.Repeat(&st.req, nil)
		m.known = true
	}
	return fault, nil
}

// decodeResponse decodes the head of a response, to a request of that method, into c.client.resp, and says what is wrong with it.
func (c *conn) decodeResponse(s *stream, method string, block []byte, end bool) (broken, err error) {
	p := &c.client.resp
	var m *memo
	if method != "HEAD" && method != "CONNECT" {
		m = c.memos.recall(ofResponse, end, c.dec.changes, block)
	}
	if m != nil && m.known {
		p.Repeat(m.p, s)
		return nil, nil
	}
	before := c.dec.changes
	c.sink.begin(ofResponse, nil, p, nil)
	if err := c.dec.decode(block, &c.sink); err != nil {
		return nil, err
	}
	broken = c.sink.response(method, s, end)
	if m != nil && broken == nil && c.dec.changes == before && p.Size() <= maxMemoHead {
		if m.p == nil {
			m.p = new(http1.Response)
		}
		m.p.Repeat(p, nil)
		m.known = true
	}
	return broken, nil
}

// decodeTrailers decodes trailers into c.trailers, and says what is wrong with them.
func (c *conn) decodeTrailers(block []byte) (why string, err error) {
	m := c.memos.recall(ofTrailers, true, c.dec.changes, block)
	if m != nil && m.known {
		c.trailers.Repeat(m.fields)
		return "", nil
	}
	before := c.dec.changes
	c.sink.begin(ofTrailers, nil, nil, &c.trailers)
	if err := c.dec.decode(block, &c.sink); err != nil {
		return "", err
	}
	why = c.sink.bad
	if err := c.sink.b.EndTrailers(); err != nil && why == "" {
		why = err.Error()
	}
	if m != nil && why == "" && c.dec.changes == before && c.trailers.Size() <= maxMemoHead {
		if m.fields == nil {
			m.fields = new(http1.Fields)
		}
		m.fields.Repeat(&c.trailers)
		m.known = true
	}
	return why, nil
}
