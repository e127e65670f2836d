//! Halving a map: the mean of 2 by 2 pixels.
//!
//! For pixels a b over c d, `((a + b) + (c + d)) * 0.25`. A last odd row or column is left out.

use super::element::{Pointer, SharedOut};
use super::{Output, Source, StepError, check_len};
use crate::isa::Level;
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Simd};

const STEP: &str = "average pooling";

/// Halves a map `x` of `[h, w, c]` into `out`, `[h / 2, w / 2, c]`.
///
/// # Errors
/// [`StepError::Shape`] when the input has fewer than two rows or columns or no channel,
/// [`StepError::Length`] when an operand has another size than the shape says,
/// [`StepError::Worker`] when a worker panicked.
pub fn pool2x(
    level: Level,
    pool: &Pool,
    shape: [usize; 3],
    x: Source<'_>,
    mut out: Output<'_>,
) -> Result<(), StepError> {
    let [h, w, c] = shape;
    let elements = h.checked_mul(w).and_then(|n| n.checked_mul(c));
    let Some(elements) = elements.filter(|_| h >= 2 && w >= 2 && c >= 1) else {
        return Err(StepError::Shape {
            step: STEP,
            reason: format!("a map of {h}x{w}x{c} cannot be halved"),
        });
    };
    check_len(STEP, "input", x.len(), elements)?;
    check_len(STEP, "output", out.len(), (h / 2) * (w / 2) * c)?;
    let x = Pointer::of(x);
    let out = SharedOut::new(&mut out);
    pool.run(h / 2, &|row, _| level.dispatch(Row { x, out, w, c, row }))
        .map_err(|source| StepError::Worker { step: STEP, source })
}

/// One row of the output; the operands were checked.
struct Row {
    x: Pointer,
    out: SharedOut,
    w: usize,
    c: usize,
    row: usize,
}

impl Kernel for Row {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Row { x, out, w, c, row } = self;
        let quarter = s.splat(0.25);
        for column in 0..w / 2 {
            let a = (2 * row * w + 2 * column) * c;
            let to = (row * (w / 2) + column) * c;
            let mut i = 0;
            while i < c {
                let n = (c - i).min(LANES);
                // SAFETY: both rows and both columns lie in the input, and the pixel in the
                // output, of which this task has a row of its own.
                unsafe {
                    let at = a + i;
                    let above = s.add(x.read(s, at, n), x.read(s, at + c, n));
                    let at = at + w * c;
                    let below = s.add(x.read(s, at, n), x.read(s, at + c, n));
                    out.write(s, s.mul(s.add(above, below), quarter), to + i, n);
                }
                i += n;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::element::testing::{Tensor, assert_bits, random};
    use super::*;

    #[test]
    fn same_bits_as_plain_loops() {
        for (h, w, c) in [(2, 2, 1), (3, 2, 15), (4, 7, 16), (9, 8, 17), (33, 5, 40)] {
            for (half_in, half_out) in [(false, false), (false, true), (true, false), (true, true)]
            {
                let x = Tensor::new(&random(h * w * c, 1), half_in);
                let v = x.widened();
                let mut expected = Vec::new();
                for y in 0..h / 2 {
                    for col in 0..w / 2 {
                        for i in 0..c {
                            let at = |dy, dx| v[((2 * y + dy) * w + 2 * col + dx) * c + i];
                            expected.push(((at(0, 0) + at(0, 1)) + (at(1, 0) + at(1, 1))) * 0.25);
                        }
                    }
                }
                let expected = Tensor::new(&expected, half_out);
                for level in Level::float_levels() {
                    for threads in 1..=4 {
                        let pool = Pool::new(threads).unwrap();
                        let mut out =
                            Tensor::new(&vec![f32::NAN; expected.source().len()], half_out);
                        pool2x(level, &pool, [h, w, c], x.source(), out.output()).unwrap();
                        let what = format!("{h}x{w}x{c} {}", level.isa());
                        assert_bits(&out.widened(), &expected.widened(), &what);
                    }
                }
            }
        }
    }

    #[test]
    fn wrong_operands_are_refused() {
        let run = |shape, x: usize, out: usize| {
            let (x, mut out) = (vec![0.0; x], vec![0.0; out]);
            let pool = Pool::new(1).unwrap();
            pool2x(Level::best(), &pool, shape, Source::F32(&x), Output::F32(&mut out))
        };
        run([3, 4, 2], 24, 4).unwrap();
        assert!(run([1, 4, 2], 8, 0).is_err());
        assert!(run([4, 1, 2], 8, 0).is_err());
        assert!(run([4, 4, 0], 0, 0).is_err());
        assert!(run([usize::MAX, 4, 2], 8, 0).is_err());
        assert!(run([3, 4, 2], 23, 4).unwrap_err().to_string().contains("input"));
        assert!(run([3, 4, 2], 24, 5).unwrap_err().to_string().contains("output"));
    }
}
