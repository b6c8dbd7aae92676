// Command cni-plugin is the CNI plugin that container runtimes call for every pod; see package plugin.
package main

import "github.com/mistnet/mistnet/cni/plugin"

func main() { plugin.Main() }
