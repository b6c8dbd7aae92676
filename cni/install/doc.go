// Package install puts the CNI plugin on a host: its binary into the runtime's plugin directory and its entry at the end
// of the chain the runtime uses. Removal restores every byte of what was there before.
//
// It hides how runtimes choose among configuration files, the older form of a configuration with one plugin, and
// atomic replacement. It does not know what the plugin does.
package install
