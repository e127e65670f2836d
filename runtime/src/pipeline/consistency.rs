//! Consistency with the input: back-projection (Irani & Peleg 1991) of a finished picture, row by row.
//!
//! A result `f` times as large is right only if it is the input again when it is reduced. Each of
//! [`ROUNDS`] rounds adds what it lacks, `x ← x + s · enlarge(lr − reduce(x))`, where `s` is the strength,
//! from 0 to 1, and `reduce` and `enlarge` are Pillow's bicubic resampling (Keys 1981, a = −0.5;
//! antialiased, that is stretched by `f`, when reducing; cut and normalised anew at the picture's borders).
//! `enlarge` nearly undoes `reduce`, so in the terms of the range-null space decomposition (Wang et al.
//! 2022, DDNM) the part of the picture that the input determines is set right, and the part that it says
//! nothing about, the model's own detail, is left alone.
//!
//! It works on whole blended rows as they come, and keeps as many as the kernels reach: the result does
//! not depend on tiles, as it would if each were made consistent by itself and then blended with its
//! neighbours, and the picture's borders are the only ones there are. Products and sums are f32 in one
//! fixed order, without fused operations, so a run gives the same bits everywhere.

use super::plan::RGB;

/// Rounds of back-projection. At full strength each takes away all that is lacking at the input's low
/// frequencies and most of it at the highest: of white noise 15 % is left after two.
pub const ROUNDS: usize = 2;
/// Enlarged rows of the input's grid that a row of the result depends on: two before its own, two after.
const LINES: usize = 5;

/// Keys' cubic convolution kernel with a = −0.5.
fn keys(x: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        (1.5 * x - 2.5) * x * x + 1.0
    } else if x < 2.0 {
        ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    } else {
        0.0
    }
}

/// Which inputs an output is made of, and where its weights are.
#[derive(Clone, Copy, Debug)]
struct Window {
    start: usize,
    count: usize,
    weights: usize,
}

/// Bicubic resampling along one axis, from `n` elements to `n · den / num`; one of the two is 1. Outputs
/// whose kernel is whole repeat with a period of `den`, of which one is kept: a filter does not grow with the
/// axis.
#[derive(Debug)]
struct Filter {
    num: usize,
    den: usize,
    outputs: usize,
    /// Of the first three periods and the last two.
    windows: Vec<Window>,
    weights: Vec<f32>,
}

impl Filter {
    /// Outputs, and windows that are kept: those of a period, and of two at either end, where kernels are cut.
    fn extent(inputs: usize, num: usize, den: usize) -> [usize; 2] {
        let outputs = inputs * den / num;
        [outputs, outputs.min(5 * den)]
    }

    fn bytes(inputs: usize, num: usize, den: usize) -> usize {
        let [_, kept] = Self::extent(inputs, num, den);
        kept * (size_of::<Window>() + 4 * num * size_of::<f32>())
    }

    fn new(inputs: usize, num: usize, den: usize) -> Option<Self> {
        let [outputs, kept] = Self::extent(inputs, num, den);
        let mut windows: Vec<Window> = reserve(kept)?;
        let mut weights = reserve(kept * 4 * num)?;
        let (n, d) = (num as i64, den as i64);
        let begin = kept.min(3 * den);
        for i in (0..begin).chain(outputs - (kept - begin)..outputs) {
            // Output i lies at `twice / 2d` on the inputs' axis, and the kernel reaches 2n to either side.
            let twice = (2 * i as i64 + 1) * n;
            let start = (twice - 4 * n * d + d).div_euclid(2 * d).max(0);
            let end = (twice + 4 * n * d + d).div_euclid(2 * d).min(inputs as i64);
            let value = |x: i64| keys(((2 * x + 1) * d - twice) as f64 / (2 * d * n) as f64);
            let sum: f64 = (start..end).map(value).sum();
            let at = weights.len();
            weights.extend((start..end).map(|x| (value(x) / sum) as f32));
            let (start, count) = (start as usize, (end - start) as usize);
            windows.push(Window { start, count, weights: at });
        }
        Some(Self { num, den, outputs, windows, weights })
    }

    /// The first input of output `i`, and the weights from there on.
    fn at(&self, i: usize) -> (usize, &[f32]) {
        let (begin, behind) = (3 * self.den, self.outputs - i);
        let (at, periods) = match i {
            _ if i < begin => (i, 0),
            _ if behind <= 2 * self.den => (self.windows.len() - behind, 0),
            // The third period, so many further on.
            _ => (2 * self.den + (i - begin) % self.den, 1 + (i - begin) / self.den),
        };
        let w = self.windows[at];
        (w.start + periods * self.num, &self.weights[w.weights..][..w.count])
    }

    /// Resamples a row of interleaved pixels.
    fn row(&self, from: &[f32], to: &mut [f32]) {
        for (i, pixel) in to.chunks_exact_mut(RGB).enumerate() {
            let (start, weights) = self.at(i);
            let mut sum = [0f32; RGB];
            for (w, value) in weights.iter().zip(from[start * RGB..].chunks_exact(RGB)) {
                for (s, v) in sum.iter_mut().zip(value) {
                    *s += w * v;
                }
            }
            pixel.copy_from_slice(&sum);
        }
    }
}

fn reserve<T>(len: usize) -> Option<Vec<T>> {
    let mut v = Vec::new();
    v.try_reserve_exact(len).ok()?;
    Some(v)
}

fn zeros(len: usize) -> Option<Vec<f32>> {
    let mut v = reserve(len)?;
    v.resize(len, 0.0);
    Some(v)
}

/// `sum ← sum + w · row`.
fn add_scaled(sum: &mut [f32], w: f32, row: &[f32]) {
    for (s, v) in sum.iter_mut().zip(row) {
        *s += w * v;
    }
}

/// What both rounds share.
#[derive(Debug)]
struct Shape {
    /// Rows and columns of the input.
    size: [usize; 2],
    factor: usize,
    strength: f32,
    /// Vertically and horizontally.
    reduce: [Filter; 2],
    enlarge: [Filter; 2],
}

/// One round. Row `y` of the result is kept in slot `y` modulo the number of slots.
#[derive(Debug)]
struct Round {
    /// Rows of the result, from the first that is not corrected yet.
    rows: Vec<f32>,
    /// Rows of the input's grid that are lacking, enlarged horizontally.
    lines: Vec<f32>,
    /// A row of the result's width.
    wide: Vec<f32>,
    /// Two rows of the input's width.
    narrow: Vec<f32>,
    /// Rows of the input's grid compared.
    compared: usize,
    /// Rows of the input's grid whose rows of the result have been given away.
    done: usize,
}

/// Rows of the result that a round holds at most: from the first of those that belong to row i of the
/// input to the last that row i + 2 is reduced from.
fn slots(factor: usize) -> usize {
    (9 * factor).div_ceil(2)
}

impl Round {
    fn elements([_, width]: [usize; 2], factor: usize) -> usize {
        width * RGB * (factor * (slots(factor) + LINES + 1) + 2)
    }

    fn new([_, width]: [usize; 2], factor: usize) -> Option<Self> {
        let line = width * factor * RGB;
        Some(Self {
            rows: zeros(line * slots(factor))?,
            lines: zeros(line * LINES)?,
            wide: zeros(line)?,
            narrow: zeros(width * RGB * 2)?,
            compared: 0,
            done: 0,
        })
    }

    /// Reduces the rows that row `i` of the input depends on, and keeps what they lack of it.
    fn compare(&mut self, shape: &Shape, i: usize, input: &InputRow<'_>) {
        let line = self.wide.len();
        let (start, weights) = shape.reduce[0].at(i);
        self.wide.fill(0.0);
        for (y, &w) in (start..).zip(weights) {
            let slot = y % slots(shape.factor) * line;
            add_scaled(&mut self.wide, w, &self.rows[slot..][..line]);
        }
        let (reduced, wanted) = self.narrow.split_at_mut(shape.size[1] * RGB);
        shape.reduce[1].row(&self.wide, reduced);
        input(i, wanted);
        for (value, wanted) in reduced.iter_mut().zip(wanted) {
            *value = shape.strength * (*wanted - *value);
        }
        shape.enlarge[1].row(reduced, &mut self.lines[i % LINES * line..][..line]);
    }

    /// Corrects row `y` of the result where it lies.
    fn correct(&mut self, shape: &Shape, y: usize) -> &[f32] {
        let line = self.wide.len();
        let row = &mut self.rows[y % slots(shape.factor) * line..][..line];
        let (start, weights) = shape.enlarge[0].at(y);
        for (i, &w) in (start..).zip(weights) {
            add_scaled(row, w, &self.lines[i % LINES * line..][..line]);
        }
        row
    }
}

/// Reduces a picture of `size` (rows and columns, multiples of `factor`; three interleaved channels) by
/// `factor`, with the same filter: what the picture's owner would have had to upscale. `None` where there is
/// no memory for it.
///
/// # Panics
/// Where `pixels` is not `size[0] · size[1] · 3` long.
#[must_use]
pub fn reduced(pixels: &[f32], [height, width]: [usize; 2], factor: usize) -> Option<Vec<f32>> {
    assert_eq!(pixels.len(), height * width * RGB, "the picture has another size");
    let [rows, columns] = [Filter::new(height, factor, 1)?, Filter::new(width, factor, 1)?];
    let line = width / factor * RGB;
    let (mut wide, mut out) = (zeros(width * RGB)?, zeros(height / factor * line)?);
    for (y, to) in out.chunks_exact_mut(line.max(1)).enumerate() {
        let (start, weights) = rows.at(y);
        wide.fill(0.0);
        for (from, &w) in pixels.chunks_exact(width * RGB).skip(start).zip(weights) {
            add_scaled(&mut wide, w, from);
        }
        columns.row(&wide, to);
    }
    Some(out)
}

/// Writes row `i` of the input, −1 to 1, three interleaved channels.
pub type InputRow<'a> = dyn Fn(usize, &mut [f32]) + 'a;

/// Makes a picture consistent with its input while its rows pass through.
#[derive(Debug)]
pub struct Consistency {
    shape: Shape,
    rounds: [Round; ROUNDS],
}

impl Consistency {
    /// For an input of `size`, rows and columns, and a result `factor` times as large. `None` where there
    /// is no memory for it.
    #[must_use]
    pub fn new(size: [usize; 2], factor: usize, strength: f32) -> Option<Self> {
        let [h, w] = size;
        let shape = Shape {
            size,
            factor,
            strength,
            reduce: [Filter::new(h * factor, factor, 1)?, Filter::new(w * factor, factor, 1)?],
            enlarge: [Filter::new(h, 1, factor)?, Filter::new(w, 1, factor)?],
        };
        Some(Self { shape, rounds: [Round::new(size, factor)?, Round::new(size, factor)?] })
    }

    /// Bytes that [`Consistency::new`] allocates; nothing is allocated afterwards.
    #[must_use]
    pub fn bytes(size: [usize; 2], factor: usize) -> usize {
        let filters = size
            .map(|side| Filter::bytes(side * factor, factor, 1) + Filter::bytes(side, 1, factor));
        let rounds = ROUNDS * Round::elements(size, factor) * size_of::<f32>();
        filters[0].saturating_add(filters[1]).saturating_add(rounds)
    }

    /// Takes row `y` of the result, rows from the top; each row that no later one can change any more goes
    /// to `sink`, in order. With the last row all that are left go.
    ///
    /// # Panics
    /// Where a row is not as long as the result is wide.
    pub fn push(
        &mut self,
        y: usize,
        row: &[f32],
        input: &InputRow<'_>,
        sink: &mut dyn FnMut(usize, &[f32]),
    ) {
        push(&self.shape, &mut self.rounds, y, row, input, sink);
    }
}

/// Rows go through the rounds one inside the other.
fn push(
    shape: &Shape,
    rounds: &mut [Round],
    y: usize,
    row: &[f32],
    input: &InputRow<'_>,
    sink: &mut dyn FnMut(usize, &[f32]),
) {
    let Some((round, rest)) = rounds.split_first_mut() else {
        return sink(y, row);
    };
    let (line, height) = (round.wide.len(), shape.size[0]);
    round.rows[y % slots(shape.factor) * line..][..line].copy_from_slice(row);
    while round.compared < height {
        let (start, weights) = shape.reduce[0].at(round.compared);
        if start + weights.len() > y + 1 {
            break;
        }
        round.compare(shape, round.compared, input);
        round.compared += 1;
        while round.done < round.compared
            && (round.compared == height || round.done + 2 < round.compared)
        {
            for y in round.done * shape.factor..(round.done + 1) * shape.factor {
                push(shape, rest, y, round.correct(shape, y), input, sink);
            }
            round.done += 1;
        }
    }
    if round.done == height {
        (round.compared, round.done) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What repeats is kept once, and is what each output would have by itself.
    #[test]
    fn a_filter_does_not_grow_with_its_axis() {
        for (num, den) in [(1, 1), (4, 1), (1, 4), (8, 1), (1, 8), (1, 3)] {
            for inputs in (1..60).chain([5000]).map(|n| n * num) {
                let filter = Filter::new(inputs, num, den).unwrap();
                assert!(filter.windows.len() <= 5 * den);
                let (n, d) = (num as f64, den as f64);
                for i in 0..inputs * den / num {
                    // Centre and reach on the inputs' axis; an input counts where its centre is within it.
                    let centre = (i as f64 + 0.5) * n / d;
                    let within = |x: &usize| (*x as f64 + 0.5 - centre).abs() < 2.0 * n;
                    let (start, weights) = filter.at(i);
                    let end = start + weights.len();
                    assert!((start..end).all(|x| x < inputs));
                    let near = (centre - 3.0 * n).max(0.0) as usize;
                    for x in (near..inputs.min((centre + 3.0 * n) as usize + 1)).filter(within) {
                        assert!((start..end).contains(&x), "{inputs} {num}/{den}: {i}, {x}");
                    }
                    let value = |x: usize| keys((x as f64 + 0.5 - centre) / n);
                    let sum: f64 = (start..end).map(value).sum();
                    for (x, &w) in (start..).zip(weights) {
                        assert!((f64::from(w) - value(x) / sum).abs() < 1e-6, "{inputs}: {i}, {x}");
                    }
                }
            }
        }
        assert_eq!(Consistency::bytes([90, 64], 4), Consistency::bytes([9_000, 64], 4));
    }

    #[test]
    fn bytes_are_what_is_allocated() {
        for (size, factor) in [([1, 1], 4), ([3, 40], 2), ([64, 5], 4), ([9, 9], 8), ([4, 7], 1)] {
            let c = Consistency::new(size, factor, 1.0).unwrap();
            let filters = c.shape.reduce.iter().chain(&c.shape.enlarge);
            let tables = filters
                .map(|f| f.windows.capacity() * size_of::<Window>() + f.weights.capacity() * 4);
            let rows = c.rounds.iter().map(|r| {
                [&r.rows, &r.lines, &r.wide, &r.narrow].iter().map(|v| v.capacity() * 4).sum()
            });
            assert_eq!(tables.chain(rows).sum::<usize>(), Consistency::bytes(size, factor));
        }
    }
}
