package lab

import (
	"strings"
	"syscall"
	"testing"
)

func TestTooFewInotifyInstancesAreSaidSo(t *testing.T) {
	t.Parallel()
	left := 3
	open := func(int) (int, error) { // files instead: the machine's instances are not for tests to use up
		if left == 0 {
			return -1, syscall.EMFILE
		}
		left--
		return syscall.Open("/dev/null", syscall.O_CLOEXEC, 0)
	}
	if err := checkInotify(3, open); err != nil {
		t.Error(err)
	}
	left = 3
	if err := checkInotify(4, open); err == nil || !strings.Contains(err.Error(), "gives 3 more") ||
		!strings.Contains(err.Error(), "fs.inotify.max_user_instances") {
		t.Errorf("of 4 instances there are 3, and it says: %v", err)
	}
}
