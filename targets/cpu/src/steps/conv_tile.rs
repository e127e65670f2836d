//! The body and the epilogue of a convolution: tiles of the output from a filled band.

use half::f16;

use super::conv::{ConvShape, MAX_KERNEL_ROWS};
use crate::kernels::matmul::Tile;
use crate::registry::MatmulKernel;
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

/// What stays the same for all tiles of a convolution. Pointers: every tile writes pixels and
/// channels of its own.
#[derive(Clone, Copy)]
pub(super) struct Epilogue<'a> {
    pub(super) bias: Option<&'a [f32]>,
    pub(super) add: Option<&'a [f32]>,
    pub(super) residual: Option<Read>,
    pub(super) output_scale: f32,
    pub(super) out: Write,
}

// SAFETY: tasks write disjoint parts of `out` and of nothing else; a residual at the same
// address is read only where the same task writes afterwards.
unsafe impl Send for Epilogue<'_> {}
// SAFETY: as above.
unsafe impl Sync for Epilogue<'_> {}

/// Some rows and columns of the output, some panels of its channels.
pub(super) struct TileJob<'a> {
    pub(super) shape: &'a ConvShape,
    pub(super) kernel: &'a MatmulKernel,
    pub(super) epilogue: &'a Epilogue<'a>,
    /// The band's pixel of output column `x[0]` in slot 0.
    pub(super) band: *const f32,
    /// Elements from one slot of the band to the next.
    pub(super) band_row: usize,
    /// Slots; row v of the padded input is in slot `v % ring`.
    pub(super) ring: usize,
    /// Output rows and columns, from and to.
    pub(super) y: [usize; 2],
    pub(super) x: [usize; 2],
    /// Panels, from and to.
    pub(super) panels: [usize; 2],
    pub(super) weights: *const u8,
    /// Bytes of a weight.
    pub(super) weight_size: usize,
    /// The longest stretch of K for one pass over the tiles.
    pub(super) k_block: usize,
    /// `[2][n]`, sums and squares of this job's block.
    pub(super) sums: Option<*mut f64>,
    /// Accumulators: 16 for each pixel and panel of the kernel.
    pub(super) acc: *mut f32,
    /// Where weights are widened first: the kernel that then takes their place, and room for a
    /// stretch of all its panels.
    pub(super) widened: Option<(&'a MatmulKernel, *mut f32)>,
}

/// A stretch of K: whole kernel rows, or a part of one.
#[derive(Clone, Copy)]
struct Stretch {
    rows: usize,
    start: usize,
    len: usize,
}

impl Stretch {
    /// The stretch that begins at kernel row `row`, element `start`.
    fn at(row: usize, start: usize, kernel_rows: usize, run: usize, limit: usize) -> Self {
        if run >= limit {
            let pieces = run.div_ceil(limit);
            let piece = run.div_ceil(pieces).next_multiple_of(4);
            Stretch { rows: 1, start, len: piece.min(run - start) }
        } else {
            Stretch { rows: (limit / run).min(kernel_rows - row), start: 0, len: run }
        }
    }
}

impl Kernel for TileJob<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let ConvShape { c, kernel: [kh, kw], stride: [sy, sx], .. } = *self.shape;
        let run = kw * c;
        let depth = kh * run;
        let cols = self.x[1] - self.x[0];
        let tiles = cols.div_ceil(self.kernel.rows);
        let whole = depth <= self.k_block;
        let mut panel = self.panels[0];
        while panel < self.panels[1] {
            let panels = self.kernel.panels.min(self.panels[1] - panel);
            let (mut ky, mut start) = (0, 0);
            while ky < kh {
                let stretch = Stretch::at(ky, start, kh, run, self.k_block);
                let first = ky == 0 && start == 0;
                let k = ky * run + start;
                let len = stretch.rows * stretch.len;
                let last = k + len == depth;
                // SAFETY: panels and k lie within the checked weights, and the room for widened
                // ones is that of a stretch.
                let (b, panel_stride, functions) = unsafe {
                    let b = self.weights.add((panel * depth + k) * LANES * self.weight_size);
                    match self.widened {
                        // Not worth it for a single tile.
                        Some((kernel, to)) if tiles * (self.y[1] - self.y[0]) > 1 => {
                            for q in 0..panels {
                                let from = b.add(q * depth * LANES * 2).cast::<f16>();
                                for i in 0..len {
                                    let v = s.load_f16(from.add(i * LANES));
                                    s.store(v, to.add((q * len + i) * LANES));
                                }
                            }
                            (to.cast_const().cast(), len * LANES * 4, kernel.tiles[panels - 1])
                        }
                        _ => (b, depth * LANES * self.weight_size, self.kernel.tiles[panels - 1]),
                    }
                };
                for y in self.y[0]..self.y[1] {
                    let mut runs = [0_isize; MAX_KERNEL_ROWS];
                    for (i, offset) in runs[..stretch.rows].iter_mut().enumerate() {
                        let slot = (y * sy + ky + i) % self.ring;
                        *offset = (4 * (slot * self.band_row + stretch.start)) as isize;
                    }
                    let mut x = 0;
                    for t in 0..tiles {
                        // Even tiles: the first few are one pixel wider.
                        let width = cols / tiles + usize::from(t < cols % tiles);
                        let pixel = if whole { 0 } else { (y - self.y[0]) * cols + x };
                        // SAFETY: conv2d laid out the band, the weights and the accumulators
                        // for all rows, columns and panels of the job, and checked their
                        // lengths; the kernel's instruction set is that of the plan's level.
                        unsafe {
                            let acc = self.acc.add(pixel * LANES * panels);
                            functions[width - 1](&Tile {
                                a: self.band.add(x * sx * c),
                                a_stride: 4 * sx * c,
                                runs: runs.as_ptr(),
                                n_runs: stretch.rows,
                                run_len: stretch.len,
                                b,
                                panel_stride,
                                c: acc,
                                c_stride: 4 * LANES * panels,
                                accumulate: usize::from(!first),
                            });
                            if last {
                                self.finish(s, [y, self.x[0] + x], width, panel, panels, acc);
                            }
                        }
                        x += width;
                    }
                }
                start += stretch.len;
                if start == run || stretch.rows > 1 {
                    ky += stretch.rows;
                    start = 0;
                }
            }
            panel += panels;
        }
    }
}

impl TileJob<'_> {
    /// Turns one tile of accumulators into output.
    ///
    /// # Safety
    /// `acc` holds `width` pixels of `panels` panels; the tile lies in the output.
    #[inline(always)]
    unsafe fn finish<S: Simd>(
        &self,
        s: S,
        [y, x]: [usize; 2],
        width: usize,
        panel: usize,
        panels: usize,
        acc: *const f32,
    ) {
        let n = self.shape.n;
        let e = self.epilogue;
        let ow = self.shape.out()[1];
        for q in 0..panels {
            let first = (panel + q) * LANES;
            let lanes = LANES.min(n - first);
            let mut bias = s.splat(0.0);
            if let Some(b) = e.bias {
                bias = s.load_slice(&b[first..first + lanes]);
            }
            if let Some(b) = e.add {
                bias = s.add(bias, s.load_slice(&b[first..first + lanes]));
            }
            let scale = s.splat(e.output_scale);
            let mut index = (y * ow + x) * n + first;
            // SAFETY: see above; sums hold two rows of n.
            unsafe {
                #[allow(clippy::manual_map)] // a closure might not be inlined
                let mut sums = match self.sums {
                    None => None,
                    Some(p) => Some((
                        load_sums(s, p.add(first), lanes),
                        load_sums(s, p.add(n + first), lanes),
                    )),
                };
                for i in 0..width {
                    let mut v = s.load(acc.add((i * panels + q) * LANES));
                    v = s.add(v, bias);
                    if let Some(r) = e.residual {
                        v = s.add(v, r.load(s, index, lanes));
                    }
                    v = s.mul(v, scale);
                    e.out.store(s, index, lanes, v);
                    if let Some((sum, square)) = &mut sums {
                        if let Write::F16(p) = e.out {
                            // As the next step reads it.
                            v = Read::F16(p).load(s, index, lanes);
                        }
                        *sum = s.add_d(*sum, v);
                        *square = s.add_square_d(*square, v);
                    }
                    index += n;
                }
                if let (Some(p), Some((sum, square))) = (self.sums, sums) {
                    store_sums(s, p.add(first), lanes, sum);
                    store_sums(s, p.add(n + first), lanes, square);
                }
            }
        }
    }
}

impl Read {
    /// Up to sixteen elements from `index`.
    ///
    /// # Safety
    /// They must be readable.
    #[inline(always)]
    unsafe fn load<S: Simd>(self, s: S, index: usize, lanes: usize) -> S::F {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Read::F32(p) if lanes == LANES => s.load(p.add(index)),
                Read::F32(p) => s.load_n(p.add(index), lanes),
                Read::F16(p) if lanes == LANES => s.load_f16(p.add(index)),
                Read::F16(p) => s.load_f16_n(p.add(index), lanes),
            }
        }
    }
}

impl Write {
    /// Up to sixteen elements to `index`.
    ///
    /// # Safety
    /// They must be writable, and no other task may touch them.
    #[inline(always)]
    unsafe fn store<S: Simd>(self, s: S, index: usize, lanes: usize, v: S::F) {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Write::F32(p) if lanes == LANES => s.store(v, p.add(index)),
                Write::F32(p) => s.store_n(v, p.add(index), lanes),
                Write::F16(p) if lanes == LANES => s.store_f16(v, p.add(index)),
                Write::F16(p) => s.store_f16_n(v, p.add(index), lanes),
            }
        }
    }
}

/// # Safety
/// `p` must be readable for `lanes` elements.
#[inline(always)]
unsafe fn load_sums<S: Simd>(s: S, p: *const f64, lanes: usize) -> S::D {
    // SAFETY: the caller's; the block holds 16.
    unsafe {
        if lanes == LANES {
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
unsafe fn store_sums<S: Simd>(s: S, p: *mut f64, lanes: usize, v: S::D) {
    // SAFETY: the caller's; the block holds 16.
    unsafe {
        if lanes == LANES {
            s.store_d(v, p);
            return;
        }
        let mut block = [0.0; LANES];
        s.store_d(v, block.as_mut_ptr());
        std::ptr::copy_nonoverlapping(block.as_ptr(), p, lanes);
    }
}
