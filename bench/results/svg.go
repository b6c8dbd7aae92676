package results

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// The chart's measures, in pixels.
const (
	chartWidth  = 960
	labelWidth  = 200
	rightWidth  = 150
	rowHeight   = 22
	groupHeight = 34
	topHeight   = 84
)

// Colours of the verdicts; each also has a shape of its own, for readers who see colours differently.
var verdictColour = map[Verdict]string{Win: "#1a7f4b", Tie: "#5a6472", Unclear: "#5a6472", Loss: "#b3261e"}

// SVG is a chart of the ratios to the proxies: a point and its interval for each, on a logarithmic axis, better always to the right. A metric
// of which less is better is drawn as theirs ÷ ours, so that right of 1 is good throughout; the number beside it stays ours ÷ theirs.
func SVG(r Run) string {
	// The path without a proxy is no peer, and so far off that it would squeeze the axis: it is in the tables.
	rows := slices.DeleteFunc(slices.Clone(r.Rows), func(w Row) bool { return w.Contender == "direct" })
	groups := 0
	for i, w := range rows {
		if i == 0 || group(w) != group(rows[i-1]) {
			groups++
		}
	}
	height := topHeight + len(rows)*rowHeight + groups*groupHeight + 30
	ax := axisOf(rows)
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="Helvetica, Arial, sans-serif" font-size="12">`+"\n",
		chartWidth, height, chartWidth, height)
	fmt.Fprintf(&b, `<title>%s against its peers</title>`+"\n", html.EscapeString(r.Base))
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", chartWidth, height)
	fmt.Fprintf(&b, `<text x="20" y="28" font-size="17" font-weight="bold" fill="#1c2430">%s against its peers, same machine, same minutes</text>`+"\n", html.EscapeString(r.Base))
	b.WriteString(`<text x="20" y="48" fill="#5a6472">Times better (right of 1) or worse (left), with 95 % interval. The number at the right is the plain ratio ours ÷ theirs.</text>` + "\n")
	if len(rows) == 0 {
		b.WriteString(`<text x="20" y="74" fill="#1c2430">No ratios in this run.</text>` + "\n</svg>\n")
		return b.String()
	}
	bottom := height - 24
	for _, t := range ax.ticks() {
		x, colour, width := ax.at(t), "#e3e7ec", 1.0
		if t == 1 {
			colour, width = "#1c2430", 1.4
		}
		fmt.Fprintf(&b, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="%s" stroke-width="%.1f"/>`+"\n", x, topHeight-8, x, bottom, colour, width)
		for _, y := range []int{topHeight - 13, bottom + 15} {
			fmt.Fprintf(&b, `<text x="%.1f" y="%d" text-anchor="middle" fill="#5a6472" font-size="11">%g×</text>`+"\n", x, y, t)
		}
	}
	y := topHeight
	for i, w := range rows {
		if i == 0 || group(w) != group(rows[i-1]) {
			y += groupHeight
			fmt.Fprintf(&b, `<text x="20" y="%d" font-weight="bold" fill="#1c2430">%s</text>`+"\n", y-8, html.EscapeString(group(w)))
		}
		y += rowHeight
		writePoint(&b, ax, w, float64(y)-8)
	}
	b.WriteString("</svg>\n")
	return b.String()
}

func group(w Row) string { return w.Workload + ": " + Unit(w.Metric) }

// writePoint draws one row whose middle is at height y.
func writePoint(b *strings.Builder, ax axis, w Row, y float64) {
	colour := verdictColour[w.Verdict]
	lo, mid, hi := goodness(w)
	fmt.Fprintf(b, `<text x="%d" y="%.1f" text-anchor="end" fill="#1c2430">%s</text>`+"\n", labelWidth-14, y+4, html.EscapeString("against "+w.Contender))
	fmt.Fprintf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-width="2.4"/>`+"\n", ax.at(lo), y, ax.at(hi), y, colour)
	for _, end := range []float64{lo, hi} {
		fmt.Fprintf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-width="1.6"/>`+"\n", ax.at(end), y-4, ax.at(end), y+4, colour)
	}
	x := ax.at(mid)
	switch w.Verdict {
	case Win:
		fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="5" fill="%s"/>`+"\n", x, y, colour)
	case Loss:
		fmt.Fprintf(b, `<rect x="%.1f" y="%.1f" width="9" height="9" fill="%s"/>`+"\n", x-4.5, y-4.5, colour)
	default:
		fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="4.5" fill="#ffffff" stroke="%s" stroke-width="2"/>`+"\n", x, y, colour)
	}
	fmt.Fprintf(b, `<text x="%d" y="%.1f" fill="%s">%s  %s</text>`+"\n", chartWidth-rightWidth+24, y+4, colour, number(w.Ratio), html.EscapeString(string(w.Verdict)))
}

// goodness turns a ratio and its interval so that more is better.
func goodness(w Row) (low, mid, high float64) {
	if w.Better == Lower {
		return 1 / w.High, 1 / w.Ratio, 1 / w.Low
	}
	return w.Low, w.Ratio, w.High
}

// axis maps a ratio to a place: logarithmic between two bounds that hold 1, clipped outside.
type axis struct{ low, high float64 }

// axisOf holds all points, and intervals as far as a factor of 32 each way.
func axisOf(rows []Row) axis {
	ax := axis{low: 0.5, high: 2}
	for _, w := range rows {
		lo, _, hi := goodness(w)
		ax.low, ax.high = min(ax.low, lo*0.95), max(ax.high, hi*1.05)
	}
	return axis{low: max(ax.low, 1.0/32), high: min(ax.high, 32)}
}

func (ax axis) at(v float64) float64 {
	v = min(max(v, ax.low), ax.high)
	share := (math.Log(v) - math.Log(ax.low)) / (math.Log(ax.high) - math.Log(ax.low))
	return labelWidth + share*(chartWidth-labelWidth-rightWidth)
}

func (ax axis) ticks() []float64 {
	var ts []float64
	for _, t := range []float64{0.03125, 0.0625, 0.125, 0.25, 0.5, 0.7, 1, 1.4, 2, 3, 4, 8, 16, 32} {
		if t >= ax.low && t <= ax.high {
			ts = append(ts, t)
		}
	}
	return ts
}
