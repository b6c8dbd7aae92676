package waypoint

import (
	"io"
	"testing"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/accesslog"
)

// TestFormatsHaveSessionsNote: what no format asks for is not looked at.
func TestFormatsHaveSessionsNote(t *testing.T) {
	t.Parallel()
	s := &session{tunnel: &tunnel{Waypoint: &Waypoint{rep: newReporter(reportConfig{out: io.Discard}, zap.NewNop())}}}
	s.noteNothing()
	if s.note(accesslog.Request, nil, nil); s.log.headers != nil || s.notes != nil {
		t.Error("headers are noted that nobody asked for")
	}
}
