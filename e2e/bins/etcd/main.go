// Command etcd is etcd's server. Its own module has replace directives, which keep it from being built by version; this
// main package is the same two lines in a module that can be pinned.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
