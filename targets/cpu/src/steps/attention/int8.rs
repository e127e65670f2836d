//! Attention whose two products are of bytes, with exact `i32` sums.
//!
//! Queries and keys become bytes with a scale for each token and head, after the keys' mean over
//! all tokens is taken from every key: that adds the same to all scores of a query, which the
//! softmax does not see, and spares the bytes the part that all keys share (SageAttention, Zhang
//! et al. 2024, section 3.2). Values become bytes with a scale for each channel and block of
//! [`KEY_BLOCK`] keys. Weights are relative to the largest of their block and become bytes with
//! the scale 1/255; the sum that the result is divided by is that of the bytes, so that the
//! weights that were really used add up to one. In `f32`, each operation rounded, for one query
//! and head of `d` channels:
//!
//! ```text
//! bytes(x[..]) = (round(x * (127 / a)), a / 127)            a = max(|x[..]|, 1e-30)
//! qb[c], qs    = bytes(q[c] * (scale * log2 e))
//! kb[j][c], ks[j] = bytes(k[j][c] - mean[c])                mean in f64, in the order of j
//! m = -inf, l = 0, o[..] = 0
//! for each block of 256 keys (the last may be shorter):
//!     vb[j][c], vs[c] = bytes(v[j][c])                      over the block's j
//!     u[j] = (sum over c of qb[c] * kb[j][c]) * ks[j]
//!     p[j] = round(power((u[j] - max u) * qs))              power(x) near 255 * 2^x
//!     t = (max u) * qs;  n = max(m, t);  a = exp((m - n) * ln 2);  b = exp((t - n) * ln 2);  m = n
//!     l = fused l * a + ((sum over j of p[j]) * b)
//!     o[c] = fused o[c] * a + ((sum over j of p[j] * vb[j][c]) * (vs[c] * b))
//! result[c] = o[c] / l
//! ```
//!
//! Integer sums do not depend on their order, so neither do the bits of the result. What is not
//! finite makes a scale a NaN, and with it every result that it had a part in.
//! [`naive::attention_int8`](crate::naive::attention_int8) is this in plain loops.
//!
//! Keys and values are turned into bytes once, in the order that the kernels of
//! [`crate::kernels::dot`] read, by tasks of one block each; then a task takes some queries of a
//! head past all of them, as many at a time as the kernel has rows.

use super::{AttentionPlan, Rows, STEP};
use crate::kernels::dot::{DotTile, GROUP};
use crate::pool::Pool;
use crate::registry::DotKernel;
use crate::simd::{Kernel, LANES, Simd, math};
use crate::steps::element::SharedOut;
use crate::steps::{SharedMut, StepError};

mod pack;
use pack::Extent;

/// Keys that share a largest weight and the values' scales; part of the definition. All sums of
/// a block's weights, and of its products, are whole numbers that `f32` holds exactly.
pub const KEY_BLOCK: usize = 256;

/// The most queries of a task: they, their results and a block of keys and values stay in a
/// large core's second-level cache. A multiple of the rows of most kernels.
pub(super) const MAX_QUERIES: usize = 168;

/// What the largest of some numbers is taken for at least, so that its inverse is finite.
pub(crate) const LEAST: f32 = 1e-30;

/// The largest byte of queries, keys and values.
pub(crate) const LARGEST: f32 = 127.0;

/// Weights of less than 2^-30 of the largest are zero; a larger bound would do.
pub(crate) const DEEPEST: f32 = -30.0;

/// 1.5 * 2^23 + 127: adding it to a number of small size leaves that number, rounded, plus the
/// exponent's bias in the low bits of the sum.
pub(crate) const ROUND: f32 = 12_583_039.0;

/// 255 times the Taylor coefficients of 2^r, the highest first: within 5e-5 for |r| <= 1/2, a
/// hundredth of a byte's step.
pub(crate) const POWER: [f32; 5] = {
    const L: f64 = std::f64::consts::LN_2;
    [
        (255.0 * L * L * L * L / 24.0) as f32,
        (255.0 * L * L * L / 6.0) as f32,
        (255.0 * L * L / 2.0) as f32,
        (255.0 * L) as f32,
        255.0,
    ]
};

/// 255 * 2^x for x <= 0, exact for 0; a NaN for a NaN.
#[inline(always)]
fn power<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.at_least(x, s.splat(DEEPEST));
    let shifted = s.add(x, s.splat(ROUND));
    let r = s.sub(x, s.sub(shifted, s.splat(ROUND)));
    let mut p = s.splat(POWER[0]);
    for c in &POWER[1..] {
        p = s.mul_add(p, r, s.splat(*c));
    }
    s.mul(p, s.from_bits(s.shl_i::<23>(s.to_bits(shifted))))
}

/// Where the scratch holds what, in elements of four bytes from its start, or from a worker's
/// part. Parts start on multiples of 64 bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Channels of a head, in groups, and rounded up to whole vectors.
    groups: usize,
    padded: usize,
    /// Vectors of keys, and blocks of them.
    key_panels: usize,
    key_blocks: usize,
    /// Keys as bytes, `[heads][key_panels][groups][16][4]`.
    k: usize,
    /// What one step of each key's bytes is worth, `[heads][key_panels][16]`.
    k_scale: usize,
    /// What is added to the sums of each key's products, as `k_scale`.
    k_add: usize,
    /// Values as bytes, `[heads][key_blocks][padded / 16][keys / 4][16][4]`.
    v: usize,
    /// As for keys, but `[heads][key_blocks][padded]`.
    v_scale: usize,
    v_add: usize,
    /// Mean of the keys, `[heads][padded]`.
    mean: usize,
    /// The first worker's part, and the size of each.
    workers: usize,
    worker: usize,
    /// A worker's queries as bytes, `[queries][padded]`.
    q: usize,
    /// What one step of each query's bytes is worth, its largest score and its sum of weights,
    /// `[tiles][16]`.
    q_scale: usize,
    m: usize,
    l: usize,
    /// Weighted values, `[queries][padded]`.
    o: usize,
    /// Scores and weights of a tile's rows, `[rows][KEY_BLOCK]`.
    t: usize,
    p: usize,
    /// Sums of a tile, `[rows][panels * 16]`.
    sums: usize,
    /// Bytes of one key, and of one panel before it is arranged.
    row: usize,
    panel: usize,
    /// Of a block's values by channel, the extent, and what they are multiplied by and sum to
    /// as bytes, `[4][padded]`.
    values: usize,
}

impl Layout {
    pub(super) fn new(plan: &AttentionPlan, kernel: &DotKernel) -> Self {
        let heads = plan.shape.heads;
        let d = plan.shape.channels / heads;
        let keys = plan.shape.keys;
        let (groups, padded) = (d.div_ceil(GROUP), d.next_multiple_of(LANES));
        let key_panels = keys.div_ceil(LANES);
        let key_blocks = keys.div_ceil(KEY_BLOCK);
        let queries = plan.units * kernel.rows;
        let states = plan.units * LANES;
        // Offsets of parts laid end to end.
        let parts = || {
            let mut end = 0;
            move |elements: usize| {
                let start = end;
                end += elements.next_multiple_of(LANES);
                start
            }
        };
        let mut part = parts();
        let k = part(heads * key_panels * groups * LANES);
        let k_scale = part(heads * key_panels * LANES);
        let k_add = part(heads * key_panels * LANES);
        let v = part(heads * padded * keys.div_ceil(GROUP));
        let v_scale = part(heads * key_blocks * padded);
        let v_add = part(heads * key_blocks * padded);
        let mean = part(heads * padded);
        let workers = part(0);
        let mut part = parts();
        Layout {
            groups,
            padded,
            key_panels,
            key_blocks,
            k,
            k_scale,
            k_add,
            v,
            v_scale,
            v_add,
            mean,
            workers,
            q: part(queries * padded / GROUP),
            q_scale: part(states),
            m: part(states),
            l: part(states),
            o: part(queries * padded),
            t: part(kernel.rows * KEY_BLOCK),
            p: part(kernel.rows * KEY_BLOCK / GROUP),
            sums: part(kernel.rows * kernel.panels * LANES),
            row: part(padded / GROUP),
            panel: part(groups.max(KEY_BLOCK / GROUP) * LANES),
            values: part(4 * padded),
            worker: part(0),
        }
    }

    /// Elements of the whole scratch.
    pub(super) const fn len(&self, threads: usize) -> usize {
        self.workers + threads * self.worker
    }
}

/// The operands of one run; their extents were checked against the plan.
#[derive(Clone, Copy)]
pub(super) struct Run<'a> {
    pub(super) plan: &'a AttentionPlan,
    pub(super) kernel: &'static DotKernel,
    pub(super) q: Rows,
    pub(super) k: Rows,
    pub(super) v: Rows,
    pub(super) out: SharedOut,
    /// `Layout::len` elements.
    pub(super) scratch: SharedMut<f32>,
}

impl Run<'_> {
    /// All of it.
    pub(super) fn run(self, pool: &Pool) -> Result<(), StepError> {
        let layout = &Layout::new(self.plan, self.kernel);
        let heads = self.plan.shape.heads;
        let stages = [
            (Stage::Mean, layout.padded / LANES),
            (Stage::Pack, layout.key_blocks),
            (Stage::Mix, self.plan.blocks),
        ];
        for (stage, tasks) in stages {
            pool.run(heads * tasks, &|task, worker| {
                let at = layout.workers + worker * layout.worker;
                self.plan.level.dispatch(Task {
                    run: self,
                    layout,
                    d: self.plan.shape.channels / heads,
                    all: self.scratch.get(),
                    // SAFETY: worker < threads, so its part lies in the scratch, and no two
                    // tasks that run at once have the same worker number.
                    own: unsafe { self.scratch.get().add(at) },
                    stage,
                    head: task / tasks,
                    number: task % tasks,
                });
            })
            .map_err(|source| StepError::Worker { step: STEP, source })?;
        }
        Ok(())
    }
}

/// What must be over before the next begins.
#[derive(Clone, Copy)]
enum Stage {
    /// The keys' mean, sixteen channels a task.
    Mean,
    /// Keys and values to bytes, a block of keys a task.
    Pack,
    /// The attention, some queries a task.
    Mix,
}

/// A task of a stage, in one head. `all` is the scratch, of which the task writes nothing but
/// what is its own by head and number, and reads what stages before have written; `own` is the
/// worker's part.
struct Task<'a> {
    run: Run<'a>,
    layout: &'a Layout,
    /// Channels of a head.
    d: usize,
    all: *mut f32,
    own: *mut f32,
    stage: Stage,
    head: usize,
    number: usize,
}

impl Kernel for Task<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: the fields' promises, and heads and numbers are within the stage's tasks.
        unsafe {
            match (self.stage, self.run.kernel.signed) {
                (Stage::Mean, _) => self.mean(s),
                (Stage::Pack, true) => self.pack::<S, true>(s),
                (Stage::Pack, false) => self.pack::<S, false>(s),
                (Stage::Mix, true) => self.mix::<S, true>(s),
                (Stage::Mix, false) => self.mix::<S, false>(s),
            }
        }
    }
}

/// The parts of a task.
///
/// # Safety
/// Of every method: the promises of [`Task`]; offsets are those of [`Layout`].
impl Task<'_> {
    /// Lanes of the vector of channels that starts at `c`.
    #[inline(always)]
    fn lanes(&self, c: usize) -> usize {
        (self.d - c).min(LANES)
    }

    /// Up to sixteen channels of the head, from `c`, of one token.
    #[inline(always)]
    unsafe fn read<S: Simd>(&self, s: S, rows: Rows, token: usize, c: usize) -> S::F {
        let at = token * rows.stride + rows.first + self.head * self.d + c;
        // SAFETY: see the impl; the row and the columns lie in the operand.
        unsafe { rows.data.read(s, at, self.lanes(c)) }
    }

    /// The values of the block that starts at key `first`.
    #[inline(always)]
    const fn values(&self, first: usize) -> usize {
        let Layout { v, padded, .. } = *self.layout;
        let of_head = padded * self.run.plan.shape.keys.div_ceil(GROUP);
        v + self.head * of_head + first / GROUP * padded
    }

    /// The channels of the block that starts at key `first`, among those of all.
    #[inline(always)]
    const fn block_channels(&self, first: usize) -> usize {
        let Layout { key_blocks, padded, .. } = *self.layout;
        (self.head * key_blocks + first / KEY_BLOCK) * padded
    }

    /// Some queries past all keys.
    #[inline(always)]
    unsafe fn mix<S: Simd, const SIGNED: bool>(&self, s: S) {
        let shape = &self.run.plan.shape;
        let rows = self.run.kernel.rows;
        let first = self.number * self.run.plan.units * rows;
        let queries = (shape.queries - first).min(self.run.plan.units * rows);
        // SAFETY: see the impl; the task owns its queries of the head in the output.
        unsafe {
            for row in 0..queries {
                self.load_query::<S, SIGNED>(s, first + row, row);
            }
            for state in 0..queries.div_ceil(rows) * LANES {
                *self.own.add(self.layout.m + state) = f32::NEG_INFINITY;
                *self.own.add(self.layout.l + state) = 0.0;
            }
            for i in (0..queries * self.layout.padded).step_by(LANES) {
                s.store(s.splat(0.0), self.own.add(self.layout.o + i));
            }
            let mut key = 0;
            while key < shape.keys {
                let keys = (shape.keys - key).min(KEY_BLOCK);
                let mut row = 0;
                while row < queries {
                    let rows = (queries - row).min(rows);
                    self.scores(s, key, keys, row, rows);
                    let state = self.soften::<S, SIGNED>(s, key, keys, row, rows);
                    self.weigh(s, key, keys, row, rows, &state);
                    row += rows;
                }
                key += keys;
            }
            for row in 0..queries {
                let sum = s.splat(*self.own.add(self.layout.l + self.state(row)));
                let from = self.own.add(self.layout.o + row * self.layout.padded);
                let to = (first + row) * shape.channels + self.head * self.d;
                let mut c = 0;
                while c < self.d {
                    let v = s.div(s.load(from.add(c)), sum);
                    self.run.out.write(s, v, to + c, self.lanes(c));
                    c += LANES;
                }
            }
        }
    }

    /// Where a query's state is: each tile's is a vector.
    #[inline(always)]
    const fn state(&self, row: usize) -> usize {
        let rows = self.run.kernel.rows;
        row / rows * LANES + row % rows
    }

    /// One query to bytes.
    #[inline(always)]
    unsafe fn load_query<S: Simd, const SIGNED: bool>(&self, s: S, query: usize, row: usize) {
        let scale = s.splat(self.run.plan.scale * std::f32::consts::LOG2_E);
        // SAFETY: see the impl.
        unsafe {
            let to = self.own.add(self.layout.q).cast::<u8>().add(row * self.layout.padded);
            let mut extent = Extent::new(s);
            let mut c = 0;
            while c < self.d {
                extent.see(s, s.mul(self.read(s, self.run.q, query, c), scale));
                c += LANES;
            }
            let extent = extent.joined(s);
            let factor = extent.factor(s);
            let zero = s.splat_i(if SIGNED { 0 } else { 128 });
            let mut c = 0;
            while c < self.d {
                let x = s.mul(s.mul(self.read(s, self.run.q, query, c), scale), factor);
                s.quantize::<SIGNED>(x, zero, to.add(c));
                c += LANES;
            }
            *self.own.add(self.layout.q_scale + self.state(row)) = s.max_lane(extent.step(s));
        }
    }

    /// The sums of the first product, of a tile's rows with a block's keys.
    #[inline(always)]
    unsafe fn scores<S: Simd>(&self, _: S, key: usize, keys: usize, row: usize, rows: usize) {
        let Layout { groups, padded, key_panels, .. } = *self.layout;
        let kernel = self.run.kernel;
        let start = [0_isize];
        let all = keys.div_ceil(LANES);
        let first = self.head * key_panels + key / LANES;
        // SAFETY: see the impl; the kernel was chosen for the level.
        unsafe {
            let mut panel = 0;
            while panel < all {
                let panels = (all - panel).min(kernel.panels);
                kernel.tiles[panels - 1][rows - 1](&DotTile {
                    a: self.own.add(self.layout.q).cast::<u8>().add(row * padded),
                    a_stride: padded,
                    runs: start.as_ptr(),
                    n_runs: 1,
                    run_len: groups,
                    b: self.all.add(self.layout.k + (first + panel) * groups * LANES).cast(),
                    panel_stride: groups * GROUP * LANES,
                    c: self.own.add(self.layout.t + panel * LANES).cast(),
                    c_stride: KEY_BLOCK * size_of::<i32>(),
                    accumulate: 0,
                });
                panel += panels;
            }
        }
    }

    /// Turns a tile's sums into scores and then weights, and brings the queries' largest scores
    /// and sums of weights up to date. Returns what results so far, and this block's, are
    /// multiplied by.
    #[inline(always)]
    unsafe fn soften<S: Simd, const SIGNED: bool>(
        &self,
        s: S,
        key: usize,
        keys: usize,
        row: usize,
        rows: usize,
    ) -> [[f32; LANES]; 2] {
        let panels = keys.div_ceil(LANES);
        let state = self.state(row);
        let (mut tops, mut sums) = ([0.0_f32; LANES], [0.0_f32; LANES]);
        let zero = s.splat_i(if SIGNED { -128 } else { 0 });
        // SAFETY: see the impl.
        unsafe {
            let at = self.head * self.layout.key_panels * LANES + key;
            let scale = self.all.add(self.layout.k_scale + at);
            let add = self.all.add(self.layout.k_add + at).cast::<i32>();
            for (r, (top, total)) in tops.iter_mut().zip(&mut sums).enumerate().take(rows) {
                let t = self.own.add(self.layout.t + r * KEY_BLOCK);
                let p = self.own.add(self.layout.p).cast::<u8>().add(r * KEY_BLOCK);
                let mut largest = s.splat(f32::NEG_INFINITY);
                for i in (0..panels * LANES).step_by(LANES) {
                    let sum = s.add_i(s.load_i(t.add(i).cast()), s.load_i(add.add(i)));
                    s.store(s.mul(s.float_of(sum), s.load(scale.add(i))), t.add(i));
                    if i + LANES > keys {
                        for missing in keys..i + LANES {
                            *t.add(missing) = f32::NEG_INFINITY;
                        }
                    }
                    largest = s.max(s.load(t.add(i)), largest);
                }
                let largest = s.max_lane(largest);
                let worth = *self.own.add(self.layout.q_scale + state + r);
                *top = largest * worth;
                let (largest, worth) = (s.splat(largest), s.splat(worth));
                let mut sum = s.splat(0.0);
                for i in (0..panels * LANES).step_by(LANES) {
                    let x = s.mul(s.sub(s.load(t.add(i)), largest), worth);
                    let weight = s.round_even(power(s, x));
                    s.quantize::<SIGNED>(weight, zero, p.add(i));
                    sum = s.add(sum, weight);
                }
                *total = s.sum(sum);
            }
            let (m, l) = (self.own.add(self.layout.m + state), self.own.add(self.layout.l + state));
            let (top, before) = (s.load(tops.as_ptr()), s.load(m));
            let now = s.max(top, before);
            let ln2 = s.splat(std::f32::consts::LN_2);
            let old = math::exp(s, s.mul(s.sub(before, now), ln2));
            let new = math::exp(s, s.mul(s.sub(top, now), ln2));
            s.store(now, m);
            s.store(s.mul_add(s.load(l), old, s.mul(s.load(sums.as_ptr()), new)), l);
            let mut factors = [[0.0; LANES]; 2];
            s.store(old, factors[0].as_mut_ptr());
            s.store(new, factors[1].as_mut_ptr());
            factors
        }
    }

    /// The second product, of a tile's weights with a block's values.
    #[inline(always)]
    unsafe fn weigh<S: Simd>(
        &self,
        s: S,
        key: usize,
        keys: usize,
        row: usize,
        rows: usize,
        [old, new]: &[[f32; LANES]; 2],
    ) {
        let padded = self.layout.padded;
        let kernel = self.run.kernel;
        let groups = keys.div_ceil(GROUP);
        let start = [0_isize];
        let width = kernel.panels * LANES;
        let all = padded / LANES;
        // SAFETY: see the impl; the kernel was chosen for the level.
        unsafe {
            let values = self.all.add(self.values(key));
            let at = self.block_channels(key);
            let scale = self.all.add(self.layout.v_scale + at);
            let add = self.all.add(self.layout.v_add + at).cast::<i32>();
            let sums = self.own.add(self.layout.sums).cast::<i32>();
            let mut panel = 0;
            while panel < all {
                let panels = (all - panel).min(kernel.panels);
                kernel.tiles[panels - 1][rows - 1](&DotTile {
                    a: self.own.add(self.layout.p).cast(),
                    a_stride: KEY_BLOCK,
                    runs: start.as_ptr(),
                    n_runs: 1,
                    run_len: groups,
                    b: values.add(panel * groups * LANES).cast(),
                    panel_stride: groups * GROUP * LANES,
                    c: sums,
                    c_stride: width * size_of::<i32>(),
                    accumulate: 0,
                });
                for i in (0..panels * LANES).step_by(LANES) {
                    let c = panel * LANES + i;
                    let (scale, add) = (s.load(scale.add(c)), s.load_i(add.add(c)));
                    for (r, (old, new)) in old.iter().zip(new).enumerate().take(rows) {
                        let o = self.own.add(self.layout.o + (row + r) * padded + c);
                        let sum = s.float_of(s.add_i(s.load_i(sums.add(r * width + i)), add));
                        let part = s.mul(sum, s.mul(scale, s.splat(*new)));
                        s.store(s.mul_add(s.load(o), s.splat(*old), part), o);
                    }
                }
                panel += panels;
            }
        }
    }
}

#[cfg(test)]
mod tests;
