//! Which of a component's weights are in memory when.
//!
//! Lives here: what is fetched before each step and given back behind it, and how much of it is resident
//! at once, both decided when a session is prepared. Never here: the system's calls (`runtime`'s memory
//! map makes them) and the kernels that read the weights.

use crate::lower::Program;
use latile_runtime::backend::Residency;
use latile_runtime::format::LoadedComponent;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

/// How far ahead of the running step weights are asked for, in bytes of them: what storage of 100 MB/s
/// reads while a step of a large layer runs, and little beside what a session keeps.
const AHEAD: usize = 4 << 20;

/// Weights that are used again before this many bytes of others are stay: mapping them again would cost
/// more than they take.
const NEAR: usize = 1 << 20;

type Bytes = Range<usize>;

/// What a session does about its weights' memory, step by step.
#[derive(Debug)]
pub(crate) struct Schedule {
    turns: Vec<Turn>,
    /// Bytes resident at once, at most.
    peak: usize,
    drop: bool,
}

#[derive(Debug, Default)]
struct Turn {
    /// What to ask for before the step runs.
    fetch: Vec<Bytes>,
    /// What to give back once it has.
    release: Vec<Bytes>,
}

/// What a step reads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Use {
    /// Bytes of weights.
    bytes: usize,
    /// The blocks that become resident by that, each once.
    blocks: Vec<Bytes>,
}

impl Schedule {
    /// The schedule of `program`, whose weights `component` holds.
    pub(crate) fn new(
        program: &Program<'_>,
        component: &LoadedComponent<'_>,
        residency: Residency,
    ) -> Self {
        let drop = residency == Residency::Drop && component.can_release();
        let uses: Vec<Use> = program
            .steps
            .iter()
            .map(|step| {
                let mut all = Vec::new();
                step.weights(&mut |w| {
                    all.extend(component.place_of(w).filter(|r| !r.is_empty()));
                });
                Use::of(&all, |at| component.block_of(at..at + 1))
            })
            .collect();
        plan(&uses, component.bytes(), drop)
    }

    /// Bytes of weights resident at once, at most.
    pub(crate) const fn peak(&self) -> usize {
        self.peak
    }
}

impl Use {
    /// Of `ranges`, where `block` is the block that a byte lies in.
    fn of(ranges: &[Bytes], block: impl Fn(usize) -> Bytes) -> Self {
        let mut blocks = Vec::new();
        for r in ranges {
            let mut at = r.start;
            while at < r.end {
                let around = block(at);
                at = around.end;
                blocks.push(around);
            }
        }
        blocks.sort_by_key(|b| b.start);
        blocks.dedup();
        Self { bytes: ranges.iter().map(Range::len).sum(), blocks }
    }
}

/// The schedule for steps with these uses of a component of `total` bytes.
fn plan(uses: &[Use], total: usize, drop: bool) -> Schedule {
    // Bytes that the steps before each one read, to tell how far apart two uses are.
    let mut before = vec![0usize];
    for of in uses {
        before.push(before[before.len() - 1] + of.bytes);
    }
    let mut turns: Vec<Turn> = uses.iter().map(|_| Turn::default()).collect();
    // From the last step to the first: is this use of a block the last for a while?
    let mut next: HashMap<usize, usize> = HashMap::new();
    for (i, of) in uses.iter().enumerate().rev() {
        for block in &of.blocks {
            let again = next.insert(block.start, i);
            let far = again.is_none_or(|next| before[next] - before[i + 1] > NEAR);
            if drop && far {
                turns[i].release.push(block.clone());
            }
        }
    }
    // From the first to the last: what is there, and what must be asked for.
    let (mut now, mut peak) = (0, 0);
    let mut there: HashSet<usize> = HashSet::new();
    let mut fresh: Vec<Vec<Bytes>> = Vec::new();
    for (of, turn) in uses.iter().zip(&turns) {
        let new = |block: &&Bytes| there.insert(block.start);
        let new: Vec<Bytes> = of.blocks.iter().filter(new).cloned().collect();
        now += new.iter().map(Range::len).sum::<usize>();
        peak = peak.max(now);
        fresh.push(new);
        for block in &turn.release {
            there.remove(&block.start);
            now -= block.len();
        }
    }
    let mut asked = 0;
    for (i, turn) in turns.iter_mut().enumerate() {
        while asked < uses.len() && (asked <= i || before[asked] - before[i + 1] < AHEAD) {
            turn.fetch.append(&mut fresh[asked]);
            asked += 1;
        }
        turn.fetch = joined(std::mem::take(&mut turn.fetch));
        turn.release = joined(std::mem::take(&mut turn.release));
    }
    Schedule { turns, peak: if drop { peak } else { total }, drop }
}

/// Neighbours made one.
fn joined(mut blocks: Vec<Bytes>) -> Vec<Bytes> {
    blocks.sort_by_key(|b| b.start);
    let mut out: Vec<Bytes> = Vec::with_capacity(blocks.len());
    for block in blocks {
        match out.last_mut() {
            Some(last) if block.start <= last.end => last.end = last.end.max(block.end),
            _ => out.push(block),
        }
    }
    out
}

/// A component's weights in the hands of a session.
#[derive(Debug)]
pub(crate) struct Resident<'m> {
    component: Arc<LoadedComponent<'m>>,
    schedule: Schedule,
    /// Everything has been asked for and stays.
    warm: bool,
}

impl<'m> Resident<'m> {
    pub(crate) const fn new(component: Arc<LoadedComponent<'m>>, schedule: Schedule) -> Self {
        Self { component, schedule, warm: false }
    }

    /// Before step `i` runs.
    pub(crate) fn before(&self, i: usize) {
        if !self.warm {
            self.schedule.turns[i].fetch.iter().for_each(|r| self.component.prefetch(r.clone()));
        }
    }

    /// After step `i` has run.
    pub(crate) fn after(&self, i: usize) {
        self.schedule.turns[i].release.iter().for_each(|r| self.component.release(r.clone()));
    }

    /// After a run.
    pub(crate) fn ran(&mut self) {
        if self.schedule.drop {
            // What a large page brought along beyond the blocks around it.
            self.component.release(0..self.component.bytes());
        } else {
            self.warm = true;
        }
    }
}

impl Drop for Resident<'_> {
    /// Components are released between stages; the bytes stay in the system's cache while there is room.
    fn drop(&mut self) {
        self.component.release(0..self.component.bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: usize = 1 << 20;

    /// A step that reads `range`, in blocks of 2 MiB of which the first begins 1 MiB before the component.
    fn step(range: Bytes) -> Use {
        let block = |at: usize| {
            let start = (at + M) / (2 * M) * 2 * M;
            start.saturating_sub(M)..start + M
        };
        if range.is_empty() { Use::default() } else { Use::of(&[range], block) }
    }

    fn asked(schedule: &Schedule) -> Vec<usize> {
        schedule.turns.iter().map(|t| t.fetch.iter().map(Range::len).sum()).collect()
    }

    /// First and end of what each turn gives back, in MiB.
    fn released(schedule: &Schedule) -> Vec<Vec<(usize, usize)>> {
        let of = |t: &Turn| t.release.iter().map(|r| (r.start / M, r.end / M)).collect();
        schedule.turns.iter().map(of).collect()
    }

    #[test]
    fn uses_are_counted_in_blocks() {
        let blocks = |r: Bytes| -> Vec<_> {
            step(r).blocks.iter().map(|b| (b.start / M, b.end / M)).collect()
        };
        assert_eq!(blocks(0..1), [(0, 1)]);
        assert_eq!(blocks(M - 1..M + 1), [(0, 1), (1, 3)]);
        assert_eq!(blocks(M..3 * M), [(1, 3)]);
        let several = Use::of(&[5..9, 20..40, 7..8], |at| at / 10 * 10..at / 10 * 10 + 10);
        assert_eq!(several, Use { bytes: 25, blocks: vec![0..10, 20..30, 30..40] });
    }

    #[test]
    fn a_layer_at_a_time_is_resident() {
        let layers: Vec<Use> = (0..8).map(|i| step(i * 4 * M..(i + 1) * 4 * M)).collect();
        let dropped = plan(&layers, 32 * M, true);
        // Four of its own and half a block at either end.
        assert_eq!(dropped.peak, 6 * M);
        // The block that a layer shares with the next one stays for it.
        assert_eq!(released(&dropped)[0], [(0, 3)]);
        assert_eq!(released(&dropped)[1], [(3, 7)]);
        assert_eq!(released(&dropped)[7], [(27, 33)]);
        // Every byte is asked for once, before it is used, and not all at once.
        let of = asked(&dropped);
        assert_eq!(of.iter().sum::<usize>(), 33 * M);
        assert_eq!(of[..3], [9 * M, 4 * M, 4 * M]);
        assert_eq!(of[7], 0);
        let kept = plan(&layers, 32 * M, false);
        assert_eq!(kept.peak, 32 * M);
        assert!(kept.turns.iter().all(|t| t.release.is_empty()));
        assert_eq!(asked(&kept), of);
    }

    #[test]
    fn weights_used_again_soon_stay() {
        let (a, b, c) = (0..M / 2, M..M + M / 2, 3 * M..9 * M);
        let order = [&a, &b, &a, &c, &a].map(|r| step(r.clone()));
        let schedule = plan(&order, 9 * M, true);
        // Between the second and the third use of `a` lies all of `c`.
        let expected = [vec![], vec![(1, 3)], vec![(0, 1)], vec![(3, 9)], vec![(0, 1)]];
        assert_eq!(released(&schedule), expected);
        assert_eq!(schedule.peak, 6 * M);
        // The last use asks again.
        assert_eq!(asked(&schedule).iter().sum::<usize>(), 10 * M);
        assert_eq!(plan(&[step(0..0), step(0..0)], 0, true).peak, 0);
    }
}
