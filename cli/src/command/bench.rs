//! `latile bench`: how long a component takes here.

use crate::bundled;
use crate::console::{bytes, say, say_json};
use crate::exit::UsageError;
use crate::interrupt::Interrupt;
use crate::memory::{self, peak_rss_bytes};
use crate::progress::{Progress, Unit};
use argh::FromArgs;
use latile_runtime::backend::Backend;
use latile_runtime::format::{Held, Model, Role};
use latile_runtime::pipeline::Generator;
use latile_runtime::tensor::ArenaError;
use std::path::PathBuf;
use std::time::Instant;

/// Times one component of a model on noise.
#[derive(FromArgs, Debug)]
#[argh(
    subcommand,
    name = "bench",
    help_triggers("-h", "--help"),
    example = "{command_name} sr.latile --component decoder --latent 64x64 --threads 2 --runs 5 --json"
)]
pub(crate) struct Args {
    /// the .latile file; by default the bundled model
    #[argh(positional, arg_name = "MODEL")]
    pub(crate) model: Option<PathBuf>,

    /// unet, decoder or encoder
    #[argh(option, from_str_fn(super::role), arg_name = "name")]
    pub(crate) component: Role,

    /// height and width of the latent; an encoder's picture is as much larger as the model says
    #[argh(option, from_str_fn(size), arg_name = "HxW")]
    pub(crate) latent: [usize; 2],

    /// map or read: whether the model's file is mapped (the default), or read into memory, for storage
    /// that should not be mapped
    #[argh(option, from_str_fn(super::weights), arg_name = "how")]
    pub(crate) weights: Option<Held>,

    /// threads, by default one for each core
    #[argh(option, arg_name = "n")]
    pub(crate) threads: Option<usize>,

    /// the most memory the process may have resident, weights included, such as 256M or 1.5G; K, M and G
    /// are powers of 1024
    #[argh(option, from_str_fn(memory::parse), arg_name = "size")]
    pub(crate) memory: Option<usize>,

    /// timed runs, after one that is not (default 5)
    #[argh(option, arg_name = "n", default = "5")]
    pub(crate) runs: u32,

    /// print one JSON object
    #[argh(switch)]
    pub(crate) json: bool,
}

/// `64x48` as `[64, 48]`.
fn size(text: &str) -> Result<[usize; 2], String> {
    let side = |s: &str| s.parse().ok().filter(|&n: &usize| (1..=65_536).contains(&n));
    text.split_once('x')
        .and_then(|(h, w)| Some([side(h)?, side(w)?]))
        .ok_or_else(|| "a size is HEIGHTxWIDTH, such as 64x64".to_owned())
}

#[derive(serde::Serialize)]
struct Report<'a> {
    model: &'a str,
    component: &'static str,
    latent: [usize; 2],
    precision: &'static str,
    backend: String,
    isa: String,
    threads: usize,
    runs: u32,
    median_s: f64,
    min_s: f64,
    max_s: f64,
    gmac: f64,
    gmac_per_s: f64,
    arena_bytes: usize,
    weight_bytes: usize,
    /// What the process was to have at most.
    planned_bytes: usize,
    way: String,
    peak_rss_bytes: Option<u64>,
}

/// Prepares, runs once untimed and `--runs` times timed, reports.
///
/// # Errors
/// A model that is refused, a size that does not suit it, too little memory.
pub(crate) fn run(args: &Args, interrupt: &Interrupt) -> anyhow::Result<()> {
    if !(1..=100_000).contains(&args.runs) {
        return Err(UsageError(format!("--runs is {}; it can be 1 to 100000", args.runs)).into());
    }
    let model = bundled::open(args.model.as_deref(), args.weights)?;
    let [height, width] = input_size(&model, args.component, args.latent)?;
    let backend = super::cpu(args.threads)?;
    let role = args.component;
    let alone = super::Alone {
        role,
        size: [height, width],
        runs: u64::from(args.runs) + 1,
        limit: args.memory,
        resident: 0,
        tensors: super::tensor_bytes(&model, role, [height, width])?.iter().sum(),
    };
    let (room, planned_bytes) = alone.plan(&backend, &model)?;
    let mut session = backend.prepare(&model, role, height, width, room)?;
    let mut noise = Generator::new(0);
    let inputs = session
        .inputs()
        .iter()
        .map(|p| {
            let mut v = super::buffer(p.shape)?;
            noise.randn(v.len(), |i, x| v[i] = x);
            Ok(v)
        })
        .collect::<Result<Vec<_>, ArenaError>>()?;
    let mut outputs =
        session.outputs().iter().map(|p| super::buffer(p.shape)).collect::<Result<Vec<_>, _>>()?;
    let inputs: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
    let mut outputs: Vec<&mut [f32]> = outputs.iter_mut().map(Vec::as_mut_slice).collect();

    let total = u64::from(args.runs) + 1;
    let mut progress = Progress::new("bench", Unit::Runs);
    let mut seconds = Vec::with_capacity(args.runs as usize);
    for i in 0..total {
        interrupt.check()?;
        progress.at(i, total, "");
        let start = Instant::now();
        session.run(&inputs, &mut outputs)?;
        if i > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    drop(progress);
    seconds.sort_by(f64::total_cmp);
    let median_s = median(&seconds);
    let stats = session.stats();
    let gmac = stats.macs as f64 / 1e9;
    let report = Report {
        model: model.name(),
        component: args.component.name(),
        latent: args.latent,
        precision: model.manifest().precision.dtype().name(),
        backend: stats.backend,
        isa: stats.isa,
        threads: stats.threads,
        runs: args.runs,
        median_s,
        // Invariant: `runs` is at least 1.
        min_s: seconds[0],
        max_s: seconds[seconds.len() - 1],
        gmac,
        gmac_per_s: gmac / median_s,
        arena_bytes: stats.arena_bytes,
        weight_bytes: stats.weight_bytes,
        planned_bytes,
        way: stats.way,
        peak_rss_bytes: peak_rss_bytes(),
    };
    if args.json {
        return say_json(&report);
    }
    Ok(say(&format!(
        "{} of {} at latent {}x{}, {}, on {} with {} threads\n  median {:.4} s of {} runs ({:.4} to {:.4}), {:.2} GMAC, {:.1} GMAC/s\n  arena {}, weights {}{}",
        report.component,
        report.model,
        args.latent[0],
        args.latent[1],
        report.precision,
        report.isa,
        report.threads,
        report.median_s,
        report.runs,
        report.min_s,
        report.max_s,
        report.gmac,
        report.gmac_per_s,
        bytes(report.arena_bytes as u64),
        bytes(report.weight_bytes as u64),
        report.peak_rss_bytes.map_or(String::new(), |p| format!(", peak {}", bytes(p))),
    ))?)
}

/// Height and width of the component's maps at this latent.
fn input_size(model: &Model, role: Role, latent: [usize; 2]) -> anyhow::Result<[usize; 2]> {
    let spec = model.component(role)?;
    let size = match (role, model.manifest().latent) {
        (Role::Encoder, Some(l)) => latent.map(|s| s * l.factor as usize),
        (Role::Encoder, None) => {
            return Err(UsageError(format!(
                "{} does not say how much larger than a latent its pictures are",
                model.name()
            ))
            .into());
        }
        (Role::Unet | Role::Decoder, _) => latent,
    };
    let multiple = spec.multiple as usize;
    if size.iter().any(|s| s % multiple != 0) {
        return Err(UsageError(format!(
            "{role} takes sides that are multiples of {multiple}; --latent {}x{} gives {}x{}",
            latent[0], latent[1], size[0], size[1]
        ))
        .into());
    }
    Ok(size)
}

/// The middle of sorted numbers, or the mean of the two middle ones.
fn median(sorted: &[f64]) -> f64 {
    let n = sorted.len();
    (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_medians() {
        assert_eq!(size("64x48"), Ok([64, 48]));
        for wrong in ["64", "0x4", "4x", "x", "-1x4", "4x4x4", "70000x4"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
        assert_eq!(median(&[1.0, 2.0, 9.0]), 2.0);
        assert_eq!(median(&[1.0, 2.0, 4.0, 9.0]), 3.0);
    }
}
