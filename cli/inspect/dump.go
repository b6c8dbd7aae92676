// Package inspect shows what the programs of a mesh know: ztunnel's /config_dump and istiod's /debug/xds, as the tables
// that users of istioctl know. It reads the dumps of Istio's ztunnel too.
package inspect

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// Dump is the part of a ztunnel's /config_dump that tables show.
type Dump struct {
	Workloads     []Workload     `json:"workloads"`
	Services      []Service      `json:"services"`
	Policies      []Policy       `json:"policies"`
	Certificates  []Certificate  `json:"certificates"`
	WorkloadState map[string]Pod `json:"workloadState"`
	Version       struct {
		Version string `json:"version"`
	} `json:"version"`

	parts map[string]json.RawMessage
}

// Workload is a unit of compute as ztunnel knows it.
type Workload struct {
	Name        string   `json:"name"`
	Namespace   string   `json:"namespace"`
	WorkloadIPs []string `json:"workloadIps"`
	Node        string   `json:"node"`
	Protocol    string   `json:"protocol"`
	Waypoint    Gateway  `json:"waypoint"`
}

// Service is a service as ztunnel knows it.
type Service struct {
	Name      string              `json:"name"`
	Namespace string              `json:"namespace"`
	Hostname  string              `json:"hostname"`
	VIPs      []string            `json:"vips"` // network/address
	Waypoint  Gateway             `json:"waypoint"`
	Endpoints map[string]Endpoint `json:"endpoints"`
}

// Endpoint is a workload behind a service.
type Endpoint struct {
	Status string `json:"status"`
}

// Policy is an authorization policy.
type Policy struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
	Action    string `json:"action"`
	Scope     string `json:"scope"`
	DryRun    bool   `json:"dryRun"`
	Invalid   string `json:"invalid"`
}

// Certificate is one identity and the certificates it has.
type Certificate struct {
	Identity  string `json:"identity"`
	State     string `json:"state"`
	CertChain []X509 `json:"certChain"`
	RootCerts []X509 `json:"rootCerts"`
}

// X509 is one certificate.
type X509 struct {
	SerialNumber   string    `json:"serialNumber"`
	ValidFrom      time.Time `json:"validFrom"`
	ExpirationTime time.Time `json:"expirationTime"`
}

// Pod is a pod that a ztunnel serves.
type Pod struct {
	State string `json:"state"`
	Info  struct {
		Name      string `json:"name"`
		Namespace string `json:"namespace"`
	} `json:"info"`
	Connections struct {
		Inbound  []Conn `json:"inbound"`
		Outbound []Conn `json:"outbound"`
	} `json:"connections"`
}

// Conn is a connection of a pod.
type Conn struct {
	Src         string `json:"src"`
	OriginalDst string `json:"originalDst"`
	ActualDst   string `json:"actualDst"`
	Protocol    string `json:"protocol"`
}

// Gateway is a waypoint, as namespace/hostname or network/address.
type Gateway string

// UnmarshalJSON reads our text form and the object that Istio's ztunnel writes.
func (g *Gateway) UnmarshalJSON(b []byte) error {
	var text string
	if json.Unmarshal(b, &text) == nil {
		*g = Gateway(text)
		return nil
	}
	var object struct {
		Destination json.RawMessage `json:"destination"`
	}
	if err := json.Unmarshal(b, &object); err != nil {
		return err
	}
	if json.Unmarshal(object.Destination, &text) == nil {
		*g = Gateway(text)
		return nil
	}
	var name struct{ Namespace, Hostname, Network, Address string }
	if err := json.Unmarshal(object.Destination, &name); err != nil {
		return err
	}
	*g = Gateway(name.Namespace + "/" + name.Hostname)
	if name.Hostname == "" {
		*g = Gateway(name.Network + "/" + name.Address)
	}
	return nil
}

// ReadDump understands a /config_dump.
func ReadDump(b []byte) (*Dump, error) {
	d := &Dump{}
	if err := json.Unmarshal(b, d); err != nil {
		return nil, fmt.Errorf("understand the dump: %w: is it the /config_dump of a ztunnel?", err)
	}
	if err := json.Unmarshal(b, &d.parts); err != nil {
		return nil, err
	}
	if _, ok := d.parts["workloads"]; !ok {
		return nil, fmt.Errorf("understand the dump: it has no workloads: is it the /config_dump of a ztunnel?")
	}
	return d, nil
}

// waypointName is what the table shows of a waypoint: the name of its service.
func (d *Dump) waypointName(g Gateway) string {
	if g == "" {
		return "None"
	}
	_, host, _ := strings.Cut(string(g), "/")
	for _, s := range d.Services {
		if s.Hostname == host {
			return s.Name
		}
		for _, vip := range s.VIPs {
			if vip == string(g) {
				return s.Name
			}
		}
	}
	return host
}
