package cni

// PodOf and Oldest are what adoption finds pods by.
var PodOf = podOf

// Oldest returns only the processes' numbers.
func Oldest(proc string, uids map[string]bool) (map[string]int, error) {
	found, err := procDir(proc).oldest(uids)
	out := make(map[string]int, len(found))
	for uid, p := range found {
		out[uid] = p.pid
	}
	return out, err
}
