//! What Winograd's F(2, 3) along rows makes of a layer's input, seen as it will be quantized.
//!
//! Lives here: the three quantities ([`Pairs`]) that the algorithm multiplies in place of pixels (Lavin & Gray 2016,
//! section 4.1), and their extremes by channel ([`Extremes`]). Never here: which layers may be computed so, or ranges.
//!
//! With x the padded row, and x\[2t\] the first pixel that output 2t sees: x\[2t\] − x\[2t + 2\] and
//! x\[2t + 1\] − x\[2t + 3\], pixels two apart; x\[2t + 1\] + x\[2t + 2\]; x\[2t + 2\] − x\[2t + 1\].

/// The quantities, in the order of a layer's ranges.
pub(crate) const KINDS: usize = 3;
/// The quantities of a row, pixels by channels.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pairs {
    padded: Vec<f32>,
    found: [Vec<f32>; KINDS],
}

impl Pairs {
    /// The quantities of `row`, with `pad` pixels of zeros to the left and right: pixels two apart, sums, differences.
    pub(crate) fn of(
        &mut self,
        row: &[f32],
        channels: usize,
        pad: [usize; 2],
    ) -> &[Vec<f32>; KINDS] {
        let [left, right] = pad.map(|n| n * channels);
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
