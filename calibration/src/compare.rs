//! What int8 costs, measured: the float and the int8 model on the same inputs.
//!
//! Lives here: the signal-to-noise ratio of what each layer of the int8 model reads when its network is run on
//! the float model's trajectory, errors of all layers before it included; and one picture made by either
//! model. Never here: estimates, reports.

use crate::CalibrationError;
use crate::pictures::PictureSet;
use crate::run::Options;
use crate::table::EXACT_DB;
use crate::trajectory::{self, Meter, OnRun, Recorded, failed};
use crate::watch;
use latile_cpu::session::{CpuBackend, CpuSession};
use latile_runtime::backend::{RunError, Session};
use latile_runtime::format::{Model, Role};
use latile_runtime::pipeline::{PipelineError, Stage};
use serde::Serialize;
use std::collections::HashMap;

/// Pictures that are compared, at most.
const PICTURES: usize = 2;
/// Rows of a map that are compared, about: all of them would not fit in memory.
const ROWS: usize = 4;

/// How an int8 model differs from the float model that it was made of.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Pictures run.
    pub pictures: usize,
    /// What each layer reads, in execution order.
    pub layers: Vec<Measured>,
    /// What each network makes; `layer` is the output's name.
    pub results: Vec<Measured>,
    /// The first picture.
    pub example: Example,
}

/// Signal-to-noise ratios of one map.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// `unet`, `decoder`.
    pub component: String,
    /// The layer.
    pub layer: String,
    /// In dB, by group of timesteps; none where no step fell into a group.
    pub sqnr_db: Vec<Option<f32>>,
}

/// One picture, made by both models.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Example {
    /// The picture's name.
    pub name: String,
    /// Columns of the results.
    pub width: usize,
    /// Rows of the results.
    pub height: usize,
    /// Peak signal-to-noise ratio of the int8 result against the float one, over 8-bit samples.
    pub psnr_db: f32,
    /// Pixels of the float model's result.
    #[serde(skip)]
    pub float: Vec<u8>,
    /// Pixels of the int8 model's result.
    #[serde(skip)]
    pub int8: Vec<u8>,
}

/// Runs both models on pictures of `set`; `int8` must be made of the same weights as `float`. `progress` is
/// told the picture and the stage before each run of a network, with multiply-accumulates done and in all.
///
/// # Errors
/// [`CalibrationError`].
pub fn compare(
    float: &Model,
    int8: &Model,
    backend: &CpuBackend,
    set: &PictureSet,
    options: &Options,
    progress: &mut OnRun<'_>,
) -> Result<Comparison, CalibrationError> {
    let unsuited = |why: &str| CalibrationError::Unsuited {
        model: int8.name().to_owned(),
        why: why.to_owned(),
    };
    if float.manifest().metadata.source_hash != int8.manifest().metadata.source_hash {
        return Err(unsuited("it is not made of the float model's weights"));
    }
    let samples = &set.samples[..set.samples.len().min(PICTURES)];
    if samples.is_empty() {
        return Err(unsuited("there is no picture to compare it on"));
    }
    // The float model twice and the int8 model once a picture, and once more for the example.
    let total = trajectory::macs(float, options)? * (3 * samples.len() as u64 + 1);
    let mut meter = Meter { progress, done: 0, total };
    let mut errors = Errors::default();
    let mut example = None;
    for (i, sample) in samples.iter().enumerate() {
        let name = sample.datum.name.as_str();
        let (before, runs) =
            trajectory::recorded(float, backend, set, (i, sample), options, &mut meter)?;
        if example.is_none() {
            let (after, _) =
                trajectory::upscale(int8, backend, set, (i, sample), options, &mut meter)?;
            example = Some(Example {
                name: name.to_owned(),
                width: set.side,
                height: set.side,
                psnr_db: psnr(&before, &after),
                float: before,
                int8: after,
            });
        }
        for role in [Role::Unet, Role::Decoder] {
            let runs: Vec<&Recorded> = runs.iter().filter(|r| r.role == role).collect();
            let Some(first) = runs.first() else { continue };
            let prepare = |model| {
                let [h, w] = first.size;
                backend.session(model, role, h, w)
            };
            let stage = if role == Role::Unet { Stage::Denoise } else { Stage::Decode };
            let prepared = |source| failed(name, PipelineError::Prepare { stage, source });
            let mut pair = (prepare(float).map_err(prepared)?, prepare(int8).map_err(prepared)?);
            let spec = int8.component(role)?;
            let groups = spec.timestep_groups.len().max(1);
            for run in runs {
                let group = run.timestep.map_or(0, |t| spec.timestep_group(t as f32));
                if meter.ask(name, "compare").is_break() {
                    return Err(CalibrationError::Cancelled);
                }
                errors
                    .run(&mut pair, run, group, groups)
                    .map_err(|source| failed(name, PipelineError::Run { stage, source }))?;
                meter.done += 2 * pair.0.stats().macs;
            }
        }
    }
    let (layers, results) = errors.finish();
    // Invariant: there is at least one sample, and the first makes the example.
    let example = example.ok_or(CalibrationError::Cancelled)?;
    Ok(Comparison { pictures: samples.len(), layers, results, example })
}

/// Peak signal-to-noise ratio of 8-bit samples, at most [`EXACT_DB`].
fn psnr(a: &[u8], b: &[u8]) -> f32 {
    let squares: f64 = a.iter().zip(b).map(|(&a, &b)| f64::from(a.abs_diff(b)).powi(2)).sum();
    let peak = 255.0 * 255.0 * a.len() as f64;
    if squares == 0.0 { EXACT_DB } else { (10.0 * (peak / squares).log10()) as f32 }
}

/// Sums of squares, of the signal and of its error, by group.
type Sums = Vec<(f64, f64)>;

/// What was found so far.
#[derive(Default)]
struct Errors {
    /// By network and name, in the order of their first appearance.
    layers: Vec<(Role, String, Sums)>,
    index: HashMap<(Role, String), usize>,
    results: Vec<(Role, String, Sums)>,
}

impl Errors {
    /// Runs both sessions on `run`.
    fn run(
        &mut self,
        (float, int8): &mut (CpuSession<'_>, CpuSession<'_>),
        run: &Recorded,
        group: usize,
        groups: usize,
    ) -> Result<(), RunError> {
        let inputs: Vec<&[f32]> = run.inputs.iter().map(Vec::as_slice).collect();
        let mut kept: HashMap<String, Vec<f32>> = HashMap::new();
        let mut rows = Rows::default();
        let mut keep = |layer: &str, channels: usize, row: &[f32]| {
            if rows.wanted(layer, row.len() / channels.max(1)) {
                kept.entry(layer.to_owned()).or_default().extend_from_slice(row);
            }
        };
        let a = watch::outputs(float, |s, out| s.run_observed(&inputs, out, &mut keep))?;
        int8.set_timestep_group(group);
        let mut rows = Rows::default();
        let mut used: HashMap<String, usize> = HashMap::new();
        let mut weigh = |layer: &str, channels: usize, row: &[f32]| {
            if !rows.wanted(layer, row.len() / channels.max(1)) {
                return;
            }
            let Some(kept) = kept.get(layer) else { return };
            let start = used.entry(layer.to_owned()).or_default();
            if let Some(float) = kept.get(*start..*start + row.len()) {
                *start += row.len();
                let sums = self.sums(run.role, layer, groups);
                add(&mut sums[group], float, row);
            }
        };
        let b = watch::outputs(int8, |s, out| s.run_observed(&inputs, out, &mut weigh))?;
        for ((port, a), b) in float.outputs().iter().zip(&a).zip(&b) {
            let at = self.results.iter().position(|r| r.0 == run.role && r.1 == port.name);
            let at = at.unwrap_or_else(|| {
                self.results.push((run.role, port.name.clone(), vec![(0.0, 0.0); groups]));
                self.results.len() - 1
            });
            add(&mut self.results[at].2[group], a, b);
        }
        Ok(())
    }

    fn sums(&mut self, role: Role, layer: &str, groups: usize) -> &mut Sums {
        let at = *self.index.entry((role, layer.to_owned())).or_insert_with(|| {
            self.layers.push((role, layer.to_owned(), vec![(0.0, 0.0); groups]));
            self.layers.len() - 1
        });
        &mut self.layers[at].2
    }

    fn finish(self) -> (Vec<Measured>, Vec<Measured>) {
        let measured = |(role, layer, sums): (Role, String, Sums)| Measured {
            component: role.name().to_owned(),
            layer,
            sqnr_db: sums.into_iter().map(db).collect(),
        };
        let all = |list: Vec<_>| list.into_iter().map(measured).collect();
        (all(self.layers), all(self.results))
    }
}

/// Signal-to-noise ratio in dB; none without a signal.
fn db((signal, noise): (f64, f64)) -> Option<f32> {
    let most = f64::from(EXACT_DB);
    (signal > 0.0).then(|| (10.0 * (signal / noise).log10()).clamp(-most, most) as f32)
}

fn add(sums: &mut (f64, f64), signal: &[f32], other: &[f32]) {
    for (&x, &y) in signal.iter().zip(other) {
        let (x, y) = (f64::from(x), f64::from(y));
        sums.0 += x * x;
        sums.1 += (x - y) * (x - y);
    }
}

/// Which rows of each layer are looked at: [`ROWS`] of a square map, evenly spaced.
#[derive(Default)]
struct Rows {
    seen: HashMap<String, usize>,
}

impl Rows {
    fn wanted(&mut self, layer: &str, width: usize) -> bool {
        let every = (width / ROWS).max(1);
        match self.seen.get_mut(layer) {
            Some(row) => {
                *row += 1;
                *row % every == every / 2
            }
            None => {
                self.seen.insert(layer.to_owned(), 0);
                every / 2 == 0
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_rows_of_each_layer_are_looked_at() {
        let mut rows = Rows::default();
        let wanted: Vec<usize> = (0..64).filter(|_| rows.wanted("a", 64)).collect();
        assert_eq!(wanted.len(), 4);
        let first: Vec<bool> = (0..3).map(|_| rows.wanted("b", 2)).collect();
        assert_eq!(first, [true; 3]);
    }

    #[test]
    fn ratios_are_bounded_and_absent_without_a_signal() {
        assert_eq!(db((0.0, 1.0)), None);
        assert_eq!(db((1.0, 0.0)), Some(EXACT_DB));
        assert_eq!(db((100.0, 1.0)), Some(20.0));
        assert_eq!(psnr(&[1, 2], &[1, 2]), EXACT_DB);
        assert!((psnr(&[0, 0], &[255, 255]) - 0.0).abs() < 1e-6);
    }
}
