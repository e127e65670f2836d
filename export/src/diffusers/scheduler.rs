//! `scheduler/scheduler_config.json`: the noise schedule the U-Net was trained on, and how its folder samples it.

use super::options::{ConfigError, Options};
use latile_runtime::format::{BetaSchedule, Prediction, SchedulerSpec, Spacing};
use serde_json::json;
use std::path::Path;

/// Keys of samplers that latile does not use, or that are without effect at their only supported value.
const HARMLESS: [&str; 6] = [
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "skip_prk_steps",
    "variance_type",
    "tensor_format",
    "clip_sample_range",
];

/// How far explicit betas may lie from a schedule they are recognised as, relative.
const BETA_TOLERANCE: f64 = 1e-5;

/// A scheduler and what there is to say about it.
#[derive(Clone, Debug, PartialEq)]
pub struct SchedulerConfig {
    /// The schedule.
    pub spec: SchedulerSpec,
    /// Where the folder names a sampler other than DDIM.
    pub note: Option<String>,
}

/// Reads a scheduler's config.
///
/// # Errors
/// [`ConfigError`] naming the file, the key and what would be supported.
pub fn read_scheduler(path: &Path) -> Result<SchedulerConfig, ConfigError> {
    let o = Options::read(path)?;
    let class = o.required("_class_name", o.text("_class_name")?)?.to_owned();
    // Whether the class clips by default, and whether its last step goes to ᾱ = 1 by default.
    let (clips, to_one) = match class.as_str() {
        "DDIMScheduler" => (true, true),
        "DDPMScheduler" => (true, true),
        "PNDMScheduler" => (false, false),
        _ => {
            return Err(o.unsupported(
                "_class_name",
                "\"DDIMScheduler\", \"DDPMScheduler\", \"PNDMScheduler\"",
            ));
        }
    };
    o.only("thresholding", &[json!(false)])?;
    o.only("timestep_values", &[])?;
    let train_timesteps = o.u32("num_train_timesteps")?.unwrap_or(1000);
    if !(1..=100_000).contains(&train_timesteps) {
        return Err(o.unsupported("num_train_timesteps", "1 to 100000"));
    }
    let betas = read_betas(&o, train_timesteps)?;
    let clip_sample = if o.bool("clip_sample")?.unwrap_or(clips) {
        let range = o.f64("clip_sample_range")?.unwrap_or(1.0) as f32;
        if !(range.is_finite() && range > 0.0) {
            return Err(o.unsupported("clip_sample_range", "a number above zero"));
        }
        Some(range)
    } else {
        None
    };
    let spec = SchedulerSpec {
        train_timesteps,
        betas,
        prediction: match o.text("prediction_type")?.unwrap_or("epsilon") {
            "epsilon" => Prediction::Epsilon,
            "v_prediction" => Prediction::V,
            "sample" => Prediction::Sample,
            _ => {
                return Err(
                    o.unsupported("prediction_type", "\"epsilon\", \"v_prediction\", \"sample\"")
                );
            }
        },
        spacing: match o.text("timestep_spacing")?.unwrap_or("leading") {
            "leading" => Spacing::Leading,
            "trailing" => Spacing::Trailing,
            "linspace" => Spacing::Linspace,
            _ => {
                return Err(
                    o.unsupported("timestep_spacing", "\"leading\", \"trailing\", \"linspace\"")
                );
            }
        },
        steps_offset: o.u32("steps_offset")?.unwrap_or(0),
        set_alpha_to_one: o.bool("set_alpha_to_one")?.unwrap_or(to_one),
        clip_sample,
        zero_terminal_snr: o.bool("rescale_betas_zero_snr")?.unwrap_or(false),
    };
    if spec.steps_offset >= train_timesteps {
        return Err(o.unsupported("steps_offset", "less than num_train_timesteps"));
    }
    o.finish(&HARMLESS)?;
    let note = (class != "DDIMScheduler").then(|| {
        format!("the folder names {class}; its noise schedule is kept, sampling is by DDIM")
    });
    Ok(SchedulerConfig { spec, note })
}

fn read_betas(o: &Options, train_timesteps: u32) -> Result<BetaSchedule, ConfigError> {
    let kind = o.text("beta_schedule")?.unwrap_or("linear");
    let start = o.f64("beta_start")?.unwrap_or(0.0001);
    let end = o.f64("beta_end")?.unwrap_or(0.02);
    if let Some(betas) = o.f64s("trained_betas")? {
        let known = "betas that are linear or scaled_linear, one a training timestep";
        return match recognise_betas(&betas) {
            Some(schedule) if betas.len() == train_timesteps as usize => Ok(schedule),
            _ => Err(o.unsupported("trained_betas", known)),
        };
    }
    for (key, beta) in [("beta_start", start), ("beta_end", end)] {
        if !(beta > 0.0 && beta < 1.0) {
            return Err(o.unsupported(key, "a number between 0 and 1"));
        }
    }
    match kind {
        "linear" => Ok(BetaSchedule::Linear { start, end }),
        "scaled_linear" => Ok(BetaSchedule::ScaledLinear { start, end }),
        _ => Err(o.unsupported("beta_schedule", "\"linear\", \"scaled_linear\"")),
    }
}

/// The schedule that explicit betas follow, where they follow one.
pub(crate) fn recognise_betas(betas: &[f64]) -> Option<BetaSchedule> {
    let (&start, &end) = betas.first().zip(betas.last())?;
    if !(start > 0.0 && start < 1.0 && end > 0.0 && end < 1.0) {
        return None;
    }
    let last = (betas.len() - 1).max(1) as f64;
    let close = |f: &dyn Fn(f64) -> f64| {
        betas
            .iter()
            .enumerate()
            .all(|(i, &b)| (f(i as f64 / last) / b - 1.0).abs() <= BETA_TOLERANCE)
    };
    if close(&|t| (start.sqrt() + (end.sqrt() - start.sqrt()) * t).powi(2)) {
        Some(BetaSchedule::ScaledLinear { start, end })
    } else if close(&|t| start + (end - start) * t) {
        Some(BetaSchedule::Linear { start, end })
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn explicit_betas_are_recognised() {
        let line = |a: f64, b: f64| (0..1000).map(move |i| a + (b - a) * f64::from(i) / 999.0);
        let linear: Vec<f64> = line(0.001, 0.02).map(|b| (b * 1e8).round() / 1e8).collect();
        assert_eq!(
            recognise_betas(&linear),
            Some(BetaSchedule::Linear { start: 0.001, end: 0.02 })
        );
        let scaled: Vec<f64> = line(0.0015f64.sqrt(), 0.0155f64.sqrt())
            .map(|b| b * b)
            .map(|b| f64::from(b as f32))
            .collect();
        assert!(matches!(recognise_betas(&scaled), Some(BetaSchedule::ScaledLinear { .. })));
        let cosine: Vec<f64> = line(0.1, 0.9).map(|b| b.sin()).collect();
        assert_eq!(recognise_betas(&cosine), None);
        assert_eq!(recognise_betas(&[]), None);
        assert_eq!(recognise_betas(&[0.0, 0.1]), None);
        assert_eq!(recognise_betas(&[f64::NAN, 0.1]), None);
    }
}
