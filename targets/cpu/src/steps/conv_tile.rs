//! The body of a convolution: tiles of the output from a filled band.

use half::f16;

use super::conv::{ConvShape, MAX_KERNEL_ROWS};
use super::conv_epilogue::{Epilogue, Patch};
use super::conv_plan::{FINISH_PIXELS, Family, POINT_GAP};
use crate::kernels::Operands;
use crate::kernels::dot::{DotFn, DotTile};
use crate::kernels::matmul::{Tile, TileFn};
use crate::registry::{DotKernel, MatmulKernel};
use crate::simd::{Kernel, LANES, Simd};

/// Panels of a pixel's output and residual that are asked for at once: neighbouring lines
/// come faster together than one by one, as each pair of panels comes to be finished (benches/record). A multiple of every kernel's panels.
const ANNOUNCED_PANELS: usize = 16;

/// Some rows and columns of the output's phase, some panels of its channels. Sizes without a unit are in units of
/// four bytes; see [`Family`].
pub(super) struct TileJob<'a> {
    pub(super) shape: &'a ConvShape,
    pub(super) family: Family,
    pub(super) epilogue: &'a Epilogue<'a>,
    /// The phase of the output, down and across; 0 where there is but one.
    pub(super) phase: [usize; 2],
    /// The band's column of window column `x[0]` of that phase in slot 0.
    pub(super) band: *const u32,
    /// From one column of the band to the next.
    pub(super) column: usize,
    /// What a window reads of a row of the band, at each point.
    pub(super) run: usize,
    /// From one slot of the band to the next, and from one point of a column to the next.
    pub(super) band_row: usize,
    pub(super) band_plane: usize,
    /// Slots; line v, such as row v of the padded input, is in slot `(v - base) % ring`. Where there are points, none before its
    /// predecessor.
    pub(super) base: usize,
    pub(super) ring: usize,
    /// Rows and columns of windows, from and to.
    pub(super) y: [usize; 2],
    pub(super) x: [usize; 2],
    /// Panels, from and to.
    pub(super) panels: [usize; 2],
    /// The weights of the phase, and bytes from those of one point to those of the next.
    pub(super) weights: *const u8,
    pub(super) point_weights: usize,
    /// The longest stretch of K for one pass over the tiles.
    pub(super) k_block: usize,
    /// `[2][n]`, sums and squares of this job's block.
    pub(super) sums: Option<*mut f64>,
    /// Sums: 16 for each pixel and panel of the kernel; see `ConvPlan::tile_len`.
    pub(super) acc: *mut u32,
    /// Where weights are widened first: the kernel that then takes their place.
    pub(super) widened: Option<&'static MatmulKernel>,
    /// Room for a widened or rearranged stretch of all the kernel's panels.
    pub(super) prepared: *mut u8,
}

/// A stretch of K: whole kernel rows, or a part of one.
#[derive(Clone, Copy)]
struct Stretch {
    rows: usize,
    start: usize,
    len: usize,
}

impl Stretch {
    /// The stretch that begins at kernel row `row`, unit `start`.
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

/// The operands of either kind of micro-kernel: the same places in memory, whatever they point to.
type Units = Operands<u32, u8, u32>;

/// The micro-kernels of one number of panels, for tiles of some pixels and of one more.
#[derive(Clone, Copy)]
enum Tiles {
    Float([TileFn; 2]),
    Int8([DotFn; 2]),
}

impl Tiles {
    fn new(family: Family, panels: usize, pixels: usize) -> Self {
        // Where no tile is wider, `pixels` may be the most there are.
        let wider = pixels.min(family.rows() - 1);
        match family {
            Family::Float(k) => {
                let tiles = k.tiles[panels - 1];
                Tiles::Float([tiles[pixels - 1], tiles[wider]])
            }
            Family::Int8(k) => {
                let tiles = k.tiles[panels - 1];
                Tiles::Int8([tiles[pixels - 1], tiles[wider]])
            }
        }
    }

    /// Computes one tile.
    ///
    /// # Safety
    /// As for the micro-kernels.
    #[inline(always)]
    unsafe fn multiply(self, wider: bool, units: &Units) {
        let units: *const Units = units;
        // SAFETY: the operands are `repr(C)` and alike but for what their pointers point to; for
        // the rest the caller.
        unsafe {
            match self {
                Tiles::Float(tiles) => tiles[usize::from(wider)](&*units.cast::<Tile>()),
                Tiles::Int8(tiles) => tiles[usize::from(wider)](&*units.cast::<DotTile>()),
            }
        }
    }
}

/// The weights of a stretch as a micro-kernel reads them.
#[derive(Clone, Copy)]
struct Stored {
    family: Family,
    b: *const u8,
    /// Bytes from the first panel to the second.
    panel_stride: usize,
}

impl Kernel for TileJob<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let ConvShape { stride: [_, sx], .. } = *self.shape;
        let kh = self.shape.stored_kernel()[0];
        let ow = self.shape.out()[1];
        let doubled = self.shape.doubled();
        let points = self.shape.points();
        let depth = kh * self.run;
        // What a micro-kernel's tile has several of: windows, or Winograd's tiles of them.
        let [high, wide] = self.shape.tile();
        let cols = (self.x[1] - self.x[0]).div_ceil(wide);
        let windows = (self.y[1] - self.y[0]) * (self.x[1] - self.x[0]);
        let rows = (self.y[1] - self.y[0]).div_ceil(high);
        let (lines, cols) = if points > 1 && self.band_row == cols * self.column {
            // Of points nothing lies between a row and the next: they are one.
            (1, rows * cols)
        } else {
            (rows, cols)
        };
        // Even tiles: the first few are one wider.
        let tiles = cols.div_ceil(self.family.rows());
        let (narrow, wider) = (cols / tiles, cols % tiles);
        // Whether a tile can be finished before the next one is summed.
        let whole = points == 1 && depth <= self.k_block;
        // Windows that are asked for with each tile of points.
        let at_once = windows.div_ceil(points * lines * tiles);
        let mut panel = self.panels[0];
        while panel < self.panels[1] {
            let panels = self.family.panels().min(self.panels[1] - panel);
            // Panels that are asked for while these are summed.
            let ahead = if (panel - self.panels[0]).is_multiple_of(ANNOUNCED_PANELS) {
                ANNOUNCED_PANELS.min(self.panels[1] - panel)
            } else {
                0
            };
            let mut announced = 0;
            for point in 0..points {
                let (mut ky, mut start) = (0, 0);
                while ky < kh {
                    let stretch = Stretch::at(ky, start, kh, self.run, self.k_block);
                    let first = ky == 0 && start == 0;
                    let k = ky * self.run + start;
                    let last = points == 1 && k + stretch.rows * stretch.len == depth;
                    // SAFETY: points, panels and k lie within the checked weights.
                    let weights = unsafe {
                        let row = self.family.weight_row();
                        let b = self.weights.add(point * self.point_weights);
                        let b = b.add((panel * depth + k) * row);
                        // Widening is not worth it for a single tile.
                        let single = tiles * lines == 1;
                        self.prepare(s, b, stretch, panels, depth, single)
                    };
                    let functions = Tiles::new(weights.family, panels, narrow);
                    for line in 0..lines {
                        let y = self.y[0] + line * high;
                        let top = self.shape.lines([y, y + 1])[0];
                        let mut runs = [0_isize; MAX_KERNEL_ROWS];
                        for (i, offset) in runs[..stretch.rows].iter_mut().enumerate() {
                            let slot = (top + self.phase[0] + ky + i - self.base) % self.ring;
                            *offset = (4 * (slot * self.band_row + stretch.start)) as isize;
                        }
                        let row_sums = if whole { 0 } else { (point * lines + line) * cols };
                        let mut units = Units {
                            // SAFETY: the band has all points.
                            a: unsafe { self.band.add(point * self.band_plane) },
                            a_stride: 4 * sx * self.column,
                            runs: runs.as_ptr(),
                            n_runs: stretch.rows,
                            run_len: stretch.len,
                            b: weights.b,
                            panel_stride: weights.panel_stride,
                            // SAFETY: the sums of this row's first column.
                            c: unsafe {
                                self.acc.add(row_sums * LANES * panels + point * POINT_GAP)
                            },
                            c_stride: 4 * LANES * panels,
                            accumulate: usize::from(!first),
                        };
                        let place = [
                            (y << doubled) + self.phase[0],
                            (self.x[0] << doubled) + self.phase[1],
                        ];
                        let mut patch = self.epilogue.patch(place, ow, 1 << doubled, panel, panels);
                        let mut patch_sums = units.c;
                        for t in 0..tiles {
                            let width = narrow + usize::from(t < wider);
                            if ahead == 0 {
                                // They have been asked for.
                            } else if points > 1 && ky == 0 {
                                self.announce(s, [announced, at_once], panel, ahead);
                                announced += at_once;
                            } else if last {
                                let mut next = Patch { panels: ahead, ..patch };
                                next.advance();
                                self.epilogue.announce(s, &Patch { pixels: width, ..next });
                            }
                            // SAFETY: conv2d laid out the band, the weights and the sums for all
                            // rows, columns, points and panels of the job, and checked their lengths; the
                            // kernel's instruction set is that of the plan's level.
                            unsafe {
                                functions.multiply(t < wider, &units);
                                // Past the last tile there may be nothing.
                                units.a = units.a.wrapping_add(width * sx * self.column);
                                units.c = units.c.wrapping_add(width * LANES * panels);
                                patch.pixels += width;
                                if last && (patch.pixels >= FINISH_PIXELS || t + 1 == tiles) {
                                    self.epilogue.finish(s, &patch, patch_sums, self.sums);
                                    patch.advance();
                                    if whole {
                                        units.c = patch_sums;
                                    }
                                    patch_sums = units.c;
                                }
                            }
                        }
                    }
                    start += stretch.len;
                    if start == self.run || stretch.rows > 1 {
                        ky += stretch.rows;
                        start = 0;
                    }
                }
            }
            if points > 1 {
                // SAFETY: the sums have just been made; for the rest as above.
                unsafe {
                    if self.shape.squares() {
                        self.join_squares(s, panel, panels);
                    } else {
                        self.join(s, panel, panels);
                    }
                };
            }
            panel += panels;
        }
    }
}

impl TileJob<'_> {
    /// The weights of a stretch, from `b` on, widened or rearranged where the kernel wants that.
    ///
    /// # Safety
    /// The stretch of `panels` panels lies in the weights.
    #[inline(always)]
    unsafe fn prepare<S: Simd>(
        &self,
        s: S,
        b: *const u8,
        stretch: Stretch,
        panels: usize,
        depth: usize,
        single: bool,
    ) -> Stored {
        let row = self.family.weight_row();
        let len = stretch.rows * stretch.len;
        let stored = Stored { family: self.family, b, panel_stride: depth * row };
        let prepared = Stored {
            family: self.family,
            b: self.prepared.cast_const(),
            panel_stride: len * LANES * 4,
        };
        // SAFETY: the caller's; the room is that of a stretch of all panels.
        unsafe {
            match (self.family, self.widened) {
                (Family::Float(_), Some(kernel)) if !single => {
                    for q in 0..panels {
                        let from = b.add(q * depth * row).cast::<f16>();
                        let to = self.prepared.add(q * prepared.panel_stride).cast::<f32>();
                        for i in 0..len {
                            s.store(s.load_f16(from.add(i * LANES)), to.add(i * LANES));
                        }
                    }
                    Stored { family: Family::Float(kernel), ..prepared }
                }
                (Family::Int8(DotKernel { arrange: Some(arrange), .. }), _) => {
                    for q in 0..panels {
                        let from = b.add(q * depth * row).cast();
                        let to = self.prepared.add(q * prepared.panel_stride).cast();
                        arrange(from, to, stretch.rows, stretch.len);
                    }
                    prepared
                }
                _ => stored,
            }
        }
    }
}
