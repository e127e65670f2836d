//! How fast this machine runs a model's components: a short measurement, and what it says of a strategy.
//!
//! Each component is run on noise at sizes that grow until its share of the time is spent, so a slow machine
//! measures a small tile and a fast one a large tile. A choice is never made by it: [`super::budget`].

use super::budget::{StagePlan, Strategy};
use super::noise::Generator;
use super::plan::{PipelineError, Stage};
use crate::backend::Backend;
use crate::format::Model;
use std::time::{Duration, Instant};

/// Bytes of dropped weights that come back in a second, where the system still has them in its cache.
const REREAD_PER_SECOND: f64 = 2e9;
/// Bytes of a scratch file that are read or written in a second, where much of it is in the system's cache.
const FILE_PER_SECOND: f64 = 4e8;

/// Multiply-accumulates a second, by component.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// The U-Net's.
    pub unet: f64,
    /// The decoder's.
    pub decoder: f64,
}

impl Pace {
    /// Measures both components of `model` on `backend` for about `time` in all, at tiles up to those of
    /// `strategy` and with no more room than it has. On a slow machine it takes some times as long.
    ///
    /// # Errors
    /// [`PipelineError::Prepare`], [`PipelineError::Run`].
    pub fn measure(
        backend: &dyn Backend,
        model: &Model,
        strategy: &Strategy,
        time: Duration,
    ) -> Result<Self, PipelineError> {
        let most = strategy.grid.tile();
        let rate = |stage| measure_stage(backend, model, stage, most, time / 2);
        let [unet, decoder] = &strategy.stages;
        Ok(Self { unet: rate(unet)?, decoder: rate(decoder)? })
    }

    /// Seconds that a stage will take.
    #[must_use]
    pub fn stage_seconds(&self, stage: &StagePlan) -> f64 {
        let rate = match stage.stage {
            Stage::Denoise => self.unet,
            Stage::Decode => self.decoder,
        };
        let reread = stage.choice.reread_bytes(stage.rereads) as f64;
        let file = stage.file_bytes as f64;
        stage.macs() as f64 / rate + reread / REREAD_PER_SECOND + file / FILE_PER_SECOND
    }

    /// Seconds that a run will take.
    #[must_use]
    pub fn seconds(&self, strategy: &Strategy) -> f64 {
        strategy.stages.iter().map(|s| self.stage_seconds(s)).sum()
    }
}

/// The best rate at the largest size that the time allows.
fn measure_stage(
    backend: &dyn Backend,
    model: &Model,
    plan: &StagePlan,
    most: [usize; 2],
    time: Duration,
) -> Result<f64, PipelineError> {
    let stage = plan.stage;
    let multiple = model.component(stage.role())?.multiple as usize;
    let begin = Instant::now();
    let mut side = multiple;
    loop {
        let size = most.map(|m| m.min(side).next_multiple_of(multiple));
        let prepare = |source| PipelineError::Prepare { stage, source };
        let mut session = backend
            .prepare(model, stage.role(), size[0], size[1], plan.choice.room())
            .map_err(prepare)?;
        let mut noise = Generator::new(0);
        // Invariant: a session's ports can be counted.
        let elements = |s: crate::tensor::Shape| s.elements().unwrap_or(0);
        let inputs: Vec<Vec<f32>> = session
            .inputs()
            .iter()
            .map(|p| {
                let mut v = vec![0.0; elements(p.shape)];
                noise.randn(v.len(), |i, x| v[i] = x);
                v
            })
            .collect();
        let mut outputs: Vec<Vec<f32>> =
            session.outputs().iter().map(|p| vec![0.0; elements(p.shape)]).collect();
        let inputs: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
        let mut outputs: Vec<&mut [f32]> = outputs.iter_mut().map(Vec::as_mut_slice).collect();
        let mut run = || {
            let start = Instant::now();
            session
                .run(&inputs, &mut outputs)
                .map_err(|source| PipelineError::Run { stage, source })
                .map(|()| start.elapsed())
        };
        // The first run touches the arena and the weights.
        run()?;
        let mut best = run()?;
        // A tile of twice the side takes four times as long. Small ones say little: their steps are shorter
        // than what threads need to meet.
        let largest = side >= most[0].max(most[1]);
        if !largest && begin.elapsed() <= time / 2 && 4 * best <= time {
            side *= 2;
            continue;
        }
        while begin.elapsed() + best <= time {
            best = best.min(run()?);
        }
        let macs = session.stats().macs.max(1);
        return Ok(macs as f64 / best.as_secs_f64().max(1e-9));
    }
}
