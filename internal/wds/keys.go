package wds

import (
	"fmt"

	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	pb "github.com/mistnet/mistnet/api/workload"
)

// appendPolicies adds the extension that lists policies, if there are any.
func appendPolicies(extensions []*pb.Extension, keys []string) ([]*pb.Extension, error) {
	if len(keys) == 0 {
		return extensions, nil
	}
	list := &structpb.ListValue{}
	for _, k := range keys {
		list.Values = append(list.Values, structpb.NewStringValue(k))
	}
	config := &anypb.Any{}
	if err := anypb.MarshalFrom(config, list, deterministic); err != nil {
		return extensions, fmt.Errorf("extensions[%s]: %w", extensionPolicies, err)
	}
	return append(extensions, &pb.Extension{Name: extensionPolicies, Config: config}), nil
}

// policies reads the policies that extensions list. Unread, they would not be enforced.
func (d *decoder) policies(extensions []*pb.Extension) ([]string, error) {
	var keys []string
	for _, x := range extensions {
		if x.GetName() != extensionPolicies {
			continue
		}
		var list structpb.ListValue
		if err := x.GetConfig().UnmarshalTo(&list); err != nil {
			return nil, fmt.Errorf("extensions[%s]: %w", extensionPolicies, err)
		}
		for i, v := range list.GetValues() {
			key, ok := v.GetKind().(*structpb.Value_StringValue)
			if !ok || key.StringValue == "" {
				return nil, fmt.Errorf("extensions[%s]: [%d] is not a policy's key", extensionPolicies, i)
			}
			keys = append(keys, d.intern(key.StringValue))
		}
	}
	return keys, nil
}
