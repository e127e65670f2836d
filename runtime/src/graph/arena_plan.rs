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
/// An arena that is larger than what lives at once by less than this share of it is small enough.
const ENOUGH: usize = 256;

/// Places every buffer so that no two that live at the same step overlap, but for `overlays`, which name
/// buffers, and each pair once at most. `None` where the sizes overflow.
///
/// Buffers are placed one after the other, the largest first, each at the lowest offset that is free over
/// its whole life; then again with the one that ended highest placed before all others, as long as that
/// makes the arena smaller and it is larger than what lives at once.
#[must_use]
pub fn plan_arena(buffers: &[Lifetime], overlays: &[Overlay]) -> Option<ArenaPlan> {
    let mut order: Vec<usize> = (0..buffers.len()).collect();
    // Size decides; then the earlier buffer, so that the plan is the same everywhere.
    order.sort_by_key(|&i| (std::cmp::Reverse(buffers[i].bytes), buffers[i].first, i));
    let Some(&largest) = order.first() else {
        return Some(ArenaPlan { offsets: Vec::new(), bytes: 0 });
    };
    let floor = buffers[largest].bytes / SMALL;
    let large = order.partition_point(|&i| buffers[i].bytes >= floor);
    let space = Space::new(buffers, overlays)?;
    let rows = space.rows(&order[..large]);
    let mut ranks: Vec<usize> = (0..large).collect();
    let mut last = space.place(&order[..large], &rows, &ranks)?;
    let mut best = last.clone();
    let least = space.least(&order[..large]);
    let mut tries = PATIENCE;
    while tries > 0 && best.bytes - best.bytes / ENOUGH > least {
        let end = |k: usize| last.offsets[order[k]] + buffers[order[k]].bytes;
        let highest = (0..large).max_by_key(|&at| (end(ranks[at]), std::cmp::Reverse(at)));
        ranks[..=highest.unwrap_or(0)].rotate_right(1);
        last = space.place(&order[..large], &rows, &ranks)?;
        tries -= 1;
        if last.bytes < best.bytes {
            (best, tries) = (last.clone(), PATIENCE);
        }
    }
    for at in large..order.len() {
        let others = order[..at].iter().filter_map(|&j| space.neighbour(order[at], j));
        space.put(order[at], others, &mut best)?;
    }
    Some(best)
}

/// What is to be placed.
struct Space<'a> {
    buffers: &'a [Lifetime],
    overlays: &'a [Overlay],
    /// Sizes, aligned.
    bytes: Vec<usize>,
    /// Which buffers some overlay is about.
    laid: Vec<bool>,
}

/// A buffer that lives at the same time as another one.
#[derive(Clone, Copy)]
struct Neighbour {
    index: usize,
    /// The other one may begin so many bytes before this one's start and earlier,
    before: usize,
    /// and so many bytes behind it and later.
    behind: usize,
}

impl<'a> Space<'a> {
    fn new(buffers: &'a [Lifetime], overlays: &'a [Overlay]) -> Option<Self> {
        let sizes = buffers.iter().map(|b| align_up(b.bytes, ALIGN));
        let bytes = sizes.collect::<Option<_>>()?;
        let mut laid = vec![false; buffers.len()];
        for o in overlays {
            align_up(o.distance, ALIGN)?;
            (laid[o.replaced], laid[o.by]) = (true, true);
        }
        Some(Self { buffers, overlays, bytes, laid })
    }

    /// `j` as a neighbour of `i`, if they ever live at the same time.
    fn neighbour(&self, i: usize, j: usize) -> Option<Neighbour> {
        let (b, other) = (self.buffers[i], self.buffers[j]);
        if other.first > b.last || b.first > other.last {
            return None;
        }
        let (mut before, mut behind) = (self.bytes[i], self.bytes[j]);
        if self.laid[i] && self.laid[j] {
            for o in self.overlays {
                // That it does not overflow has been seen.
                let distance = || align_up(o.distance, ALIGN).unwrap_or(usize::MAX);
                if (o.replaced, o.by) == (j, i) {
                    before = before.min(distance());
                } else if (o.replaced, o.by) == (i, j) {
                    behind = behind.min(distance());
                }
            }
        }
        Some(Neighbour { index: j, before, behind })
    }

    /// The neighbours of each of `order` among them. Found once: there are many orders to try.
    fn rows(&self, order: &[usize]) -> Vec<Vec<Neighbour>> {
        let row = |&i: &usize| {
            let others = order.iter().filter(|&&j| j != i);
            others.filter_map(|&j| self.neighbour(i, j)).collect()
        };
        order.iter().map(row).collect()
    }

    /// Bytes that no order can do without: of what stands at some step, all that no overlay saves.
    fn least(&self, order: &[usize]) -> usize {
        let end = self.buffers.iter().map(|b| b.last + 1).max().unwrap_or(0);
        let mut change = vec![0i128; end + 1];
        for &i in order {
            change[self.buffers[i].first] += self.bytes[i] as i128;
            change[self.buffers[i].last + 1] -= self.bytes[i] as i128;
        }
        for o in self.overlays {
            let (a, b) = (self.buffers[o.replaced], self.buffers[o.by]);
            let (first, last) = (a.first.max(b.first), a.last.min(b.last));
            if first <= last {
                let saved = self.bytes[o.replaced].min(self.bytes[o.by]) as i128;
                change[first] -= saved;
                change[last + 1] += saved;
            }
        }
        let live = change.iter().scan(0i128, |sum, c| {
            *sum += c;
            Some(*sum)
        });
        live.max().unwrap_or(0).max(0) as usize
    }

    /// Places all of `order` by rank; `rows` are their neighbours.
    fn place(
        &self,
        order: &[usize],
        rows: &[Vec<Neighbour>],
        ranks: &[usize],
    ) -> Option<ArenaPlan> {
        let mut plan = ArenaPlan { offsets: vec![0; self.bytes.len()], bytes: 0 };
        let mut placed = vec![false; self.bytes.len()];
        for &k in ranks {
            let others = rows[k].iter().filter(|n| placed[n.index]).copied();
            self.put(order[k], others, &mut plan)?;
            placed[order[k]] = true;
        }
        Some(plan)
    }

    /// Places `i` at the lowest offset that `others`, which are placed, leave free.
    fn put(
        &self,
        i: usize,
        others: impl Iterator<Item = Neighbour>,
        plan: &mut ArenaPlan,
    ) -> Option<()> {
        // From what start on to what end before it no buffer may begin.
        let mut taken: Vec<(usize, usize)> = Vec::with_capacity(32);
        for n in others {
            let start = plan.offsets[n.index];
            // The last offset that is early enough is itself free.
            let from = start.saturating_sub(n.before) + usize::from(start >= n.before);
            taken.push((from, start.checked_add(n.behind)?));
        }
        taken.sort_unstable();
        let mut at = 0usize;
        for &(start, end) in &taken {
            if at < start {
                break;
            }
            at = at.max(end);
        }
        plan.offsets[i] = at;
        plan.bytes = plan.bytes.max(at.checked_add(self.bytes[i])?);
        Some(())
    }
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
                let there = replaced.max(by) < buffers.len();
                if there && replaced != by && !overlays.iter().any(known) {
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
            let order: Vec<usize> = (0..buffers.len()).collect();
            let space = Space::new(&buffers, &overlays).unwrap();
            prop_assert!(space.least(&order) <= plan.bytes);
        }
    }
}
