package wds

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"google.golang.org/protobuf/reflect/protoreflect"

	pb "github.com/mistnet/mistnet/api/route"
)

// routeReader reads L7 configuration and gathers every fault with the path of its field.
type routeReader struct{ ruleReader }

// unknownFields fails for what this version does not know, anywhere below m: a condition that is passed over makes a
// rule wider, and a setting that is passed over makes a policy weaker.
func (r *routeReader) unknownFields(at string, m protoreflect.Message) {
	if len(m.GetUnknown()) > 0 {
		r.fail(at, errors.New("holds a field this version does not know"))
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		name := string(f.Name())
		if at != "" {
			name = at + "." + name
		}
		switch {
		case f.IsMap() || f.Message() == nil:
		case f.IsList():
			for i := range v.List().Len() {
				r.unknownFields(fmt.Sprintf("%s[%d]", name, i), v.List().Get(i).Message())
			}
		default:
			r.unknownFields(name, v.Message())
		}
		return true
	})
}

// enum returns the number of e, which must be known, and zero only if that is a value.
func (r *routeReader) enum(at string, e protoreflect.Enum, zero bool) uint8 {
	n := e.Number()
	if e.Descriptor().Values().ByNumber(n) == nil || n == 0 && !zero {
		r.fail(at, fmt.Errorf("unknown value %d", n))
		return 0
	}
	return uint8(n)
}

func (r *routeReader) filled(at, s string) string {
	if s == "" {
		r.fail(at, errors.New("is empty"))
	}
	return s
}

func (r *routeReader) port(at string, n uint32) uint16 {
	p, err := port(n)
	if err != nil {
		r.fail(at, err)
	}
	return p
}

func (r *routeReader) within(at string, n, least, most uint32) uint16 {
	if n < least || n > most {
		r.fail(at, fmt.Errorf("%d is not %d to %d", n, least, most))
		return 0
	}
	return uint16(n)
}

func (r *routeReader) statuses(at string, list []uint32) []uint16 {
	return each(list, at, func(at string, n uint32) uint16 { return r.within(at, n, 100, 599) })
}

func (r *routeReader) prefix(at string, m *pb.Prefix) netip.Prefix {
	length := m.GetLength()
	p, err := prefix(m.GetAddress(), &length)
	if err != nil {
		r.fail(at, err)
	}
	return p
}

// each translates every element, which knows its path. Of none it makes nil.
func each[A, B any](from []A, at string, one func(at string, a A) B) []B {
	if len(from) == 0 {
		return nil
	}
	to := make([]B, len(from))
	for i, a := range from {
		to[i] = one(fmt.Sprintf("%s[%d]", at, i), a)
	}
	return to
}

// filledList, filledMap and filledBytes make nil of what is empty, so that equal nouns are equal, and copy the rest.
func filledList(s []string) []string {
	if len(s) == 0 {
		return nil
	}
	return slices.Clone(s)
}

func filledMap[V any](m map[string]V) map[string]V {
	if len(m) == 0 {
		return nil
	}
	return maps.Clone(m)
}

func filledBytes(b []byte) []byte {
	if len(b) == 0 {
		return nil
	}
	return slices.Clone(b)
}
