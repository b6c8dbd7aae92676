// Command h2spec runs the conformance tests of summerwind/h2spec against a server of HTTP/2 without TLS, the strict ones too, and
// fails when one of them does. The waypoint's tests build it: go -C tools build ./h2spec
package main

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/summerwind/h2spec"
	"github.com/summerwind/h2spec/config"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: h2spec HOST:PORT [SECTION...]")
		os.Exit(2)
	}
	ok, err := run(os.Args[1], os.Args[2:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "h2spec:", err)
	}
	if !ok {
		os.Exit(1)
	}
}

// run runs the tests of these sections, or all, and reports whether they passed.
func run(addr string, sections []string) (bool, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return false, err
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		return false, fmt.Errorf("port of %s: %w", addr, err)
	}
	return h2spec.Run(&config.Config{
		Host: host, Port: n, Path: "/", Timeout: 5 * time.Second, MaxHeaderLen: 4000, Strict: true, Sections: sections,
	})
}
