package inspect

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"sigs.k8s.io/yaml"
)

// Filter picks what is shown; a zero field picks everything.
type Filter struct {
	Namespace string // of workloads, services, policies and pods
	Node      string // of workloads
}

func (f Filter) namespace(ns string) bool { return f.Namespace == "" || f.Namespace == ns }

// Parts are the names of what can be shown of a ztunnel, and the keys they have in its dump.
var Parts = map[string]string{
	"workload": "workloads", "service": "services", "policy": "policies", "certificate": "certificates", "connections": "workloadState",
}

// order is how "all" shows them.
var order = []string{"workload", "service", "policy", "certificate", "connections"}

// Print writes one part of the dump, or "all", as a table. now decides which certificates are valid.
func (d *Dump) Print(out io.Writer, part string, f Filter, now time.Time) error {
	if part == "all" {
		for i, p := range order {
			if i > 0 {
				fmt.Fprintln(out)
			}
			if err := d.Print(out, p, f, now); err != nil {
				return err
			}
		}
		return nil
	}
	var t table
	switch part {
	case "workload":
		t = d.workloads(f)
	case "service":
		t = d.services(f)
	case "policy":
		t = d.policies(f)
	case "certificate":
		t = d.certificates(now)
	case "connections":
		t = d.connections(f)
	default:
		return fmt.Errorf("there is no part %q of a ztunnel", part)
	}
	return t.print(out)
}

// PrintRaw writes one part, or "all", as the ztunnel told it, in JSON or YAML.
func (d *Dump) PrintRaw(out io.Writer, part, format string) error {
	var raw []byte
	if part == "all" {
		b, err := json.Marshal(d.parts)
		if err != nil {
			return err
		}
		raw = b
	} else if raw = d.parts[Parts[part]]; raw == nil {
		raw = []byte("null")
	}
	if format == "yaml" {
		b, err := yaml.JSONToYAML(raw)
		if err != nil {
			return err
		}
		_, err = out.Write(b)
		return err
	}
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, raw, "", "  "); err != nil {
		return err
	}
	pretty.WriteByte('\n')
	_, err := out.Write(pretty.Bytes())
	return err
}

// table is rows of cells under a head.
type table struct {
	head []string
	rows [][]string
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

func (t *table) sort() {
	slices.SortFunc(t.rows, func(a, b []string) int { return slices.Compare(a, b) })
}

func (t *table) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 8, 1, ' ', 0)
	for _, row := range append([][]string{t.head}, t.rows...) {
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	return w.Flush()
}

func (d *Dump) workloads(f Filter) table {
	t := table{head: []string{"NAMESPACE", "POD NAME", "ADDRESS", "NODE", "WAYPOINT", "PROTOCOL"}}
	for _, w := range d.Workloads {
		if !f.namespace(w.Namespace) || f.Node != "" && f.Node != w.Node {
			continue
		}
		t.add(w.Namespace, w.Name, strings.Join(w.WorkloadIPs, ","), w.Node, d.waypointName(w.Waypoint), cmp.Or(w.Protocol, "TCP"))
	}
	t.sort()
	return t
}

func (d *Dump) services(f Filter) table {
	t := table{head: []string{"NAMESPACE", "SERVICE NAME", "SERVICE VIP", "WAYPOINT", "ENDPOINTS"}}
	for _, s := range d.Services {
		if !f.namespace(s.Namespace) {
			continue
		}
		var vips []string
		for _, vip := range s.VIPs {
			_, addr, _ := strings.Cut(vip, "/")
			vips = append(vips, addr)
		}
		healthy := 0
		for _, ep := range s.Endpoints {
			if ep.Status == "" || ep.Status == "Healthy" {
				healthy++
			}
		}
		t.add(s.Namespace, s.Name, strings.Join(vips, ","), d.waypointName(s.Waypoint), fmt.Sprintf("%d/%d", healthy, len(s.Endpoints)))
	}
	t.sort()
	return t
}

func (d *Dump) policies(f Filter) table {
	t := table{head: []string{"NAMESPACE", "POLICY NAME", "ACTION", "SCOPE"}}
	for _, p := range d.Policies {
		if !f.namespace(p.Namespace) {
			continue
		}
		action := p.Action
		switch {
		case p.Invalid != "":
			action = "DENY (invalid: " + p.Invalid + ")"
		case p.DryRun:
			action += " (dry run)"
		}
		t.add(p.Namespace, p.Name, action, p.Scope)
	}
	t.sort()
	return t
}

func (d *Dump) certificates(now time.Time) table {
	t := table{head: []string{"CERTIFICATE NAME", "TYPE", "STATUS", "VALID CERT", "SERIAL NUMBER", "NOT AFTER", "NOT BEFORE"}}
	certs := slices.SortedFunc(slices.Values(d.Certificates), func(a, b Certificate) int { return cmp.Compare(a.Identity, b.Identity) })
	for _, c := range certs {
		add := func(kind string, x X509) {
			valid := now.After(x.ValidFrom) && now.Before(x.ExpirationTime)
			t.add(c.Identity, kind, c.State, strconv.FormatBool(valid), x.SerialNumber,
				x.ExpirationTime.UTC().Format(time.RFC3339), x.ValidFrom.UTC().Format(time.RFC3339))
		}
		for i, x := range c.CertChain {
			if i == 0 {
				add("Leaf", x)
			} else {
				add("Intermediate", x)
			}
		}
		for _, x := range c.RootCerts {
			add("Root", x)
		}
		if len(c.CertChain) == 0 {
			t.add(c.Identity, "NA", c.State, "false", "NA", "NA", "NA")
		}
	}
	return t
}

func (d *Dump) connections(f Filter) table {
	t := table{head: []string{"WORKLOAD", "DIRECTION", "LOCAL", "REMOTE", "REMOTE TARGET", "PROTOCOL"}}
	names := make(map[string]string) // address → namespace/name
	for _, w := range d.Workloads {
		for _, ip := range w.WorkloadIPs {
			names[ip] = w.Namespace + "/" + w.Name
		}
	}
	named := func(addr string) string {
		if addr == "invalid AddrPort" { // how Go writes that there is none
			return ""
		}
		i := strings.LastIndexByte(addr, ':')
		if i < 0 {
			return addr
		}
		if name := names[strings.Trim(addr[:i], "[]")]; name != "" {
			return name + addr[i:]
		}
		return addr
	}
	for _, uid := range slices.Sorted(maps.Keys(d.WorkloadState)) {
		p := d.WorkloadState[uid]
		if !f.namespace(p.Info.Namespace) {
			continue
		}
		who := p.Info.Namespace + "/" + p.Info.Name
		for _, c := range p.Connections.Inbound {
			t.add(who, "Inbound", named(c.ActualDst), named(c.Src), "", c.Protocol)
		}
		for _, c := range p.Connections.Outbound {
			t.add(who, "Outbound", named(c.Src), named(c.ActualDst), named(c.OriginalDst), c.Protocol)
		}
	}
	t.sort()
	return t
}
