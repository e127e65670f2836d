//! What Winograd's algorithms make of a layer's input, seen as it will be quantized.
//!
//! Lives here: the three quantities ([`Pairs`]) that F(2, 3) along rows multiplies in place of pixels (Lavin & Gray 2016,
//! section 4.1), the nine of F(2 × 2, 3 × 3) ([`Squares`]), and their extremes by channel ([`Extremes`]). Never here: which
//! layers may be computed so, or ranges.
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

/// The quantities of squares, in the order of a layer's ranges: kind i down and j across is number 3 i + j.
pub(crate) const SQUARE_KINDS: usize = KINDS * KINDS;

/// Makes the quantities of squares of those of pairs, row by row, from the top of a map.
#[derive(Clone, Debug, Default)]
pub(crate) struct Squares {
    /// Rows of the padded map that came, and the last three of them, each at its number modulo 3.
    rows: usize,
    last: [[Vec<f32>; KINDS]; 3],
    /// Room for what is shown.
    room: Vec<f32>,
}

impl Squares {
    /// Begins a map with `top` rows of zeros above it. What a map is as wide as is told by its first row.
    pub(crate) fn begin(&mut self, top: usize) {
        self.rows = top;
        self.last.iter_mut().flatten().for_each(Vec::clear);
    }

    /// Whether a map has begun.
    pub(crate) fn has_rows(&self) -> bool {
        self.last.iter().flatten().any(|row| !row.is_empty())
    }

    /// Takes the next row's quantities along it, and shows `see` those that it completes, with their number.
    pub(crate) fn add(&mut self, row: &[Vec<f32>; KINDS], see: &mut dyn FnMut(usize, &[f32])) {
        for (kind, now) in row.iter().enumerate() {
            let before = |rows: usize| &self.last[(self.rows + 3 - rows) % 3][kind];
            // Two apart down: of every row but the first two. Sums and differences: of rows 2t + 1 and 2t + 2.
            if self.rows >= 2 {
                apart(&mut self.room, before(2), now);
                see(kind, &self.room);
            }
            if self.rows >= 2 && self.rows.is_multiple_of(2) {
                sum(&mut self.room, before(1), now);
                see(KINDS + kind, &self.room);
                apart(&mut self.room, now, before(1));
                see(2 * KINDS + kind, &self.room);
            }
        }
        for (last, now) in self.last[self.rows % 3].iter_mut().zip(row) {
            last.clone_from(now);
        }
        self.rows += 1;
    }

    /// Ends a map with `bottom` rows of zeros below it.
    pub(crate) fn end(&mut self, bottom: usize, see: &mut dyn FnMut(usize, &[f32])) {
        let zeros = self.last[(self.rows + 2) % 3].clone().map(|mut row| {
            row.fill(0.0);
            row
        });
        for _ in 0..bottom {
            self.add(&zeros, see);
        }
    }
}

/// `a - b`; a row that is not there is of zeros.
fn apart(to: &mut Vec<f32>, a: &[f32], b: &[f32]) {
    to.clear();
    match (a, b) {
        ([], b) => to.extend(b.iter().map(|b| -b)),
        (a, []) => to.extend(a),
        (a, b) => to.extend(a.iter().zip(b).map(|(a, b)| a - b)),
    }
}

/// `a + b`, likewise.
fn sum(to: &mut Vec<f32>, a: &[f32], b: &[f32]) {
    to.clear();
    if a.is_empty() {
        to.extend(b);
    } else {
        to.extend(a.iter().zip(b).map(|(a, b)| a + b));
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
