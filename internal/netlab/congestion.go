package netlab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

const (
	sysctlAllowed   = "net.ipv4.tcp_allowed_congestion_control"
	sysctlAvailable = "net.ipv4.tcp_available_congestion_control"
	// allowedBefore holds the machine's own list while labs need a longer one.
	allowedBefore = ".allowed-congestion-control"
)

// allowCongestion lets every namespace use the algorithm. The list of those allowed is one for the whole machine; the
// first lab to lengthen it writes down what it was, and the last one to go puts it back.
func allowCongestion(s *state, algorithm string) error {
	available, err := readSysctl(sysctlAvailable)
	if err != nil {
		return err
	}
	if !slices.Contains(strings.Fields(available), algorithm) {
		return fmt.Errorf("congestion control %q is not available on this kernel, only %s", algorithm, available)
	}
	unlock, err := lock(s.root)
	if err != nil {
		return err
	}
	defer unlock()
	allowed, err := readSysctl(sysctlAllowed)
	if err != nil {
		return err
	}
	before := filepath.Join(s.root, allowedBefore)
	if slices.Contains(strings.Fields(allowed), algorithm) {
		if _, err := os.Stat(before); errors.Is(err, fs.ErrNotExist) {
			return nil // allowed by the machine itself
		}
		return s.update(func(s *state) { s.Congestion = algorithm })
	}
	if err := s.update(func(s *state) { s.Congestion = algorithm }); err != nil {
		return err
	}
	if _, err := os.Stat(before); errors.Is(err, fs.ErrNotExist) {
		if err := os.WriteFile(before, []byte(allowed), 0o600); err != nil {
			return err
		}
	}
	return writeSysctl(sysctlAllowed, allowed+" "+algorithm)
}

// restoreCongestion puts the machine's list back once no lab needs a longer one. The caller holds the lock.
func restoreCongestion(root string) error {
	before := filepath.Join(root, allowedBefore)
	old, err := os.ReadFile(before)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	all, err := states(root)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(all, func(s *state) bool { return s.Congestion != "" }) {
		return nil
	}
	if err := writeSysctl(sysctlAllowed, string(old)); err != nil {
		return err
	}
	return os.Remove(before)
}

// writeSysctl sets a value that may read back in another order.
func writeSysctl(name, value string) error {
	if err := os.WriteFile(sysctlPath(name), []byte(value), 0); err != nil {
		return fmt.Errorf("set %s=%s: %w", name, value, err)
	}
	return nil
}
