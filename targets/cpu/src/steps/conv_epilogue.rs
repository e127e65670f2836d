//! The epilogue of a convolution: sums become numbers, the vectors and the residual are added, the result
//! is stored and added up for the next GroupNorm. How sums come about is not here.

use half::f16;

use super::conv_rows::Window;
use crate::simd::{Kernel, LANES, Simd};

/// A tensor by its address.
#[derive(Clone, Copy)]
pub(super) enum Read {
    F32(*const f32),
    F16(*const f16),
}

/// A tensor by its address.
#[derive(Clone, Copy)]
pub(super) enum Write {
    F32(*mut f32),
    F16(*mut f16),
}

/// What turns an int8 layer's sums into numbers: `(sum - correction[n]) * worth[n]`. Whole panels of
/// both, so that their last one can be read as the others.
#[derive(Clone, Copy)]
pub(super) struct Dequantize<'a> {
    pub(super) correction: &'a [i32],
    pub(super) worth: &'a [f32],
}

/// What stays the same for all tiles of a convolution. Pointers: every tile writes pixels and
/// channels of its own.
#[derive(Clone, Copy)]
pub(super) struct Epilogue<'a> {
    /// Output channels.
    pub(super) n: usize,
    /// Given for int8 layers.
    pub(super) dequantize: Option<Dequantize<'a>>,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) add: Option<&'a [f32]>,
    pub(super) residual: Option<Read>,
    pub(super) output_scale: f32,
    pub(super) out: Write,
    /// The rows that the output and the residual hold.
    pub(super) out_rows: Window,
    pub(super) residual_rows: Window,
}

// SAFETY: tasks write disjoint parts of `out` and of nothing else; a residual at the same
// address is read only where the same task writes afterwards.
unsafe impl Send for Epilogue<'_> {}
// SAFETY: as above.
unsafe impl Sync for Epilogue<'_> {}

/// Pixels of one output row and phase, and some panels of their channels.
#[derive(Clone, Copy)]
pub(super) struct Patch {
    /// From one pixel to the next.
    pub(super) step: usize,
    /// The first pixel's number in the output, and in the residual.
    pub(super) pixel: usize,
    pub(super) residual: usize,
    pub(super) pixels: usize,
    /// The first panel.
    pub(super) panel: usize,
    pub(super) panels: usize,
}

impl Patch {
    /// Moves behind its pixels.
    #[inline(always)]
    pub(super) const fn advance(&mut self) {
        self.pixel += self.pixels * self.step;
        self.residual += self.pixels * self.step;
        self.pixels = 0;
    }
}

impl<'a> Epilogue<'a> {
    /// As it is where `first` is the filter of output channel 0.
    pub(super) fn of_filters(&self, first: usize) -> Self {
        let dequantize = |d: Dequantize<'a>| Dequantize {
            correction: &d.correction[first..],
            worth: &d.worth[first..],
        };
        Epilogue {
            dequantize: self.dequantize.map(dequantize),
            bias: self.bias.map(|b| &b[first..]),
            ..*self
        }
    }

    /// The patch without pixels that begins at row `y`, column `x` of an output `width` wide and has each
    /// `step`th pixel from there on.
    #[inline(always)]
    pub(super) const fn patch(
        &self,
        [y, x]: [usize; 2],
        width: usize,
        step: usize,
        panel: usize,
        panels: usize,
    ) -> Patch {
        Patch {
            step,
            pixel: self.out_rows.row(y) * width + x,
            residual: self.residual_rows.row(y) * width + x,
            pixels: 0,
            panel,
            panels,
        }
    }

    /// Asks for what [`Epilogue::finish`] will read and write, so that it is there when the sums are: the
    /// pixels of a patch lie too far apart for the processor to foresee.
    #[inline(always)]
    pub(super) fn announce<S: Simd>(&self, s: S, patch: &Patch) {
        let mut index = patch.pixel * self.n + patch.panel * LANES;
        let mut other = patch.residual * self.n + patch.panel * LANES;
        let out = match self.out {
            Write::F32(p) => Read::F32(p.cast_const()),
            Write::F16(p) => Read::F16(p.cast_const()),
        };
        for _ in 0..patch.pixels {
            out.prefetch(s, index, patch.panels);
            if let Some(r) = self.residual {
                r.prefetch(s, other, patch.panels);
            }
            index += self.n * patch.step;
            other += self.n * patch.step;
        }
    }

    /// Turns sums, `[pixels][panels][16]` from `acc` on, into output; adds it to `sums`, `[2][n]`.
    ///
    /// # Safety
    /// `acc` must hold the patch; the patch must lie in the output and be the caller's alone.
    #[inline(always)]
    pub(super) unsafe fn finish<S: Simd>(
        &self,
        s: S,
        patch: &Patch,
        acc: *const u32,
        sums: Option<*mut f64>,
    ) {
        for q in 0..patch.panels {
            let first = (patch.panel + q) * LANES;
            let strip = Strip {
                epilogue: self,
                // SAFETY: the caller's.
                acc: unsafe { acc.add(q * LANES) },
                acc_step: patch.panels * LANES,
                step: patch.step * self.n,
                first,
                lanes: LANES.min(self.n - first),
                index: patch.pixel * self.n + first,
                residual: patch.residual * self.n + first,
                pixels: patch.pixels,
                sums,
            };
            if strip.lanes == LANES {
                strip.finish::<S, true>(s);
            } else {
                ragged(s, strip);
            }
        }
    }
}

/// The last panel where it is not whole: apart, so that its partial loads and stores do not slow the others.
#[cold]
#[inline(never)]
fn ragged<S: Simd>(s: S, strip: Strip<'_>) {
    s.vectorize(strip);
}

/// The pixels of one panel. The addresses are those of a patch, which [`Epilogue::finish`]'s caller vouches
/// for.
struct Strip<'a> {
    epilogue: &'a Epilogue<'a>,
    acc: *const u32,
    /// From one pixel's sums to the next's.
    acc_step: usize,
    /// From one pixel's elements to the next's.
    step: usize,
    /// The first channel.
    first: usize,
    lanes: usize,
    /// The first element of the output, and of the residual.
    index: usize,
    residual: usize,
    pixels: usize,
    sums: Option<*mut f64>,
}

impl Kernel for Strip<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.finish::<S, false>(s);
    }
}

impl Strip<'_> {
    /// `FULL`: all sixteen lanes.
    #[inline(always)]
    fn finish<S: Simd, const FULL: bool>(&self, s: S) {
        match (self.epilogue.out, self.epilogue.residual) {
            (Write::F32(o), None) => self.typed::<S, f32, f32, FULL>(s, o, None),
            (Write::F32(o), Some(Read::F32(r))) => self.typed::<S, _, _, FULL>(s, o, Some(r)),
            (Write::F32(o), Some(Read::F16(r))) => self.typed::<S, _, _, FULL>(s, o, Some(r)),
            (Write::F16(o), None) => self.typed::<S, f16, f16, FULL>(s, o, None),
            (Write::F16(o), Some(Read::F32(r))) => self.typed::<S, _, _, FULL>(s, o, Some(r)),
            (Write::F16(o), Some(Read::F16(r))) => self.typed::<S, _, _, FULL>(s, o, Some(r)),
        }
    }

    #[inline(always)]
    fn typed<S: Simd, O: Number, R: Number, const FULL: bool>(
        &self,
        s: S,
        out: *mut O,
        residual: Option<*const R>,
    ) {
        match (self.epilogue.dequantize, self.sums) {
            (None, None) => self.pixels::<S, O, R, FULL, false, false>(s, out, residual),
            (None, Some(_)) => self.pixels::<S, O, R, FULL, false, true>(s, out, residual),
            (Some(_), None) => self.pixels::<S, O, R, FULL, true, false>(s, out, residual),
            (Some(_), Some(_)) => self.pixels::<S, O, R, FULL, true, true>(s, out, residual),
        }
    }

    #[inline(always)]
    fn pixels<
        S: Simd,
        O: Number,
        R: Number,
        const FULL: bool,
        const INT8: bool,
        const SUMS: bool,
    >(
        &self,
        s: S,
        out: *mut O,
        residual: Option<*const R>,
    ) {
        let e = self.epilogue;
        let lanes = if FULL { LANES } else { self.lanes };
        let channels = self.first..self.first + lanes;
        let mut bias = s.splat(0.0);
        if let Some(b) = e.bias {
            bias = s.load_slice(&b[channels.clone()]);
        }
        if let Some(b) = e.add {
            bias = s.add(bias, s.load_slice(&b[channels]));
        }
        let scaled = e.output_scale != 1.0;
        let scale = s.splat(e.output_scale);
        let (mut correction, mut worth) = (s.splat_i(0), s.splat(0.0));
        if INT8 && let Some(d) = e.dequantize {
            let whole = self.first..self.first + LANES;
            // SAFETY: sixteen elements.
            correction = unsafe { s.load_i(d.correction[whole.clone()].as_ptr()) };
            worth = s.load_slice(&d.worth[whole]);
        }
        let (mut sum, mut square) = (s.zero_d(), s.zero_d());
        let sums = self.sums.filter(|_| SUMS);
        // SAFETY: the pixels lie in the output, their sums in `acc`; `sums` hold two rows of n.
        unsafe {
            if let Some(p) = sums {
                sum = load_sums::<S, FULL>(s, p.add(self.first), lanes);
                square = load_sums::<S, FULL>(s, p.add(e.n + self.first), lanes);
            }
            let mut acc = self.acc;
            let mut index = self.index;
            let mut other = self.residual;
            for _ in 0..self.pixels {
                let mut v = if INT8 {
                    s.mul(s.float_of(s.sub_i(s.load_i(acc.cast()), correction)), worth)
                } else {
                    s.load(acc.cast())
                };
                v = s.add(v, bias);
                if let Some(r) = residual {
                    v = s.add(v, R::load::<S, FULL>(s, r.add(other), lanes));
                    other += self.step;
                }
                if scaled {
                    v = s.mul(v, scale);
                }
                O::store::<S, FULL>(s, v, out.add(index), lanes);
                if SUMS {
                    // As the next step reads it.
                    let v = O::stored::<S, FULL>(s, v, out.add(index), lanes);
                    sum = s.add_d(sum, v);
                    square = s.add_square_d(square, v);
                }
                index += self.step;
                acc = acc.add(self.acc_step);
            }
            if let Some(p) = sums {
                store_sums::<S, FULL>(s, p.add(self.first), lanes, sum);
                store_sums::<S, FULL>(s, p.add(e.n + self.first), lanes, square);
            }
        }
    }
}

impl Read {
    /// Asks for the panels from `index` on.
    #[inline(always)]
    fn prefetch<S: Simd>(self, s: S, index: usize, panels: usize) {
        const LINE: usize = 64;
        let (start, bytes) = match self {
            Read::F32(p) => (p.wrapping_add(index).cast::<u8>(), 4 * LANES * panels),
            Read::F16(p) => (p.wrapping_add(index).cast::<u8>(), 2 * LANES * panels),
        };
        let mut at = 0;
        while at < bytes {
            s.prefetch(start.wrapping_add(at));
            at += LINE;
        }
    }
}

/// A stored element. All lanes where `FULL`, else the first `lanes`.
trait Number: Copy {
    /// # Safety
    /// The lanes must be readable.
    unsafe fn load<S: Simd, const FULL: bool>(s: S, p: *const Self, lanes: usize) -> S::F;
    /// # Safety
    /// The lanes must be writable.
    unsafe fn store<S: Simd, const FULL: bool>(s: S, v: S::F, p: *mut Self, lanes: usize);
    /// What `v` is once stored, which it was at `p`.
    ///
    /// # Safety
    /// The lanes must be readable.
    unsafe fn stored<S: Simd, const FULL: bool>(
        s: S,
        v: S::F,
        p: *const Self,
        lanes: usize,
    ) -> S::F;
}

impl Number for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd, const FULL: bool>(s: S, p: *const f32, lanes: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe { if FULL { s.load(p) } else { s.load_n(p, lanes) } }
    }
    #[inline(always)]
    unsafe fn store<S: Simd, const FULL: bool>(s: S, v: S::F, p: *mut f32, lanes: usize) {
        // SAFETY: the caller's.
        unsafe { if FULL { s.store(v, p) } else { s.store_n(v, p, lanes) } }
    }
    #[inline(always)]
    unsafe fn stored<S: Simd, const FULL: bool>(_: S, v: S::F, _: *const f32, _: usize) -> S::F {
        v
    }
}

impl Number for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd, const FULL: bool>(s: S, p: *const f16, lanes: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe { if FULL { s.load_f16(p) } else { s.load_f16_n(p, lanes) } }
    }
    #[inline(always)]
    unsafe fn store<S: Simd, const FULL: bool>(s: S, v: S::F, p: *mut f16, lanes: usize) {
        // SAFETY: the caller's.
        unsafe { if FULL { s.store_f16(v, p) } else { s.store_f16_n(v, p, lanes) } }
    }
    #[inline(always)]
    unsafe fn stored<S: Simd, const FULL: bool>(
        s: S,
        _: S::F,
        p: *const f16,
        lanes: usize,
    ) -> S::F {
        // SAFETY: the caller's.
        unsafe { Self::load::<S, FULL>(s, p, lanes) }
    }
}

/// # Safety
/// `p` must be readable for `lanes` elements.
#[inline(always)]
unsafe fn load_sums<S: Simd, const FULL: bool>(s: S, p: *const f64, lanes: usize) -> S::D {
    // SAFETY: the caller's; the block holds 16.
    unsafe {
        if FULL {
            return s.load_d(p);
        }
        let mut block = [0.0; LANES];
        std::ptr::copy_nonoverlapping(p, block.as_mut_ptr(), lanes);
        s.load_d(block.as_ptr())
    }
}

/// # Safety
/// `p` must be writable for `lanes` elements.
#[inline(always)]
unsafe fn store_sums<S: Simd, const FULL: bool>(s: S, p: *mut f64, lanes: usize, v: S::D) {
    // SAFETY: the caller's; the block holds 16.
    unsafe {
        if FULL {
            s.store_d(v, p);
            return;
        }
        let mut block = [0.0; LANES];
        s.store_d(v, block.as_mut_ptr());
        std::ptr::copy_nonoverlapping(block.as_ptr(), p, lanes);
    }
}
