package linux

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TakeOver gives l every new connection to its address, of which other listeners may have a share by SO_REUSEPORT, and
// has the kernel move to it what they have not accepted when they close. When l closes, what it leaves goes to the others
// in the same way. It needs CAP_SYS_ADMIN (or CAP_BPF) and CAP_NET_ADMIN, and Linux 5.14; without them connections go on
// being shared, and those that a closing listener has not accepted are reset.
//
// The older listener should close some milliseconds later, not at once: a packet of a handshake that another processor is
// working on for it in the moment it closes is lost to the kernel (seen once in 3000 connections under load).
//
// The kernel runs a program for the group of listeners that picks the one in a map of a single place. Closing the
// listener empties the place; then the kernel chooses as it would without a program. Nothing outlives the listeners.
func TakeOver(l *net.TCPListener) error {
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	var cerr error
	if err := raw.Control(func(fd uintptr) { cerr = takeOver(int(fd)) }); err != nil {
		return err
	}
	if cerr != nil {
		return fmt.Errorf("take over %s: %w", l.Addr(), cerr)
	}
	return nil
}

func takeOver(listener int) error {
	places, err := bpf(unix.BPF_MAP_CREATE, &mapAttr{
		kind: unix.BPF_MAP_TYPE_REUSEPORT_SOCKARRAY, keyBytes: 4, valueBytes: 8, entries: 1,
	})
	if err != nil {
		return os.NewSyscallError("bpf map", err)
	}
	defer unix.Close(places)
	var pins runtime.Pinner // what the kernel reads by its address
	defer pins.Unpin()
	key, value := new(uint32), new(uint64)
	*value = uint64(listener)
	place := elemAttr{fd: uint32(places), key: address(&pins, key), value: address(&pins, value)}
	if _, err := bpf(unix.BPF_MAP_UPDATE_ELEM, &place); err != nil {
		return os.NewSyscallError("bpf map update", err)
	}
	program := chooser(places)
	license := []byte("Apache-2.0\x00")
	load := progAttr{
		kind: unix.BPF_PROG_TYPE_SK_REUSEPORT, attach: unix.BPF_SK_REUSEPORT_SELECT_OR_MIGRATE,
		count: uint32(len(program)), code: address(&pins, &program[0]), license: address(&pins, &license[0]),
	}
	prog, err := bpf(unix.BPF_PROG_LOAD, &load)
	if err != nil {
		return os.NewSyscallError("bpf program", err)
	}
	defer unix.Close(prog)
	return os.NewSyscallError("SO_ATTACH_REUSEPORT_EBPF", unix.SetsockoptInt(listener, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_EBPF, prog))
}

// instruction is struct bpf_insn: dst is the lower half of the registers' byte, src the upper one.
type instruction struct {
	code      uint8
	registers uint8
	offset    int16
	value     int32
}

// helperSelect is bpf_sk_select_reuseport(context, map, &key, flags).
const helperSelect = 82

// chooser picks the listener in the first place of the map, and lets the kernel choose when there is none.
func chooser(places int) []instruction {
	const stack = -4 // where the key is, from r10
	return []instruction{
		{code: unix.BPF_ST | unix.BPF_W | unix.BPF_MEM, registers: 10, offset: stack},                                    // key = 0
		{code: unix.BPF_LD | unix.BPF_DW | unix.BPF_IMM, registers: 2 | unix.BPF_PSEUDO_MAP_FD<<4, value: int32(places)}, // r2 = the map
		{}, // second half of the above
		{code: unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_X, registers: 3 | 10<<4},        // r3 = r10
		{code: unix.BPF_ALU64 | unix.BPF_ADD | unix.BPF_K, registers: 3, value: stack},  // r3 = &key
		{code: unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_K, registers: 4},                // r4 = no flags
		{code: unix.BPF_JMP | unix.BPF_CALL, value: helperSelect},                       // r1 is the context already
		{code: unix.BPF_ALU64 | unix.BPF_MOV | unix.BPF_K, registers: 0, value: skPass}, // whatever it said
		{code: unix.BPF_JMP | unix.BPF_EXIT},
	}
}

// skPass is SK_PASS of enum sk_action.
const skPass = 1

// The commands' parts of union bpf_attr, as far as they are needed; the kernel takes the rest for zero.
type (
	mapAttr struct {
		kind, keyBytes, valueBytes, entries uint32
		_                                   uint32 // flags
	}
	elemAttr struct {
		fd         uint32
		_          uint32
		key, value uint64 // addresses
		_          uint64 // flags
	}
	progAttr struct {
		kind, count   uint32
		code, license uint64    // addresses
		_             [2]uint32 // level and size of the log
		_             uint64    // the log
		_             [2]uint32 // kernel version, flags
		_             [16]byte  // name
		_             uint32    // device
		attach        uint32
	}
)

func address[T any](pins *runtime.Pinner, p *T) uint64 {
	pins.Pin(p)
	return uint64(uintptr(unsafe.Pointer(p)))
}

// bpf makes the system call and returns the descriptor it made, if it makes one.
func bpf[T mapAttr | elemAttr | progAttr](command int, attr *T) (int, error) {
	for {
		fd, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(command), uintptr(unsafe.Pointer(attr)), unsafe.Sizeof(*attr))
		switch {
		case errno == 0:
			return int(fd), nil
		case !errors.Is(errno, unix.EAGAIN) && !errors.Is(errno, unix.EINTR): // the verifier was interrupted
			return 0, errno
		}
	}
}
