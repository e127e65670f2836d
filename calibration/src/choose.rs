//! From a histogram to an int8 range, by each [`Method`].
//!
//! Lives here: the histogram, the exact mean squared error of a range over it, and the search for the best
//! range. Never here: layers, channels, or how values were gathered. All arithmetic is f64 in a fixed order
//! with `libm`'s logarithm, so that the same histogram gives the same range on every machine.

use crate::table::{Method, Range, Ranges};

/// Bins of a histogram.
pub const BINS: usize = 2048;
/// Ranges below this are taken for zero: their scale's inverse, or its product with an input scale, might
/// not be finite.
const LEAST_EXTENT: f64 = 1e-30;
/// Candidates along one end of the range in one sweep.
const SWEEP: u32 = 64;
/// The entropy of ranges narrower than this many bins says nothing: every bin has a level of its own.
const ENTROPY_BINS: f64 = 256.0;

/// How often values fell into each of [`BINS`] equal parts of `lo ..= hi`.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    lo: f64,
    width: f64,
    counts: Vec<u64>,
}

impl Histogram {
    /// An empty histogram over `lo ..= hi`, widened to hold 0.
    #[must_use]
    pub fn new(lo: f32, hi: f32) -> Self {
        let (lo, hi) = (f64::from(lo.min(0.0)), f64::from(hi.max(0.0)));
        Self { lo, width: (hi - lo) / BINS as f64, counts: vec![0; BINS] }
    }

    /// The lower end of bin 0.
    #[must_use]
    pub fn lo(&self) -> f64 {
        self.lo
    }

    /// The upper end of the last bin.
    #[must_use]
    pub fn hi(&self) -> f64 {
        self.edge(BINS)
    }

    /// Bins for each unit of the value; 0 where the histogram has no extent.
    #[must_use]
    pub fn per_unit(&self) -> f64 {
        if self.is_point() { 0.0 } else { 1.0 / self.width }
    }

    /// Adds `n` values of bin `bin`; beyond the last, of the last.
    pub fn add(&mut self, bin: usize, n: u64) {
        self.counts[bin.min(BINS - 1)] += n;
    }

    /// Values in all.
    #[must_use]
    pub fn samples(&self) -> u64 {
        self.counts.iter().sum()
    }

    fn edge(&self, bin: usize) -> f64 {
        self.lo + self.width * bin as f64
    }

    /// Whether all values are (next to) 0, so that no range can be made of them.
    fn is_point(&self) -> bool {
        self.width * (BINS as f64) < LEAST_EXTENT
    }

    /// The mean squared error of `range`, rounding and clipping, of values spread evenly within each bin.
    ///
    /// With s the scale, the error's integral from 0 to x is `k·s³/12 + (x − k·s)³/3`, where k is the level
    /// of x (clamped to the range): k whole steps around as many levels, and what lies past the last.
    #[must_use]
    pub fn error(&self, scale: f32, zero_point: u8) -> f64 {
        let s = f64::from(scale);
        let (least, most) = (-f64::from(zero_point), f64::from(255 - zero_point));
        let inverse = 1.0 / s;
        let integral = |x: f64| {
            let k = nearest(x * inverse).clamp(least, most);
            let rest = x - k * s;
            k * (s * s * s) * (1.0 / 12.0) + rest * rest * rest * (1.0 / 3.0)
        };
        let mut below = integral(self.lo);
        let mut sum = 0.0;
        for (bin, &n) in self.counts.iter().enumerate() {
            let above = integral(self.edge(bin + 1));
            sum += n as f64 * (above - below);
            below = above;
        }
        (sum / (self.width * self.samples().max(1) as f64)).max(0.0)
    }

    /// The value below which the share `q` of all values lies.
    fn quantile(&self, q: f64) -> f64 {
        let wanted = q * self.samples() as f64;
        let mut below = 0.0;
        for (bin, &n) in self.counts.iter().enumerate() {
            let n = n as f64;
            if below + n >= wanted && n > 0.0 {
                return self.edge(bin) + self.width * ((wanted - below) / n).clamp(0.0, 1.0);
            }
            below += n;
        }
        self.hi()
    }
}

/// Sums over the bins at either end of a histogram, by which a range that clips too much is known without a
/// look at each bin.
struct Tails<'h> {
    histogram: &'h Histogram,
    /// Of bins `0 .. i`: how many values, and the sums of their bins' middles and of those squared.
    below: Vec<[f64; 3]>,
}

impl<'h> Tails<'h> {
    fn new(histogram: &'h Histogram) -> Self {
        let mut below = vec![[0.0; 3]];
        let mut sums = [0.0; 3];
        for (bin, &n) in histogram.counts.iter().enumerate() {
            let (n, x) = (n as f64, histogram.edge(bin) + histogram.width * 0.5);
            sums = [sums[0] + n, sums[1] + n * x, sums[2] + n * x * x];
            below.push(sums);
        }
        Self { histogram, below }
    }

    /// No more than the mean squared error that a range makes of values beyond its ends: that of a bin is at
    /// least the square of its middle's distance.
    fn clipping(&self, scale: f32, zero_point: u8) -> f64 {
        let h = self.histogram;
        let s = f64::from(scale);
        let (bottom, top) = (-s * f64::from(zero_point), s * f64::from(255 - zero_point));
        let bin = |x: f64| ((x - h.lo) / h.width).clamp(0.0, BINS as f64);
        // Whole bins below the bottom, and above the top.
        let (low, high) = (bin(bottom).floor() as usize, bin(top).ceil() as usize);
        let [all, low, high] = [BINS, low, high].map(|i| self.below[i]);
        let distance = |[n, x, xx]: [f64; 3], end: f64| xx - 2.0 * end * x + end * end * n;
        let above = [0, 1, 2].map(|i| all[i] - high[i]);
        (distance(low, bottom) + distance(above, top)) / all[0].max(1.0)
    }
}

/// The nearest integer, halves to even, of a number below 2⁵¹ in magnitude: added to a power of two so large
/// that only integers are left. One addition and one subtraction, where a call would cost more than the rest.
fn nearest(x: f64) -> f64 {
    const MAGIC: f64 = 6_755_399_441_055_744.0;
    (x + MAGIC) - MAGIC
}

/// What the divergences of a histogram's ranges have in common.
struct Entropy<'h> {
    histogram: &'h Histogram,
    total: f64,
    /// Of each bin: p · ln p of its share p.
    own: Vec<f64>,
}

impl<'h> Entropy<'h> {
    fn new(histogram: &'h Histogram) -> Self {
        let total = histogram.samples().max(1) as f64;
        let own = histogram.counts.iter().map(|&n| plogp(n as f64 / total)).collect();
        Self { histogram, total, own }
    }

    /// Kullback-Leibler divergence of the values' distribution P, those outside the range moved to its ends,
    /// from the one that the range's levels can tell apart, Q: each level's share of what lies inside,
    /// spread over those of its bins that have any (Migacz 2017, "8-bit inference with TensorRT").
    fn divergence(&self, scale: f32, zero_point: u8) -> f64 {
        /// Stands for the probability of what cannot occur.
        const NEVER: f64 = 1e-9;
        let h = self.histogram;
        let inverse = 1.0 / f64::from(scale);
        let level = |bin: usize| nearest((h.edge(bin) + h.width * 0.5) * inverse);
        let (least, most) = (-f64::from(zero_point), f64::from(255 - zero_point));
        let inside = |bin: &usize| (least..=most).contains(&level(*bin));
        let Some(first) = (0..BINS).find(inside) else { return f64::INFINITY };
        let last = (first..BINS).rfind(inside).unwrap_or(first);
        let share = |part: &[u64]| part.iter().sum::<u64>() as f64 / self.total;
        let (below, above) = (share(&h.counts[..first]), share(&h.counts[last + 1..]));
        let within = share(&h.counts[first..=last]);
        if within == 0.0 {
            return f64::INFINITY;
        }
        let mut sum = 0.0;
        let mut start = first;
        while start <= last {
            let of = level(start);
            let mut end = start + 1;
            while end <= last && level(end) == of {
                end += 1;
            }
            let used = h.counts[start..end].iter().filter(|&&n| n > 0).count().max(1) as f64;
            let p = share(&h.counts[start..end]);
            let q = (p / within / used).max(NEVER);
            sum += self.own[start..end].iter().sum::<f64>() - p * libm::log(q);
            for (end_bin, moved) in [(first, below), (last, above)] {
                if (start..end).contains(&end_bin) && moved > 0.0 {
                    let here = h.counts[end_bin] as f64 / self.total;
                    let q = if here > 0.0 { q } else { NEVER };
                    sum += plogp(here + moved) - plogp(here) - moved * libm::log(q);
                }
            }
            start = end;
        }
        sum
    }
}

fn plogp(p: f64) -> f64 {
    if p > 0.0 { p * libm::log(p) } else { 0.0 }
}

/// The scale and zero point that cover `lo ..= hi`, of which 0 is a part; `None` where that is (next to) a
/// point. 0 is exactly a level, so either end may lie up to half a step outside.
#[must_use]
pub fn cover(lo: f64, hi: f64) -> Option<(f32, u8)> {
    let (lo, hi) = (lo.min(0.0), hi.max(0.0));
    let extent = hi - lo;
    if !(extent.is_finite() && extent >= LEAST_EXTENT) {
        return None;
    }
    let scale = (extent / 255.0) as f32;
    let zero_point = (-lo / f64::from(scale)).round_ties_even().clamp(0.0, 255.0) as u8;
    Some((scale, zero_point))
}

/// A range by each method, `percentile` in percent, where [`least_error`] found `mse`; `None` where all values
/// were (next to) 0.
#[must_use]
pub fn ranges(histogram: &Histogram, percentile: f32, mse: Option<Range>) -> Option<Ranges> {
    let minmax = cover(histogram.lo(), histogram.hi())?;
    let measured = |(scale, zero_point): (f32, u8)| Range {
        scale,
        zero_point,
        error: histogram.error(scale, zero_point) as f32,
    };
    let tail = (1.0 - f64::from(percentile) / 100.0) / 2.0;
    // Where next to all values are 0 their percentile is 0 too, and leaves the others.
    let kept = cover(histogram.quantile(tail), histogram.quantile(1.0 - tail)).unwrap_or(minmax);
    Some(Ranges {
        minmax: measured(minmax),
        percentile: measured(kept),
        mse: mse?,
        entropy: measured(search(histogram, Method::Entropy).unwrap_or(minmax)),
    })
}

/// The range of least mean squared error; `None` where all values were (next to) 0.
#[must_use]
pub fn least_error(histogram: &Histogram) -> Option<Range> {
    let minmax = cover(histogram.lo(), histogram.hi())?;
    let (scale, zero_point) = search(histogram, Method::Mse).unwrap_or(minmax);
    Some(Range { scale, zero_point, error: histogram.error(scale, zero_point) as f32 })
}

/// The range of least cost among those that shrink the histogram's own ends: the far end is swept, then the
/// near one, then both again on a grid as fine as a bin.
fn search(histogram: &Histogram, method: Method) -> Option<(f32, u8)> {
    let (lo, hi) = (histogram.lo(), histogram.hi());
    let narrowest = match method {
        Method::Entropy => ENTROPY_BINS * histogram.width,
        _ => 0.0,
    };
    let entropy = (method == Method::Entropy).then(|| Entropy::new(histogram));
    let tails = Tails::new(histogram);
    // Infinite where it is certain to be more than `least`.
    let cost = |lo: f64, hi: f64, least: f64| {
        if hi - lo < narrowest {
            return f64::INFINITY;
        }
        match (cover(lo, hi), &entropy) {
            (None, _) => f64::INFINITY,
            (Some((s, z)), Some(entropy)) => entropy.divergence(s, z),
            // What the sums' own rounding could be mistaken for is far less than the thousandth.
            (Some((s, z)), None) if tails.clipping(s, z) > least * 1.001 => f64::INFINITY,
            (Some((s, z)), None) => histogram.error(s, z),
        }
    };
    let far_is_hi = hi >= -lo;
    let mut best = (cost(lo, hi, f64::INFINITY), [lo, hi]);
    for (round, step) in [(0, 1.0 / f64::from(SWEEP)), (1, 1.0 / f64::from(SWEEP * SWEEP / 2))] {
        for end in [usize::from(far_is_hi), usize::from(!far_is_hi)] {
            let whole = [lo, hi][end];
            if whole == 0.0 {
                continue;
            }
            let middle = if round == 0 { 0.5 } else { best.1[end] / whole };
            let half = f64::from(SWEEP / 2);
            // The widest first, so that of equals the one that clips least is taken.
            for i in 0..=SWEEP {
                let share = (middle + (half - f64::from(i)) * step).clamp(0.0, 1.0);
                let mut ends = best.1;
                ends[end] = whole * share;
                let found = cost(ends[0], ends[1], best.0);
                if found < best.0 {
                    best = (found, ends);
                }
            }
        }
    }
    cover(best.1[0], best.1[1])
}

#[cfg(test)]
mod tests;
