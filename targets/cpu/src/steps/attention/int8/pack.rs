//! Keys and values as bytes with their scales, in the order that the integer kernels read.
//!
//! Lives here: the stages before the attention itself. Which bytes they are is said in the parent
//! module.

use super::{KEY_BLOCK, LARGEST, LEAST, Layout, Task};
use crate::kernels::dot::GROUP;
use crate::simd::{LANES, Simd};

/// The largest size of some numbers, lane by lane, and a NaN where one of them was not finite.
#[derive(Clone, Copy)]
pub(super) struct Extent<S: Simd> {
    largest: S::F,
    damage: S::F,
}

impl<S: Simd> Extent<S> {
    #[inline(always)]
    pub(super) fn new(s: S) -> Self {
        Extent { largest: s.splat(LEAST), damage: s.splat(0.0) }
    }

    #[inline(always)]
    pub(super) fn see(&mut self, s: S, x: S::F) {
        let zero = s.splat(0.0);
        self.largest = s.max(s.max(x, s.sub(zero, x)), self.largest);
        self.damage = s.mul_add(x, zero, self.damage);
    }

    /// # Safety
    /// Both must be readable for sixteen elements.
    #[inline(always)]
    unsafe fn load(s: S, largest: *const f32, damage: *const f32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Extent { largest: s.load(largest), damage: s.load(damage) } }
    }

    /// # Safety
    /// Both must be writable for sixteen elements.
    #[inline(always)]
    unsafe fn store(self, s: S, largest: *mut f32, damage: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe {
            s.store(self.largest, largest);
            s.store(self.damage, damage);
        }
    }

    /// Of all lanes together.
    #[inline(always)]
    pub(super) fn joined(self, s: S) -> Self {
        Extent { largest: s.splat(s.max_lane(self.largest)), damage: s.splat(s.sum(self.damage)) }
    }

    /// What numbers are multiplied by to become bytes.
    #[inline(always)]
    pub(super) fn factor(self, s: S) -> S::F {
        s.div(s.splat(LARGEST), self.largest)
    }

    /// What one step is worth.
    #[inline(always)]
    pub(super) fn step(self, s: S) -> S::F {
        s.add(s.div(self.largest, s.splat(LARGEST)), self.damage)
    }
}

/// The stages before the last.
///
/// # Safety
/// Of every method: the promises of [`Task`]; offsets are those of [`Layout`].
impl Task<'_> {
    /// The head's mean key.
    #[inline(always)]
    pub(super) unsafe fn mean<S: Simd>(&self, s: S) {
        let keys = self.run.plan.shape.keys;
        let c = self.number * LANES;
        // SAFETY: see the impl; the task owns these sixteen means.
        unsafe {
            let mut sum = s.zero_d();
            for key in 0..keys {
                sum = s.add_d(sum, self.read(s, self.run.k, key, c));
            }
            let mut sums = [0.0_f64; LANES];
            s.store_d(sum, sums.as_mut_ptr());
            let to = self.all.add(self.layout.mean + self.head * self.layout.padded + c);
            for (i, sum) in sums.iter().enumerate() {
                *to.add(i) = (sum / keys as f64) as f32;
            }
        }
    }

    /// A block of keys and values to bytes.
    #[inline(always)]
    pub(super) unsafe fn pack<S: Simd, const SIGNED: bool>(&self, s: S) {
        let first = self.number * KEY_BLOCK;
        let keys = (self.run.plan.shape.keys - first).min(KEY_BLOCK);
        // SAFETY: see the impl; the task owns its block of every part.
        unsafe {
            let mut key = 0;
            while key < keys {
                self.pack_keys::<S, SIGNED>(s, first + key, (keys - key).min(LANES));
                key += LANES;
            }
            self.pack_values::<S, SIGNED>(s, first, keys);
        }
    }

    /// Sixteen or fewer keys from a multiple of sixteen.
    #[inline(always)]
    unsafe fn pack_keys<S: Simd, const SIGNED: bool>(&self, s: S, first: usize, keys: usize) {
        let Layout { groups, padded, key_panels, .. } = *self.layout;
        let panel = self.head * key_panels + first / LANES;
        // SAFETY: see the impl.
        unsafe {
            let mean = self.all.add(self.layout.mean + self.head * padded);
            let row = self.own.add(self.layout.row).cast::<u8>();
            let scale = self.all.add(self.layout.k_scale + panel * LANES);
            let add = self.all.add(self.layout.k_add + panel * LANES).cast::<i32>();
            let packed = self.packed(self.layout.k + panel * groups * LANES);
            let words = packed.cast::<u32>();
            for i in 0..LANES {
                if i >= keys {
                    *scale.add(i) = 0.0;
                    *add.add(i) = 0;
                    for g in 0..groups {
                        *words.add(g * LANES + i) = 0;
                    }
                    continue;
                }
                let mut extent = Extent::new(s);
                let mut c = 0;
                while c < self.d {
                    let x = self.read(s, self.run.k, first + i, c);
                    extent.see(s, s.sub(x, s.load(mean.add(c))));
                    c += LANES;
                }
                let extent = extent.joined(s);
                let factor = extent.factor(s);
                // Whole numbers below 2^24: exact.
                let mut sum = s.splat(0.0);
                let mut c = 0;
                while c < self.d {
                    let x = self.read(s, self.run.k, first + i, c);
                    let x = s.round_even(s.mul(s.sub(x, s.load(mean.add(c))), factor));
                    s.quantize::<true>(x, s.splat_i(0), row.add(c));
                    sum = s.add(sum, x);
                    c += LANES;
                }
                let from = row.cast::<u32>();
                for g in 0..groups {
                    *words.add(g * LANES + i) = *from.add(g);
                }
                *scale.add(i) = s.max_lane(extent.step(s));
                // Unsigned kernels see queries that are larger by 128.
                *add.add(i) = if SIGNED { 0 } else { -128 * s.sum(sum) as i32 };
            }
            self.arrange(packed, self.layout.k + panel * groups * LANES, groups);
        }
    }

    /// A block's values, all channels of one token after the other, as they lie.
    #[inline(always)]
    unsafe fn pack_values<S: Simd, const SIGNED: bool>(&self, s: S, first: usize, keys: usize) {
        let padded = self.layout.padded;
        let groups = keys.div_ceil(GROUP);
        // SAFETY: see the impl.
        unsafe {
            let largest = self.own.add(self.layout.values);
            let damage = largest.add(padded);
            let factor = damage.add(padded);
            let sums = factor.add(padded);
            let mut extent = Extent::new(s);
            for c in (0..self.d).step_by(LANES) {
                extent.store(s, largest.add(c), damage.add(c));
                s.store(s.splat(0.0), sums.add(c));
            }
            for key in first..first + keys {
                for c in (0..self.d).step_by(LANES) {
                    extent = Extent::load(s, largest.add(c), damage.add(c));
                    extent.see(s, self.read(s, self.run.v, key, c));
                    extent.store(s, largest.add(c), damage.add(c));
                }
            }
            let at = self.block_channels(first);
            for c in (0..self.d).step_by(LANES) {
                extent = Extent::load(s, largest.add(c), damage.add(c));
                s.store(extent.factor(s), factor.add(c));
                s.store(extent.step(s), self.all.add(self.layout.v_scale + at + c));
            }
            let place = self.values(first);
            for g in 0..groups {
                let n = (keys - g * GROUP).min(GROUP);
                for c in (0..self.d).step_by(LANES) {
                    let mut rows = [[0_u8; LANES]; GROUP];
                    // Whole numbers below 2^24: exact.
                    let mut sum = s.load(sums.add(c));
                    for (i, row) in rows[..n].iter_mut().enumerate() {
                        let x = self.read(s, self.run.v, first + g * GROUP + i, c);
                        let x = s.round_even(s.mul(x, s.load(factor.add(c))));
                        s.quantize::<true>(x, s.splat_i(0), row.as_mut_ptr());
                        sum = s.add(sum, x);
                    }
                    s.store(sum, sums.add(c));
                    // In words, for the sake of compilers.
                    let mut words = [0_u32; LANES];
                    for (i, row) in rows.iter().enumerate() {
                        for (word, byte) in words.iter_mut().zip(row) {
                            *word |= u32::from(*byte) << (8 * i);
                        }
                    }
                    for word in &mut words {
                        *word = word.to_le();
                    }
                    let panel = self.all.add(place + c * groups);
                    panel.cast::<[u32; LANES]>().add(g).write(words);
                }
            }
            if self.run.kernel.arrange.is_some() {
                let packed = self.own.add(self.layout.panel);
                for c in (0..self.d).step_by(LANES) {
                    let panel = place + c * groups;
                    packed.copy_from_nonoverlapping(self.all.add(panel), groups * LANES);
                    self.arrange(packed.cast(), panel, groups);
                }
            }
            let add = self.all.add(self.layout.v_add + at).cast::<i32>();
            for c in 0..padded {
                // Signed kernels see weights that are smaller by 128.
                *add.add(c) = if SIGNED { 128 * *sums.add(c) as i32 } else { 0 };
            }
        }
    }

    /// Where a panel is put together: at its place, or where it is arranged from.
    #[inline(always)]
    unsafe fn packed(&self, place: usize) -> *mut u8 {
        // SAFETY: see the impl.
        unsafe {
            match self.run.kernel.arrange {
                None => self.all.add(place).cast(),
                Some(_) => self.own.add(self.layout.panel).cast(),
            }
        }
    }

    /// Brings a panel to its place, in the order that the kernel reads.
    #[inline(always)]
    unsafe fn arrange(&self, packed: *mut u8, place: usize, groups: usize) {
        if let Some(arrange) = self.run.kernel.arrange {
            // SAFETY: see the impl; both hold a panel, and the level has the instructions.
            unsafe { arrange(packed.cast(), self.all.add(place).cast(), 1, groups) }
        }
    }
}
