//! What Winograd's F(2, 3) along rows makes of a layer's input, seen as it will be quantized.
//!
//! Lives here: the three quantities ([`Pairs`]) that the algorithm multiplies in place of pixels (Lavin & Gray 2016,
//! section 4.1), and their extremes by channel ([`Extremes`]). Never here: which layers may be computed so, or ranges.
//!
//! With x the padded row, and x\[2t\] the first pixel that output 2t sees: x\[2t\] − x\[2t + 2\] and
//! x\[2t + 1\] − x\[2t + 3\], pixels two apart; x\[2t + 1\] + x\[2t + 2\]; x\[2t + 2\] − x\[2t + 1\].

/// The quantities, in the order of a layer's ranges.
pub(crate) const KINDS: usize = 3;
/// Of this many rows one is looked at: neighbouring rows are alike, and that one costs more than the rest of a pass.
const STRIDE: u64 = 4;
/// Which of them: the first row of a map would lie at its edge each time.
const FIRST: u64 = 1;

/// The quantities of a row, pixels by channels.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pairs {
    padded: Vec<f32>,
    found: [Vec<f32>; KINDS],
}

/// Which rows of a layer's input are looked at, and how they are padded.
#[derive(Clone, Debug)]
pub(crate) struct Rows {
    /// Pixels of zero to the left and to the right.
    pad: [usize; 2],
    seen: u64,
}

impl Rows {
    pub(crate) fn new(pad: [usize; 2]) -> Self {
        Self { pad, seen: 0 }
    }

    /// Counts one more row; whether it is looked at.
    pub(crate) fn next(&mut self) -> bool {
        let at = self.seen % STRIDE;
        self.seen += 1;
        at == FIRST
    }

    /// Begins the next pass, over the same rows.
    pub(crate) fn restart(&mut self) {
        self.seen = 0;
    }
}

impl Pairs {
    /// The quantities of `row`: pixels two apart, sums, differences.
    pub(crate) fn of(&mut self, row: &[f32], channels: usize, rows: &Rows) -> &[Vec<f32>; KINDS] {
        let [left, right] = rows.pad.map(|n| n * channels);
        self.padded.clear();
        self.padded.resize(left, 0.0);
        self.padded.extend_from_slice(row);
        self.padded.resize(left + row.len() + right, 0.0);
        let [apart, sums, differences] = &mut self.found;
        apart.clear();
        sums.clear();
        differences.clear();
        if let Some(ahead) = self.padded.get(2 * channels..) {
            apart.extend(self.padded.iter().zip(ahead).map(|(a, b)| a - b));
        }
        // From the second pixel on, two and two.
        let inner = self.padded.get(channels..).unwrap_or_default();
        for pair in inner.chunks_exact(2 * channels) {
            let (a, b) = pair.split_at(channels);
            sums.extend(a.iter().zip(b).map(|(a, b)| a + b));
            differences.extend(a.iter().zip(b).map(|(a, b)| b - a));
        }
        &self.found
    }
}

/// The least and the largest value of each channel.
#[derive(Clone, Debug)]
pub(crate) struct Extremes {
    pub(crate) min: Vec<f32>,
    pub(crate) max: Vec<f32>,
}

impl Extremes {
    pub(crate) fn new(channels: usize) -> Self {
        Self { min: vec![0.0; channels], max: vec![0.0; channels] }
    }

    /// Adds pixels by channels.
    pub(crate) fn add(&mut self, pixels: &[f32]) {
        for pixel in pixels.chunks_exact(self.min.len()) {
            for ((&x, min), max) in pixel.iter().zip(&mut self.min).zip(&mut self.max) {
                *min = if x < *min { x } else { *min };
                *max = if x > *max { x } else { *max };
            }
        }
    }
}
