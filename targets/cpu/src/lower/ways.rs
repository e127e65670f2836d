//! The ways to run a component, from the fastest to the one with the smallest arena: which values to
//! stream, searched where the arena is fullest.
//!
//! Lowering reserves nothing, so each way is priced by lowering the component that way.

use super::build::lower;
use super::fuse::{Job, fuse};
use super::passes::streamable;
use super::program::Program;
use crate::isa::Level;
use latile_runtime::backend::PrepareError;
use latile_runtime::format::LoadedComponent;
use latile_runtime::graph::ValueId;
use latile_runtime::tensor::{DType, Shape};

/// Values whose maps are smaller than this share of the arena, or this many bytes, are not worth a pass:
/// its layers' weights are in use together.
const LEAST_SHARE: usize = 48;
const LEAST_BYTES: usize = 32 << 10;
/// Steps in a row of the search that may fail to make the smallest arena smaller.
const PATIENCE: usize = 4;
/// An arena must be smaller than the next larger one by this share of it to be worth more work.
const LEAST_GAIN: usize = 64;

/// What is to be run: a component at one size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup<'m, 'a> {
    pub(crate) component: &'m LoadedComponent<'m>,
    pub(crate) shapes: &'a [Shape],
    pub(crate) dtype: DType,
    pub(crate) level: Level,
    pub(crate) threads: usize,
}

/// A way to run a component: the values that are streamed, and what that costs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Way {
    /// Ascending.
    streamed: Vec<ValueId>,
    pub(crate) arena_bytes: usize,
    pub(crate) macs: u64,
}

impl Way {
    /// `whole`, or how many values are streamed.
    pub(crate) fn name(&self) -> String {
        match self.streamed.len() {
            0 => "whole".to_owned(),
            n => format!("streamed {n}"),
        }
    }
}

/// The search for ways.
pub(crate) struct Search<'m, 'a> {
    setup: Setup<'m, 'a>,
    jobs: Vec<Job>,
    can: Vec<bool>,
    /// Every way that was looked at.
    seen: Vec<Way>,
}

impl<'m, 'a> Search<'m, 'a> {
    pub(crate) fn new(setup: Setup<'m, 'a>) -> Self {
        let graph = &setup.component.spec().graph;
        let jobs = fuse(graph);
        let can = streamable(graph, &jobs);
        Self { setup, jobs, can, seen: Vec::new() }
    }

    /// The component lowered in that way.
    ///
    /// # Errors
    /// [`PrepareError`] where it cannot be.
    pub(crate) fn lower(&self, way: &Way) -> Result<Program<'m>, PrepareError> {
        self.streaming(&way.streamed)
    }

    /// The component lowered with these values streamed.
    fn streaming(&self, streamed: &[ValueId]) -> Result<Program<'m>, PrepareError> {
        let Setup { component, shapes, dtype, level, threads } = self.setup;
        let mut marks = vec![false; self.can.len()];
        for value in streamed {
            marks[value.index()] = true;
        }
        lower(component, &self.jobs, &marks, (shapes, dtype), level, threads)
    }

    /// Prices a way, and remembers it.
    fn look(&mut self, streamed: Vec<ValueId>) -> Result<(Way, Vec<ValueId>), PrepareError> {
        let program = self.streaming(&streamed)?;
        let (arena_bytes, macs) = (program.arena_bytes, program.macs());
        let way = Way { streamed, arena_bytes, macs };
        self.seen.push(way.clone());
        Ok((way, program.crowd))
    }

    /// All ways worth having: the fastest first, each with a smaller arena than those before it.
    ///
    /// # Errors
    /// [`PrepareError`] where the component cannot be lowered.
    pub(crate) fn ways(&mut self) -> Result<Vec<Way>, PrepareError> {
        let (mut way, mut crowd) = self.look(Vec::new())?;
        let mut smallest = way.arena_bytes;
        let mut patience = PATIENCE;
        while let Some((next, there)) = self.step(&way, &crowd, patience > 0)? {
            (way, crowd) = (next, there);
            patience =
                if way.arena_bytes < smallest { PATIENCE } else { patience.saturating_sub(1) };
            smallest = smallest.min(way.arena_bytes);
        }
        let mut all = std::mem::take(&mut self.seen);
        // What streams nothing is the fastest of those with the same work.
        all.sort_by_key(|w| (w.macs, std::cmp::Reverse(w.arena_bytes)));
        let mut front: Vec<Way> = Vec::new();
        for way in all {
            if front.last().is_none_or(|last| {
                way.arena_bytes < last.arena_bytes - last.arena_bytes / LEAST_GAIN
            }) {
                if front.last().is_some_and(|last| last.macs == way.macs) && front.len() > 1 {
                    front.pop();
                }
                front.push(way);
            }
        }
        Ok(front)
    }

    /// The best way with a smaller arena than `way` that differs from it a little: one more value
    /// streamed, else one more without a gain where that is `allowed`, since another one may follow that
    /// needs it, else two more, else one in place of another.
    fn step(
        &mut self,
        way: &Way,
        crowd: &[ValueId],
        allowed: bool,
    ) -> Result<Option<(Way, Vec<ValueId>)>, PrepareError> {
        let mut more: Vec<ValueId> = crowd.to_vec();
        more.sort_unstable();
        more.dedup();
        more.retain(|v| {
            let bytes = self.setup.shapes[v.index()].elements().unwrap_or(0).saturating_mul(2);
            self.can[v.index()]
                && !way.streamed.contains(v)
                && bytes >= LEAST_BYTES
                && bytes.saturating_mul(LEAST_SHARE) >= way.arena_bytes
        });
        let with = |add: &[ValueId], without: Option<ValueId>| {
            let mut all = way.streamed.clone();
            all.retain(|v| Some(*v) != without);
            all.extend_from_slice(add);
            all.sort_unstable();
            all
        };
        let one: Vec<_> = more.iter().map(|v| with(&[*v], None)).collect();
        let two = more.iter().enumerate().flat_map(|(i, a)| {
            let with = &with;
            more[i + 1..].iter().map(move |b| with(&[*a, *b], None))
        });
        let two: Vec<_> = two.collect();
        let swapped = way.streamed.iter().flat_map(|old| {
            let (with, more) = (&with, &more);
            more.iter().map(move |new| with(&[*new], Some(*old)))
        });
        let swapped: Vec<_> = swapped.collect();
        for (moves, gain) in [(one, !allowed), (two, true), (swapped, true)] {
            let mut best: Option<(f64, (Way, Vec<ValueId>))> = None;
            for streamed in moves {
                let (next, there) = self.look(streamed)?;
                let saved = way.arena_bytes as f64 - next.arena_bytes as f64;
                if gain && saved <= 0.0 {
                    continue;
                }
                // The most bytes for the least work; where there is no gain, the least loss.
                let before = way.macs as f64;
                let price = (next.macs as f64 - before).max(0.0) + before / 200.0;
                let worth = if saved > 0.0 { saved / price } else { saved };
                if best.as_ref().is_none_or(|(most, _)| worth > *most) {
                    best = Some((worth, (next, there)));
                }
            }
            if let Some((_, best)) = best {
                return Ok(Some(best));
            }
        }
        Ok(None)
    }
}

/// The fastest way whose arena has at most `limit` bytes, and its program; or the size of the smallest
/// arena there is.
///
/// # Errors
/// [`PrepareError`] where the component cannot be lowered.
pub(crate) fn fastest_within<'m>(
    setup: Setup<'m, '_>,
    limit: Option<usize>,
) -> Result<Result<(Way, Program<'m>), usize>, PrepareError> {
    let mut search = Search::new(setup);
    let whole = search.streaming(&[])?;
    if limit.is_none_or(|limit| whole.arena_bytes <= limit) {
        let (arena_bytes, macs) = (whole.arena_bytes, whole.macs());
        return Ok(Ok((Way { streamed: Vec::new(), arena_bytes, macs }, whole)));
    }
    let ways = search.ways()?;
    let fits = ways.iter().find(|w| limit.is_none_or(|limit| w.arena_bytes <= limit));
    match fits {
        Some(way) => Ok(Ok((way.clone(), search.lower(way)?))),
        None => Ok(Err(ways.last().map_or(whole.arena_bytes, |w| w.arena_bytes))),
    }
}
