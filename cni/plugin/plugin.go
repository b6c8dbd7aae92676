package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"go.uber.org/zap"
)

// Timeout is how long the plugin waits for the agent's answer.
const Timeout = 5 * time.Second

// Main is the body of the plugin's main function. It exits 0, or 1 with a CNI error on standard output.
func Main() {
	skel.PluginMainFuncs(Funcs(os.Stdout), Versions(), "Mistnet CNI plugin: enrols pods in the mesh")
}

// Versions are those of the CNI specification the plugin speaks.
func Versions() version.PluginInfo { return version.PluginSupports("0.3.1", "0.4.0", "1.0.0", "1.1.0") }

// Funcs are the plugin's commands. Results go to out.
func Funcs(out io.Writer) skel.CNIFuncs {
	return skel.CNIFuncs{
		Add:    func(args *skel.CmdArgs) error { return add(args, out) },
		Del:    del,
		Check:  check,
		GC:     gc,
		Status: status,
	}
}

// add reports a pod that is about to start and waits for the agent to have it ready.
func add(args *skel.CmdArgs, out io.Writer) error {
	c, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	if c.PrevResult == nil {
		return types.NewError(types.ErrInvalidNetworkConfig,
			"no prevResult: this plugin must come after the one that makes the pod's interface", "")
	}
	result, err := c.result()
	if err != nil {
		return err
	}
	if err := tell(args, c, PathAdd, "ADD"); err != nil {
		return err
	}
	_, err = out.Write(result)
	return err
}

// check asks the agent whether the pod still is as ADD left it.
func check(args *skel.CmdArgs) error {
	c, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	if c.PrevResult == nil {
		return types.NewError(types.ErrInvalidNetworkConfig, "no prevResult to check against", "")
	}
	return tell(args, c, PathCheck, "CHECK")
}

func tell(args *skel.CmdArgs, c *Conf, path, command string) error {
	pod, err := parseArgs(args.Args)
	if err != nil {
		return err
	}
	log := c.log(pod, args).With(zap.String("command", command))
	if why := c.skips(pod); why != "" {
		log.Debug("pod skipped", zap.String("reason", why))
		return nil
	}
	ips, err := c.ips()
	if err != nil {
		return err
	}
	began := time.Now()
	err = c.call(http.MethodPost, path, event(args, pod, ips))
	if err != nil {
		log.Error("agent refused or did not answer", zap.Error(err), zap.Duration("duration", time.Since(began)))
		return types.NewError(types.ErrTryAgainLater,
			fmt.Sprintf("mesh agent cannot take pod %s/%s, try again later", pod.namespace, pod.name), err.Error())
	}
	log.Info("agent answered", zap.Duration("duration", time.Since(began)))
	return nil
}

// del reports a pod that is gone. It succeeds whatever happens: a pod must be able to end without an agent, which finds
// out by itself when it is back.
func del(args *skel.CmdArgs) error {
	c, err := parseConf(args.StdinData)
	if err != nil {
		return nil
	}
	pod, err := parseArgs(args.Args)
	if err != nil || c.skips(pod) != "" {
		return nil
	}
	log := c.log(pod, args).With(zap.String("command", "DEL"))
	if err := c.call(http.MethodPost, PathDel, event(args, pod, nil)); err != nil {
		log.Warn("agent not told that the pod is gone", zap.Error(err))
		return nil
	}
	log.Info("agent told that the pod is gone")
	return nil
}

// gc tells the agent which attachments exist.
func gc(args *skel.CmdArgs) error {
	c, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	var v Valid
	for _, a := range c.ValidAttachments {
		v.Attachments = append(v.Attachments, Attachment{ContainerID: a.ContainerID, IfName: a.IfName})
	}
	if err := c.call(http.MethodPost, PathGC, v); err != nil {
		return types.NewError(types.ErrTryAgainLater, "mesh agent cannot collect garbage", err.Error())
	}
	return nil
}

// status reports whether ADD would find the agent ready.
func status(args *skel.CmdArgs) error {
	c, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	if c.AmbientEnabled != nil && !*c.AmbientEnabled {
		return nil
	}
	if err := c.call(http.MethodGet, PathStatus, nil); err != nil {
		return types.NewError(types.ErrPluginNotAvailable, "mesh agent is not ready", err.Error())
	}
	return nil
}

func event(args *skel.CmdArgs, pod podArgs, ips []IP) Event {
	return Event{
		Netns: args.Netns, PodName: pod.name, PodNamespace: pod.namespace, PodUID: pod.uid,
		ContainerID: args.ContainerID, IfName: args.IfName, IPs: ips,
	}
}

// maxAnswerBytes bounds how much of the agent's explanation ends in an error.
const maxAnswerBytes = 1 << 10

// call makes one request of the agent. Any answer but 200 is an error with the agent's words.
func (c *Conf) call(method, path string, body any) error {
	ctx, cancel := context.WithTimeout(context.Background(), Timeout)
	defer cancel()
	var payload io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
		payload = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://unix"+path, payload)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", c.socket())
		},
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("call agent at %s (is cni-agent running?): %w", c.socket(), err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	why, _ := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes))
	return fmt.Errorf("agent answers %s: %s", resp.Status, strings.TrimSpace(string(why)))
}
