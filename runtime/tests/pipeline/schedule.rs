//! Timesteps and coefficients against diffusers' DDIMScheduler and LDM's sampler.

use crate::fake::scheduler;
use crate::oracle::{fixture_json, scheduler_of, spacing_of};
use latile_runtime::format::{BetaSchedule, Prediction, SchedulerSpec, Spacing};
use latile_runtime::pipeline::{Schedule, ScheduleError};
use proptest::prelude::*;

/// Any number of steps, against the table that `tests/oracle/ddim_tables.py` wrote.
#[test]
fn timesteps_of_every_step_count() {
    let mut counts = 0;
    for row in include_str!("timesteps.tsv").lines() {
        let f: Vec<&str> = row.split('\t').collect();
        let spec = SchedulerSpec {
            train_timesteps: f[0].parse().unwrap(),
            steps_offset: f[2].parse().unwrap(),
            ..scheduler()
        };
        let range = f[3].parse::<u32>().unwrap()..=f[4].parse().unwrap();
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for steps in range {
            let s = Schedule::new(&spec, steps, 1.0, Some(spacing_of(f[1])))
                .unwrap_or_else(|e| panic!("{row}: {steps}: {e}"));
            let t = s.timesteps();
            assert!(t.windows(2).all(|w| w[0] > w[1]), "{row}: {steps}: {t:?}");
            for byte in t.iter().flat_map(|t| t.to_le_bytes()) {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
            }
            counts += 1;
        }
        assert_eq!(format!("{hash:016x}"), f[5], "{row}");
    }
    assert_eq!(counts, 5 * 1000 + 4 * 50 + 77 + 1);
}

/// The worked example of the paper's code: 15 steps of 1000 are 16.
#[test]
fn compvis_spacing_by_hand() {
    let s = Schedule::new(&scheduler(), 15, 0.0, Some(Spacing::Compvis)).unwrap();
    let wanted: Vec<u32> = (0..16).rev().map(|i| i * 66 + 1).collect();
    assert_eq!(s.timesteps(), wanted);
    for pair in s.steps.windows(2) {
        assert_eq!(pair[0].alpha_prev, pair[1].alpha);
    }
    // The last step leads to timestep 0, not to a clean latent.
    assert_eq!(s.steps[15].alpha_prev, 1.0 - 0.0015);
    // 9 steps: the original's tenth timestep would be 1000 and fails.
    let s = Schedule::new(&scheduler(), 9, 0.0, Some(Spacing::Compvis)).unwrap();
    assert_eq!(s.timesteps(), [889, 778, 667, 556, 445, 334, 223, 112, 1]);
}

/// ᾱ before and after each step, and σ at eta 1, of every schedule in the table.
#[test]
fn coefficients_are_those_of_diffusers_and_ldm() {
    let mut rows = 0;
    for row in fixture_json("sampling/schedules.json").as_array().unwrap() {
        let Some(spec) = scheduler_of(&row["scheduler"]) else {
            assert_eq!(row["schedule"], "cosine");
            continue;
        };
        if row.get("invalid_timesteps").is_some() {
            continue;
        }
        let label = format!("{} {} {}", row["schedule"], row["spacing"], row["steps"]);
        let spacing = spacing_of(row["spacing"].as_str().unwrap());
        let steps = row["steps"].as_u64().unwrap() as u32;
        let schedule = Schedule::new(&spec, steps, 1.0, Some(spacing)).unwrap();
        let count = schedule.steps.len();
        assert_eq!(row["count"], count, "{label}");
        let sum: u64 = schedule.timesteps().iter().map(|&t| u64::from(t)).sum();
        assert_eq!(row["timestep_sum"], sum, "{label}");
        let alpha_sum: f64 = schedule.steps.iter().map(|s| f64::from(s.alpha)).sum();
        let wanted = row["alpha_sum"].as_f64().unwrap();
        assert!((alpha_sum - wanted).abs() <= 2e-7 * count as f64, "{label}: {alpha_sum} {wanted}");
        let list = |name: &str| row[name].as_array().unwrap();
        let kept: Vec<usize> = match list("timesteps").len() {
            7 if count > 7 => vec![0, 1, 2, count / 2, count - 3, count - 2, count - 1],
            n => (0..n).collect(),
        };
        for (i, k) in kept.into_iter().enumerate() {
            let step = schedule.steps[k];
            assert_eq!(list("timesteps")[i], step.timestep, "{label}");
            for (name, found) in [
                ("alpha", step.alpha),
                ("alpha_previous", step.alpha_prev),
                ("sigma_eta1", step.sigma),
            ] {
                let wanted = list(name)[i].as_f64().unwrap();
                let difference = (f64::from(found) - wanted).abs();
                // Without terminal signal, the f32 rounding of torch's own steps to ᾱ shows most where
                // little signal or little noise is left.
                let loose = spec.zero_terminal_snr && name == "sigma_eta1";
                let fine = difference <= if loose { 4e-6 } else { 1e-6 };
                assert!(fine, "{label}: step {k}: {name} {found}, wanted {wanted}");
            }
        }
        rows += 1;
    }
    assert!(rows > 100, "only {rows} rows");
}

fn any_spec() -> impl Strategy<Value = SchedulerSpec> {
    let prediction =
        prop_oneof![Just(Prediction::Epsilon), Just(Prediction::V), Just(Prediction::Sample)];
    let betas = (any::<bool>(), 1e-4..2e-3, 5e-3..3e-2).prop_map(|(scaled, start, end)| {
        if scaled {
            BetaSchedule::ScaledLinear { start, end }
        } else {
            BetaSchedule::Linear { start, end }
        }
    });
    (prediction, betas, 1u32..1200, 0u32..3, any::<bool>(), any::<bool>()).prop_map(
        |(prediction, betas, train_timesteps, steps_offset, one, zero)| SchedulerSpec {
            train_timesteps,
            betas,
            prediction,
            steps_offset,
            set_alpha_to_one: one,
            zero_terminal_snr: zero,
            ..scheduler()
        },
    )
}

fn any_spacing() -> impl Strategy<Value = Spacing> {
    prop_oneof![
        Just(Spacing::Compvis),
        Just(Spacing::Leading),
        Just(Spacing::Trailing),
        Just(Spacing::Linspace)
    ]
}

proptest! {
    /// A model that knows the noise is led along the forward process (eq. 12 with σ = 0), and σ keeps the
    /// variance what it was (eq. 16).
    #[test]
    fn a_perfect_model_stays_on_the_forward_process(
        spec in any_spec(), share in 0.0f64..1.0, spacing in any_spacing(), eta in 0f32..=1.0,
    ) {
        let steps = 1 + (share * f64::from(spec.train_timesteps - 1)) as u32;
        let (x0, noise) = (0.7f32, -1.3f32);
        let schedule = match Schedule::new(&spec, steps, eta, Some(spacing)) {
            Ok(s) => s,
            // What must be refused, and nothing else.
            Err(ScheduleError::Degenerate { .. }) => {
                prop_assert!(spec.zero_terminal_snr);
                return Ok(());
            }
            Err(ScheduleError::NoTimesteps { .. }) => {
                prop_assert!(spec.steps_offset >= spec.train_timesteps || spec.train_timesteps == 1);
                return Ok(());
            }
            Err(e) => return Err(TestCaseError::fail(e.to_string())),
        };
        let still = Schedule::new(&spec, steps, 0.0, Some(spacing)).unwrap();
        for (step, exact) in schedule.steps.iter().zip(&still.steps) {
            let (a, p) = (f64::from(step.alpha), f64::from(step.alpha_prev));
            let at = |alpha: f64| (alpha.sqrt() * f64::from(x0) + (1.0 - alpha).sqrt() * f64::from(noise)) as f32;
            let output = match spec.prediction {
                Prediction::Epsilon => noise,
                Prediction::Sample => x0,
                Prediction::V => (a.sqrt() * f64::from(noise) - (1.0 - a).sqrt() * f64::from(x0)) as f32,
            };
            let total = f64::from(step.to_eps).powi(2) + f64::from(step.sigma).powi(2);
            prop_assert!((total - (1.0 - p)).abs() < 1e-6);
            if eta == 0.0 {
                prop_assert_eq!(step.sigma, 0.0);
            }
            let mut latent = [at(a)];
            exact.update(&mut latent, &[output]);
            // Where hardly any signal or noise is left, recovering it amplifies the f32 rounding of the input.
            let tolerance = 1e-6 + 4e-7 / a.max(1e-9).sqrt().min((1.0 - a).sqrt());
            prop_assert!((f64::from(latent[0]) - f64::from(at(p))).abs() < tolerance,
                "t {}: {} is not {} ({} {})", step.timestep, latent[0], at(p), a, p);
        }
    }
}

#[test]
fn clipping_bounds_the_clean_latent_only() {
    let spec =
        SchedulerSpec { prediction: Prediction::Sample, clip_sample: Some(1.5), ..scheduler() };
    let step = Schedule::new(&spec, 2, 0.0, None).unwrap().steps[0];
    let (a, p) = (f64::from(step.alpha), f64::from(step.alpha_prev));
    let mut latent = [0.3f32];
    step.update(&mut latent, &[4.0]);
    // The noise is inferred from the clean latent as it was predicted.
    let eps = (f64::from(0.3f32) - a.sqrt() * 4.0) / (1.0 - a).sqrt();
    let wanted = p.sqrt() * 1.5 + (1.0 - p).sqrt() * eps;
    assert!((f64::from(latent[0]) - wanted).abs() < 1e-6);
}

#[test]
fn zero_terminal_snr_ends_without_signal() {
    let v = SchedulerSpec { prediction: Prediction::V, zero_terminal_snr: true, ..scheduler() };
    let s = Schedule::new(&v, 4, 1.0, Some(Spacing::Trailing)).unwrap();
    assert_eq!((s.steps[0].timestep, s.steps[0].alpha), (999, 0.0));
    let epsilon = SchedulerSpec { prediction: Prediction::Epsilon, ..v };
    let refused = Schedule::new(&epsilon, 4, 0.0, Some(Spacing::Trailing)).unwrap_err();
    assert!(refused.to_string().contains("timestep 999"), "{refused}");
    // Leading spacing never visits it.
    Schedule::new(&epsilon, 4, 0.0, Some(Spacing::Leading)).unwrap();
}

#[test]
fn impossible_requests_are_refused() {
    let new = |steps, eta| Schedule::new(&scheduler(), steps, eta, None).unwrap_err();
    assert_eq!(new(0, 0.0), ScheduleError::NoSteps);
    assert_eq!(new(1001, 0.0), ScheduleError::TooManySteps { steps: 1001, train: 1000 });
    assert_eq!(new(4, 1.5), ScheduleError::Eta { eta: 1.5 });
    assert!(matches!(new(4, f32::NAN), ScheduleError::Eta { .. }));
    let far = SchedulerSpec { steps_offset: u32::MAX, ..scheduler() };
    let refused = Schedule::new(&far, 4, 0.0, None).unwrap_err();
    assert!(matches!(refused, ScheduleError::NoTimesteps { .. }));
    let flat =
        SchedulerSpec { betas: BetaSchedule::Linear { start: 1e-12, end: 1e-12 }, ..scheduler() };
    let refused = Schedule::new(&flat, 4, 0.0, None).unwrap_err();
    assert!(matches!(refused, ScheduleError::Degenerate { .. }));
}
