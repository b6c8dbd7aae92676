package wds

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	pb "github.com/mistnet/mistnet/api/workload"
)

// labelsToProto makes an extension of labels, or nothing of none.
func labelsToProto(labels map[string]string) ([]*pb.Extension, error) {
	if len(labels) == 0 {
		return nil, nil
	}
	m := &structpb.Struct{Fields: make(map[string]*structpb.Value, len(labels))}
	for k, v := range labels {
		m.Fields[k] = structpb.NewStringValue(v)
	}
	config := new(anypb.Any)
	if err := anypb.MarshalFrom(config, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		return nil, err
	}
	return []*pb.Extension{{Name: extensionLabels, Config: config}}, nil
}

// labels reads them from the extensions of a workload.
func (d *decoder) labels(extensions []*pb.Extension) (map[string]string, error) {
	for _, x := range extensions {
		if x.GetName() != extensionLabels || d.withoutLabels {
			continue
		}
		var m structpb.Struct
		if err := x.GetConfig().UnmarshalTo(&m); err != nil {
			return nil, err
		}
		if len(m.Fields) == 0 {
			return nil, errors.New("there are none")
		}
		labels := make(map[string]string, len(m.Fields))
		for k, v := range m.Fields {
			s, ok := v.GetKind().(*structpb.Value_StringValue)
			if !ok {
				return nil, fmt.Errorf("%q is not a string", k)
			}
			labels[d.intern(k)] = d.intern(s.StringValue)
		}
		return labels, nil
	}
	return nil, nil
}
