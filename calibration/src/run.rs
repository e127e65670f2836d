//! The run: pictures through the float model, over its whole sampling trajectory, twice.
//!
//! Lives here: what may be chosen ([`Options`]), the groups of timesteps, and [`calibrate`]. The sampling is
//! the pipeline's own, noise, schedule, decoder and all; a backend that looks on stands in for the CPU's.
//! Never here: statistics.

use crate::CalibrationError;
use crate::collect::Collector;
use crate::pictures::{Decode, PictureSet};
use crate::table::{ModelId, Sampling, Table, VERSION};
use crate::watch::{self, Watched};
use latile_cpu::session::CpuBackend;
use latile_runtime::backend::{Backend, Room};
use latile_runtime::format::{LatentSpec, Model, Precision, Role, Task};
use latile_runtime::graph::{MAX_GROUPS, ValueKind};
use latile_runtime::pipeline::{
    Options as RunOptions, Picture, PipelineError, Pixels, Plan, Stage,
};
use std::cell::RefCell;
use std::ops::ControlFlow;
use std::path::Path;
use std::rc::Rc;

/// Channels of a picture.
const RGB: usize = 3;
/// Smallest and largest latent side; beyond it the pipeline would cut the picture into tiles.
const SIZES: std::ops::RangeInclusive<usize> = 8..=128;

/// What a caller may choose.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// DDIM steps.
    pub steps: u32,
    /// DDIM's eta; the model's own where absent.
    pub eta: Option<f32>,
    /// Pictures, at most.
    pub count: usize,
    /// Groups of timesteps with ranges of their own, at most: equal parts of the training's timesteps, of
    /// which those that no step falls into are joined to the part before.
    pub groups: usize,
    /// Side of the latent, which is that of the low-resolution picture.
    pub size: usize,
    /// Seed of the first picture's noise; each following picture's is one more.
    pub seed: u64,
    /// The percentage of values that the range by percentile holds.
    pub percentile: f32,
}

impl Default for Options {
    fn default() -> Self {
        Self { steps: 8, eta: None, count: 8, groups: 4, size: 64, seed: 0, percentile: 99.99 }
    }
}

impl Options {
    fn check(&self) -> Result<(), CalibrationError> {
        let wrong = |why: String| Err(CalibrationError::Option(why));
        if self.count == 0 {
            return wrong("0 pictures asked for; use at least 1".to_owned());
        }
        if !(1..=MAX_GROUPS).contains(&self.groups) {
            return wrong(format!("{} timestep groups; it can be 1 to {MAX_GROUPS}", self.groups));
        }
        if !SIZES.contains(&self.size) {
            return wrong(format!(
                "size {}; the side of the latent can be {} to {}",
                self.size,
                SIZES.start(),
                SIZES.end()
            ));
        }
        if !(50.0..=100.0).contains(&self.percentile) {
            return wrong(format!("percentile {}; it can be 50 to 100", self.percentile));
        }
        Ok(())
    }

    fn run_options(&self, picture: usize) -> RunOptions {
        RunOptions {
            steps: Some(self.steps),
            eta: self.eta,
            seed: self.seed.wrapping_add(picture as u64),
            // It changes pixels after the last network.
            consistency: Some(0.0),
            ..RunOptions::default()
        }
    }
}

/// How far a calibration is. Called before each run of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// 1, then 2.
    pub pass: usize,
    /// The picture under way.
    pub picture: &'a str,
    /// What is done with it.
    pub stage: &'static str,
    /// Multiply-accumulates done.
    pub done: u64,
    /// Multiply-accumulates in all, at least 1.
    pub total: u64,
}

/// The progress callback; it stops the calibration by [`ControlFlow::Break`].
pub type OnProgress<'a> = dyn FnMut(&Progress<'_>) -> ControlFlow<()> + 'a;

/// Reads the pictures of `folder` that [`calibrate`] needs for `model`, once it is known to suit.
///
/// # Errors
/// [`CalibrationError`]: what [`calibrate`] would refuse before its first run, and [`PictureSet::read`]'s.
pub fn read_pictures(
    model: &Model,
    folder: &Path,
    options: &Options,
    decode: &mut Decode<'_>,
) -> Result<PictureSet, CalibrationError> {
    let side = side(model, options)?;
    planned(model, options, &options.run_options(0))?;
    PictureSet::read(folder, options.count, side, decode)
}

/// Runs `model`, an f32 or f16 one, on `set` and makes a table of what its layers read.
///
/// Every picture is reduced to the latent's grid and upscaled again by the pipeline, with the model's own
/// schedule, eta and noise: the U-Net's inputs are those of the whole trajectory. Then the decoder is run on
/// the result, and the encoder, where there is one, on the picture itself. All of it is done twice: first
/// for extremes and moments, then, when an equaliser's candidates and all bounds are known, for histograms.
/// The table is the same for any number of threads and any instruction set.
///
/// # Errors
/// [`CalibrationError`].
pub fn calibrate(
    model: &Model,
    backend: &CpuBackend,
    set: &PictureSet,
    options: &Options,
    progress: &mut OnProgress<'_>,
) -> Result<Table, CalibrationError> {
    let side = side(model, options)?;
    let run_options = options.run_options(0);
    let plan = planned(model, options, &run_options)?;
    if set.side != side || set.samples.is_empty() {
        return Err(CalibrationError::Option(format!(
            "{} pictures of {given}x{given} were given, the model needs some of {side}x{side}",
            set.samples.len(),
            given = set.side
        )));
    }
    let timesteps = plan.schedule().timesteps();
    let sampling = Sampling {
        timesteps: timesteps.clone(),
        spacing: Some(plan.schedule().spacing),
        eta: plan.schedule().eta,
        seed: options.seed,
        size: options.size as u32,
        percentile: options.percentile,
    };
    // Invariant: the plan has checked that there is a scheduler.
    let train = model.manifest().scheduler.map_or(1, |s| s.train_timesteps);
    let bounds = timestep_groups(train, &timesteps, options.groups);
    let collector = Rc::new(RefCell::new(Collector::new(model, &bounds)?));
    let encoder = Encoder::of(model, side)?;
    let each = plan.macs() + encoder.as_ref().map_or(0, |e| e.macs);
    let mut meter = Meter {
        progress,
        done: 0,
        total: each.saturating_mul(2 * set.samples.len() as u64).max(1),
        pass: 1,
    };
    let watched = Watched { cpu: backend, watch: Rc::clone(&collector) };
    for pass in [1, 2] {
        meter.pass = pass;
        for (i, sample) in set.samples.iter().enumerate() {
            let name = &sample.datum.name;
            let low =
                sample.low(side, factor(model)?).ok_or_else(|| CalibrationError::Pipeline {
                    picture: name.clone(),
                    source: PipelineError::OutOfMemory {
                        bytes: side * side * 16,
                        what: "a picture",
                    },
                })?;
            let run_options = options.run_options(i);
            let plan = planned(model, options, &run_options)?;
            let picture =
                Picture { width: options.size, height: options.size, pixels: Pixels::Rgb8(&low) };
            let start = meter.done;
            let outcome = plan.run(
                &watched,
                picture,
                &mut |p| {
                    let step = timesteps.get(p.step).filter(|_| p.stage == Stage::Denoise);
                    collector.borrow_mut().at(name, step.copied());
                    meter.done = start + p.done;
                    let stage = if step.is_some() { "denoise" } else { "decode" };
                    meter.ask(name, stage)
                },
                &mut |_, _| {},
            );
            settle(&collector, name, outcome)?;
            if let Some(encoder) = &encoder {
                collector.borrow_mut().at(name, None);
                if meter.ask(name, "encode").is_break() {
                    return Err(CalibrationError::Cancelled);
                }
                let outcome = encoder.run(&watched, model, &sample.unit(side, encoder.side));
                settle(&collector, name, outcome)?;
                meter.done = start + each;
            }
        }
        if pass == 1 {
            collector.borrow_mut().turn(model)?;
        }
    }
    drop(watched);
    // Invariant: every session, and their backend, are gone.
    let collector = Rc::try_unwrap(collector).expect("nobody looks on any more").into_inner();
    let (name, source_hash) = {
        let m = &model.manifest().metadata;
        (m.name.clone(), m.source_hash.clone())
    };
    Ok(Table {
        version: VERSION,
        model: ModelId { name, source_hash },
        data: set.samples.iter().map(|s| s.datum.clone()).collect(),
        skipped: set.skipped.clone(),
        sampling,
        components: collector.finish(model, options.percentile)?,
    })
}

/// What a run came to: a layer that read nonsense is named rather than what that led to.
fn settle<T>(
    collector: &RefCell<Collector>,
    picture: &str,
    outcome: Result<T, PipelineError>,
) -> Result<T, CalibrationError> {
    if let Some(failure) = collector.borrow_mut().take_failure() {
        return Err(failure);
    }
    outcome.map_err(|source| match source {
        PipelineError::Cancelled => CalibrationError::Cancelled,
        source => CalibrationError::Pipeline { picture: picture.to_owned(), source },
    })
}

/// The pipeline's plan for one picture.
fn planned<'a>(
    model: &'a Model,
    options: &Options,
    run: &'a RunOptions,
) -> Result<Plan<'a>, CalibrationError> {
    Plan::new(model, options.size, options.size, run).map_err(CalibrationError::Plan)
}

struct Meter<'p, 'f> {
    progress: &'p mut OnProgress<'f>,
    done: u64,
    total: u64,
    pass: usize,
}

impl Meter<'_, '_> {
    fn ask(&mut self, picture: &str, stage: &'static str) -> ControlFlow<()> {
        let (pass, done, total) = (self.pass, self.done, self.total);
        (self.progress)(&Progress { pass, picture, stage, done, total })
    }
}

/// The encoder, where the model has one.
struct Encoder {
    side: usize,
    macs: u64,
}

impl Encoder {
    fn of(model: &Model, side: usize) -> Result<Option<Self>, CalibrationError> {
        let Ok(spec) = model.component(Role::Encoder) else { return Ok(None) };
        let side = side - side % spec.multiple as usize;
        let unsuited =
            |why: String| CalibrationError::Unsuited { model: model.name().to_owned(), why };
        let inputs: Vec<_> = spec.graph.inputs.iter().map(|p| spec.graph.kind(p.value)).collect();
        if inputs != [ValueKind::Map(RGB as u32)] {
            return Err(unsuited(format!("its encoder takes {inputs:?}, not a picture")));
        }
        let shapes =
            spec.graph.infer(&[(side, side)]).map_err(|e| unsuited(format!("encoder: {e}")))?;
        Ok(Some(Self { side, macs: spec.graph.macs(&shapes) }))
    }

    fn run(
        &self,
        backend: &dyn Backend,
        model: &Model,
        picture: &[f32],
    ) -> Result<(), PipelineError> {
        let stage = Stage::Decode;
        let mut session = backend
            .prepare(model, Role::Encoder, self.side, self.side, Room::default())
            .map_err(|source| PipelineError::Prepare { stage, source })?;
        watch::outputs(&mut *session, |s, outputs| s.run(&[picture], outputs))
            .map_err(|source| PipelineError::Run { stage, source })?;
        Ok(())
    }
}

/// Checks that calibrating `model` makes sense and gives the side of the pictures to cut.
fn side(model: &Model, options: &Options) -> Result<usize, CalibrationError> {
    options.check()?;
    let unsuited = |why: &str| CalibrationError::Unsuited {
        model: model.name().to_owned(),
        why: why.to_owned(),
    };
    let manifest = model.manifest();
    if !matches!(manifest.precision, Precision::F32 | Precision::F16) {
        return Err(unsuited(
            "it is an int8 model already; calibrate the f32 or f16 model that it was made of",
        ));
    }
    if manifest.task != Task::SuperResolution {
        return Err(unsuited(
            "it is a set of components whose inputs no picture gives, and ranges are never made of random ones; only super-resolution models can be calibrated",
        ));
    }
    if manifest.metadata.source_hash.is_empty() {
        return Err(unsuited(
            "it does not say which weights it was made of, so a table could not name them; export it again",
        ));
    }
    Ok(options.size * factor(model)?)
}

fn factor(model: &Model) -> Result<usize, CalibrationError> {
    match model.manifest().latent {
        Some(LatentSpec { factor, .. }) => Ok(factor as usize),
        None => Err(CalibrationError::Unsuited {
            model: model.name().to_owned(),
            why: "it does not describe its latent space".to_owned(),
        }),
    }
}

/// Bounds of at most `groups` equal parts of `0..train`. A part that none of `timesteps` falls into has
/// nothing to make ranges of: it goes to the part before it, or, where there is none, to the one after.
#[must_use]
pub fn timestep_groups(train: u32, timesteps: &[u32], groups: usize) -> Vec<u32> {
    let train = train.max(1);
    let mut bounds: Vec<u32> = Vec::new();
    let mut below = 0;
    for i in 1..=groups.max(1) as u64 {
        let bound = (u64::from(train) * i / groups.max(1) as u64) as u32;
        let seen = timesteps.iter().any(|t| (below..bound).contains(t));
        match bounds.last_mut() {
            Some(last) if !seen => *last = bound,
            _ if seen => bounds.push(bound),
            _ => {}
        }
        below = bound;
    }
    if bounds.is_empty() {
        bounds.push(train);
    }
    bounds
}

#[cfg(test)]
mod tests;
