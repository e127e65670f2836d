//! Attention with a running softmax: no matrix of queries by keys exists.
//!
//! For each head, softmax(scale * q kᵀ) v (Vaswani et al. 2017, eq. 1). A task takes a block of
//! queries of one head and streams all keys and values past it in blocks of [`KEY_BLOCK`],
//! keeping each query's largest score, its sum of weights and its weighted values, rescaled
//! whenever a larger score appears (Milakov and Gimelshein 2018, algorithm 3).
//!
//! The scores of a block are computed as [key][query], with queries in the lanes: then each
//! query's maximum and sum run down a lane, nothing is reduced across lanes, and the weights
//! lie as the second product wants them. Definition for one query, all in `f32`, every
//! multiply-add fused, in the order of the indices:
//!
//! ```text
//! m = -inf, l = 0, o[..] = 0
//! for each block of 64 keys (the last may be shorter):
//!     t[j] = sum over c, from 0, of k[j][c] * (q[c] * scale)
//!     n = max(m, t[..]);  a = exp(m - n);  m = n
//!     p[j] = exp(t[j] - m)
//!     l = l * a + (sum over j, from 0, of p[j])
//!     o[c] = o[c] * a + (sum over j, from 0, of p[j] * v[j][c])
//! result[c] = o[c] / l
//! ```
//!
//! [`AttentionPlan::int8`] plans the same with products of bytes, by a definition of its own (the
//! module `int8`).
//!
//! Neither the queries in a task nor the register tiles change a bit of it, so both follow the
//! instruction set and the number of threads.

use super::element::{Pointer, SharedOut};
use super::{Output, SharedMut, Source, StepError, check_len};
use crate::isa::{Isa, Level};
use crate::kernels::dot;
use crate::kernels::matmul::Tile;
use crate::pool::Pool;
use crate::registry::{self, DotKernel, MatmulKernel, WeightType};
use crate::simd::{Kernel, LANES, Simd, math};

mod int8;
pub use int8::KEY_BLOCK as INT8_KEY_BLOCK;
pub(crate) use int8::{DEEPEST, LARGEST, LEAST, POWER, ROUND};

const STEP: &str = "attention";

/// Keys between two looks at the running maximum; part of the definition.
pub const KEY_BLOCK: usize = 64;

/// The most queries of a task, in vectors: 96 queries of 512 channels, with a block of keys and
/// values, stay in a large core's second-level cache.
const MAX_VECTORS: usize = 6;

/// Elements by which rows of keys and panels of values are set apart beyond their size, so that
/// neighbours do not meet in one set of the first-level cache.
const SKEW: usize = 16;

/// The shape of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query tokens.
    pub queries: usize,
    /// Key and value tokens.
    pub keys: usize,
    /// Channels of all heads together.
    pub channels: usize,
    /// Heads; head `i` owns channels `i * d..(i + 1) * d`, `d = channels / heads`.
    pub heads: usize,
}

/// Some columns of a row-major matrix: a whole tensor, or one part of a fused projection.
#[derive(Clone, Copy, Debug)]
pub struct Columns<'a> {
    /// The matrix, `[tokens, stride]`.
    pub data: Source<'a>,
    /// Elements from one row to the next.
    pub stride: usize,
    /// The first column.
    pub first: usize,
}

impl<'a> Columns<'a> {
    /// All columns of `[tokens, channels]`.
    pub const fn whole(data: Source<'a>, channels: usize) -> Self {
        Columns { data, stride: channels, first: 0 }
    }

    fn check(
        &self,
        operand: &'static str,
        tokens: usize,
        channels: usize,
    ) -> Result<(), StepError> {
        if self.first.checked_add(channels).is_none_or(|end| end > self.stride) {
            return Err(StepError::Shape {
                step: STEP,
                reason: format!(
                    "{operand}: {channels} channels from column {} do not fit rows of {}",
                    self.first, self.stride
                ),
            });
        }
        let expected = tokens.saturating_mul(self.stride);
        check_len(STEP, operand, self.data.len(), expected)
    }
}

/// Where an attention's queries are.
#[derive(Clone, Copy, Debug)]
pub enum Queries<'a> {
    /// In a tensor of their own.
    Of(Columns<'a>),
    /// In the output, whose rows they fill: a task has read all of its queries before it writes a result.
    InPlace,
}

/// The operands of one attention.
#[derive(Debug)]
pub struct AttentionArgs<'a> {
    /// Queries.
    pub q: Queries<'a>,
    /// Keys.
    pub k: Columns<'a>,
    /// Values.
    pub v: Columns<'a>,
    /// The result, `[queries, channels]`.
    pub out: Output<'a>,
}

/// How an attention of one shape is computed.
#[derive(Clone, Copy, Debug)]
pub struct AttentionPlan {
    shape: AttentionShape,
    scale: f32,
    level: Level,
    /// Multiplies keys by queries; both are `f32` in the scratch.
    kernel: &'static MatmulKernel,
    /// The kernel of both products where they are of bytes.
    int8: Option<&'static DotKernel>,
    threads: usize,
    /// Queries in a task: vectors of sixteen, or as many times the rows of the kernel of bytes.
    units: usize,
    /// Tasks of one head.
    blocks: usize,
}

impl AttentionPlan {
    /// Plans an attention for a pool of at most `threads`.
    ///
    /// # Errors
    /// [`StepError::Shape`] when an extent is zero, the heads do not divide the channels, or
    /// the shape does not fit the address space.
    pub fn new(
        shape: AttentionShape,
        scale: f32,
        level: Level,
        threads: usize,
    ) -> Result<Self, StepError> {
        Self::check(shape, threads)?;
        let mut plan = AttentionPlan {
            shape,
            scale,
            level,
            kernel: registry::matmul(level, WeightType::F32),
            int8: None,
            threads,
            units: 0,
            blocks: 0,
        };
        plan.divide(LANES, MAX_VECTORS);
        Ok(plan)
    }

    /// Plans an attention with products of bytes; `int8` in this module's source has its
    /// definition, [`naive::attention_int8`](crate::naive::attention_int8) the plain loops.
    ///
    /// # Errors
    /// As [`AttentionPlan::new`], and [`StepError::Shape`] when a head has more channels than
    /// sums of products of bytes hold.
    pub fn int8(
        shape: AttentionShape,
        scale: f32,
        level: Level,
        threads: usize,
    ) -> Result<Self, StepError> {
        let mut plan = Self::new(shape, scale, level, threads)?;
        let d = shape.channels / shape.heads;
        if d > dot::MAX_PRODUCTS {
            let reason = format!(
                "{d} channels a head are too many for sums of bytes in 32 bits, which hold {}",
                dot::MAX_PRODUCTS
            );
            return Err(StepError::Shape { step: STEP, reason });
        }
        let kernel = registry::dot(level);
        plan.int8 = Some(kernel);
        plan.divide(kernel.rows, int8::MAX_QUERIES / kernel.rows);
        Ok(plan)
    }

    /// Whether the products are of bytes.
    pub const fn is_int8(&self) -> bool {
        self.int8.is_some()
    }

    fn check(shape: AttentionShape, threads: usize) -> Result<(), StepError> {
        let AttentionShape { queries, keys, channels, heads } = shape;
        let refuse = |reason: String| Err(StepError::Shape { step: STEP, reason });
        if [queries, keys, channels, heads, threads].contains(&0) {
            return refuse(format!("{shape:?} on {threads} threads has a zero extent"));
        }
        if !channels.is_multiple_of(heads) {
            return refuse(format!("{heads} heads do not divide {channels} channels"));
        }
        // Far above any picture, and small enough that the products below stay in usize.
        const CHANNELS: usize = 1 << 20;
        let tokens = queries.max(keys);
        if channels > CHANNELS || tokens.checked_mul(8 * channels).is_none() {
            return refuse(format!("{shape:?} does not fit the address space"));
        }
        Ok(())
    }

    /// Divides the queries into tasks of at most `most` times `unit` of them.
    fn divide(&mut self, unit: usize, most: usize) {
        let (heads, threads) = (self.shape.heads, self.threads);
        let all = self.shape.queries.div_ceil(unit);
        let mut blocks = all.div_ceil(most);
        // With few tasks, make them a multiple of the threads: nobody waits for the last one.
        if blocks * heads < 4 * threads {
            blocks = (blocks..=all).find(|b| (b * heads).is_multiple_of(threads)).unwrap_or(all);
        }
        self.units = all.div_ceil(blocks);
        self.blocks = all.div_ceil(self.units);
    }

    /// The shape.
    pub const fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    /// The micro-kernel's name, for reports.
    pub const fn kernel_name(&self) -> &'static str {
        match self.int8 {
            Some(kernel) => kernel.name,
            None => self.kernel.name,
        }
    }

    /// Multiply-adds of the two products.
    pub const fn macs(&self) -> u64 {
        let s = &self.shape;
        (2 * s.queries as u64).saturating_mul(s.keys as u64).saturating_mul(s.channels as u64)
    }

    /// Tasks that one run is divided into.
    pub const fn tasks(&self) -> usize {
        self.blocks * self.shape.heads
    }

    /// `f32` elements of scratch that [`attention`] needs.
    pub fn scratch_len(&self) -> usize {
        match self.int8 {
            Some(kernel) => int8::Layout::new(self, kernel).len(self.threads),
            None => self.threads * Layout::new(self).len,
        }
    }
}

/// Where a worker keeps what, in elements of its part of the scratch.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// Channels of a head.
    d: usize,
    /// The same, rounded up to whole vectors.
    padded: usize,
    /// Queries, `[vectors][d][16]`, scaled.
    q: usize,
    /// A block of keys, rows of `k_stride`.
    k: usize,
    k_stride: usize,
    /// A block of values, panels `[KEY_BLOCK][16]` set `v_stride` apart.
    v: usize,
    v_stride: usize,
    /// Scores and then weights, `[KEY_BLOCK][16 * vectors]`.
    p: usize,
    /// Weighted values, `[16 * vectors][padded]`.
    o: usize,
    /// Each query's largest score, sum of weights and last rescaling.
    m: usize,
    l: usize,
    a: usize,
    /// All of it.
    len: usize,
}

impl Layout {
    const fn new(plan: &AttentionPlan) -> Self {
        let d = plan.shape.channels / plan.shape.heads;
        let padded = d.div_ceil(LANES) * LANES;
        let queries = plan.units * LANES;
        let k_stride = padded + SKEW;
        let v_stride = KEY_BLOCK * LANES + SKEW;
        let k = queries * d;
        let v = k + KEY_BLOCK * k_stride;
        let p = v + padded / LANES * v_stride;
        let o = p + KEY_BLOCK * queries;
        let m = o + queries * padded;
        Layout {
            d,
            padded,
            q: 0,
            k,
            k_stride,
            v,
            v_stride,
            p,
            o,
            m,
            l: m + queries,
            a: m + 2 * queries,
            len: m + 3 * queries,
        }
    }
}

/// Runs one attention. `scratch` needs [`AttentionPlan::scratch_len`] elements (more are left
/// alone; start it on a 64-byte boundary for speed); its contents before do not matter.
///
/// # Errors
/// [`StepError::Length`] or [`StepError::Shape`] when an operand does not have the size that
/// the shape says or the pool has more threads than planned, [`StepError::Worker`] when a
/// worker panicked.
pub fn attention(
    plan: &AttentionPlan,
    pool: &Pool,
    mut args: AttentionArgs<'_>,
    scratch: &mut [f32],
) -> Result<(), StepError> {
    let AttentionShape { queries, keys, channels, .. } = plan.shape;
    if let Queries::Of(q) = args.q {
        q.check("queries", queries, channels)?;
    }
    args.k.check("keys", keys, channels)?;
    args.v.check("values", keys, channels)?;
    check_len(STEP, "output", args.out.len(), queries * channels)?;
    let needed = plan.scratch_len();
    if scratch.len() < needed {
        check_len(STEP, "scratch", scratch.len(), needed)?;
    }
    if pool.threads() > plan.threads {
        return Err(StepError::Shape {
            step: STEP,
            reason: format!(
                "planned for {} threads, the pool has {}",
                plan.threads,
                pool.threads()
            ),
        });
    }
    let out = SharedOut::new(&mut args.out);
    let scratch = SharedMut(scratch.as_mut_ptr());
    let q = match args.q {
        Queries::Of(q) => Rows::of(&q),
        Queries::InPlace => Rows { data: out.pointer(), stride: channels, first: 0 },
    };
    let (k, v) = (Rows::of(&args.k), Rows::of(&args.v));
    if let Some(kernel) = plan.int8 {
        return int8::Run { plan, kernel, q, k, v, out, scratch }.run(pool);
    }
    let layout = Layout::new(plan);
    pool.run(plan.tasks(), &|task, worker| {
        // SAFETY: worker < threads, so its part lies in the scratch, and no two tasks that run
        // at once have the same worker number.
        let scratch = unsafe { scratch.get().add(worker * layout.len) };
        let block = task % plan.blocks;
        let first = block * plan.units * LANES;
        plan.level.dispatch(Task {
            plan,
            layout: &layout,
            q,
            k,
            v,
            out,
            scratch,
            head: task / plan.blocks,
            first,
            queries: (plan.shape.queries - first).min(plan.units * LANES),
        });
    })
    .map_err(|source| StepError::Worker { step: STEP, source })
}

/// [`Columns`] whose extent was checked.
#[derive(Clone, Copy, Debug)]
struct Rows {
    data: Pointer,
    stride: usize,
    first: usize,
}

impl Rows {
    const fn of(columns: &Columns<'_>) -> Self {
        Rows { data: Pointer::of(columns.data), stride: columns.stride, first: columns.first }
    }
}

/// One block of queries of one head. The operands' extents were checked against the plan, and
/// `scratch` holds `layout.len` elements that are this task's alone.
struct Task<'a> {
    plan: &'a AttentionPlan,
    layout: &'a Layout,
    q: Rows,
    k: Rows,
    v: Rows,
    out: SharedOut,
    scratch: *mut f32,
    head: usize,
    /// The first query.
    first: usize,
    queries: usize,
}

impl Kernel for Task<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let layout = self.layout;
        let vectors = self.queries.div_ceil(LANES);
        // SAFETY: the fields' promises; every offset below is one of `Layout`'s and every
        // count stays within what it was sized for: vectors <= plan.units and keys <=
        // KEY_BLOCK.
        unsafe {
            self.load_queries(s, vectors);
            let state = self.scratch.add(layout.m);
            for g in 0..vectors {
                s.store(s.splat(f32::NEG_INFINITY), state.add(g * LANES));
                s.store(s.splat(0.0), self.scratch.add(layout.l + g * LANES));
            }
            let o = self.scratch.add(layout.o);
            for i in (0..self.queries * layout.padded).step_by(LANES) {
                s.store(s.splat(0.0), o.add(i));
            }
            let mut key = 0;
            while key < self.plan.shape.keys {
                let keys = (self.plan.shape.keys - key).min(KEY_BLOCK);
                self.load_keys(s, key, keys);
                self.load_values(s, key, keys);
                self.scores(keys, vectors);
                self.soften(s, keys, vectors);
                self.mix(s, keys);
                key += keys;
            }
            self.store_result(s);
        }
    }
}

/// The parts of a task.
///
/// # Safety
/// Of every method: the promises of [`Task`], with at most `plan.units` vectors of queries
/// and [`KEY_BLOCK`] keys.
impl Task<'_> {
    /// Queries of a full task; rows of scores are this long.
    #[inline(always)]
    const fn width(&self) -> usize {
        self.plan.units * LANES
    }

    /// Transposes the queries into vectors of sixteen, scaled; missing ones are zero.
    #[inline(always)]
    unsafe fn load_queries<S: Simd>(&self, s: S, vectors: usize) {
        let d = self.layout.d;
        let scale = s.splat(self.plan.scale);
        let column = self.q.first + self.head * d;
        // SAFETY: see the impl; the row and the columns lie in the operand.
        unsafe {
            let q = self.scratch.add(self.layout.q);
            for row in 0..vectors * LANES {
                let to = q.add(row / LANES * d * LANES + row % LANES);
                let mut c = 0;
                while c < d {
                    let n = (d - c).min(LANES);
                    let mut lanes = [0.0_f32; LANES];
                    if row < self.queries {
                        let at = (self.first + row) * self.q.stride + column + c;
                        s.store(s.mul(self.q.data.read(s, at, n), scale), lanes.as_mut_ptr());
                    }
                    for (i, x) in lanes[..n].iter().enumerate() {
                        *to.add((c + i) * LANES) = *x;
                    }
                    c += n;
                }
            }
        }
    }

    /// Copies a block of keys as rows of `f32`.
    #[inline(always)]
    unsafe fn load_keys<S: Simd>(&self, s: S, key: usize, keys: usize) {
        let d = self.layout.d;
        let column = self.k.first + self.head * d;
        // SAFETY: see the impl; rows are padded to whole vectors.
        unsafe {
            for row in 0..keys {
                let from = (key + row) * self.k.stride + column;
                let to = self.scratch.add(self.layout.k + row * self.layout.k_stride);
                let mut c = 0;
                while c < d {
                    let v = self.k.data.read(s, from + c, (d - c).min(LANES));
                    s.store(v, to.add(c));
                    c += LANES;
                }
            }
        }
    }

    /// Copies a block of values as panels of sixteen channels, zero beyond the last.
    #[inline(always)]
    unsafe fn load_values<S: Simd>(&self, s: S, key: usize, keys: usize) {
        let d = self.layout.d;
        let column = self.v.first + self.head * d;
        // SAFETY: see the impl; panels hold KEY_BLOCK rows.
        unsafe {
            let v = self.scratch.add(self.layout.v);
            for row in 0..keys {
                let from = (key + row) * self.v.stride + column;
                let mut c = 0;
                while c < d {
                    let x = self.v.data.read(s, from + c, (d - c).min(LANES));
                    s.store(x, v.add(c / LANES * self.layout.v_stride + row * LANES));
                    c += LANES;
                }
            }
        }
    }

    /// All scores of a block of keys, `[key][query]`: keys are the kernel's rows, vectors of
    /// queries its panels.
    #[inline(always)]
    unsafe fn scores(&self, keys: usize, vectors: usize) {
        let layout = self.layout;
        let kernel = self.plan.kernel;
        let float = size_of::<f32>();
        let start = [0_isize];
        // SAFETY: see the impl; the level's kernel was chosen for this level.
        unsafe {
            let mut key = 0;
            while key < keys {
                let rows = (keys - key).min(kernel.rows);
                let mut vector = 0;
                while vector < vectors {
                    let panels = (vectors - vector).min(kernel.panels);
                    let at = layout.p + key * self.width() + vector * LANES;
                    kernel.tiles[panels - 1][rows - 1](&Tile {
                        a: self.scratch.add(layout.k + key * layout.k_stride),
                        a_stride: layout.k_stride * float,
                        runs: start.as_ptr(),
                        n_runs: 1,
                        run_len: layout.d,
                        b: self.scratch.add(layout.q + vector * layout.d * LANES).cast(),
                        panel_stride: layout.d * LANES * float,
                        c: self.scratch.add(at),
                        c_stride: self.width() * float,
                        accumulate: 0,
                    });
                    vector += panels;
                }
                key += rows;
            }
        }
    }

    /// Turns scores into weights and brings each query's maximum, sum and rescaling up to date.
    #[inline(always)]
    unsafe fn soften<S: Simd>(&self, s: S, keys: usize, vectors: usize) {
        let width = self.width();
        let layout = self.layout;
        for g in 0..vectors {
            // SAFETY: see the impl.
            unsafe {
                let at = g * LANES;
                let p = self.scratch.add(layout.p + at);
                let m = self.scratch.add(layout.m + at);
                let l = self.scratch.add(layout.l + at);
                let before = s.load(m);
                let mut largest = before;
                for key in 0..keys {
                    largest = s.max(s.load(p.add(key * width)), largest);
                }
                let mut sum = s.splat(0.0);
                for key in 0..keys {
                    let score = p.add(key * width);
                    let weight = math::exp(s, s.sub(s.load(score), largest));
                    s.store(weight, score);
                    sum = s.add(sum, weight);
                }
                let rescale = math::exp(s, s.sub(before, largest));
                s.store(largest, m);
                s.store(s.mul_add(s.load(l), rescale, sum), l);
                s.store(rescale, self.scratch.add(layout.a + at));
            }
        }
    }

    /// Adds a block's weighted values to the rescaled ones before it. Queries are the inner
    /// loop: all weights and a few panels of values stay in the first-level cache.
    #[inline(always)]
    unsafe fn mix<S: Simd>(&self, s: S, keys: usize) {
        let layout = self.layout;
        let panels = layout.padded / LANES;
        // SAFETY: see the impl.
        unsafe {
            let mut panel = 0;
            while panel < panels {
                let job = Mix {
                    p: self.scratch.add(layout.p),
                    p_stride: self.width(),
                    v: self.scratch.add(layout.v + panel * layout.v_stride),
                    v_stride: layout.v_stride,
                    keys,
                    o: self.scratch.add(layout.o + panel * LANES),
                    o_stride: layout.padded,
                    rescale: self.scratch.add(layout.a),
                    queries: self.queries,
                };
                panel += job.panels(s, panels - panel);
            }
        }
    }

    /// Divides by the sums of weights and stores.
    #[inline(always)]
    unsafe fn store_result<S: Simd>(&self, s: S) {
        let layout = self.layout;
        let channels = self.plan.shape.channels;
        // SAFETY: see the impl; a task writes only its queries' and its head's elements.
        unsafe {
            for row in 0..self.queries {
                let sum = s.splat(*self.scratch.add(layout.l + row));
                let from = self.scratch.add(layout.o + row * layout.padded);
                let to = (self.first + row) * channels + self.head * layout.d;
                let mut c = 0;
                while c < layout.d {
                    let v = s.div(s.load(from.add(c)), sum);
                    self.out.write(s, v, to + c, (layout.d - c).min(LANES));
                    c += LANES;
                }
            }
        }
    }
}

/// The second product, for a few panels of channels: `o[r][c] = o[r][c] * rescale[r] + sum over
/// j of p[j][r] * v[j][c]`. The weights of neighbouring queries are neighbours, which the
/// kernels of [`crate::kernels`] do not read; hence tiles of its own.
struct Mix {
    /// Weights, `[keys]` rows `p_stride` apart.
    p: *const f32,
    p_stride: usize,
    /// Panels `[keys][16]`, `v_stride` apart.
    v: *const f32,
    v_stride: usize,
    keys: usize,
    /// Rows `o_stride` apart.
    o: *mut f32,
    o_stride: usize,
    rescale: *const f32,
    queries: usize,
}

/// The operands hold the queries, keys and panels that a tile is asked for.
impl Mix {
    /// All queries by as many panels as fit a tile, at most `left`; tells how many.
    #[inline(always)]
    unsafe fn panels<S: Simd>(self, s: S, left: usize) -> usize {
        // SAFETY: see the impl.
        unsafe {
            match (S::ISA, left) {
                (Isa::Avx512, 3..) => self.all_queries::<S, 8, 3>(s),
                (Isa::Avx512, 2) => self.all_queries::<S, 8, 2>(s),
                (Isa::Avx512, _) => self.all_queries::<S, 8, 1>(s),
                (_, _) => self.all_queries::<S, 6, 1>(s),
            }
        }
    }

    /// All queries, `M` at a time, by `N` panels.
    #[inline(always)]
    unsafe fn all_queries<S: Simd, const M: usize, const N: usize>(mut self, s: S) -> usize {
        // SAFETY: see the impl; each tile is within the queries left.
        unsafe {
            while self.queries >= M {
                self.tile::<S, M, N>(s);
            }
            if self.queries >= 4 {
                self.tile::<S, 4, N>(s);
            }
            if self.queries >= 2 {
                self.tile::<S, 2, N>(s);
            }
            if self.queries >= 1 {
                self.tile::<S, 1, N>(s);
            }
        }
        N
    }

    /// One register tile of `M` queries by `N` panels; goes on to the next queries.
    #[inline(always)]
    unsafe fn tile<S: Simd, const M: usize, const N: usize>(&mut self, s: S) {
        // SAFETY: see the impl.
        unsafe {
            let mut sums = [[s.splat(0.0); N]; M];
            for j in 0..self.keys {
                let p = self.p.add(j * self.p_stride);
                let mut v = [s.splat(0.0); N];
                for (n, v) in v.iter_mut().enumerate() {
                    *v = s.load(self.v.add(n * self.v_stride + j * LANES));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let p = s.splat(*p.add(r));
                    for (sum, v) in sums.iter_mut().zip(&v) {
                        *sum = s.mul_add(p, *v, *sum);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                let rescale = s.splat(*self.rescale.add(r));
                for (n, sum) in sums.iter().enumerate() {
                    let o = self.o.add(r * self.o_stride + n * LANES);
                    s.store(s.mul_add(s.load(o), rescale, *sum), o);
                }
            }
            self.p = self.p.add(M);
            self.o = self.o.add(M * self.o_stride);
            self.rescale = self.rescale.add(M);
            self.queries -= M;
        }
    }
}

#[cfg(test)]
mod tests;
