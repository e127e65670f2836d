//! Ways of making a picture, priced in bytes and in work before the first pixel, and the choice among them.
//!
//! Lives here: [`Budget`], what a process may take; [`Strategy`], one way of making one picture, with every
//! byte that it has at once; [`Strategies`], all of them for a plan, and the fastest that fits. Never here:
//! a clock. A choice depends on the model, the size, the options, the backend's offers and the budget, so
//! the same command gives the same picture however busy the machine is.
//!
//! A strategy is a grid of tiles and, for each stage, one of the backend's [`Offer`]s at the tile's size with
//! its weights kept or dropped. One tile is the whole frame and exact; several are blended. A stage's price in
//! work is its multiply-accumulates, and [`MACS_PER_BYTE`] for each byte of weights that is read again. Its
//! price in memory is the process's base, the caller's buffers, the pipeline's own, the arena and the weights
//! resident at once. Stages follow each other, and sessions give back arena and weights between them: a
//! strategy's price in memory is that of its largest stage, in work their sum. In a [`Runner`](super::Runner)
//! both stand at once, and weights that are part of the program are never given back.
//!
//! Where the caller names a folder, each strategy comes twice: with the latent in memory, and with the latent
//! in a file there, which takes two rows of it, and whose bytes read and written count as work.

use super::field::Scratch;
use super::plan::{PipelineError, Plan, Stage};
use super::resume::{self, Resume};
use super::tiles::{Grid, Tiling};
use crate::backend::{Backend, Offer, PrepareError, Residency, Room};
use crate::format::Role;
use std::cmp::Reverse;
use std::fmt;

/// What reading a byte of weights again counts, in multiply-accumulates: pages that were dropped come back
/// from the system's cache at some GB/s, while a machine computes some ten GMAC/s.
pub const MACS_PER_BYTE: u64 = 10;
/// What a byte of a scratch file counts, read or written: a memory card moves some 40 MB/s beside a processor
/// of 20 GMAC/s, an SSD some 400 MB/s beside one of 200. So a file is taken where it saves more than it costs
/// on such machines, and never where there is room in memory.
pub const MACS_PER_FILE_BYTE: u64 = 500;
/// How much more work an exact run may be than a blended one, in halves, and still be preferred where the
/// caller leaves it open: seams and a drift of tone are worth that much to avoid, and no more.
const EXACT_HALVES: u64 = 3;
/// Tile sides, in latent pixels, that are tried beside the default one.
const SIDES: [usize; 20] =
    [512, 448, 384, 320, 256, 224, 192, 160, 128, 112, 96, 80, 64, 56, 48, 40, 32, 24, 16, 8];
const MIB: usize = 1 << 20;

/// `12.3 MiB`.
#[must_use]
pub fn mib(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / MIB as f64)
}

/// A budget to ask for where `bytes` are needed, such as `38M`: whole MiB, and one to spare, because what a
/// process takes before its run differs a little from start to start.
#[must_use]
pub fn advised(bytes: usize) -> String {
    format!("{}M", bytes.div_ceil(MIB) + 1)
}

/// What the caller of a run has in memory beside it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// The picture that comes in, and what else stands from beginning to end.
    pub input: usize,
    /// What takes rows of the result, from the first row on: an encoder's buffers, or all rows collected.
    pub result: usize,
    /// What comes on top when the run is over and its sessions are gone, such as an encoder's buffers.
    pub finish: usize,
}

/// How a plan is run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// By [`Plan::run`]: one session after the other.
    #[default]
    Once,
    /// By [`Plan::resume`], which has one more buffer for a tile on its way to or from the file.
    Resumed,
    /// In a [`Runner`](super::Runner), which keeps both sessions and all buffers.
    Warm,
}

/// What a process may take for a run, and what it takes anyway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// The most bytes that the process may have resident; none: what the fastest way takes.
    pub limit: Option<usize>,
    /// Bytes it has before the run, beside the caller's buffers and the model's weights.
    pub base: usize,
    /// The caller's buffers.
    pub caller: Caller,
    /// The most bytes that the process has had resident until now, which no plan can undo.
    pub so_far: usize,
    /// How the plan will be run.
    pub mode: Mode,
}

/// Bytes that stand at the same time, by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// The process itself.
    pub base: usize,
    /// The caller's buffers.
    pub picture: usize,
    /// The pipeline's buffers.
    pub pipeline: usize,
    /// The session's arena.
    pub arena: usize,
    /// The session's weights.
    pub weights: usize,
}

impl Parts {
    /// Their sum.
    #[must_use]
    pub fn total(&self) -> usize {
        [self.base, self.picture, self.pipeline, self.arena, self.weights]
            .into_iter()
            .fold(0, usize::saturating_add)
    }
}

/// One of a backend's offers, and what becomes of its weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The way.
    pub offer: Offer,
    /// Its weights.
    pub weights: Residency,
}

impl Choice {
    /// Every way to take `offers`, each with its weights kept, then dropped where that saves anything.
    pub fn all(offers: Vec<Offer>) -> impl Iterator<Item = Self> {
        offers.into_iter().flat_map(|offer| {
            let saves = offer.weights_dropped < offer.weights_kept;
            let dropped = saves.then(|| Self { offer: offer.clone(), weights: Residency::Drop });
            std::iter::once(Self { offer, weights: Residency::Keep }).chain(dropped)
        })
    }

    /// The cheapest way to run a component `runs` times with at most `bytes` for arena and weights.
    ///
    /// # Errors
    /// The fewest bytes that would do.
    pub fn within(offers: Vec<Offer>, runs: u64, bytes: usize) -> Result<Self, usize> {
        let rereads = runs.saturating_sub(1);
        let all: Vec<Self> = Self::all(offers).collect();
        let least = all.iter().map(Self::bytes).min().unwrap_or(usize::MAX);
        all.into_iter()
            .filter(|c| c.bytes() <= bytes)
            .min_by_key(|c| (c.rank(runs, rereads), Reverse(c.offer.arena_bytes)))
            .ok_or(least)
    }

    /// Bytes of weights resident at once.
    #[must_use]
    pub fn weight_bytes(&self) -> usize {
        match self.weights {
            Residency::Keep => self.offer.weights_kept,
            Residency::Drop => self.offer.weights_dropped,
        }
    }

    /// Bytes of arena and weights.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.offer.arena_bytes.saturating_add(self.weight_bytes())
    }

    /// Bytes of weights that are read again where `rereads` runs find them dropped.
    #[must_use]
    pub fn reread_bytes(&self, rereads: u64) -> u64 {
        match self.weights {
            Residency::Keep => 0,
            Residency::Drop => (self.offer.weights_kept as u64).saturating_mul(rereads),
        }
    }

    /// What to compare by: work, and of equals weights that are kept before weights that are dropped. (Of
    /// equals in that too the larger arena: what is stored whole runs a little faster than what is streamed.)
    fn rank(&self, runs: u64, rereads: u64) -> (u64, bool) {
        (self.work(runs, rereads), self.weights == Residency::Drop)
    }

    /// The work of `runs` runs of which `rereads` find dropped weights gone, in multiply-accumulates.
    #[must_use]
    pub fn work(&self, runs: u64, rereads: u64) -> u64 {
        let reread = self.reread_bytes(rereads).saturating_mul(MACS_PER_BYTE);
        self.offer.macs.saturating_mul(runs).saturating_add(reread)
    }

    /// What a session that runs this way is given.
    #[must_use]
    pub fn room(&self) -> Room {
        Room { arena: Some(self.offer.arena_bytes), weights: self.weights }
    }
}

/// A stage of a strategy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StagePlan {
    /// Which.
    pub stage: Stage,
    /// How its session runs.
    pub choice: Choice,
    /// How often it runs.
    pub runs: u64,
    /// How often it then finds its weights gone where they are dropped.
    pub rereads: u64,
    /// What stands in memory meanwhile, of all sessions.
    pub parts: Parts,
    /// Bytes of the latent that it reads and writes where that is in a file.
    pub file_bytes: u64,
}

impl StagePlan {
    /// Its work in multiply-accumulates; see [`Choice::work`] and [`MACS_PER_FILE_BYTE`].
    #[must_use]
    pub fn work(&self) -> u64 {
        let file = self.file_bytes.saturating_mul(MACS_PER_FILE_BYTE);
        self.choice.work(self.runs, self.rereads).saturating_add(file)
    }

    /// Its multiply-accumulates.
    #[must_use]
    pub fn macs(&self) -> u64 {
        self.choice.offer.macs.saturating_mul(self.runs)
    }
}

/// One way to make the picture, priced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Strategy {
    /// The tiles.
    pub grid: Grid,
    /// The U-Net's stage, then the decoder's.
    pub stages: [StagePlan; 2],
    /// What stands in memory when the run is over and the caller finishes.
    pub finish: Parts,
    /// The most bytes that the process had before the run.
    pub so_far: usize,
    /// Bytes of the file that the latent stands in; 0: it stands in memory.
    pub scratch_bytes: usize,
}

impl Strategy {
    /// Whether the frame is one tile, so that nothing is blended.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.grid.tiles() == 1
    }

    /// The most bytes that stand at once.
    #[must_use]
    pub fn peak(&self) -> usize {
        let [unet, decoder] = &self.stages;
        let stages = unet.parts.total().max(decoder.parts.total());
        stages.max(self.finish.total()).max(self.so_far)
    }

    /// Its work in multiply-accumulates; see [`Choice::work`].
    #[must_use]
    pub fn work(&self) -> u64 {
        self.stages.iter().fold(0, |sum, s| sum.saturating_add(s.work()))
    }

    /// Stages whose weights are dropped.
    fn drops(&self) -> usize {
        self.stages.iter().filter(|s| s.choice.weights == Residency::Drop).count()
    }

    /// Its multiply-accumulates.
    #[must_use]
    pub fn macs(&self) -> u64 {
        self.stages.iter().fold(0, |sum, s| sum.saturating_add(s.macs()))
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [h, w] = self.grid.tile();
        match self.grid.tiles() {
            1 => write!(f, "exact, the whole frame at once")?,
            n => write!(f, "{n} blended tiles of {w}x{h}")?,
        }
        for stage in &self.stages {
            let role = stage.stage.role();
            write!(f, ", {role} {}", stage.choice.offer.way)?;
            if stage.choice.weights == Residency::Drop {
                f.write_str(" with weights dropped")?;
            }
        }
        match self.scratch_bytes {
            0 => Ok(()),
            bytes => write!(f, ", the latent in a file of {}", mib(bytes)),
        }
    }
}

/// All strategies of a plan that are worth having: for each grid, each that no other one of it beats in both
/// bytes and work.
#[derive(Clone, Debug)]
pub struct Strategies {
    tiling: Tiling,
    all: Vec<Strategy>,
}

impl Strategies {
    /// The strategies, in no order that means anything; never none.
    #[must_use]
    pub fn all(&self) -> &[Strategy] {
        &self.all
    }

    /// The one to take where the process may have `limit` bytes; none where no strategy fits.
    ///
    /// The one with the least work; of those one that keeps its weights, and then the largest, which stores
    /// most maps whole and so runs a little faster. Where the caller left the tiling open, exact runs come
    /// first, unless blending is less than two thirds of the work.
    #[must_use]
    pub fn choose(&self, limit: usize) -> Option<&Strategy> {
        self.choose_of(limit, |_| true)
    }

    /// The one to take of those that are `wanted`.
    fn choose_of(&self, limit: usize, wanted: impl Fn(&Strategy) -> bool) -> Option<&Strategy> {
        let best = |exact: Option<bool>| {
            self.all
                .iter()
                .filter(|s| s.peak() <= limit && exact.is_none_or(|e| e == s.is_exact()))
                .filter(|s| wanted(s))
                .min_by_key(|s| (s.work(), s.drops(), Reverse(s.peak())))
        };
        if self.tiling != Tiling::Auto {
            return best(None);
        }
        match (best(Some(true)), best(Some(false))) {
            (Some(exact), Some(blend)) if exact.work() / EXACT_HALVES > blend.work() / 2 => {
                Some(blend)
            }
            (exact, blend) => exact.or(blend),
        }
    }

    /// The one that needs the fewest bytes, and of those the one to take.
    #[must_use]
    pub fn smallest(&self) -> Option<&Strategy> {
        self.choose(self.all.iter().map(Strategy::peak).min()?)
    }

    /// What one takes instead of `chosen` where the process may have less: the largest budget below its own
    /// peak that does, with what it buys.
    #[must_use]
    pub fn cheaper(&self, chosen: &Strategy) -> Option<&Strategy> {
        self.choose(chosen.peak().checked_sub(1)?)
    }

    /// The smallest budget above the peak of `chosen` that buys less work, or an exact result in place of a
    /// blended one.
    #[must_use]
    pub fn better(&self, chosen: &Strategy) -> Option<&Strategy> {
        let mut peaks: Vec<usize> =
            self.all.iter().map(Strategy::peak).filter(|&p| p > chosen.peak()).collect();
        peaks.sort_unstable();
        peaks.into_iter().filter_map(|limit| self.choose(limit)).find(|s| {
            (s.is_exact() && !chosen.is_exact())
                || (s.is_exact() == chosen.is_exact() && s.work() < chosen.work())
        })
    }
}

impl Stage {
    /// The component that runs in it.
    #[must_use]
    pub fn role(self) -> Role {
        match self {
            Self::Denoise => Role::Unet,
            Self::Decode => Role::Decoder,
        }
    }
}

impl Plan<'_> {
    /// The same run with the tiles of the one that `resume` keeps, if it keeps one, whatever
    /// [`Plan::within`] would choose otherwise: with others it would be another run. Where those do not fit,
    /// or the options rule them out, the choice is free, and [`Plan::resume`] says what differs.
    #[must_use]
    pub fn going_on(self, resume: &Resume) -> Self {
        Self { before: resume.tiling(), ..self }
    }

    /// The same run within `budget`: tiles, ways of running and residency of weights such that the process
    /// has at most that much, and the run is the fastest that has; see [`Strategies::choose`].
    ///
    /// Without a limit, the tiles stay as [`Plan::new`] made them, and sessions take what they like.
    ///
    /// # Errors
    /// [`PipelineError::Budget`] where no way fits, [`PipelineError::Prepare`] where the backend cannot run the
    /// model at this size.
    pub fn within(self, backend: &dyn Backend, budget: &Budget) -> Result<Self, PipelineError> {
        let found = match (budget.limit, &self.before) {
            (None, None) => self.price(backend, budget, vec![self.grid.clone()])?,
            _ => self.strategies(backend, budget)?,
        };
        self.by(&found, budget.limit)
    }

    /// As [`Plan::within`], with the [`Plan::strategies`] of the same backend and budget found already.
    ///
    /// # Errors
    /// [`PipelineError::Budget`] where none of `found` fits.
    pub fn by(mut self, found: &Strategies, limit: Option<usize>) -> Result<Self, PipelineError> {
        let most = limit.unwrap_or(usize::MAX);
        let before = self
            .before
            .as_ref()
            .and_then(|tiling| found.choose_of(most, |s| resume::tiling(&s.grid) == *tiling));
        let chosen = before.or_else(|| match limit {
            None => found.choose_of(most, |s| s.grid == self.grid),
            Some(limit) => found.choose(limit),
        });
        // Without a limit there is one: a backend makes at least one offer.
        let chosen = chosen.ok_or_else(|| refusal(most, found.smallest()))?.clone();
        log::info!("{chosen}: {} at most", mib(chosen.peak()));
        let [unet, decoder] = &chosen.stages;
        self.unet_macs = unet.choice.offer.macs.max(1);
        self.decoder_macs = decoder.choice.offer.macs.max(1);
        self.grid = chosen.grid.clone();
        self.strategy = Some(chosen);
        Ok(self)
    }

    /// All ways to make this picture, priced; the limit of `budget` plays no part.
    ///
    /// # Errors
    /// [`PipelineError::Prepare`] where the backend cannot run the model at this size.
    pub fn strategies(
        &self,
        backend: &dyn Backend,
        budget: &Budget,
    ) -> Result<Strategies, PipelineError> {
        let mut grids = vec![self.grid.clone()];
        let mut add = |grid: Grid| {
            if !grids.contains(&grid) {
                grids.push(grid);
            }
        };
        if self.options.tile.is_none() && self.options.tiling != Tiling::Exact {
            let [h, w] = self.padded;
            let floor = 2 * self.multiple;
            for side in SIDES.into_iter().filter(|&s| s >= floor && s < h.max(w)) {
                // A side that an overlap which was asked for leaves nothing of is none.
                add_some(&mut add, self.tiles(side).ok());
            }
            // Models with large multiples have a smallest tile of their own.
            add_some(&mut add, self.tiles(floor.min(h.max(w))).ok());
            if self.options.tiling == Tiling::Auto {
                add_some(&mut add, Grid::whole(self.padded, self.multiple).ok());
            }
        }
        self.price(backend, budget, grids)
    }

    /// Prices every way to run each of `grids`.
    fn price(
        &self,
        backend: &dyn Backend,
        budget: &Budget,
        grids: Vec<Grid>,
    ) -> Result<Strategies, PipelineError> {
        let mut all = Vec::new();
        let mut failed = None;
        for grid in grids {
            match self.price_grid(backend, budget, grid) {
                Ok(more) => all.extend(more),
                // A damaged model is refused; a size that cannot be run leaves the others.
                Err(e @ PipelineError::Prepare { source: PrepareError::Model(_), .. }) => {
                    return Err(e);
                }
                Err(e) => failed = Some(e),
            }
        }
        match failed {
            Some(e) if all.is_empty() => Err(e),
            _ => Ok(Strategies { tiling: self.options.tiling, all }),
        }
    }

    /// Every way to run `grid` that no other one beats in both bytes and work.
    fn price_grid(
        &self,
        backend: &dyn Backend,
        budget: &Budget,
        grid: Grid,
    ) -> Result<Vec<Strategy>, PipelineError> {
        let [h, w] = grid.tile();
        let choices = |stage: Stage| -> Result<Vec<Choice>, PipelineError> {
            let offers = backend.offers(self.model, stage.role(), h, w);
            let offers = offers.map_err(|source| PipelineError::Prepare { stage, source })?;
            Ok(Choice::all(offers).collect())
        };
        let (unets, decoders) = (choices(Stage::Denoise)?, choices(Stage::Decode)?);
        let takes = |s: &Scratch| s.takes(self.latent_bytes());
        let places: &[bool] = if self.options.scratch.as_ref().is_some_and(takes) {
            &[false, true]
        } else {
            &[false]
        };
        let pairs = unets.iter().flat_map(|u| decoders.iter().map(move |d| (u, d)));
        let pairs = pairs.flat_map(|(u, d)| places.iter().map(move |&in_file| (u, d, in_file)));
        let mut found: Vec<Strategy> =
            pairs.map(|(u, d, in_file)| self.strategy_of(budget, &grid, [u, d], in_file)).collect();
        found.sort_by_key(|s| (s.peak(), s.work(), s.drops()));
        let mut best = (u64::MAX, usize::MAX);
        found.retain(|s| {
            let rank = (s.work(), s.drops());
            let better = rank < best;
            best = best.min(rank);
            better
        });
        Ok(found)
    }

    /// Bytes that either stage moves from and to a file with the latent: each tile's window once a step, and
    /// the first noise; each row, once to be moved on, and once for the noise of a step.
    fn file_bytes(&self, grid: &Grid) -> [u64; 2] {
        let [h, w] = grid.tile();
        let channels = self.latent.channels as usize;
        let tiles = (grid.tiles() + self.gathered(grid)) as u64;
        let windows = tiles.saturating_mul((h * w * channels * size_of::<f32>()) as u64);
        let passes = if self.schedule.eta > 0.0 { 4 } else { 2 };
        let latent = self.latent_bytes() as u64;
        let step = windows.saturating_add(latent.saturating_mul(passes));
        let steps = step.saturating_mul(self.schedule.steps.len() as u64);
        [steps.saturating_add(latent), windows]
    }

    /// `grid` run in these ways, the latent in memory or `in_file`.
    fn strategy_of(
        &self,
        budget: &Budget,
        grid: &Grid,
        [unet, decoder]: [&Choice; 2],
        in_file: bool,
    ) -> Strategy {
        let Caller { input, result, finish } = budget.caller;
        let base = budget.base;
        let [denoise, decode] = self.stage_bytes(grid);
        let latent = self.field_bytes(in_file);
        let file_bytes = if in_file { self.file_bytes(grid) } else { [0; 2] };
        let sum = |bytes: &[usize]| bytes.iter().fold(0, |sum: usize, &b| sum.saturating_add(b));
        let arenas = [unet, decoder].map(|c| c.offer.arena_bytes);
        let weights = [unet, decoder].map(Choice::weight_bytes);
        let staying = self.model.is_part_of_program();
        let records = self.record_bytes(grid);
        let record = |i: usize| if budget.mode == Mode::Resumed { records[i] } else { 0 };
        let parts = match budget.mode {
            Mode::Warm => {
                let all = Parts {
                    base,
                    picture: sum(&[input, result]),
                    pipeline: sum(&[latent, denoise, decode]),
                    arena: sum(&arenas),
                    weights: sum(&weights),
                };
                [all, all]
            }
            Mode::Once | Mode::Resumed => [
                Parts {
                    base,
                    picture: input,
                    pipeline: sum(&[latent, denoise, record(0)]),
                    arena: arenas[0],
                    weights: weights[0],
                },
                Parts {
                    base,
                    picture: sum(&[input, result]),
                    pipeline: sum(&[latent, decode, record(1)]),
                    arena: arenas[1],
                    weights: if staying { sum(&weights) } else { weights[1] },
                },
            ],
        };
        let tiles = (grid.tiles() + self.gathered(grid)) as u64;
        let stage = |stage, choice: &Choice, runs: u64, i: usize| {
            // Between the frames of a stream weights go as between the runs of one.
            let rereads = if budget.mode == Mode::Warm { runs } else { runs.saturating_sub(1) };
            let (parts, file_bytes) = (parts[i], file_bytes[i]);
            StagePlan { stage, choice: choice.clone(), runs, rereads, parts, file_bytes }
        };
        Strategy {
            grid: grid.clone(),
            stages: [
                stage(Stage::Denoise, unet, tiles * self.schedule.steps.len() as u64, 0),
                stage(Stage::Decode, decoder, tiles, 1),
            ],
            finish: Parts {
                base,
                picture: sum(&[input, result, finish]),
                weights: if staying { sum(&weights) } else { 0 },
                ..Parts::default()
            },
            so_far: budget.so_far,
            scratch_bytes: if in_file { self.latent_bytes() } else { 0 },
        }
    }
}

fn add_some(add: &mut impl FnMut(Grid), grid: Option<Grid>) {
    if let Some(grid) = grid {
        add(grid);
    }
}

fn refusal(limit: usize, smallest: Option<&Strategy>) -> PipelineError {
    PipelineError::Budget {
        limit,
        smallest: smallest.map_or(usize::MAX, Strategy::peak),
        strategy: smallest.map_or_else(String::new, ToString::to_string),
    }
}
