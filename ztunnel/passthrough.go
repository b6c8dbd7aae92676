package ztunnel

import (
	"context"
	"net"
	"time"

	"github.com/mistnet/mistnet/internal/authz"
	"github.com/mistnet/mistnet/internal/linux"
	"github.com/mistnet/mistnet/internal/mesh"
	"github.com/mistnet/mistnet/ztunnel/nexthop"
)

// passthrough serves one captured plaintext connection to the pod: nobody vouches for the caller, so only policies
// that allow the unknown let it pass.
func (d *pod) passthrough(ctx context.Context, caller *net.TCPConn) {
	src := addrPort(caller.RemoteAddr())
	dst, err := linux.OriginalDst(caller)
	var v *view
	var to *mesh.Workload
	if err == nil {
		v, to, err = d.workload(ctx)
	}
	var hop nexthop.Hop
	if err == nil {
		hop, err = nexthop.Passthrough(to, dst)
	}
	if err != nil {
		d.rep.early("inbound", src, dst, err)
		abort(caller)
		return
	}
	c := &conn{
		record: &record{
			start: time.Now(), inbound: true, src: src, dst: dst,
			srcWorkload: v.WorkloadAt(d.networkAddr(src.Addr())), dstWorkload: to,
		},
		pod: d.key(), original: dst, target: hop.Addr,
		request: authz.Request{Src: src, Dst: hop.Addr},
	}
	ctx = d.conns.track(ctx, c)
	err = d.admitPlain(ctx, c, caller)
	if err != nil {
		abort(caller)
	}
	d.rep.close(c, err)
}

func (d *pod) admitPlain(ctx context.Context, c *conn, caller *net.TCPConn) error {
	waiting, cancel := context.WithTimeout(ctx, workloadWait)
	defer cancel()
	if err := d.state.authorize(waiting, c); err != nil {
		return err
	}
	app, err := d.dialApp(ctx, c)
	if err != nil {
		return err
	}
	d.rep.open(c)
	return pump(ctx, c, caller, app)
}
