package apply

import (
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mistnet/mistnet/internal/mesh"
)

// Carries reports whether ztunnel has a connection that came to its ports in the namespace: one that was captured, or a
// tunnel of a peer.
func Carries(ns Namespace) (busy bool, err error) {
	err = ns.Do(func() error {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			sockets, err := netlink.SocketDiagTCP(family)
			if err != nil {
				return fmt.Errorf("list connections: %w", err)
			}
			busy = busy || slices.ContainsFunc(sockets, isCarried)
		}
		return nil
	})
	return busy, err
}

func isCarried(s *netlink.Socket) bool {
	switch s.State {
	case netlink.TCP_LISTEN, netlink.TCP_TIME_WAIT, netlink.TCP_CLOSE:
		return false
	}
	return slices.Contains([]uint16{mesh.PortOutbound, mesh.PortPassthrough, mesh.PortHBONE}, s.ID.SourcePort)
}
