//! Places buffers with known lifetimes in one arena.

use crate::tensor::{ALIGN, align_up};

/// A buffer and the steps between which its bytes matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetime {
    /// Size in bytes.
    pub bytes: usize,
    /// The step that first writes it.
    pub first: usize,
    /// The last step that reads or writes it; not before `first`.
    pub last: usize,
}

/// Where each buffer lies, and what the arena must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArenaPlan {
    /// One offset a buffer, each a multiple of [`ALIGN`].
    pub offsets: Vec<usize>,
    /// Size of the arena in bytes.
    pub bytes: usize,
}

/// Places every buffer so that no two that live at the same step overlap: largest first, each at the
/// lowest offset that is free over its whole life. `None` where the sizes overflow.
#[must_use]
pub fn plan_arena(buffers: &[Lifetime]) -> Option<ArenaPlan> {
    let mut order: Vec<usize> = (0..buffers.len()).collect();
    // Size decides; then the earlier buffer, so that the plan is the same everywhere.
    order.sort_by_key(|&i| (std::cmp::Reverse(buffers[i].bytes), buffers[i].first, i));
    let mut offsets = vec![0usize; buffers.len()];
    let mut placed: Vec<usize> = Vec::with_capacity(buffers.len());
    let mut total = 0usize;
    let mut taken: Vec<(usize, usize)> = Vec::new();
    for &i in &order {
        let b = buffers[i];
        debug_assert!(b.first <= b.last);
        let bytes = align_up(b.bytes, ALIGN)?;
        taken.clear();
        taken.extend(placed.iter().filter_map(|&j| {
            let other = buffers[j];
            let together = other.first <= b.last && b.first <= other.last;
            together.then(|| (offsets[j], offsets[j] + align_up(other.bytes, ALIGN).unwrap_or(0)))
        }));
        taken.sort_unstable();
        let mut at = 0usize;
        for &(start, end) in &taken {
            if start >= at && start - at >= bytes {
                break;
            }
            at = at.max(end);
        }
        offsets[i] = at;
        total = total.max(at.checked_add(bytes)?);
        placed.push(i);
    }
    Some(ArenaPlan { offsets, bytes: total })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_chain_needs_two_buffers() {
        let b = |first, last| Lifetime { bytes: 1000, first, last };
        let plan = plan_arena(&[b(0, 1), b(1, 2), b(2, 3), b(3, 4)]).unwrap();
        assert_eq!(plan.bytes, 2048);
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        let b = Lifetime { bytes: usize::MAX - 10, first: 0, last: 0 };
        assert_eq!(plan_arena(&[b]), None);
    }

    proptest! {
        #[test]
        fn living_buffers_never_overlap(
            raw in prop::collection::vec((0usize..5000, 0usize..20, 0usize..8), 0..40)
        ) {
            let buffers: Vec<Lifetime> = raw
                .iter()
                .map(|&(bytes, first, len)| Lifetime { bytes, first, last: first + len })
                .collect();
            let plan = plan_arena(&buffers).unwrap();
            let mut top = 0;
            for (i, a) in buffers.iter().enumerate() {
                prop_assert_eq!(plan.offsets[i] % ALIGN, 0);
                top = top.max(plan.offsets[i] + align_up(a.bytes, ALIGN).unwrap());
                for (j, b) in buffers.iter().enumerate().skip(i + 1) {
                    if a.first <= b.last && b.first <= a.last && a.bytes > 0 && b.bytes > 0 {
                        let (x, y) = (plan.offsets[i], plan.offsets[j]);
                        prop_assert!(x + a.bytes <= y || y + b.bytes <= x);
                    }
                }
            }
            prop_assert_eq!(top, plan.bytes);
        }
    }
}
