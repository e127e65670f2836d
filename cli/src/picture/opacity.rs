//! Enlarges an opacity channel, row by row. No network has seen one, so it is interpolated.

use super::Samples;

/// Inputs that an output reads at most: the kernel reaches two to either side.
const TAPS: usize = 5;

/// Keys' cubic convolution kernel with a = −½ (Keys 1981), in the powers in which `image` computes it.
fn keys(x: f32) -> f32 {
    let a = x.abs();
    let sixfold = if a < 1.0 {
        9.0 * a.powi(3) - 15.0 * a.powi(2) + 6.0
    } else if a < 2.0 {
        -3.0 * a.powi(3) + 15.0 * a.powi(2) - 24.0 * a + 12.0
    } else {
        0.0
    };
    sixfold / 6.0
}

/// Which inputs one output is made of.
#[derive(Clone, Copy, Debug)]
struct Window {
    start: usize,
    count: usize,
    weights: [f32; TAPS],
}

impl Window {
    /// Of output `i` along an axis that grows from `from` elements to `to`; cut at its ends, and then
    /// normalised anew.
    fn new(i: u32, from: u32, to: u32) -> Self {
        let centre = (i as f32 + 0.5) * (from as f32 / to as f32);
        let start = (centre - 2.0).floor().clamp(0.0, from as f32 - 1.0) as usize;
        let end = ((centre + 2.0).ceil() as usize).clamp(start + 1, from as usize);
        let count = (end - start).min(TAPS);
        let mut weights = [0.0; TAPS];
        let used = &mut weights[..count];
        let mut sum = 0.0;
        for (k, w) in used.iter_mut().enumerate() {
            *w = keys((start + k) as f32 - (centre - 0.5));
            sum += *w;
        }
        used.iter_mut().for_each(|w| *w /= sum);
        Self { start, count, weights }
    }

    fn weights(&self) -> &[f32] {
        &self.weights[..self.count]
    }
}

/// One channel made larger, bicubically: first along columns, then along the row.
#[derive(Debug)]
pub(crate) struct Enlarger {
    samples: Samples,
    from: (u32, u32),
    to: (u32, u32),
    columns: Vec<Window>,
    /// A row of the result, as wide as the input.
    line: Vec<f32>,
    row: Vec<f32>,
    next: u32,
}

impl Enlarger {
    /// `samples`, one channel of `from` (width, height), towards `to`, which is at least as large.
    ///
    /// Returns `None` where `samples` does not have the size of `from`, or `to` is smaller.
    pub(crate) fn new(samples: Samples, from: (u32, u32), to: (u32, u32)) -> Option<Self> {
        if samples.len() != from.0 as usize * from.1 as usize || to.0 < from.0 || to.1 < from.1 {
            return None;
        }
        Some(Self {
            samples,
            from,
            to,
            columns: (0..to.0).map(|x| Window::new(x, from.0, to.0)).collect(),
            line: vec![0.0; from.0 as usize],
            row: vec![0.0; to.0 as usize],
            next: 0,
        })
    }

    /// Bytes that it takes beside the samples.
    pub(crate) fn bytes(from: (u32, u32), to: (u32, u32)) -> usize {
        let each = size_of::<Window>() + size_of::<f32>();
        (from.0 as usize * size_of::<f32>()).saturating_add((to.0 as usize).saturating_mul(each))
    }

    /// Whether its samples have 16 bits.
    pub(crate) fn is_deep(&self) -> bool {
        matches!(self.samples, Samples::Sixteen(_))
    }

    /// The next row from the top, whole numbers on the samples' own scale; behind the last row, that again.
    pub(crate) fn next(&mut self) -> &[f32] {
        let window = Window::new(self.next.min(self.to.1 - 1), self.from.1, self.to.1);
        self.next = self.next.saturating_add(1);
        let width = self.line.len();
        let first = window.start * width;
        for (x, sum) in self.line.iter_mut().enumerate() {
            *sum = 0.0;
            for (k, w) in window.weights().iter().enumerate() {
                let at = first + k * width + x;
                *sum += w * match &self.samples {
                    Samples::Eight(v) => f32::from(v[at]),
                    Samples::Sixteen(v) => f32::from(v[at]),
                };
            }
        }
        let most = if self.is_deep() { 65535.0 } else { 255.0 };
        for (value, column) in self.row.iter_mut().zip(&self.columns) {
            let inputs = &self.line[column.start..];
            let products = column.weights().iter().zip(inputs).map(|(w, v)| w * v);
            *value = products.fold(0.0, |sum, p| sum + p).clamp(0.0, most).round();
        }
        &self.row
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::imageops::{FilterType, resize};
    use image::{ImageBuffer, Luma};

    fn all(samples: Samples, from: (u32, u32), to: (u32, u32)) -> Vec<f32> {
        let mut enlarger = Enlarger::new(samples, from, to).unwrap();
        (0..to.1).flat_map(|_| enlarger.next().to_vec()).collect()
    }

    #[test]
    fn an_edge_stays_where_it_was() {
        let rows = 3;
        let plane: Vec<u8> = (0..rows).flat_map(|_| [0, 0, 0, 255, 255, 255]).collect();
        let out = all(Samples::Eight(plane), (6, rows), (24, rows * 4));
        assert_eq!(out.len(), 24 * 12);
        for row in out.chunks(24) {
            assert!(row[..8].iter().all(|&v| v == 0.0));
            assert!(row[16..].iter().all(|&v| v == 255.0));
            assert!(row[11] < 128.0 && row[12] > 127.0, "{row:?}");
            assert_eq!(row[11] + row[12], 255.0);
        }
    }

    /// Row by row it is what `image` makes of the whole channel.
    #[test]
    fn every_sample_is_that_of_a_whole_channel() {
        for (w, h, factor) in [(1, 1, 4), (1, 7, 4), (9, 1, 2), (5, 4, 1), (23, 17, 4), (40, 31, 8)]
        {
            let to = (w * factor, h * factor);
            let deep: Vec<u16> = (0..w * h).map(|i| (i * i % 8191 * 8 + i % 7) as u16).collect();
            let plane = ImageBuffer::<Luma<u16>, _>::from_raw(w, h, deep.clone()).unwrap();
            let expected = resize(&plane, to.0, to.1, FilterType::CatmullRom).into_raw();
            let expected: Vec<f32> = expected.into_iter().map(f32::from).collect();
            assert!(all(Samples::Sixteen(deep.clone()), (w, h), to) == expected, "{w}x{h}");

            let shallow: Vec<u8> = deep.iter().map(|v| (v >> 8) as u8).collect();
            let plane = ImageBuffer::<Luma<u8>, _>::from_raw(w, h, shallow.clone()).unwrap();
            let expected = resize(&plane, to.0, to.1, FilterType::CatmullRom).into_raw();
            let expected: Vec<f32> = expected.into_iter().map(f32::from).collect();
            assert!(all(Samples::Eight(shallow), (w, h), to) == expected, "{w}x{h}");
        }
        assert!(Enlarger::new(Samples::Eight(vec![0; 5]), (2, 3), (8, 12)).is_none());
        assert!(Enlarger::new(Samples::Eight(vec![0; 6]), (2, 3), (1, 12)).is_none());
    }
}
