package daemon

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// LogOptions say how a program logs.
type LogOptions struct {
	Level  string // debug, info, warn or error; name=level after a comma sets one logger
	Format string // plain (tab-separated, as Istio's ztunnel writes) or json
}

// NewLogger returns a logger that writes to out, and the level it can be changed by.
func NewLogger(out io.Writer, o LogOptions) (*zap.Logger, zap.AtomicLevel, error) {
	level := zap.NewAtomicLevel()
	scoped := make(map[string]zapcore.Level)
	for part := range strings.SplitSeq(o.Level, ",") {
		name, value, named := strings.Cut(strings.TrimSpace(part), "=")
		if !named {
			value = name
		}
		l, err := parseLevel(value)
		if err != nil {
			return nil, level, err
		}
		if named {
			scoped[name] = l
			continue
		}
		level.SetLevel(l)
	}
	sink := zapcore.Lock(zapcore.AddSync(out))
	switch o.Format {
	case "json":
		cfg := zapcore.EncoderConfig{
			TimeKey: "time", LevelKey: "level", NameKey: "scope", MessageKey: "message",
			EncodeTime: zapcore.RFC3339NanoTimeEncoder, EncodeLevel: zapcore.LowercaseLevelEncoder,
			EncodeDuration: zapcore.StringDurationEncoder,
		}
		core := zapcore.NewCore(zapcore.NewJSONEncoder(cfg), sink, zapcore.DebugLevel)
		return zap.New(&scopedCore{Core: core, level: level, scoped: scoped}), level, nil
	case "plain", "":
		core := &plainCore{out: sink}
		return zap.New(&scopedCore{Core: core, level: level, scoped: scoped}), level, nil
	}
	return nil, level, fmt.Errorf("log format %q: want plain or json", o.Format)
}

func parseLevel(s string) (zapcore.Level, error) {
	switch s {
	case "":
		return zapcore.InfoLevel, nil
	case "off":
		return zapcore.FatalLevel + 1, nil
	case "trace":
		return zapcore.DebugLevel, nil
	}
	l, err := zapcore.ParseLevel(s)
	if err != nil {
		return l, fmt.Errorf("log level %q: want debug, info, warn, error or off", s)
	}
	return l, nil
}

// scopedCore lets each named logger have a level of its own.
type scopedCore struct {
	zapcore.Core
	level  zap.AtomicLevel
	scoped map[string]zapcore.Level
}

func (c *scopedCore) Enabled(l zapcore.Level) bool {
	if c.level.Enabled(l) {
		return true
	}
	for _, s := range c.scoped {
		if s.Enabled(l) {
			return true
		}
	}
	return false
}

func (c *scopedCore) With(fields []zapcore.Field) zapcore.Core {
	return &scopedCore{Core: c.Core.With(fields), level: c.level, scoped: c.scoped}
}

func (c *scopedCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	enabled := c.level.Enabled(e.Level)
	if l, ok := c.scoped[e.LoggerName]; ok {
		enabled = l.Enabled(e.Level)
	}
	if !enabled {
		return ce
	}
	return ce.AddCore(e, c.Core)
}

// plainCore writes time, level, scope and message separated by tabs, then key=value pairs with strings quoted.
type plainCore struct {
	out    zapcore.WriteSyncer
	fields []zapcore.Field
}

var lines = sync.Pool{New: func() any { b := make([]byte, 0, 512); return &b }}

func (c *plainCore) Enabled(zapcore.Level) bool { return true }

func (c *plainCore) With(fields []zapcore.Field) zapcore.Core {
	all := append(append(make([]zapcore.Field, 0, len(c.fields)+len(fields)), c.fields...), fields...)
	return &plainCore{out: c.out, fields: all}
}

func (c *plainCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	return ce.AddCore(e, c)
}

func (c *plainCore) Sync() error { return c.out.Sync() }

func (c *plainCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	p := lines.Get().(*[]byte)
	b := e.Time.UTC().AppendFormat((*p)[:0], "2006-01-02T15:04:05.000000Z")
	b = append(append(append(b, '\t'), e.Level.String()...), '\t')
	b = append(append(append(b, e.LoggerName...), '\t'), e.Message...)
	sep := byte('\t')
	for _, list := range [][]zapcore.Field{c.fields, fields} {
		for i := range list {
			if list[i].Type == zapcore.SkipType {
				continue
			}
			b = appendField(append(b, sep), &list[i])
			sep = ' '
		}
	}
	b = append(b, '\n')
	_, err := c.out.Write(b)
	*p = b
	lines.Put(p)
	return err
}

func appendField(b []byte, f *zapcore.Field) []byte {
	b = append(append(b, f.Key...), '=')
	switch f.Type {
	case zapcore.StringType:
		return strconv.AppendQuote(b, f.String)
	case zapcore.Int64Type, zapcore.Int32Type, zapcore.Int16Type, zapcore.Int8Type:
		return strconv.AppendInt(b, f.Integer, 10)
	case zapcore.Uint64Type, zapcore.Uint32Type, zapcore.Uint16Type, zapcore.Uint8Type:
		return strconv.AppendUint(b, uint64(f.Integer), 10)
	case zapcore.BoolType:
		return strconv.AppendBool(b, f.Integer == 1)
	case zapcore.DurationType:
		return strconv.AppendQuote(b, time.Duration(f.Integer).String())
	case zapcore.ErrorType:
		return strconv.AppendQuote(b, f.Interface.(error).Error())
	}
	m := zapcore.NewMapObjectEncoder()
	f.AddTo(m)
	if s, ok := m.Fields[f.Key].(string); ok {
		return strconv.AppendQuote(b, s)
	}
	return strconv.AppendQuote(b, fmt.Sprint(m.Fields[f.Key]))
}
