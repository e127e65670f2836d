//! `latile plan`: what an `upscale` would take, before it is run.

mod timeline;

use crate::bundled;
use crate::console::{say, say_json};
use crate::exit::UsageError;
use crate::interrupt::Interrupt;
use crate::memory;
use crate::output;
use crate::picture::{self, Encoding, Form, Kind};
use argh::FromArgs;
use latile_cpu::session::CpuBackend;
use latile_runtime::backend::{Backend, Residency};
use latile_runtime::format::{Held, Model};
use latile_runtime::pipeline::budget::{Parts, StagePlan, advised, mib};
use latile_runtime::pipeline::{Budget, NormScope, Options, Pace, Plan, Scratch, Strategy, Tiling};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long this machine is measured.
const MEASURE: Duration = Duration::from_secs(1);
/// Width of the longest bar.
const BAR: usize = 40;

/// Says what an upscale of a picture would take: memory by purpose, work, time, and what more or less
/// memory would buy. Nothing is upscaled.
#[derive(FromArgs, Debug)]
#[argh(
    subcommand,
    name = "plan",
    help_triggers("-h", "--help"),
    example = "{command_name} --size 640x480 --memory 256M\n{command_name} sr.latile --size 1920x1080 --memory 1G --tiling blend --svg plan.svg",
    note = "The picture is taken to be of 8 bits without opacity, the result to be a PNG. The time comes\nfrom running the model on small tiles for about a second; the choice does not depend on it.\ndocs/memory.md explains the numbers."
)]
pub(crate) struct Args {
    /// the .latile file; by default the bundled model
    #[argh(positional, arg_name = "MODEL")]
    pub(crate) model: Option<PathBuf>,

    /// width and height of the picture to upscale, in pixels
    #[argh(option, from_str_fn(size), arg_name = "WxH")]
    pub(crate) size: [u32; 2],

    /// the most memory the process may have resident, weights included, such as 256M or 1.5G; K, M and G
    /// are powers of 1024
    #[argh(option, from_str_fn(memory::parse), arg_name = "size")]
    pub(crate) memory: Option<usize>,

    /// exact, blend or auto, as for upscale (default auto)
    #[argh(option, from_str_fn(memory::tiling), default = "Tiling::Auto", arg_name = "how")]
    pub(crate) tiling: Tiling,

    /// picture or tile, as for upscale (default picture)
    #[argh(
        option,
        from_str_fn(memory::norms),
        default = "NormScope::default()",
        arg_name = "whose"
    )]
    pub(crate) norms: NormScope,

    /// largest side of a tile, in pixels of the input
    #[argh(option, arg_name = "px")]
    pub(crate) tile: Option<usize>,

    /// least overlap of tiles, in pixels of the input
    #[argh(option, arg_name = "px")]
    pub(crate) overlap: Option<usize>,

    /// DDIM steps; by default what the model says
    #[argh(option, arg_name = "n")]
    pub(crate) steps: Option<u32>,

    /// map or read, as for upscale
    #[argh(option, from_str_fn(super::weights), arg_name = "how")]
    pub(crate) weights: Option<Held>,

    /// threads, by default one for each core
    #[argh(option, arg_name = "n")]
    pub(crate) threads: Option<usize>,

    /// draw memory over time as this .svg file
    #[argh(option, arg_name = "file")]
    pub(crate) svg: Option<PathBuf>,

    /// replace the .svg file if it exists
    #[argh(switch)]
    pub(crate) overwrite: bool,

    /// print one JSON object
    #[argh(switch)]
    pub(crate) json: bool,
}

/// `640x480` as `[640, 480]`.
fn size(text: &str) -> Result<[u32; 2], String> {
    let side = |s: &str| s.parse().ok().filter(|&n: &u32| n >= 1);
    text.split_once('x')
        .and_then(|(w, h)| Some([side(w)?, side(h)?]))
        .ok_or_else(|| "a size is WIDTHxHEIGHT, such as 640x480".to_owned())
}

/// What `--json` prints. Sizes are `[height, width]`, in pixels of the input.
#[derive(serde::Serialize)]
struct Report<'a> {
    model: &'a str,
    precision: &'static str,
    input_size: [u32; 2],
    output_size: [u32; 2],
    backend: &'a str,
    isa: &'a str,
    threads: usize,
    steps: usize,
    /// What `--memory` allows.
    limit_bytes: Option<usize>,
    chosen: Way<'a>,
    /// What the largest smaller budget that does would buy.
    cheaper: Option<Way<'a>>,
    /// What the smallest larger budget that buys anything would.
    better: Option<Way<'a>>,
    /// The smallest budget of all.
    smallest_bytes: usize,
    /// What was measured, billions of multiply-accumulates a second.
    unet_gmac_per_s: f64,
    decoder_gmac_per_s: f64,
}

/// A strategy, in numbers.
#[derive(serde::Serialize)]
struct Way<'a> {
    exact: bool,
    tiles: usize,
    tile: [usize; 2],
    overlap: [usize; 2],
    peak_bytes: usize,
    /// Of the file in which the latent is; 0 where it is in memory.
    scratch_bytes: usize,
    gmac: f64,
    seconds: f64,
    stages: Vec<StageReport<'a>>,
    /// When the run is over and the file is made.
    finish_bytes: PartsReport,
}

#[derive(serde::Serialize)]
struct StageReport<'a> {
    stage: String,
    way: &'a str,
    weights: &'static str,
    runs: u64,
    gmac: f64,
    seconds: f64,
    bytes: PartsReport,
}

#[derive(serde::Serialize)]
struct PartsReport {
    base: usize,
    picture: usize,
    pipeline: usize,
    arena: usize,
    weights: usize,
    total: usize,
}

impl From<Parts> for PartsReport {
    fn from(p: Parts) -> Self {
        let Parts { base, picture, pipeline, arena, weights } = p;
        Self { base, picture, pipeline, arena, weights, total: p.total() }
    }
}

fn residency(stage: &StagePlan) -> &'static str {
    match stage.choice.weights {
        Residency::Keep => "kept",
        Residency::Drop => "dropped",
    }
}

impl<'a> Way<'a> {
    fn new(strategy: &'a Strategy, pace: &Pace) -> Self {
        let stage = |s: &'a StagePlan| StageReport {
            stage: s.stage.to_string(),
            way: &s.choice.offer.way,
            weights: residency(s),
            runs: s.runs,
            gmac: s.macs() as f64 / 1e9,
            seconds: pace.stage_seconds(s),
            bytes: s.parts.into(),
        };
        Self {
            exact: strategy.is_exact(),
            tiles: strategy.grid.tiles(),
            tile: strategy.grid.tile(),
            overlap: [strategy.grid.rows.overlap(), strategy.grid.cols.overlap()],
            peak_bytes: strategy.peak(),
            scratch_bytes: strategy.scratch_bytes,
            gmac: strategy.macs() as f64 / 1e9,
            seconds: pace.seconds(strategy),
            stages: strategy.stages.iter().map(stage).collect(),
            finish_bytes: strategy.finish.into(),
        }
    }
}

/// Plans, measures, prints.
///
/// # Errors
/// As `upscale`, up to the first pixel: a model that is refused, wrong options, too little memory.
pub(crate) fn run(args: &Args, interrupt: &Interrupt) -> anyhow::Result<()> {
    if let Some(path) = &args.svg {
        if path.extension().is_none_or(|e| !e.eq_ignore_ascii_case("svg")) {
            let path = path.display();
            return Err(UsageError(format!("--svg is {path}; end its name in .svg")).into());
        }
        output::check(path, args.overwrite)?;
    }
    let [width, height] = args.size;
    let model = bundled::open(args.model.as_deref(), args.weights)?;
    let options = Options {
        steps: args.steps,
        tile: args.tile,
        overlap: args.overlap,
        tiling: args.tiling,
        norms: args.norms,
        // Not opened: it is the upscale's, and there its output's folder.
        scratch: Some(Scratch::new(".")),
        ..Options::default()
    };
    let plan = Plan::new(&model, width as usize, height as usize, &options)?;
    let output_size = super::upscale::result_size(&plan, Path::new(&format!("{width}x{height}")))?;
    let backend = super::cpu(args.threads)?;
    let kind = Kind { deep: false, opacity: false };
    let [rows, columns] = output_size;
    let form = Form { width: columns, height: rows, deep: false, opacity: false, icc: None };
    let budget = Budget {
        limit: args.memory,
        base: memory::base_bytes(0),
        caller: picture::caller(kind, (width, height), &form, Encoding::Png),
        ..Budget::default()
    };
    let all = plan.strategies(&backend, &budget)?;
    let plan = plan.by(&all, budget.limit)?;
    interrupt.check()?;
    // Invariant: `by` chose one.
    let Some(chosen) = plan.strategy() else { return Ok(()) };
    let pace = Pace::measure(&backend, &model, chosen, MEASURE)?;
    interrupt.check()?;

    let isa = backend.isa();
    let report = Report {
        model: model.name(),
        precision: model.manifest().precision.dtype().name(),
        input_size: [height, width],
        output_size,
        backend: &backend.info().backend,
        isa: isa.name(),
        threads: args.threads.unwrap_or_else(CpuBackend::available_threads),
        steps: plan.schedule().steps.len(),
        limit_bytes: args.memory,
        chosen: Way::new(chosen, &pace),
        cheaper: all.cheaper(chosen).map(|s| Way::new(s, &pace)),
        better: all.better(chosen).map(|s| Way::new(s, &pace)),
        smallest_bytes: all.smallest().map_or(chosen.peak(), Strategy::peak),
        unet_gmac_per_s: pace.unet / 1e9,
        decoder_gmac_per_s: pace.decoder / 1e9,
    };
    if let Some(path) = &args.svg {
        let title = title(&report, &model);
        let svg = timeline::draw(&title, chosen, &pace, args.memory);
        output::write(path, args.overwrite, |file| Ok(file.write_all(svg.as_bytes())?))?;
    }
    if args.json {
        return say_json(&report);
    }
    let mut text = describe(&report, &model, chosen);
    text.push_str(&neighbours(chosen, all.cheaper(chosen), all.better(chosen), &pace));
    Ok(say(text.trim_end())?)
}

fn title(r: &Report<'_>, model: &Model) -> String {
    let ([h, w], [oh, ow]) = (r.input_size, r.output_size);
    format!(
        "{}: {w}x{h} to {ow}x{oh}, {} steps, {} with {} threads",
        crate::console::plain(model.name()),
        r.steps,
        r.isa,
        r.threads
    )
}

/// The choice, stage by stage, and where its memory goes.
fn describe(r: &Report<'_>, model: &Model, chosen: &Strategy) -> String {
    let allowed = r.limit_bytes.map_or(String::new(), |b| format!(" of {}", mib(b)));
    let mut text = format!(
        "{}\n{chosen}\n{}{allowed} at most, {:.1} GMAC, about {}\n\n",
        title(r, model),
        mib(chosen.peak()),
        r.chosen.gmac,
        seconds(r.chosen.seconds),
    );
    text.push_str(
        "stage    runs   way          weights        base    picture   pipeline      arena    weights        sum     GMAC     time\n",
    );
    for s in &r.chosen.stages {
        let b = &s.bytes;
        text.push_str(&format!(
            "{:<8} {:<6} {:<12} {:<8} {} {:>8.1} {:>8}\n",
            s.stage,
            s.runs,
            s.way,
            s.weights,
            columns(b),
            s.gmac,
            seconds(s.seconds)
        ));
    }
    text.push_str(&format!("{:<36} {}\n\n", "writing the file", columns(&r.chosen.finish_bytes)));
    let [unet, decoder] = &chosen.stages;
    let all =
        [("denoise", unet.parts), ("decode", decoder.parts), ("writing the file", chosen.finish)];
    // The last of equals is as good as the first.
    let (name, peak) =
        all.into_iter().max_by_key(|(_, p)| p.total()).unwrap_or(("denoise", unet.parts));
    text.push_str(&format!("where the memory goes at its peak ({name}):\n"));
    for (name, bytes) in [
        ("base", peak.base),
        ("picture", peak.picture),
        ("pipeline", peak.pipeline),
        ("arena", peak.arena),
        ("weights", peak.weights),
    ] {
        let length = (bytes as f64 / peak.total().max(1) as f64 * BAR as f64).round() as usize;
        text.push_str(&format!("  {name:<9} {:>11}  {}\n", mib(bytes), "#".repeat(length)));
    }
    text
}

fn columns(b: &PartsReport) -> String {
    [b.base, b.picture, b.pipeline, b.arena, b.weights, b.total]
        .map(|n| format!("{:>10}", mib(n)))
        .join(" ")
}

/// What less and more memory would buy.
fn neighbours(
    chosen: &Strategy,
    cheaper: Option<&Strategy>,
    better: Option<&Strategy>,
    pace: &Pace,
) -> String {
    let line = |name: &str, s: &Strategy| {
        let (now, then) = (pace.seconds(chosen), pace.seconds(s));
        format!(
            "\n{name:<15} --memory {}: {s}; {}, about {}, {:.2} times as long",
            advised(s.peak()),
            mib(s.peak()),
            seconds(then),
            then / now.max(1e-9)
        )
    };
    let mut text = match cheaper {
        Some(s) => line("with less", s),
        None => "\nwith less       nothing; this is the least".to_owned(),
    };
    match better {
        Some(s) => text.push_str(&line("with more", s)),
        None => text.push_str("\nwith more       nothing faster"),
    }
    text
}

/// `0.52 s`, `14 s`, `3 min 20 s`, `2 h 05 min`.
fn seconds(s: f64) -> String {
    let whole = s.round().min(9e15) as u64;
    match whole {
        0..10 => format!("{s:.2} s"),
        10..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times() {
        assert_eq!(size("640x480"), Ok([640, 480]));
        for wrong in ["640", "0x4", "4x", "x", "-1x4", "4x4x4", "5000000000x4", "4 x4"] {
            assert!(size(wrong).unwrap_err().contains("640x480"), "{wrong}");
        }
        assert_eq!(seconds(0.521), "0.52 s");
        assert_eq!(seconds(14.4), "14 s");
        assert_eq!(seconds(200.0), "3 min 20 s");
        assert_eq!(seconds(7500.0), "2 h 05 min");
    }
}
