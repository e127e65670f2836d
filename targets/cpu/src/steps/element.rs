//! Stored elements, `f32` or `f16`, read and written as vectors of `f32`.
//!
//! How a slice of either type is read, and the pointers through which the tasks of the steps
//! outside the convolution reach their operands. Arithmetic is not here.

use half::f16;

use super::{Output, SharedMut, Source};
use crate::simd::Simd;

/// An element type that a vector can be read from.
pub(super) trait Element: Copy {
    /// Sixteen or fewer lanes, the others zero.
    fn read<S: Simd>(s: S, x: &[Self]) -> S::F;
}

impl Element for f32 {
    #[inline(always)]
    fn read<S: Simd>(s: S, x: &[f32]) -> S::F {
        s.load_slice(x)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn read<S: Simd>(s: S, x: &[f16]) -> S::F {
        s.load_f16_slice(x)
    }
}

/// A pointer to a [`Source`]'s elements.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pointer {
    /// Single precision.
    F32(*const f32),
    /// Half precision.
    F16(*const f16),
}

// SAFETY: it is read only; every user documents for how long and how far it is valid.
unsafe impl Send for Pointer {}
// SAFETY: as above.
unsafe impl Sync for Pointer {}

impl Pointer {
    /// The start of a tensor.
    pub(super) const fn of(source: Source<'_>) -> Self {
        match source {
            Source::F32(x) => Pointer::F32(x.as_ptr()),
            Source::F16(x) => Pointer::F16(x.as_ptr()),
        }
    }

    /// The first `n <= 16` lanes at element `at`, the others zero.
    ///
    /// # Safety
    /// Elements `at..at + n` must be readable.
    #[inline(always)]
    pub(super) unsafe fn read<S: Simd>(self, s: S, at: usize, n: usize) -> S::F {
        // SAFETY: the caller vouches for n elements.
        unsafe {
            match (self, n == 16) {
                (Pointer::F32(p), true) => s.load(p.add(at)),
                (Pointer::F32(p), false) => s.load_n(p.add(at), n),
                (Pointer::F16(p), true) => s.load_f16(p.add(at)),
                (Pointer::F16(p), false) => s.load_f16_n(p.add(at), n),
            }
        }
    }
}

/// The start of an [`Output`] that tasks write in disjoint parts.
#[derive(Clone, Copy, Debug)]
pub(super) enum SharedOut {
    /// Single precision.
    F32(SharedMut<f32>),
    /// Half precision.
    F16(SharedMut<f16>),
}

impl SharedOut {
    /// Shares an output among the tasks of one run; it must outlive that run.
    pub(super) const fn new(out: &mut Output<'_>) -> Self {
        match out {
            Output::F32(x) => SharedOut::F32(SharedMut(x.as_mut_ptr())),
            Output::F16(x) => SharedOut::F16(SharedMut(x.as_mut_ptr())),
        }
    }

    /// The same elements, to read.
    pub(super) const fn pointer(self) -> Pointer {
        match self {
            SharedOut::F32(p) => Pointer::F32(p.get()),
            SharedOut::F16(p) => Pointer::F16(p.get()),
        }
    }

    /// Writes the first `n <= 16` lanes at element `at`, rounded to nearest even.
    ///
    /// # Safety
    /// Elements `at..at + n` must lie in the output, and no other task may use them.
    #[inline(always)]
    pub(super) unsafe fn write<S: Simd>(self, s: S, v: S::F, at: usize, n: usize) {
        // SAFETY: the caller vouches for n elements.
        unsafe {
            match (self, n == 16) {
                (SharedOut::F32(p), true) => s.store(v, p.get().add(at)),
                (SharedOut::F32(p), false) => s.store_n(v, p.get().add(at), n),
                (SharedOut::F16(p), true) => s.store_f16(v, p.get().add(at)),
                (SharedOut::F16(p), false) => s.store_f16_n(v, p.get().add(at), n),
            }
        }
    }
}

/// Operands for the tests of the steps.
#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// `n` numbers between -1 and 1, the same for the same seed.
    pub(in crate::steps) fn random(n: usize, seed: u64) -> Vec<f32> {
        // SplitMix64 (Steele et al. 2014).
        let mut state = seed.wrapping_mul(0xd129_42f8_5dff_1a35);
        (0..n)
            .map(|_| {
                state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut z = state;
                z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                z ^= z >> 31;
                (z >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// Rounded to half precision.
    pub(in crate::steps) fn halves(x: &[f32]) -> Vec<f16> {
        x.iter().map(|&x| f16::from_f32(x)).collect()
    }

    /// Widened again.
    pub(in crate::steps) fn widened(x: &[f16]) -> Vec<f32> {
        x.iter().map(|x| x.to_f32()).collect()
    }

    /// A tensor with its storage.
    #[derive(Clone, Debug)]
    pub(in crate::steps) enum Tensor {
        F32(Vec<f32>),
        F16(Vec<f16>),
    }

    impl Tensor {
        /// Stores `x`, rounded where `half`.
        pub(in crate::steps) fn new(x: &[f32], half: bool) -> Self {
            if half { Tensor::F16(halves(x)) } else { Tensor::F32(x.to_vec()) }
        }
        pub(in crate::steps) fn source(&self) -> Source<'_> {
            match self {
                Tensor::F32(x) => Source::F32(x),
                Tensor::F16(x) => Source::F16(x),
            }
        }
        pub(in crate::steps) fn output(&mut self) -> Output<'_> {
            match self {
                Tensor::F32(x) => Output::F32(x),
                Tensor::F16(x) => Output::F16(x),
            }
        }
        pub(in crate::steps) fn widened(&self) -> Vec<f32> {
            match self {
                Tensor::F32(x) => x.clone(),
                Tensor::F16(x) => widened(x),
            }
        }
    }

    /// Fails with the first element whose bits differ.
    #[track_caller]
    pub(in crate::steps) fn assert_bits(found: &[f32], expected: &[f32], what: &str) {
        assert_eq!(found.len(), expected.len(), "{what}");
        for (i, (f, e)) in found.iter().zip(expected).enumerate() {
            assert!(
                f.to_bits() == e.to_bits() || (f.is_nan() && e.is_nan()),
                "{what}: element {i} is {f:e}, expected {e:e}"
            );
        }
    }

    /// Seconds that this thread has computed, without what other processes took.
    pub(in crate::steps) fn computed() -> f64 {
        let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        let nanoseconds: f64 = stat.split_whitespace().next().unwrap().parse().unwrap();
        nanoseconds / 1e9
    }
}
