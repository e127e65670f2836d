//! `latile upscale`: a picture in, a larger picture out. Streams of frames are [`frames`]'s.

mod frames;

use crate::args::STANDARD;
use crate::bundled;
use crate::console::{bytes, say, say_json};
use crate::exit::{FileError, Interrupted, Stopped, UsageError};
use crate::interrupt::Interrupt;
use crate::memory::{self, peak_rss_bytes};
use crate::output;
use crate::picture::{
    self, Encoding, Enlarger, Form, Picture, PictureError, Samples, Sink, Target,
};
use crate::progress::{Progress, Unit};
use crate::tensors;
use anyhow::anyhow;
use argh::FromArgs;
use latile_runtime::format::{Held, Spacing};
use latile_runtime::persist;
use latile_runtime::pipeline::budget::{Mode, advised};
use latile_runtime::pipeline::{
    self, Budget, GivenNoise, NoiseTensor, NormScope, Options, PipelineError, Pixels, Plan, Resume,
    Scratch, Stage, Strategy, Tiling,
};
use std::cell::RefCell;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The largest result: 16384 × 16384 pixels.
const MAX_RESULT_PIXELS: u64 = 1 << 28;

/// Makes a picture four times as large.
#[derive(FromArgs, Debug)]
#[argh(
    subcommand,
    name = "upscale",
    help_triggers("-h", "--help"),
    example = "{command_name} photo.jpg photo-4x.png\n{command_name} photo.jpg photo-4x.jpg --steps 8 --seed 3 --json\n{command_name} map.png map-4x.png --resume map.resume\nffmpeg -i in.mp4 -f rawvideo -pix_fmt rgb24 - | {command_name} - - --frames 320x180 | ffplay -f rawvideo -pix_fmt rgb24 -video_size 1280x720 -",
    note = "The EXIF orientation is applied and an ICC profile goes along. Opacity is enlarged\nbicubically. Samples of 16 bits stay so in a .png."
)]
pub(crate) struct Args {
    /// the picture: PNG, JPEG or WebP; with --frames a stream of raw frames, - for standard input
    #[argh(positional, arg_name = "INPUT")]
    pub(crate) input: PathBuf,

    /// the result: .png, .jpg or .webp; with --frames a stream of frames, - for standard output
    #[argh(positional, arg_name = "OUTPUT")]
    pub(crate) output: PathBuf,

    /// a .latile super-resolution model in place of the bundled one
    #[argh(option, arg_name = "file")]
    pub(crate) model: Option<PathBuf>,

    /// DDIM steps; by default what the model says
    #[argh(option, arg_name = "n")]
    pub(crate) steps: Option<u32>,

    /// how much fresh noise a step adds, 0 (none) to 1; by default what the model says
    #[argh(option, arg_name = "x")]
    pub(crate) eta: Option<f32>,

    /// seed of the noise, as torch.manual_seed takes it (default 0)
    #[argh(option, arg_name = "n", default = "0")]
    pub(crate) seed: u64,

    /// how timesteps are chosen: compvis, leading, trailing or linspace; by default what the model says
    #[argh(option, from_str_fn(spacing), arg_name = "name")]
    pub(crate) spacing: Option<Spacing>,

    /// how far the result must give back the input when it is reduced again, 0 to 1; less leaves more
    /// to the model, which noisy or strongly compressed pictures want; by default what the model says
    #[argh(option, arg_name = "x")]
    pub(crate) consistency: Option<f32>,

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

    /// where the latent of a large picture may stand when --memory leaves no room for it: a folder on a
    /// disk; by default that of the output, with --frames none
    #[argh(option, arg_name = "dir")]
    pub(crate) scratch: Option<PathBuf>,

    /// exact (the whole frame at once), blend (overlapping tiles where the picture is larger than one), or
    /// auto: exact where --memory allows it at less than 1.5 times the work (default auto)
    #[argh(option, from_str_fn(memory::tiling), default = "Tiling::Auto", arg_name = "how")]
    pub(crate) tiling: Tiling,

    /// picture or tile: whether tiles that are blended are normalised by an estimate for the whole
    /// picture, so that they keep its tone, or each by itself (default picture)
    #[argh(
        option,
        from_str_fn(memory::norms),
        default = "NormScope::default()",
        arg_name = "whose"
    )]
    pub(crate) norms: NormScope,

    /// largest side of a tile, in pixels of the input: less takes less memory
    #[argh(option, arg_name = "px")]
    pub(crate) tile: Option<usize>,

    /// least overlap of tiles, in pixels of the input
    #[argh(option, arg_name = "px")]
    pub(crate) overlap: Option<usize>,

    /// a safetensors file with the noise to use: noise [1,C,H,W] and, where eta is not 0,
    /// eta_noise [S,C,H,W]
    #[argh(option, arg_name = "file")]
    pub(crate) noise: Option<PathBuf>,

    /// quality of a JPEG result, 1 to 100 (default 95)
    #[argh(option, arg_name = "n", default = "95")]
    pub(crate) quality: u8,

    /// keep what is finished in this file, and go on from there when the same command is run again; it is
    /// removed when the output is in place
    #[argh(option, arg_name = "file")]
    pub(crate) resume: Option<PathBuf>,

    /// least seconds between two writes of --resume that wait for the disk (default 3): about what a power
    /// cut costs; more spares a memory card
    #[argh(option, arg_name = "s")]
    pub(crate) resume_every: Option<f64>,

    /// upscale a stream of raw frames of this size until it ends: 8 bits each of red, green and blue, rows
    /// from the top, as ffmpeg's rgb24
    #[argh(option, from_str_fn(frames::size), arg_name = "WxH")]
    pub(crate) frames: Option<frames::Size>,

    /// what --frames writes: raw (rgb24, as it reads) or png (one after the other); by default raw
    #[argh(option, from_str_fn(frames::format), arg_name = "name")]
    pub(crate) output_format: Option<frames::Format>,

    /// replace the output if it exists
    #[argh(switch)]
    pub(crate) overwrite: bool,

    /// print one JSON object
    #[argh(switch)]
    pub(crate) json: bool,
}

fn spacing(name: &str) -> Result<Spacing, String> {
    match name {
        "compvis" => Ok(Spacing::Compvis),
        "leading" => Ok(Spacing::Leading),
        "trailing" => Ok(Spacing::Trailing),
        "linspace" => Ok(Spacing::Linspace),
        _ => Err("a spacing is compvis, leading, trailing or linspace".to_owned()),
    }
}

/// What `--json` prints. Sizes are `[height, width]`.
#[derive(serde::Serialize)]
struct Report<'a> {
    input: &'a Path,
    output: &'a Path,
    model: &'a str,
    precision: &'static str,
    input_size: [u32; 2],
    output_size: [u32; 2],
    backend: &'a str,
    isa: &'a str,
    threads: usize,
    seed: u64,
    steps: usize,
    eta: f32,
    spacing: Spacing,
    consistency: f32,
    timesteps: &'a [u32],
    tiles: usize,
    tile: [usize; 2],
    overlap: [usize; 2],
    /// First row of each row of tiles, and first column of each column, in pixels of the input.
    tile_starts: [&'a [usize]; 2],
    /// Of the run: from the picture in memory to the encoding of its result's last row.
    seconds: f64,
    gmac: f64,
    /// Of these, what an earlier run that was resumed had done.
    gmac_before: f64,
    gmac_per_s: f64,
    arena_bytes: usize,
    weight_bytes: usize,
    pipeline_bytes: usize,
    /// The file in which the latent was; 0 where it was in memory.
    scratch_bytes: usize,
    /// What the process was to have at most.
    planned_bytes: Option<usize>,
    peak_rss_bytes: Option<u64>,
}

/// Checks everything that can be checked, upscales, writes, reports.
///
/// # Errors
/// Every way in which the picture, the model, the options, the memory or the output can be unfit;
/// [`Interrupted`].
pub(crate) fn run(args: &Args, interrupt: &Interrupt) -> anyhow::Result<()> {
    if let Some(size) = args.frames {
        return frames::run(args, size, interrupt);
    }
    if args.output_format.is_some() {
        return Err(UsageError("--output-format is for --frames".to_owned()).into());
    }
    if [&args.input, &args.output].into_iter().any(|path| path == Path::new(STANDARD)) {
        return Err(UsageError(
            "- stands for a stream of frames, whose size --frames says; name a file for a picture"
                .to_owned(),
        )
        .into());
    }
    let encoding = Encoding::of(&args.output, args.quality)?;
    output::check(&args.output, args.overwrite)?;
    let resume = resume(args)?;
    let mut input = picture::read_within(&args.input, args.memory)?;
    let model = bundled::open(args.model.as_deref(), args.weights)?;
    let options = options(args)?;
    let size = (input.width as usize, input.height as usize);
    let plan = Plan::new(&model, size.0, size.1, &options)?;
    let [height, width] = result_size(&plan, &args.input)?;
    encoding.can_hold(width, height, input.opacity.is_some())?;
    let backend = super::cpu(args.threads)?;
    interrupt.check()?;
    let deep = matches!(input.rgb, Samples::Sixteen(_)) && encoding == Encoding::Png;
    let opacity = input.opacity.is_some();
    let form = Form { width, height, deep, opacity, icc: input.icc.take() };
    let plan = match &resume {
        None => plan,
        Some(resume) => plan.going_on(resume),
    };
    let may_take = |encoding| budget(&input, &options, &form, encoding, args);
    let plan = plan.within(&backend, &may_take(encoding)).map_err(|e| match (&e, encoding) {
        (PipelineError::Budget { .. }, Encoding::WebP) => instead_of_webp(e, || {
            let plan = Plan::new(&model, size.0, size.1, &options)?;
            plan.within(&backend, &may_take(Encoding::Png))
        }),
        _ => e.into(),
    })?;
    memory::warn_of_scratch(&plan, &options);
    let opacity = input.opacity.take().map(|a| {
        Enlarger::new(a, (input.width, input.height), (width, height))
            .ok_or_else(|| anyhow!("the opacity channel has another size than the picture"))
    });
    let target = Target {
        path: args.output.clone(),
        overwrite: args.overwrite,
        // A resume file is for one run at a time.
        alone: resume.is_some(),
    };
    let mut result = Sink::new(target, encoding, form, opacity.transpose()?)?;
    // A row that cannot be written ends the run, before its next tile.
    let failure = RefCell::new(None);
    let mut progress = Progress::new("upscale", Unit::Macs);
    let start = Instant::now();
    let report = {
        let pixels = match &input.rgb {
            Samples::Eight(v) => Pixels::Rgb8(v),
            Samples::Sixteen(v) => Pixels::Rgb16(v),
        };
        let picture = pipeline::Picture { width: size.0, height: size.1, pixels };
        let on_progress = &mut |p: &pipeline::Progress| {
            progress.at(p.done, p.total, &next(p));
            let end = interrupt.raised() || failure.borrow().is_some();
            if end { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let sink = &mut |_, row: &[f32]| {
            let mut failure = failure.borrow_mut();
            if failure.is_none() {
                *failure = result.put(row).err();
            }
        };
        let ran = match &resume {
            None => plan.run(&backend, picture, on_progress, sink),
            Some(resume) => plan.resume(&backend, picture, resume, on_progress, sink),
        };
        if let Some(e) = failure.take() {
            return Err(e);
        }
        ran.map_err(|e| match (e, &resume) {
            (PipelineError::Cancelled, None) => anyhow::Error::from(Interrupted),
            (PipelineError::Cancelled, Some(resume)) => Stopped(format!(
                "no output was written; run the same command again to go on from {}",
                resume.path().display()
            ))
            .into(),
            (other, _) => other.into(),
        })?
    };
    let seconds = start.elapsed().as_secs_f64();
    drop(progress);

    result.finish(|| Ok(interrupt.check()?))?;
    if let Some(resume) = &resume {
        resume.remove()?;
    }

    let report = Report {
        input: &args.input,
        output: &args.output,
        model: model.name(),
        precision: model.manifest().precision.dtype().name(),
        input_size: [input.height, input.width],
        output_size: [height, width],
        backend: &report.backend,
        isa: &report.isa,
        threads: report.threads,
        seed: report.seed,
        steps: report.steps,
        eta: report.eta,
        spacing: report.spacing,
        consistency: report.consistency,
        timesteps: &report.timesteps,
        tiles: report.tiles,
        tile: report.tile,
        overlap: report.overlap,
        tile_starts: [plan.grid().rows.starts(), plan.grid().cols.starts()],
        seconds,
        gmac: report.gmac,
        gmac_before: report.gmac_before,
        gmac_per_s: (report.gmac - report.gmac_before) / seconds,
        arena_bytes: report.arena_bytes,
        weight_bytes: report.weight_bytes,
        pipeline_bytes: report.pipeline_bytes,
        scratch_bytes: report.scratch_bytes,
        planned_bytes: plan.strategy().map(Strategy::peak),
        peak_rss_bytes: peak_rss_bytes(),
    };
    if args.json { say_json(&report) } else { Ok(say(&describe(&report))?) }
}

/// Height and width of the result, within what is made.
pub(crate) fn result_size(plan: &Plan<'_>, input: &Path) -> Result<[u32; 2], PictureError> {
    let [height, width] = plan.output_size();
    let pixels = height as u64 * width as u64;
    match (u32::try_from(height), u32::try_from(width)) {
        (Ok(h), Ok(w)) if pixels <= MAX_RESULT_PIXELS => Ok([h, w]),
        _ => Err(PictureError::Refused {
            path: input.to_owned(),
            why: format!(
                "the result would have {width}x{height} pixels, {} megapixels of at most {}; crop or shrink it first",
                pixels / 1_000_000,
                MAX_RESULT_PIXELS / 1_000_000
            ),
        }),
    }
}

/// What the run may take, and what the process has beside it, now that the picture is in memory.
fn budget(
    input: &Picture,
    options: &Options,
    form: &Form,
    encoding: Encoding,
    args: &Args,
) -> Budget {
    let size = (input.width, input.height);
    let mut caller = picture::caller(input.kind(), size, form, encoding);
    let tensors = options.noise.iter().flat_map(|n| [Some(&n.initial), n.eta.as_ref()]).flatten();
    let noise: usize = tensors.map(|t| size_of_val(&t.data[..])).sum();
    caller.input += noise;
    Budget {
        limit: args.memory,
        base: memory::base_bytes(input.bytes() + noise),
        caller,
        so_far: memory::so_far(),
        mode: if args.resume.is_some() { Mode::Resumed } else { Mode::Once },
    }
}

fn options(args: &Args) -> anyhow::Result<Options> {
    Ok(Options {
        steps: args.steps,
        eta: args.eta,
        seed: args.seed,
        spacing: args.spacing,
        consistency: args.consistency,
        tile: args.tile,
        overlap: args.overlap,
        tiling: args.tiling,
        norms: args.norms,
        noise: args.noise.as_deref().map(read_noise).transpose()?,
        scratch: scratch(args)?,
    })
}

/// Where the latent may stand instead of in memory. A stream's output is often no file, and a latent that is
/// written for each frame is worth asking for.
fn scratch(args: &Args) -> anyhow::Result<Option<Scratch>> {
    let folder = match (&args.scratch, &args.frames) {
        (Some(_), _) if args.memory.is_none() => {
            let why = "--scratch is for --memory, without which the latent stays in memory";
            return Err(UsageError(why.to_owned()).into());
        }
        (Some(folder), _) if !folder.is_dir() => {
            let source = std::io::Error::other("it is not a folder; create it first");
            return Err(FileError { action: "use", path: folder.clone(), source }.into());
        }
        (Some(folder), _) => folder,
        (None, Some(_)) => return Ok(None),
        (None, None) => persist::folder(&args.output),
    };
    Ok(Some(Scratch::new(folder)))
}

/// What there is to do about a refusal where the result was to be a WebP; `png` plans the same for a PNG.
fn instead_of_webp<'a>(
    refused: PipelineError,
    png: impl FnOnce() -> Result<Plan<'a>, PipelineError>,
) -> anyhow::Error {
    let suffices = match png() {
        Ok(_) => "this memory".to_owned(),
        Err(PipelineError::Budget { smallest, .. }) => format!("--memory {}", advised(smallest)),
        Err(_) => return refused.into(),
    };
    anyhow::Error::from(refused).context(format!(
        "a WebP is collected in memory before it is written; end the output in .png, which is written row by row: {suffices} then suffices"
    ))
}

/// The file that keeps the run. The output must be another: it would be replaced, then removed.
fn resume(args: &Args) -> Result<Option<Resume>, UsageError> {
    let every = args.resume_every.map(Duration::try_from_secs_f64);
    let path = match (&args.resume, &every) {
        (Some(path), None | Some(Ok(_))) => path,
        (None, None) => return Ok(None),
        (None, Some(_)) => {
            return Err(UsageError("--resume-every is for --resume".to_owned()));
        }
        (_, Some(Err(_))) => {
            return Err(UsageError("--resume-every is a number of seconds, 0 or more".to_owned()));
        }
    };
    let place = |path: &Path| {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new(".")).canonicalize();
        folder.ok().zip(path.file_name().map(std::ffi::OsStr::to_owned))
    };
    if path == &args.output || (place(path).is_some() && place(path) == place(&args.output)) {
        return Err(UsageError(format!(
            "--resume and the output are both {}; name another file",
            path.display()
        )));
    }
    let resume = Resume::new(path);
    Ok(Some(match every {
        Some(Ok(every)) => resume.every(every),
        _ => resume,
    }))
}

fn read_noise(path: &Path) -> anyhow::Result<GivenNoise> {
    let mut initial = None;
    let mut eta = None;
    for (name, t) in tensors::read(path)? {
        let tensor = Some(NoiseTensor { shape: t.shape, data: t.data });
        match name.as_str() {
            "noise" => initial = tensor,
            "eta_noise" => eta = tensor,
            _ => {
                return Err(UsageError(format!(
                    "{} holds tensor {}; noise files hold noise and, if need be, eta_noise",
                    path.display(),
                    crate::console::plain(&name)
                ))
                .into());
            }
        }
    }
    let initial = initial
        .ok_or_else(|| UsageError(format!("{} holds no tensor named noise", path.display())))?;
    Ok(GivenNoise { initial, eta })
}

/// What comes next, in words.
fn next(p: &pipeline::Progress) -> String {
    if p.done == p.total {
        return String::new();
    }
    let mut text = match p.stage {
        Stage::Denoise => format!("step {} of {}", p.step + 1, p.steps),
        Stage::Decode => "decoding".to_owned(),
    };
    if p.tiles > 1 {
        text.push_str(&format!(", tile {} of {}", p.tile + 1, p.tiles));
    }
    text
}

fn describe(r: &Report<'_>) -> String {
    let [h, w] = r.output_size;
    let tiles = if r.tiles > 1 { format!(", {} tiles", r.tiles) } else { String::new() };
    let peak = r.peak_rss_bytes.map_or(String::new(), |p| format!(", peak {}", bytes(p)));
    format!(
        "{}  {w}x{h}, {} steps{tiles}, {:.1} s, {:.1} GMAC/s on {} with {} threads{peak}",
        r.output.display(),
        r.steps,
        r.seconds,
        r.gmac_per_s,
        r.isa,
        r.threads
    )
}
