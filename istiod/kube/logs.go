package kube

import (
	"context"
	"fmt"

	"github.com/go-logr/logr"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"k8s.io/klog/v2"
)

// withLog makes client-go log to log: what it tells is of interest when something else went wrong, so it is told at
// level debug.
func withLog(ctx context.Context, log *zap.Logger) context.Context {
	return klog.NewContext(ctx, logr.New(&sink{log: log.Named("client-go").WithOptions(zap.WithCaller(false))}))
}

// sink is a logr.LogSink.
type sink struct{ log *zap.Logger }

func (s *sink) Init(logr.RuntimeInfo) {}

// Enabled leaves out what client-go considers chatter.
func (s *sink) Enabled(level int) bool { return level <= 2 && s.log.Core().Enabled(zapcore.DebugLevel) }

func (s *sink) Info(_ int, msg string, kv ...any) { s.log.Debug(msg, pairs(kv)...) }

func (s *sink) Error(err error, msg string, kv ...any) {
	s.log.Debug(msg, append(pairs(kv), zap.Error(err))...)
}

func (s *sink) WithValues(kv ...any) logr.LogSink { return &sink{log: s.log.With(pairs(kv)...)} }

func (s *sink) WithName(name string) logr.LogSink { return &sink{log: s.log.Named(name)} }

func pairs(kv []any) []zap.Field {
	fields := make([]zap.Field, 0, len(kv)/2)
	for i := 0; i+1 < len(kv); i += 2 {
		fields = append(fields, zap.Any(fmt.Sprint(kv[i]), kv[i+1]))
	}
	return fields
}
