package plugin

import (
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/skel"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// maxLogBytes bounds the log file together with its predecessor.
const maxLogBytes = 10 << 20

// log returns a logger that writes to the log file. Standard error is not an option: runtimes throw it away.
func (c *Conf) log(pod podArgs, args *skel.CmdArgs) *zap.Logger {
	level, err := zapcore.ParseLevel(c.LogLevel)
	if err != nil || c.LogLevel == "" {
		level = zapcore.InfoLevel
	}
	encoder := zapcore.NewJSONEncoder(zapcore.EncoderConfig{
		TimeKey: "time", LevelKey: "level", NameKey: "scope", MessageKey: "message",
		EncodeTime: zapcore.RFC3339NanoTimeEncoder, EncodeLevel: zapcore.LowercaseLevelEncoder,
		EncodeDuration: zapcore.StringDurationEncoder,
	})
	return zap.New(zapcore.NewCore(encoder, rollingFile{path: c.LogFile, maxBytes: maxLogBytes}, level)).Named("cni").With(
		zap.String("pod.namespace", pod.namespace), zap.String("pod.name", pod.name),
		zap.String("container.id", args.ContainerID), zap.String("netns", args.Netns))
}

// rollingFile appends to a file that many processes share, and renames it to path.1 when it holds half of maxBytes. It
// never fails: a full disk costs lines of the log and nothing else.
type rollingFile struct {
	path     string
	maxBytes int64
}

func (r rollingFile) Write(line []byte) (int, error) {
	if st, err := os.Stat(r.path); err == nil && st.Size()+int64(len(line)) > r.maxBytes/2 {
		// Two processes may both come here: the later one then renames a young file, which loses old lines and
		// keeps the bound.
		_ = os.Rename(r.path, r.path+".1")
	}
	f, err := os.OpenFile(r.path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o640)
	if err != nil {
		if err := os.MkdirAll(filepath.Dir(r.path), 0o755); err != nil {
			return len(line), nil
		}
		if f, err = os.OpenFile(r.path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o640); err != nil {
			return len(line), nil
		}
	}
	_, _ = f.Write(line) // one write, so that lines of two processes do not mix
	_ = f.Close()
	return len(line), nil
}

func (r rollingFile) Sync() error { return nil }
