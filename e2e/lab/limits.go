package lab

import (
	"fmt"
	"os"
	"strings"
	"syscall"
)

// inotifyInstances is about how many a lab of that many nodes opens, with the mesh in it: counted on a running one.
func inotifyInstances(nodes int) int { return 12 + 11*nodes }

// checkInotify is an error when open, inotify_init1, would not give that many instances more. They are counted per user, and root's
// 128 do for four labs; in a fifth kubelets end over and over, and say "too many open files", which is not what it is.
func checkInotify(want int, open func(flags int) (fd int, err error)) error {
	for have := range want {
		fd, err := open(syscall.IN_CLOEXEC)
		if err != nil {
			limit, _ := os.ReadFile("/proc/sys/fs/inotify/max_user_instances")
			return fmt.Errorf("the kernel gives %d more inotify instances and a lab needs about %d: take another lab down, or raise fs.inotify.max_user_instances from %s (sysctl -w)",
				have, want, strings.TrimSpace(string(limit)))
		}
		defer syscall.Close(fd)
	}
	return nil
}
