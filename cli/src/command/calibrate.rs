//! `latile calibrate`: activation ranges of a float model, for an int8 export.

use crate::console::{plain, remark, say, say_json};
use crate::exit::Interrupted;
use crate::interrupt::Interrupt;
use crate::memory::peak_rss_bytes;
use crate::output;
use crate::picture::{self, PictureError};
use crate::progress::{Progress, Unit};
use argh::FromArgs;
use latile_calibration::{CalibrationError, Options, RgbPicture, Table};
use latile_cpu::session::CpuBackend;
use latile_runtime::format::Model;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Collects a float model's activation ranges, which an int8 export needs.
#[derive(FromArgs, Debug)]
#[argh(
    subcommand,
    name = "calibrate",
    help_triggers("-h", "--help"),
    example = "{command_name} ldm-f32.latile --pictures photos -o ldm.calibration.json\n{command_name} ldm-f32.latile --pictures photos -o ldm.calibration.json --count 16 --steps 20",
    note = "Pictures are the .png, .jpg and .webp files of the folder itself. A square is cut from the\nmiddle of each and reduced, and the model upscales it again over its whole sampling\ntrajectory. The table is JSON; docs/calibration.md describes it."
)]
pub(crate) struct Args {
    /// an f32 or f16 .latile super-resolution model
    #[argh(positional, arg_name = "MODEL")]
    pub(crate) model: PathBuf,

    /// a folder of pictures of the kind the model is meant for
    #[argh(option, arg_name = "folder")]
    pub(crate) pictures: PathBuf,

    /// the table to write
    #[argh(option, short = 'o', arg_name = "file")]
    pub(crate) output: PathBuf,

    /// DDIM steps of each picture (default 8)
    #[argh(option, arg_name = "n", default = "Options::default().steps")]
    pub(crate) steps: u32,

    /// pictures used at most, spread over the folder (default 8)
    #[argh(option, arg_name = "n", default = "Options::default().count")]
    pub(crate) count: usize,

    /// groups of timesteps with ranges of their own, at most (default 4)
    #[argh(option, arg_name = "n", default = "Options::default().groups")]
    pub(crate) groups: usize,

    /// side of the latent, and of the pictures once reduced (default 64)
    #[argh(option, arg_name = "px", default = "Options::default().size")]
    pub(crate) size: usize,

    /// how much fresh noise a step adds, 0 to 1; by default what the model says
    #[argh(option, arg_name = "x")]
    pub(crate) eta: Option<f32>,

    /// seed of the first picture's noise, each later picture's is one more (default 0)
    #[argh(option, arg_name = "n", default = "0")]
    pub(crate) seed: u64,

    /// the percentage of values that the range by percentile holds (default 99.99)
    #[argh(option, arg_name = "x", default = "Options::default().percentile")]
    pub(crate) percentile: f32,

    /// threads, by default one for each core
    #[argh(option, arg_name = "n")]
    pub(crate) threads: Option<usize>,

    /// replace the output if it exists
    #[argh(switch)]
    pub(crate) overwrite: bool,

    /// print one JSON object
    #[argh(switch)]
    pub(crate) json: bool,
}

/// What `--json` prints.
#[derive(serde::Serialize)]
struct Report<'a> {
    output: &'a Path,
    model: &'a str,
    source_hash: &'a str,
    pictures: Vec<&'a str>,
    skipped: &'a [latile_calibration::table::Skipped],
    timesteps: &'a [u32],
    timestep_groups: &'a [u32],
    layers: usize,
    /// Layers that stay in f16 because their input is 0.
    silent: Vec<String>,
    threads: usize,
    isa: &'static str,
    seconds: f64,
    peak_rss_bytes: Option<u64>,
}

/// Decodes a picture for a calibration set: 8 bits a sample, opacity left out.
pub(crate) fn decode(path: &Path) -> Result<RgbPicture, String> {
    let picture = picture::read(path).map_err(|e| match e {
        PictureError::Io { source, .. } => format!("it cannot be read: {source}"),
        PictureError::Refused { why, .. } => why,
        e @ PictureError::Memory { .. } => e.to_string(),
    })?;
    Ok(RgbPicture {
        width: picture.width,
        height: picture.height,
        rgb: (0..picture.rgb.len())
            .map(|i| picture.rgb.on_255(i).round_ties_even() as u8)
            .collect(),
    })
}

/// Calibrates, writes, reports.
///
/// # Errors
/// Every way in which the model, the pictures, the options or the output can be unfit; [`Interrupted`].
pub(crate) fn run(args: &Args, interrupt: &Interrupt) -> anyhow::Result<()> {
    output::check(&args.output, args.overwrite)?;
    let options = Options {
        steps: args.steps,
        eta: args.eta,
        count: args.count,
        groups: args.groups,
        size: args.size,
        seed: args.seed,
        percentile: args.percentile,
    };
    let model = Model::open(&args.model)?;
    let backend = super::cpu(args.threads)?;
    let start = Instant::now();
    let set =
        latile_calibration::read_pictures(&model, &args.pictures, &options, &mut |p| decode(p))?;
    for s in &set.skipped {
        remark(&format!("skipped: {}: {}", plain(&s.name), plain(&s.why)));
    }
    interrupt.check()?;
    let mut progress = Progress::new("calibrate", Unit::Macs);
    let table = latile_calibration::calibrate(&model, &backend, &set, &options, &mut |p| {
        let next = format!("pass {} of 2, {}, {}", p.pass, plain(p.picture), p.stage);
        progress.at(p.done, p.total, &next);
        if interrupt.raised() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .map_err(|e| match e {
        CalibrationError::Cancelled => anyhow::Error::from(Interrupted),
        other => other.into(),
    })?;
    drop(progress);
    table.write(&args.output, args.overwrite)?;
    report(args, &table, &backend, start.elapsed().as_secs_f64())
}

fn report(args: &Args, table: &Table, backend: &CpuBackend, seconds: f64) -> anyhow::Result<()> {
    let layers = table.components.iter().map(|c| c.layers.len()).sum();
    let groups: &[u32] = table
        .components
        .iter()
        .map(|c| &c.timestep_groups[..])
        .find(|g| !g.is_empty())
        .unwrap_or_default();
    if args.json {
        return say_json(&Report {
            output: &args.output,
            model: &table.model.name,
            source_hash: &table.model.source_hash,
            pictures: table.data.iter().map(|d| d.name.as_str()).collect(),
            skipped: &table.skipped,
            timesteps: &table.sampling.timesteps,
            timestep_groups: groups,
            layers,
            silent: table.silent().map(|(role, name)| format!("{role} {name}")).collect(),
            threads: args.threads.unwrap_or_else(CpuBackend::available_threads),
            isa: backend.isa().name(),
            seconds,
            peak_rss_bytes: peak_rss_bytes(),
        });
    }
    Ok(say(&format!(
        "{}  {layers} layers, {} pictures ({} skipped), {} timesteps in {} groups",
        args.output.display(),
        table.data.len(),
        table.skipped.len(),
        table.sampling.timesteps.len(),
        groups.len().max(1)
    ))?)
}
