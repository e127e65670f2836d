//! What a layer reads, gathered without keeping any of it.
//!
//! Lives here: what the two passes over a layer's inputs keep, [`Moments`] (extremes, means and squares of
//! every channel) and [`Spread`] (a histogram). Never here: which layer, which picture.
//!
//! In [`pairs`], what a convolution by Winograd's algorithm reads in their place.
//!
//! Sums run over blocks of [`BLOCK`] pixels in f32, then in f64, each channel by itself and always in the
//! order of the pixels: the result does not depend on threads, instruction set or channel count.

pub(crate) mod pairs;

use crate::choose::{BINS, Histogram};

/// Pixels whose sums are taken in f32 before they are added up in f64.
const BLOCK: usize = 32;
/// Channels that are worked on together.
const LANES: usize = 16;
/// Values beyond this have squares and scaled values that may not be finite.
pub(crate) const LARGEST: f32 = 1e15;

/// Extremes and sums of each channel.
#[derive(Clone, Debug)]
pub(crate) struct Moments {
    pub(crate) pixels: u64,
    pub(crate) min: Vec<f32>,
    pub(crate) max: Vec<f32>,
    pub(crate) sum: Vec<f64>,
    pub(crate) squares: Vec<f64>,
    /// Products of pixels with their right neighbours, all channels together, and how many pairs of pixels.
    pub(crate) products: f64,
    pub(crate) pairs: u64,
}

/// Accumulators of [`LANES`] channels over one block.
struct Lanes {
    min: [f32; LANES],
    max: [f32; LANES],
    sum: [f32; LANES],
    squares: [f32; LANES],
}

impl Moments {
    pub(crate) fn new(channels: usize) -> Self {
        Self {
            pixels: 0,
            min: vec![f32::INFINITY; channels],
            max: vec![f32::NEG_INFINITY; channels],
            sum: vec![0.0; channels],
            squares: vec![0.0; channels],
            products: 0.0,
            pairs: 0,
        }
    }

    pub(crate) fn channels(&self) -> usize {
        self.sum.len()
    }

    /// Adds a row of a map.
    ///
    /// # Errors
    /// The first value that is not finite, or beyond [`LARGEST`].
    pub(crate) fn add(&mut self, row: &[f32]) -> Result<(), f32> {
        let channels = self.channels();
        for block in row.chunks(BLOCK * channels) {
            self.block(block);
        }
        // A sum tells of a NaN or infinity; an extreme tells of what is merely too large.
        let sound = self.sum.iter().all(|s| s.is_finite())
            && self.min.iter().all(|&v| v >= -LARGEST)
            && self.max.iter().all(|&v| v <= LARGEST);
        if !sound {
            let sound = |v: &&f32| v.abs() <= LARGEST;
            return Err(row.iter().find(|v| !sound(v)).copied().unwrap_or(f32::NAN));
        }
        let pixels = row.len() / channels;
        if pixels > 0 {
            self.pixels += pixels as u64;
            self.pairs += pixels as u64 - 1;
            self.products += dot(&row[..row.len() - channels], &row[channels..]);
        }
        Ok(())
    }

    fn block(&mut self, block: &[f32]) {
        let channels = self.channels();
        let whole = channels - channels % LANES;
        for c in (0..whole).step_by(LANES) {
            let mut l = Lanes {
                min: [f32::INFINITY; LANES],
                max: [f32::NEG_INFINITY; LANES],
                sum: [0.0; LANES],
                squares: [0.0; LANES],
            };
            for pixel in block.chunks_exact(channels) {
                // Invariant: `c` steps through whole lanes.
                let x: &[f32; LANES] = pixel[c..c + LANES].try_into().expect("LANES channels");
                for (i, &x) in x.iter().enumerate() {
                    // Not `f32::min`: which of two a NaN leaves does not matter, the sum tells of it.
                    l.min[i] = if x < l.min[i] { x } else { l.min[i] };
                    l.max[i] = if x > l.max[i] { x } else { l.max[i] };
                    l.sum[i] += x;
                    l.squares[i] += x * x;
                }
            }
            for i in 0..LANES {
                self.channel(c + i, l.min[i], l.max[i], l.sum[i], l.squares[i]);
            }
        }
        for c in whole..channels {
            let (mut min, mut max) = (f32::INFINITY, f32::NEG_INFINITY);
            let (mut sum, mut squares) = (0f32, 0f32);
            for pixel in block.chunks_exact(channels) {
                let x = pixel[c];
                min = if x < min { x } else { min };
                max = if x > max { x } else { max };
                sum += x;
                squares += x * x;
            }
            self.channel(c, min, max, sum, squares);
        }
    }

    fn channel(&mut self, c: usize, min: f32, max: f32, sum: f32, squares: f32) {
        self.min[c] = self.min[c].min(min);
        self.max[c] = self.max[c].max(max);
        self.sum[c] += f64::from(sum);
        self.squares[c] += f64::from(squares);
    }

    /// Takes in what another has seen.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.pixels += other.pixels;
        self.products += other.products;
        self.pairs += other.pairs;
        for c in 0..self.channels() {
            self.min[c] = self.min[c].min(other.min[c]);
            self.max[c] = self.max[c].max(other.max[c]);
            self.sum[c] += other.sum[c];
            self.squares[c] += other.squares[c];
        }
    }

    /// Mean of channel `c`.
    pub(crate) fn mean(&self, c: usize) -> f64 {
        self.sum[c] / self.pixels.max(1) as f64
    }

    /// Mean square of channel `c`.
    pub(crate) fn mean_square(&self, c: usize) -> f64 {
        self.squares[c] / self.pixels.max(1) as f64
    }

    /// Largest magnitude in channel `c`.
    pub(crate) fn largest(&self, c: usize) -> f32 {
        self.min[c].abs().max(self.max[c].abs())
    }

    /// Correlation of a pixel with its right neighbour, each channel weighted by its variance; 0 to 1.
    pub(crate) fn neighbour(&self) -> f64 {
        let (mut variance, mut means) = (0.0, 0.0);
        for c in 0..self.channels() {
            let mean = self.mean(c);
            variance += (self.mean_square(c) - mean * mean).max(0.0);
            means += mean * mean;
        }
        if self.pairs == 0 || variance <= 0.0 {
            return 0.0;
        }
        ((self.products / self.pairs as f64 - means) / variance).clamp(0.0, 1.0)
    }
}

/// Σ a·b over [`LANES`] partial sums.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut total = 0.0;
    for (a, b) in a.chunks(BLOCK * LANES).zip(b.chunks(BLOCK * LANES)) {
        let mut sums = [0f32; LANES];
        let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(x, y)| x * y).sum();
        for (a, b) in a.zip(b) {
            for i in 0..LANES {
                sums[i] += a[i] * b[i];
            }
        }
        total += sums.iter().map(|&s| f64::from(s)).sum::<f64>() + f64::from(rest);
    }
    total
}

/// Counters that take turns, so that neighbouring values of one bin do not wait for each other.
const WAYS: usize = 2;

/// The histogram of a layer's inputs under one equaliser, in one group of timesteps.
#[derive(Clone, Debug)]
pub(crate) struct Spread {
    histogram: Histogram,
    /// Of each channel: what turns a value into its bin.
    factor: Vec<f32>,
    /// The bin of 0, and half a bin to round by.
    shift: f32,
}

/// Room to count a row in.
#[derive(Clone, Debug)]
pub(crate) struct Counts(Box<[[u32; BINS]; WAYS]>);

impl Default for Counts {
    fn default() -> Self {
        Self(Box::new([[0; BINS]; WAYS]))
    }
}

impl Spread {
    /// For inputs whose extremes are those of `moments`, multiplied by `scale` (by 1 where absent).
    pub(crate) fn new(moments: &Moments, scale: Option<&[f32]>) -> Self {
        Self::over(&moments.min, &moments.max, scale)
    }

    /// For values whose extremes by channel are `min` and `max`, multiplied by `scale`.
    pub(crate) fn over(min: &[f32], max: &[f32], scale: Option<&[f32]>) -> Self {
        let channels = min.len();
        let (mut lo, mut hi) = (0f32, 0f32);
        for c in 0..channels {
            let e = scale.map_or(1.0, |s| s[c]);
            lo = lo.min(min[c] * e);
            hi = hi.max(max[c] * e);
        }
        let histogram = Histogram::new(lo, hi);
        let per_unit = histogram.per_unit();
        let factor = (0..channels)
            .map(|c| (f64::from(scale.map_or(1.0, |s| s[c])) * per_unit) as f32)
            .collect();
        let shift = (-histogram.lo() * per_unit - 0.5) as f32;
        Self { histogram, factor, shift }
    }

    /// Adds a row of a map.
    pub(crate) fn add(&mut self, row: &[f32], counts: &mut Counts) {
        // As many values as a u32 counts, and whole pixels.
        let most = u32::MAX as usize / 2 / self.factor.len() * self.factor.len();
        for part in row.chunks(most.max(self.factor.len())) {
            self.count(part, counts);
        }
    }

    fn count(&mut self, row: &[f32], Counts(counts): &mut Counts) {
        /// Added to a number below 2²², it leaves the number's nearest integer in the low bits.
        const MAGIC: f32 = 12_582_912.0;
        for pixel in row.chunks(self.factor.len()) {
            for (xs, fs) in pixel.chunks(LANES).zip(self.factor.chunks(LANES)) {
                let mut bins = [0u32; LANES];
                for ((bin, &x), &f) in bins.iter_mut().zip(xs).zip(fs) {
                    let at = x * f + self.shift;
                    let at = if at > 0.0 { at } else { 0.0 };
                    let at = if at < (BINS - 1) as f32 { at } else { (BINS - 1) as f32 };
                    *bin = (at + MAGIC).to_bits();
                }
                for (i, &bin) in bins[..xs.len()].iter().enumerate() {
                    counts[i % WAYS][bin as usize % BINS] += 1;
                }
            }
        }
        for bin in 0..BINS {
            let n = counts.iter().map(|c| u64::from(c[bin])).sum();
            self.histogram.add(bin, n);
        }
        counts.iter_mut().for_each(|c| c.fill(0));
    }

    /// The histogram of all rows.
    pub(crate) fn finish(self) -> Histogram {
        self.histogram
    }
}

#[cfg(test)]
mod tests;
