package load

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"
)

// tick is the unit of /proc/stat and /proc/PID/stat: USER_HZ, 100 on every Linux that Go runs on (proc(5)).
const tick = 10 * time.Millisecond

// System is a reading of the machine's CPU counters since boot, summed over CPUs processors.
type System struct {
	CPUs        int
	Idle, Steal time.Duration // Idle includes waiting for disks
}

// ParseSystem reads the text of /proc/stat (proc(5)).
func ParseSystem(text string) (System, error) {
	var s System
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 0 || !strings.HasPrefix(f[0], "cpu") {
			continue
		}
		if f[0] != "cpu" {
			s.CPUs++
			continue
		}
		if len(f) < 9 {
			return System{}, fmt.Errorf("/proc/stat: %d fields in the cpu line, want at least 9", len(f))
		}
		var ticks [3]int64 // idle, iowait, steal
		for i, at := range []int{4, 5, 8} {
			n, err := strconv.ParseInt(f[at], 10, 64)
			if err != nil {
				return System{}, fmt.Errorf("/proc/stat: field %d: %w", at, err)
			}
			ticks[i] = n
		}
		s.Idle = time.Duration(ticks[0]+ticks[1]) * tick
		s.Steal = time.Duration(ticks[2]) * tick
	}
	if s.CPUs == 0 {
		return System{}, errors.New("/proc/stat: no processor in it")
	}
	return s, nil
}

// Process is a reading of one process.
type Process struct {
	PID, Parent int
	CPU         time.Duration // user and system time of all its threads, those that ended too
}

// ParseProcess reads the text of /proc/PID/stat. The command name in it may hold spaces and brackets (proc(5)).
func ParseProcess(text string) (Process, error) {
	open, shut := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
	if open < 1 || shut < open {
		return Process{}, errors.New("/proc/PID/stat: no command in brackets")
	}
	f := strings.Fields(text[shut+1:]) // f[0] is field 3, the state
	if len(f) < 13 {
		return Process{}, fmt.Errorf("/proc/PID/stat: %d fields after the command, want at least 13", len(f))
	}
	var n [4]int64
	for i, s := range []string{strings.TrimSpace(text[:open]), f[1], f[11], f[12]} {
		v, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return Process{}, fmt.Errorf("/proc/PID/stat: %w", err)
		}
		n[i] = v
	}
	return Process{PID: int(n[0]), Parent: int(n[1]), CPU: time.Duration(n[2]+n[3]) * tick}, nil
}

// Family returns the CPU time of each of roots and of all their descendants among all.
func Family(all []Process, roots []int) map[int]time.Duration {
	children := make(map[int][]Process)
	byPID := make(map[int]Process)
	for _, p := range all {
		children[p.Parent] = append(children[p.Parent], p)
		byPID[p.PID] = p
	}
	got := make(map[int]time.Duration)
	var walk func(Process)
	walk = func(p Process) {
		if _, seen := got[p.PID]; seen {
			return
		}
		got[p.PID] = p.CPU
		for _, c := range children[p.PID] {
			walk(c)
		}
	}
	for _, pid := range roots {
		if p, ok := byPID[pid]; ok {
			walk(p)
		}
	}
	return got
}

// ParseMemory reads the bytes of anonymous memory out of the text of /proc/PID/smaps_rollup (proc(5)).
func ParseMemory(text string) (int64, error) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) != 3 || f[0] != "Pss_Anon:" || f[2] != "kB" {
			continue
		}
		n, err := strconv.ParseInt(f[1], 10, 64)
		return n << 10, err
	}
	return 0, errors.New("/proc/PID/smaps_rollup: no Pss_Anon in it")
}

// readMemory sums the anonymous memory of roots and all their descendants.
func readMemory(roots []int) (int64, error) {
	family, err := readFamily(roots)
	if err != nil {
		return 0, err
	}
	var sum int64
	for pid := range family {
		text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/smaps_rollup")
		if err != nil {
			return 0, err
		}
		n, err := ParseMemory(string(text))
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

func readSystem() (System, error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return System{}, err
	}
	return ParseSystem(string(text))
}

func readFamily(roots []int) (map[int]time.Duration, error) {
	if len(roots) == 0 {
		return nil, nil
	}
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var all []Process
	for _, d := range dirs {
		if _, err := strconv.Atoi(d.Name()); err != nil {
			continue
		}
		text, err := os.ReadFile("/proc/" + d.Name() + "/stat")
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			continue // ESRCH: it ended while we looked
		}
		p, err := ParseProcess(string(text))
		if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return Family(all, roots), nil
}

// window brackets the measured part of a slice. The machine's counters are read last when it opens and first when it closes.
type window struct {
	pids  []int
	procs map[int]time.Duration
	sys   System
	start time.Time
}

func openWindow(pids []int) (*window, error) {
	procs, err := readFamily(pids)
	if err != nil {
		return nil, err
	}
	sys, err := readSystem()
	return &window{pids: pids, procs: procs, sys: sys, start: time.Now()}, err
}

// close returns a Report with the times filled in.
func (w *window) close() (Report, error) {
	elapsed := time.Since(w.start)
	sys, err := readSystem()
	if err != nil {
		return Report{}, err
	}
	procs, err := readFamily(w.pids)
	if err != nil {
		return Report{}, err
	}
	r := Report{Elapsed: elapsed, CPUs: sys.CPUs, Steal: sys.Steal - w.sys.Steal}
	// Idle time is kept exactly by a tickless kernel, while user and system time are sampled: busy is what is not idle.
	r.Busy = max(time.Duration(sys.CPUs)*elapsed-(sys.Idle-w.sys.Idle)-r.Steal, 0)
	for pid, cpu := range procs {
		r.Procs += cpu - w.procs[pid]
	}
	return r, nil
}
