package scenario

import (
	"math"
	"math/rand/v2"
	"slices"
)

// Median is the middle of xs, the mean of the two middles of an even number, NaN of none. xs is not changed.
func Median(xs []float64) float64 {
	if len(xs) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(xs))
	if mid := len(s) / 2; len(s)%2 == 1 {
		return s[mid]
	}
	return (s[len(s)/2-1] + s[len(s)/2]) / 2
}

// resamples is how many times Ratio draws from its blocks.
const resamples = 10_000

// Estimate is a ratio with its 95 % interval.
type Estimate struct{ Ratio, Low, High float64 }

// Ratio estimates ours ÷ theirs from paired blocks: the exponential of the median of the logarithms, and a percentile bootstrap
// over the blocks. Pairs that are not positive have no logarithm and must have been left out. With fewer than two pairs there is
// no interval: Low and High are the ratio.
func Ratio(ours, theirs []float64, rng *rand.Rand) Estimate {
	logs := make([]float64, len(ours))
	for i := range ours {
		logs[i] = math.Log(ours[i] / theirs[i])
	}
	mid := math.Exp(Median(logs))
	if len(logs) < 2 {
		return Estimate{Ratio: mid, Low: mid, High: mid}
	}
	medians := make([]float64, resamples)
	draw := make([]float64, len(logs))
	for i := range medians {
		for j := range draw {
			draw[j] = logs[rng.IntN(len(logs))]
		}
		medians[i] = Median(draw)
	}
	slices.Sort(medians)
	at := func(q float64) float64 { return math.Exp(medians[int(q*float64(resamples-1))]) }
	return Estimate{Ratio: mid, Low: at(0.025), High: at(0.975)}
}
