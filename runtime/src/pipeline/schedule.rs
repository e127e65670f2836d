//! DDIM (Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 12 and 16) with every coefficient of
//! every step computed before the run.
//!
//! Lives here: the noise schedule ᾱ, the choice of a few timesteps among the many, and the update of a
//! latent. The cumulative product is taken in f64 and kept in f32, as both LDM's and diffusers' tables are;
//! coefficients are computed from it in f64, kept in f32, and applied in f32 without fused operations, so
//! a run gives the same bits everywhere.

use crate::format::{BetaSchedule, Prediction, SchedulerSpec, Spacing};

/// Why no schedule can be made.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ScheduleError {
    /// No step at all.
    #[error("0 steps asked for; use at least 1")]
    NoSteps,
    /// More steps than timesteps.
    #[error(
        "{steps} steps asked for, the model was trained on {train} timesteps; use at most {train}"
    )]
    TooManySteps {
        /// Steps asked for.
        steps: u32,
        /// Timesteps of training.
        train: u32,
    },
    /// Eta out of range.
    #[error("eta {eta} is not between 0 (deterministic) and 1 (ancestral)")]
    Eta {
        /// The value given.
        eta: f32,
    },
    /// The model's offset leaves no timestep.
    #[error(
        "with this spacing no timestep below {train} is left (the model's offset is {offset}); choose another spacing, or export the model again"
    )]
    NoTimesteps {
        /// Timesteps of training.
        train: u32,
        /// The model's `steps_offset`.
        offset: u32,
    },
    /// The model's numbers lead nowhere.
    #[error(
        "the model's noise schedule cannot be sampled: at timestep {timestep} {why}; choose another spacing, or export the model again"
    )]
    Degenerate {
        /// The timestep.
        timestep: u32,
        /// What is wrong there.
        why: &'static str,
    },
}

/// One DDIM step: from the latent at `timestep` to the one at the step after.
///
/// With `x` the latent and `m` the model's output, both clean latent and noise are linear in them:
/// `x₀ = x0[0]·x + x0[1]·m`, `ε = eps[0]·x + eps[1]·m`; then `x ← to_x0 · clip(x₀) + to_eps · ε + sigma · n`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// What the U-Net is told.
    pub timestep: u32,
    /// ᾱ at `timestep`.
    pub alpha: f32,
    /// ᾱ after the step.
    pub alpha_prev: f32,
    /// Standard deviation of the noise added (eq. 16).
    pub sigma: f32,
    /// Coefficients of the predicted clean latent.
    pub x0: [f32; 2],
    /// Coefficients of the predicted noise.
    pub eps: [f32; 2],
    /// `√ᾱ_prev`.
    pub to_x0: f32,
    /// `√(1 − ᾱ_prev − σ²)`.
    pub to_eps: f32,
    /// The clean latent is clipped to ± this.
    pub clip: Option<f32>,
}

impl Step {
    /// Moves `latent` one step, without the noise of [`Step::sigma`]; `output` is the U-Net's.
    pub fn update(&self, latent: &mut [f32], output: &[f32]) {
        debug_assert_eq!(latent.len(), output.len());
        for (x, &m) in latent.iter_mut().zip(output) {
            let mut x0 = self.x0[0] * *x + self.x0[1] * m;
            let eps = self.eps[0] * *x + self.eps[1] * m;
            if let Some(limit) = self.clip {
                x0 = x0.clamp(-limit, limit);
            }
            *x = self.to_x0 * x0 + self.to_eps * eps;
        }
    }
}

/// All steps of a run, noisiest first.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// The steps. There may be one more than asked for (see [`Spacing::Compvis`]).
    pub steps: Vec<Step>,
    /// How they were chosen.
    pub spacing: Spacing,
    /// The eta they were made with.
    pub eta: f32,
}

impl Schedule {
    /// The schedule of a run of `steps` steps; `spacing` is the model's own unless given.
    ///
    /// Timesteps and the ᾱ after each step are those of LDM's `make_ddim_timesteps` under
    /// [`Spacing::Compvis`] (the ᾱ after the last step is that of timestep 0), and of diffusers'
    /// `DDIMScheduler` otherwise: there the step after `t` is taken to be `t − T // steps`, also where the
    /// next timestep is another. Where those two name a timestep that does not exist (`T`, by an offset, or
    /// `−1`, by rounding) and fail, it is left out here.
    ///
    /// # Errors
    /// [`ScheduleError`].
    pub fn new(
        spec: &SchedulerSpec,
        steps: u32,
        eta: f32,
        spacing: Option<Spacing>,
    ) -> Result<Self, ScheduleError> {
        let train = spec.train_timesteps;
        let spacing = spacing.unwrap_or(spec.spacing);
        if steps == 0 {
            return Err(ScheduleError::NoSteps);
        }
        if steps > train {
            return Err(ScheduleError::TooManySteps { steps, train });
        }
        if !(0.0..=1.0).contains(&eta) {
            return Err(ScheduleError::Eta { eta });
        }
        let alphas = alphas_cumprod(spec);
        let chosen = timesteps(spec, steps, spacing);
        if chosen.is_empty() {
            return Err(ScheduleError::NoTimesteps { train, offset: spec.steps_offset });
        }
        let jump = i64::from(train / steps);
        let list = chosen
            .iter()
            .enumerate()
            .map(|(i, &t)| {
                let alpha_prev = if spacing == Spacing::Compvis {
                    alphas[chosen.get(i + 1).map_or(0, |&p| p as usize)]
                } else {
                    match usize::try_from(i64::from(t) - jump) {
                        Ok(previous) => alphas[previous],
                        Err(_) if spec.set_alpha_to_one => 1.0,
                        Err(_) => alphas[0],
                    }
                };
                step(spec, t, alphas[t as usize], alpha_prev, eta)
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { steps: list, spacing, eta })
    }

    /// The timesteps, noisiest first.
    #[must_use]
    pub fn timesteps(&self) -> Vec<u32> {
        self.steps.iter().map(|s| s.timestep).collect()
    }
}

/// The coefficients of one step (eq. 12, 16; Salimans & Ho 2022, appendix D, for v).
fn step(
    spec: &SchedulerSpec,
    timestep: u32,
    alpha: f32,
    alpha_prev: f32,
    eta: f32,
) -> Result<Step, ScheduleError> {
    let bad = |why| Err(ScheduleError::Degenerate { timestep, why });
    if !(0.0..1.0).contains(&alpha) || !(0.0..=1.0).contains(&alpha_prev) || alpha_prev < alpha {
        return bad("the share of signal is not below 1 and falling");
    }
    if alpha == 0.0 && spec.prediction == Prediction::Epsilon {
        return bad("there is no signal, and noise prediction says nothing about the picture");
    }
    let (a, p) = (f64::from(alpha), f64::from(alpha_prev));
    let (signal, noise) = (a.sqrt(), (1.0 - a).sqrt());
    let (x0, eps) = match spec.prediction {
        Prediction::Epsilon => ([1.0 / signal, -noise / signal], [0.0, 1.0]),
        Prediction::Sample => ([0.0, 1.0], [1.0 / noise, -signal / noise]),
        Prediction::V => ([signal, -noise], [noise, signal]),
    };
    // A step that adds all the noise back (ᾱ_prev = ᾱ = 0) has 0/0 here and no variance.
    let ratio = if p == 0.0 { 1.0 } else { a / p };
    let variance = ((1.0 - p) / (1.0 - a) * (1.0 - ratio)).max(0.0);
    let sigma = f64::from(eta) * variance.sqrt();
    let to_eps = (1.0 - p - sigma * sigma).max(0.0).sqrt();
    let step = Step {
        timestep,
        alpha,
        alpha_prev,
        sigma: sigma as f32,
        x0: x0.map(|v| v as f32),
        eps: eps.map(|v| v as f32),
        to_x0: p.sqrt() as f32,
        to_eps: to_eps as f32,
        clip: spec.clip_sample,
    };
    let numbers = [step.sigma, step.x0[0], step.x0[1], step.eps[0], step.eps[1]];
    if numbers.iter().all(|v| v.is_finite()) {
        Ok(step)
    } else {
        bad("its coefficients are not finite")
    }
}

/// `num` numbers from `start` to `end` as torch has them in f32: each half counted from its own end, with one
/// rounding an element (the product is exact in f64).
fn linspace(start: f64, end: f64, num: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = f64::from((end - start) / (num.max(2) - 1) as f32);
    let (start, end) = (f64::from(start), f64::from(end));
    (0..num)
        .map(|i| {
            if i < num / 2 || num == 1 {
                (start + step * i as f64) as f32
            } else {
                (end - step * (num - 1 - i) as f64) as f32
            }
        })
        .collect()
}

/// ᾱ of every training timestep, `∏ (1 − β)` up to it.
#[must_use]
pub fn alphas_cumprod(spec: &SchedulerSpec) -> Vec<f32> {
    let num = spec.train_timesteps as usize;
    let betas = match spec.betas {
        BetaSchedule::Linear { start, end } => linspace(start, end, num),
        BetaSchedule::ScaledLinear { start, end } => {
            linspace(start.sqrt(), end.sqrt(), num).into_iter().map(|root| root * root).collect()
        }
    };
    let mut product = 1f64;
    let alphas: Vec<f32> = betas
        .iter()
        .map(|&beta| {
            product *= f64::from(1.0 - beta);
            product as f32
        })
        .collect();
    if !spec.zero_terminal_snr {
        return alphas;
    }
    // Lin et al. 2023, algorithm 1: √ᾱ is shifted to end at 0 and scaled to begin where it did. Done in f64:
    // torch's f32 square roots depend on the machine, so its table cannot be met bit by bit.
    let root = |i: usize| f64::from(alphas[i]).sqrt();
    let (first, last) = (root(0), root(num - 1));
    let scale = first / (first - last);
    (0..num).map(|i| ((root(i) - last) * scale).powi(2) as f32).collect()
}

/// The timesteps of a run, noisiest first, each below `T`.
fn timesteps(spec: &SchedulerSpec, steps: u32, spacing: Spacing) -> Vec<u32> {
    let (train, total) = (spec.train_timesteps, f64::from(spec.train_timesteps));
    let jump = train / steps;
    let mut chosen: Vec<i64> = match spacing {
        Spacing::Compvis => (0..train).step_by(jump as usize).map(|t| i64::from(t) + 1).collect(),
        Spacing::Leading => (0..steps)
            .map(|i| i64::from(i) * i64::from(jump) + i64::from(spec.steps_offset))
            .collect(),
        Spacing::Trailing => {
            let ratio = total / f64::from(steps);
            // NumPy's `arange` steps by the difference of its first two elements.
            let delta = (total - ratio) - total;
            let count = (total / ratio).ceil() as i64;
            (0..count)
                .rev()
                .map(|i| (total + i as f64 * delta).round_ties_even() as i64 - 1)
                .collect()
        }
        Spacing::Linspace => {
            let ratio = (total - 1.0) / f64::from(steps.max(2) - 1);
            (0..steps)
                .map(|i| {
                    if i + 1 == steps && steps > 1 {
                        i64::from(train) - 1
                    } else {
                        (f64::from(i) * ratio).round_ties_even() as i64
                    }
                })
                .collect()
        }
    };
    chosen.retain(|t| (0..i64::from(train)).contains(t));
    chosen.into_iter().rev().map(|t| t as u32).collect()
}
