//! The edge of a session: `f32` slices in and out of stored maps, and the check of a result.
//!
//! Both sides are NHWC; orders of axes are changed elsewhere.

use std::sync::atomic::{AtomicBool, Ordering};

use super::element::{Pointer, SharedOut};
use super::{Output, Source, StepError, check_len};
use crate::isa::Level;
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Simd};

const STORE: &str = "store input";
const LOAD: &str = "load output";
const FINITE: &str = "finite check";

/// Elements of a task.
const TASK_ELEMENTS: usize = 1 << 15;

/// Stores `x` in a map's own type, rounded to nearest even.
///
/// # Errors
/// [`StepError::Length`] when the lengths differ, [`StepError::Worker`] when a worker panicked.
pub fn store(level: Level, pool: &Pool, x: &[f32], mut out: Output<'_>) -> Result<(), StepError> {
    check_len(STORE, "map", out.len(), x.len())?;
    let to = SharedOut::new(&mut out);
    copy(level, pool, STORE, Pointer::of(Source::F32(x)), Some(to), x.len())?;
    Ok(())
}

/// Widens a map into `out` and tells whether all of it is finite.
///
/// # Errors
/// [`StepError::Length`] when the lengths differ, [`StepError::Worker`] when a worker panicked.
pub fn load(level: Level, pool: &Pool, x: Source<'_>, out: &mut [f32]) -> Result<bool, StepError> {
    check_len(LOAD, "output", out.len(), x.len())?;
    let to = SharedOut::new(&mut Output::F32(out));
    copy(level, pool, LOAD, Pointer::of(x), Some(to), x.len())
}

/// Whether `x` holds neither NaN nor infinity.
///
/// # Errors
/// [`StepError::Worker`] when a worker panicked.
pub fn all_finite(level: Level, pool: &Pool, x: &[f32]) -> Result<bool, StepError> {
    copy(level, pool, FINITE, Pointer::of(Source::F32(x)), None, x.len())
}

/// Copies `len` elements where there is a destination; both operands hold as many.
fn copy(
    level: Level,
    pool: &Pool,
    step: &'static str,
    from: Pointer,
    to: Option<SharedOut>,
    len: usize,
) -> Result<bool, StepError> {
    let finite = AtomicBool::new(true);
    pool.run(len.div_ceil(TASK_ELEMENTS), &|task, _| {
        let first = task * TASK_ELEMENTS;
        let last = (first + TASK_ELEMENTS).min(len);
        if !level.dispatch(Stretch { from, to, first, last }) {
            finite.store(false, Ordering::Relaxed);
        }
    })
    .map_err(|source| StepError::Worker { step, source })?;
    Ok(finite.load(Ordering::Relaxed))
}

/// Elements `first..last`, which both operands hold.
struct Stretch {
    from: Pointer,
    to: Option<SharedOut>,
    first: usize,
    last: usize,
}

impl Kernel for Stretch {
    /// Whether all of it was finite.
    type Out = bool;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        let zero = s.splat(0.0);
        // A finite number times zero is zero; infinity times zero, and NaN, are NaN and stay.
        let mut check = zero;
        let mut at = self.first;
        while at < self.last {
            let n = (self.last - at).min(LANES);
            // SAFETY: the stretch lies in both operands, and no other task has it.
            unsafe {
                let v = self.from.read(s, at, n);
                check = s.mul_add(v, zero, check);
                if let Some(to) = self.to {
                    to.write(s, v, at, n);
                }
            }
            at += n;
        }
        !s.sum(check).is_nan()
    }
}

#[cfg(test)]
mod tests {
    use super::super::element::testing::{assert_bits, halves, random, widened};
    use super::*;

    const LENGTHS: [usize; 8] = [0, 1, 15, 16, 17, 1000, TASK_ELEMENTS + 1, 3 * TASK_ELEMENTS - 1];

    #[test]
    fn copies_round_as_half_does() {
        for len in LENGTHS {
            let x: Vec<f32> = random(len, 5).iter().map(|x| 70_000.0 * x).collect();
            for level in Level::float_levels() {
                for threads in [1, 3] {
                    let pool = Pool::new(threads).unwrap();
                    let mut same = vec![f32::NAN; len];
                    store(level, &pool, &x, Output::F32(&mut same)).unwrap();
                    assert_bits(&same, &x, "f32");
                    let mut half = halves(&vec![f32::NAN; len]);
                    store(level, &pool, &x, Output::F16(&mut half)).unwrap();
                    assert_bits(&widened(&half), &widened(&halves(&x)), "f16");
                    let mut back = vec![f32::NAN; len];
                    let finite = load(level, &pool, Source::F16(&half), &mut back).unwrap();
                    assert_bits(&back, &widened(&halves(&x)), "f16 back");
                    assert_eq!(finite, back.iter().all(|x| x.is_finite()), "{len}");
                    assert!(load(level, &pool, Source::F32(&x), &mut back).unwrap());
                    assert_bits(&back, &x, "f32 back");
                }
            }
        }
    }

    #[test]
    fn one_bad_element_anywhere_is_found() {
        let pool = Pool::new(2).unwrap();
        for len in LENGTHS {
            let mut x = vec![f32::MAX; len];
            for level in Level::float_levels() {
                assert!(all_finite(level, &pool, &x).unwrap());
                for at in [0, 1, 14, 15, 16, len / 2, len.saturating_sub(1)] {
                    if at >= len {
                        continue;
                    }
                    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                        x[at] = bad;
                        assert!(!all_finite(level, &pool, &x).unwrap(), "{len} {at} {bad}");
                        x[at] = f32::MIN;
                    }
                }
            }
        }
    }

    #[test]
    fn wrong_lengths_are_refused() {
        let (level, pool) = (Level::best(), Pool::new(1).unwrap());
        assert!(store(level, &pool, &[0.0; 3], Output::F32(&mut [0.0; 4])).is_err());
        assert!(load(level, &pool, Source::F32(&[0.0; 3]), &mut [0.0; 2]).is_err());
    }
}
