package apply

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Attributes of nf_tables that package unix does not name.
const (
	nftaTableUserdata = 6  // NFTA_TABLE_USERDATA
	nftaChainUserdata = 12 // NFTA_CHAIN_USERDATA
)

// message is one request to nf_tables.
type message struct {
	kind   int // unix.NFT_MSG_…
	flags  int // unix.NLM_F_…
	family uint8
	attrs  []byte
}

func (m message) encode(seq uint32, flags int) []byte {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|m.kind, m.flags|flags)
	req.Seq = seq
	req.AddData(&nl.Nfgenmsg{NfgenFamily: m.family, Version: nl.NFNETLINK_V0})
	req.AddRawData(m.attrs)
	return req.Serialize()
}

// bracket is what a batch begins or ends with.
func bracket(kind int, seq uint32) []byte {
	req := nl.NewNetlinkRequest(kind, 0)
	req.Seq = seq
	req.AddData(&nl.Nfgenmsg{Version: nl.NFNETLINK_V0, ResId: nl.Swap16(unix.NFNL_SUBSYS_NFTABLES)})
	return req.Serialize()
}

// commit makes all of the changes in the namespace of the calling thread, at once, or none.
func commit(changes []message) error {
	if len(changes) == 0 {
		return nil
	}
	s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(s)
	last := uint32(len(changes))
	b := bracket(unix.NFNL_MSG_BATCH_BEGIN, 0)
	for i, m := range changes {
		seq, flags := uint32(i+1), 0
		if seq == last {
			flags = unix.NLM_F_ACK // the kernel answers once for all, after it has made the changes, and tells each failure
		}
		b = append(b, m.encode(seq, flags)...)
	}
	b = append(b, bracket(unix.NFNL_MSG_BATCH_END, last+1)...)
	if len(b) > 1<<16 { // the whole batch is one datagram
		if err := unix.SetsockoptInt(s, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 2*len(b)); err != nil {
			return os.NewSyscallError("setsockopt SO_SNDBUFFORCE", err)
		}
	}
	if err := unix.Sendto(s, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("sendto", err)
	}
	return acknowledged(s, last)
}

// acknowledged reads the answers to a batch. They are all there: the kernel works in the sender's own call.
func acknowledged(s int, last uint32) error {
	b := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(s, b, unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return errors.New("nf_tables did not answer")
		case err != nil:
			return os.NewSyscallError("recvfrom", err)
		}
		answers, err := syscall.ParseNetlinkMessage(b[:n])
		if err != nil {
			return fmt.Errorf("read answer of nf_tables: %w", err)
		}
		for _, a := range answers {
			if a.Header.Type != unix.NLMSG_ERROR || len(a.Data) < 4 {
				continue
			}
			if code := int32(nl.NativeEndian().Uint32(a.Data)); code != 0 {
				return fmt.Errorf("nf_tables refuses change %d of %d: %w", a.Header.Seq, last, unix.Errno(-code))
			}
			if a.Header.Seq == last {
				return nil
			}
		}
	}
}

// attributes are those of one object, by type.
type attributes map[uint16][]byte

// dump lists objects of all families in the namespace of the calling thread. Kind is that of the question.
func dump(kind int, each func(family uint8, of attributes)) error {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|kind, unix.NLM_F_DUMP)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.NFPROTO_UNSPEC, Version: nl.NFNETLINK_V0})
	answers, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return fmt.Errorf("list nf_tables: %w", err)
	}
	for _, b := range answers {
		if len(b) < nl.SizeofNfgenmsg {
			continue
		}
		of, err := decode(b[nl.SizeofNfgenmsg:])
		if err != nil {
			return fmt.Errorf("list nf_tables: %w", err)
		}
		each(b[0], of)
	}
	return nil
}

func decode(b []byte) (attributes, error) {
	list, err := nl.ParseRouteAttr(b)
	of := make(attributes, len(list))
	for _, a := range list {
		of[a.Attr.Type&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER)] = a.Value
	}
	return of, err
}

// in returns the attributes inside an attribute: none when it is missing, or not such a one.
func (of attributes) in(kind uint16) attributes {
	inside, _ := decode(of[kind])
	return inside
}

// number is an attribute that is one of 32 bits.
func (of attributes) number(kind uint16) (n uint32, ok bool) {
	if b := of[kind]; len(b) == 4 {
		return binary.BigEndian.Uint32(b), true
	}
	return 0, false
}

// name is an attribute that is a string.
func (of attributes) name(kind uint16) string { return unix.ByteSliceToString(of[kind]) }

// encode writes the attributes of these types, those that are there, in this order.
func (of attributes) encode(kinds ...uint16) []byte {
	var b []byte
	for _, k := range kinds {
		if v, ok := of[k]; ok {
			b = append(b, nl.NewRtAttr(int(k), v).Serialize()...)
		}
	}
	return b
}

// named are the attributes of a request about a table and perhaps something in it: names, by type.
func named(names map[uint16]string) attributes {
	of := make(attributes, len(names))
	for k, v := range names {
		of[k] = nl.ZeroTerminated(v)
	}
	return of
}
