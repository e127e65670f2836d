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

/// Two buffers of which one takes the other's memory while both live: it is written from its start on
/// while the other is read from its start on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// Index of the buffer that is read.
    pub replaced: usize,
    /// Index of the buffer that is written.
    pub by: usize,
    /// By how many bytes the first must begin behind the second, so that nothing is overwritten that
    /// is still to be read.
    pub distance: usize,
}

/// Orders that are tried in a row without a smaller arena.
const PATIENCE: usize = 12;
/// Buffers smaller than this share of the largest are placed once, after the others.
const SMALL: usize = 256;

/// Places every buffer so that no two that live at the same step overlap, but for `overlays`. `None` where
/// the sizes overflow.
///
/// Buffers are placed one after the other, the largest first, each at the lowest offset that is free over
/// its whole life; then again with the one that ended highest placed before all others, as long as that
/// makes the arena smaller.
#[must_use]
pub fn plan_arena(buffers: &[Lifetime], overlays: &[Overlay]) -> Option<ArenaPlan> {
    let mut order: Vec<usize> = (0..buffers.len()).collect();
    // Size decides; then the earlier buffer, so that the plan is the same everywhere.
    order.sort_by_key(|&i| (std::cmp::Reverse(buffers[i].bytes), buffers[i].first, i));
    let largest = order.first().map_or(0, |&i| buffers[i].bytes);
    let large = order.partition_point(|&i| buffers[i].bytes >= largest / SMALL);
    let mut best = place(buffers, overlays, &order[..large])?;
    let (mut last, mut best_order) = (best.clone(), order.clone());
    let mut tries = PATIENCE;
    while tries > 0 && large > 1 {
        let end = |i: usize| last.offsets[i] + buffers[i].bytes;
        let highest = (0..large).max_by_key(|&k| (end(order[k]), std::cmp::Reverse(k)));
        order[..=highest.unwrap_or(0)].rotate_right(1);
        last = place(buffers, overlays, &order[..large])?;
        tries -= 1;
        if last.bytes < best.bytes {
            (best, tries) = (last.clone(), PATIENCE);
            best_order.clone_from(&order);
        }
    }
    place(buffers, overlays, &best_order)
}

/// Places the buffers that `order` names, in that order.
fn place(buffers: &[Lifetime], overlays: &[Overlay], order: &[usize]) -> Option<ArenaPlan> {
    let mut offsets = vec![0usize; buffers.len()];
    let mut placed: Vec<usize> = Vec::with_capacity(buffers.len());
    let mut total = 0usize;
    // From what end before it on to what start no buffer may begin.
    let mut taken: Vec<(usize, usize)> = Vec::new();
    for &i in order {
        let b = buffers[i];
        debug_assert!(b.first <= b.last);
        let bytes = align_up(b.bytes, ALIGN)?;
        taken.clear();
        for &j in &placed {
            let other = buffers[j];
            if other.first > b.last || b.first > other.last {
                continue;
            }
            let (start, end) = (offsets[j], offsets[j] + align_up(other.bytes, ALIGN)?);
            let distance = |replaced, by| {
                let of_pair = |o: &&Overlay| o.replaced == replaced && o.by == by;
                overlays.iter().find(of_pair).map(|o| o.distance)
            };
            // The last offset from which it ends before the other, or needs to be no earlier; and
            // the first from which it begins behind it.
            let room = match distance(j, i) {
                Some(distance) => bytes.min(align_up(distance, ALIGN)?),
                None => bytes,
            };
            let end = match distance(i, j) {
                Some(distance) => end.min(start.checked_add(align_up(distance, ALIGN)?)?),
                None => end,
            };
            taken
                .push((start.saturating_sub(room).saturating_add(usize::from(start >= room)), end));
        }
        taken.sort_unstable();
        let mut at = 0usize;
        for &(start, end) in &taken {
            if at < start {
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
        let plan = plan_arena(&[b(0, 1), b(1, 2), b(2, 3), b(3, 4)], &[]).unwrap();
        assert_eq!(plan.bytes, 2048);
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        let b = Lifetime { bytes: usize::MAX - 10, first: 0, last: 0 };
        assert_eq!(plan_arena(&[b], &[]), None);
    }

    #[test]
    fn an_input_is_laid_behind_the_output_that_replaces_it() {
        let life = |bytes, first, last| Lifetime { bytes, first, last };
        // A map of half the size that ends where the result does, but for two lines of 64 bytes.
        let buffers = [life(3200, 0, 1), life(6400, 1, 2)];
        assert_eq!(plan_arena(&buffers, &[]).unwrap().bytes, 9600);
        let overlay = Overlay { replaced: 0, by: 1, distance: 3328 };
        let plan = plan_arena(&buffers, &[overlay]).unwrap();
        assert_eq!(plan, ArenaPlan { offsets: vec![3328, 0], bytes: 6528 });
        // A smaller one that replaces it, and is placed after it.
        let buffers = [life(6400, 0, 1), life(3200, 1, 2), life(640, 0, 0)];
        let overlay = Overlay { replaced: 0, by: 1, distance: 0 };
        let plan = plan_arena(&buffers, &[overlay]).unwrap();
        assert_eq!(plan, ArenaPlan { offsets: vec![0, 0, 6400], bytes: 7040 });
    }

    proptest! {
        #[test]
        fn living_buffers_never_overlap(
            raw in prop::collection::vec((0usize..5000, 0usize..20, 0usize..8), 0..40),
            pairs in prop::collection::vec((0usize..40, 0usize..40, 0usize..6000), 0..10),
        ) {
            let buffers: Vec<Lifetime> = raw
                .iter()
                .map(|&(bytes, first, len)| Lifetime { bytes, first, last: first + len })
                .collect();
            // One overlay at most between two buffers.
            let mut overlays: Vec<Overlay> = Vec::new();
            for (replaced, by, distance) in pairs {
                let known = |o: &Overlay| {
                    (o.replaced, o.by) == (replaced, by) || (o.by, o.replaced) == (replaced, by)
                };
                if replaced != by && !overlays.iter().any(known) {
                    overlays.push(Overlay { replaced, by, distance });
                }
            }
            let plan = plan_arena(&buffers, &overlays).unwrap();
            let behind = |i: usize, j: usize| overlays.iter().any(|o| {
                (o.replaced, o.by) == (i, j) && plan.offsets[i] >= plan.offsets[j] + o.distance
            });
            let mut top = 0;
            for (i, a) in buffers.iter().enumerate() {
                prop_assert_eq!(plan.offsets[i] % ALIGN, 0);
                top = top.max(plan.offsets[i] + align_up(a.bytes, ALIGN).unwrap());
                for (j, b) in buffers.iter().enumerate().skip(i + 1) {
                    if a.first <= b.last && b.first <= a.last && a.bytes > 0 && b.bytes > 0 {
                        let (x, y) = (plan.offsets[i], plan.offsets[j]);
                        let apart = x + a.bytes <= y || y + b.bytes <= x;
                        prop_assert!(apart || behind(i, j) || behind(j, i));
                    }
                }
            }
            prop_assert_eq!(top, plan.bytes);
        }
    }
}
