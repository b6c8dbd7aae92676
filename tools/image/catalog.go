package main

// image says what goes into one image.
type image struct {
	name     string
	title    string
	programs []program // the first one is the entry point
	user     string    // uid:gid the image runs as unless told otherwise
	licenses string    // SPDX expression

	packages []string          // distribution packages of which it executes something
	runs     []string          // what it executes of them and what that opens by name, as shell patterns
	links    map[string]string // symbolic links besides
}

// program is a Go program and its place in the image.
type program struct{ source, path string }

// Ids of Istio's images. ztunnel keeps uid 0, which its capabilities need to be effective, with the group that owns
// what it shares with nobody else.
const (
	istioUser = "1337:1337"
	proxyUser = "0:1337"
	rootUser  = "0:0"
	anyUser   = "65532:65532"
)

var catalog = []image{
	{
		name: "istiod", title: "Mistnet control plane", user: istioUser, licenses: "Apache-2.0",
		programs: []program{{"./cmd/istiod", "/usr/local/bin/istiod"}},
	},
	{
		name: "ztunnel", title: "Mistnet node proxy", user: proxyUser, licenses: "Apache-2.0",
		programs: []program{{"./cmd/ztunnel", "/usr/local/bin/ztunnel"}},
	},
	{
		name: "waypoint", title: "Mistnet L7 proxy", user: istioUser, licenses: "Apache-2.0",
		programs: []program{{"./cmd/waypoint", "/usr/local/bin/waypoint"}},
	},
	{
		name: "cni", title: "Mistnet CNI plugin and node agent", user: rootUser,
		licenses: "Apache-2.0 AND GPL-2.0-or-later AND LGPL-2.1-or-later AND MIT AND BSD-3-Clause", // libgmp: its GPL-2.0-or-later
		programs: []program{{"./cmd/cni-agent", "/usr/local/bin/cni-agent"}, {"./cmd/cni-plugin", "/opt/cni/bin/istio-cni"}},
		packages: []string{"iptables", "nftables"},
		// Sets of addresses are made over netlink: the ipset program is not needed. Every extension comes along, though
		// our rules need few: iptables cannot list a chain in which somebody else's rule uses one it does not have.
		runs:  []string{"/usr/sbin/xtables-nft-multi", "/usr/sbin/xtables-legacy-multi", "/usr/lib/*/xtables/*.so", "/usr/sbin/nft"},
		links: iptablesNames(),
	},
	{
		name: "demo-app", title: "Mistnet demo application", user: anyUser, licenses: "Apache-2.0",
		programs: []program{{"./cmd/demo-app", "/usr/local/bin/demo-app"}},
	},
}

// iptablesNames are the names by which the agent calls the two programs that have all of iptables in them. The plain
// ones mean nf_tables, as in the distribution.
func iptablesNames() map[string]string {
	names := make(map[string]string)
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, use := range []string{"", "-save", "-restore"} {
			names["/usr/sbin/"+family+use] = "xtables-nft-multi"
			names["/usr/sbin/"+family+"-nft"+use] = "xtables-nft-multi"
			names["/usr/sbin/"+family+"-legacy"+use] = "xtables-legacy-multi"
		}
	}
	return names
}

func imageNames() []string {
	var names []string
	for _, im := range catalog {
		names = append(names, im.name)
	}
	return names
}

// base is in every image: users, so that programs which look for their name find one, and a place for temporary files.
func base() tree {
	return tree{
		"/etc/passwd": file(0o644, "root:x:0:0:root:/:/sbin/nologin\nistio-proxy:x:1337:1337:istio-proxy:/:/sbin/nologin\n"+
			"nonroot:x:65532:65532:nonroot:/:/sbin/nologin\n"),
		"/etc/group": file(0o644, "root:x:0:\nistio-proxy:x:1337:\nnonroot:x:65532:\n"),
		"/run":       directory(0o755),
		"/tmp":       directory(0o1777),
		"/var/run":   directory(0o755),
	}
}
