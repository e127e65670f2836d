//! The float model's own trajectory, recorded: what its networks were run on, picture by picture.
//!
//! Lives here: the recording, and the run of the pipeline under it. Never here: what is made of a recording.

use crate::CalibrationError;
use crate::pictures::{PictureSet, Sample};
use crate::run::Options;
use crate::watch::{Place, Watch, Watched};
use latile_cpu::session::{CpuBackend, CpuSession};
use latile_runtime::backend::{Backend, RunError, Session};
use latile_runtime::format::{Model, Role};
use latile_runtime::pipeline::{
    Options as RunOptions, Picture, PipelineError, Pixels, Plan, Stage,
};
use std::cell::RefCell;
use std::ops::ControlFlow;
use std::rc::Rc;

/// Told the picture and the stage before each run of a network, with multiply-accumulates done and in all.
pub type OnRun<'p> = dyn FnMut(&str, &'static str, u64, u64) -> ControlFlow<()> + 'p;

/// One run of a network.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    /// The network.
    pub role: Role,
    /// Rows and columns that its session was prepared for.
    pub size: [usize; 2],
    /// The timestep of a step of sampling.
    pub timestep: Option<u32>,
    /// What it read, in the order of its inputs.
    pub inputs: Vec<Vec<f32>>,
}

/// Runs `float` on the first picture of `set` over its whole trajectory and gives what its networks were run on,
/// in order.
///
/// # Errors
/// [`CalibrationError`].
pub fn record(
    float: &Model,
    backend: &CpuBackend,
    set: &PictureSet,
    options: &Options,
    progress: &mut OnRun<'_>,
) -> Result<Vec<Recorded>, CalibrationError> {
    let Some(sample) = set.samples.first() else {
        return Err(CalibrationError::Option("there is no picture to run the model on".to_owned()));
    };
    let mut meter = Meter { progress, done: 0, total: macs(float, options)? };
    Ok(recorded(float, backend, set, (0, sample), options, &mut meter)?.1)
}

/// Multiply-accumulates of one picture.
pub(crate) fn macs(model: &Model, options: &Options) -> Result<u64, CalibrationError> {
    let run_options = run_options(options, 0);
    let plan = Plan::new(model, options.size, options.size, &run_options);
    Ok(plan.map_err(CalibrationError::Plan)?.macs())
}

/// What a picture's run came to, in an error.
pub(crate) fn failed(picture: &str, source: PipelineError) -> CalibrationError {
    match source {
        PipelineError::Cancelled => CalibrationError::Cancelled,
        source => CalibrationError::Pipeline { picture: picture.to_owned(), source },
    }
}

/// Runs `model` on picture `i` of `set`: its pixels, and what its networks were run on.
pub(crate) fn recorded(
    model: &Model,
    backend: &CpuBackend,
    set: &PictureSet,
    (i, sample): (usize, &Sample),
    options: &Options,
    meter: &mut Meter<'_, '_>,
) -> Result<(Vec<u8>, Vec<Recorded>), CalibrationError> {
    let recorder = Rc::new(RefCell::new(Recorder::default()));
    let watched = Watched { cpu: backend, watch: Rc::clone(&recorder) };
    let (pixels, timesteps) = upscale(model, &watched, set, (i, sample), options, meter)?;
    let mut runs = recorder.take().runs;
    let steps = runs.iter_mut().filter(|r| r.role == Role::Unet);
    steps.zip(timesteps).for_each(|(run, t)| run.timestep = Some(t));
    Ok((pixels, runs))
}

/// Runs `model` on picture `i` of `set`: its pixels, and the timesteps it took.
pub(crate) fn upscale(
    model: &Model,
    backend: &dyn Backend,
    set: &PictureSet,
    (i, sample): (usize, &Sample),
    options: &Options,
    meter: &mut Meter<'_, '_>,
) -> Result<(Vec<u8>, Vec<u32>), CalibrationError> {
    let name = sample.datum.name.as_str();
    let factor = set.side / options.size.max(1);
    let memory = PipelineError::OutOfMemory { bytes: set.side * set.side * 16, what: "a picture" };
    let low = sample.low(set.side, factor).ok_or_else(|| failed(name, memory))?;
    let run_options = run_options(options, i);
    let mut run = || {
        let plan = Plan::new(model, options.size, options.size, &run_options)?;
        let picture =
            Picture { width: options.size, height: options.size, pixels: Pixels::Rgb8(&low) };
        let mut pixels = Vec::new();
        let start = meter.done;
        let report = plan.run(
            backend,
            picture,
            &mut |p| {
                meter.done = start + p.done;
                meter.ask(name, if p.stage == Stage::Denoise { "denoise" } else { "decode" })
            },
            &mut |_, row| {
                let byte =
                    |v: &f32| ((v.clamp(-1.0, 1.0) / 2.0 + 0.5) * 255.0).round_ties_even() as u8;
                pixels.extend(row.iter().map(byte));
            },
        )?;
        Ok((pixels, report.timesteps))
    };
    run().map_err(|source| failed(name, source))
}

fn run_options(options: &Options, picture: usize) -> RunOptions {
    RunOptions {
        steps: Some(options.steps),
        eta: options.eta,
        seed: options.seed.wrapping_add(picture as u64),
        ..RunOptions::default()
    }
}

pub(crate) struct Meter<'p, 'f> {
    pub(crate) progress: &'p mut OnRun<'f>,
    pub(crate) done: u64,
    pub(crate) total: u64,
}

impl Meter<'_, '_> {
    pub(crate) fn ask(&mut self, picture: &str, stage: &'static str) -> ControlFlow<()> {
        (self.progress)(picture, stage, self.done.min(self.total), self.total)
    }
}

/// What the networks were run on.
#[derive(Debug, Default)]
struct Recorder {
    runs: Vec<Recorded>,
}

impl Watch for Recorder {
    fn run(
        &mut self,
        session: &mut CpuSession<'_>,
        Place { role, size }: Place,
        inputs: &[&[f32]],
        outputs: &mut [&mut [f32]],
    ) -> Result<(), RunError> {
        let inputs_kept = inputs.iter().map(|i| i.to_vec()).collect();
        self.runs.push(Recorded { role, size, timestep: None, inputs: inputs_kept });
        session.run(inputs, outputs)
    }
}
