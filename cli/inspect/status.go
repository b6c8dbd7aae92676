package inspect

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// Client is a client of istiod, as /debug/xds shows it.
type Client struct {
	Istiod    string    `json:"istiod,omitempty"` // the replica it is connected to; not in the page
	Peer      string    `json:"peer"`
	Address   string    `json:"address"`
	Node      string    `json:"node"`
	Connected time.Time `json:"connected"`
	Types     []Type    `json:"types"`
}

// Type is the state of one kind of resource at a client.
type Type struct {
	TypeURL  string            `json:"typeUrl"`
	Sent     uint64            `json:"sent"`
	Acked    uint64            `json:"acked"`
	Nacked   uint64            `json:"nacked"`
	InFlight bool              `json:"inFlight"`
	Behind   uint64            `json:"behind"`
	Rejected map[string]string `json:"rejected"`
}

// ReadClients understands istiod's /debug/xds.
func ReadClients(b []byte, istiod string) ([]Client, error) {
	var all []Client
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, fmt.Errorf("understand /debug/xds of %s: %w", istiod, err)
	}
	for i := range all {
		all[i].Istiod = istiod
	}
	return all, nil
}

// State says in a word how far the client is: SYNCED, STALE when something waits, ERROR when it refused something.
func (t Type) State() string {
	switch {
	case len(t.Rejected) > 0:
		return fmt.Sprintf("ERROR (%d refused)", len(t.Rejected))
	case t.Sent == 0:
		return "NOT SENT"
	case t.InFlight, t.Behind > 0:
		return "STALE"
	}
	return "SYNCED"
}

// short is the last part of a type's name.
func (t Type) short() string { return t.TypeURL[strings.LastIndexByte(t.TypeURL, '.')+1:] }

// PrintClients writes the table of proxy-status, and below it what clients refused and why.
func PrintClients(out io.Writer, clients []Client) error {
	t := table{head: []string{"NAME", "PEER", "ISTIOD", "ADDRESS", "CONNECTED", "STATE"}}
	var refused []string
	for _, c := range clients {
		var states []string
		for _, ty := range c.Types {
			states = append(states, ty.short()+": "+ty.State())
			for name, why := range ty.Rejected {
				refused = append(refused, fmt.Sprintf("%s refuses %s %s: %s", nodeName(c.Node), ty.short(), name, why))
			}
		}
		t.add(nodeName(c.Node), c.Peer, c.Istiod, c.Address, c.Connected.UTC().Format(time.RFC3339), strings.Join(states, ", "))
	}
	t.sort()
	if err := t.print(out); err != nil {
		return err
	}
	slices.Sort(refused)
	for i, line := range refused {
		if i == 0 {
			fmt.Fprintln(out)
		}
		fmt.Fprintln(out, line)
	}
	return nil
}

// nodeName is name.namespace of a node id as proxies give it: type~address~name.namespace~domain.
func nodeName(id string) string {
	if parts := strings.Split(id, "~"); len(parts) == 4 {
		return parts[2]
	}
	return id
}
