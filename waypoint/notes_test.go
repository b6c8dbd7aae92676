package waypoint

import (
	"io"
	"testing"

	"github.com/mistnet/mistnet/waypoint/report"

	"go.uber.org/zap"

	"github.com/mistnet/mistnet/internal/accesslog"
)

// TestFormatsHaveSessionsNote: what no format asks for is not looked at.
func TestFormatsHaveSessionsNote(t *testing.T) {
	t.Parallel()
	s := &session{tunnel: &tunnel{Waypoint: &Waypoint{rep: report.New(report.Config{Out: io.Discard}, zap.NewNop())}}}
	s.noteNothing()
	if s.note(accesslog.Request, nil, nil); s.log.Headers != nil || s.notes != nil {
		t.Error("headers are noted that nobody asked for")
	}
}
