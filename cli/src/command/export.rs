//! `latile export`: a trained checkpoint becomes one `.latile` file.

mod levels;
mod quantized;

use crate::console::{bytes, count, remark, say, say_json};
use crate::exit::{Interrupted, UsageError};
use crate::interrupt::Interrupt;
use crate::memory::peak_rss_bytes;
use crate::output;
use crate::progress::{Progress, Unit};
use argh::FromArgs;
use latile_calibration::Method;
use latile_export::compvis::Ema;
#[cfg(feature = "onnx")]
use latile_export::onnx::{OnnxParts, export_onnx};
use latile_export::{ExportError, ExportOptions, Summary, Winograd};
use latile_runtime::format::Precision;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Turns a trained checkpoint into one .latile file.
#[derive(FromArgs, Debug)]
#[argh(
    subcommand,
    name = "export",
    help_triggers("-h", "--help"),
    example = "{command_name} ldm-super-resolution-4x-openimages -o sr.latile --precision f16\n{command_name} model.ckpt -o sr.latile --precision f32 --name bsr_sr\n{command_name} ldm-folder -o sr8.latile --precision int8 --calibration photos --report sr8.html",
    note = "A checkpoint is a diffusers folder (safetensors or pytorch .bin weights) or a CompVis\n.ckpt or .safetensors file. Pickles are read without executing anything in them. ONNX graphs\ncome one by one, by --unet and --decoder, where the program was built with them.\n\nAn int8 model needs to know what its layers read: --calibration takes a folder of pictures, which\nare run through the float model, or a table that latile calibrate made, with more to choose from."
)]
pub(crate) struct Args {
    /// a diffusers folder, or a CompVis .ckpt or .safetensors file
    #[argh(positional, arg_name = "CHECKPOINT")]
    pub(crate) checkpoint: Option<PathBuf>,

    /// an ONNX U-Net, in place of a checkpoint
    #[argh(option, arg_name = "file.onnx")]
    pub(crate) unet: Option<PathBuf>,

    /// an ONNX decoder, in place of a checkpoint
    #[argh(option, arg_name = "file.onnx")]
    pub(crate) decoder: Option<PathBuf>,

    /// an ONNX encoder, in place of a checkpoint
    #[argh(option, arg_name = "file.onnx")]
    pub(crate) encoder: Option<PathBuf>,

    /// with ONNX files: the model's scheduler_config.json; by default LDM's own noise schedule
    #[argh(option, arg_name = "file.json")]
    pub(crate) scheduler: Option<PathBuf>,

    /// with ONNX files: the latent's scaling_factor (default 1)
    #[argh(option, arg_name = "x", default = "1.0")]
    pub(crate) latent_scale: f32,

    /// with ONNX files: the latent's shift_factor (default 0)
    #[argh(option, arg_name = "x", default = "0.0")]
    pub(crate) latent_shift: f32,

    /// the .latile file to write
    #[argh(option, short = 'o', arg_name = "file")]
    pub(crate) output: PathBuf,

    /// how weights and activations are stored: f32, f16, int8, or mixed, which is int8 but for the
    /// layers that lose most by it (default f16)
    #[argh(option, from_str_fn(precision), default = "Precision::F16", arg_name = "type")]
    pub(crate) precision: Precision,

    /// the model's name; by default the checkpoint's
    #[argh(option, arg_name = "text")]
    pub(crate) name: Option<String>,

    /// its licence, as an SPDX expression; by default what the checkpoint's card says
    #[argh(option, arg_name = "spdx")]
    pub(crate) license: Option<String>,

    /// DDIM steps that upscale takes by default
    #[argh(option, arg_name = "n")]
    pub(crate) steps: Option<u32>,

    /// DDIM's eta that upscale takes by default
    #[argh(option, arg_name = "x")]
    pub(crate) eta: Option<f32>,

    /// how far upscale makes the result consistent with its input by default, 0 to 1 (default 0)
    #[argh(option, arg_name = "x")]
    pub(crate) consistency: Option<f32>,

    /// for int8 and mixed: a folder of pictures to calibrate with, or a calibration table
    #[argh(option, arg_name = "path")]
    pub(crate) calibration: Option<PathBuf>,

    /// how activation ranges are chosen: mse, percentile, entropy or minmax (default mse)
    #[argh(option, from_str_fn(method), arg_name = "name")]
    pub(crate) method: Option<Method>,

    /// keep layers of these names in f16, such as unet.up_blocks.3.*; may be given again
    #[argh(option, arg_name = "glob")]
    pub(crate) keep_f16: Vec<String>,

    /// for int8 and mixed: which 3 x 3 convolutions are computed by Winograd's algorithms, which take 4/9 or 2/3 of
    /// the multiply-adds and round more: auto (those where that adds little noise), rows (those by 2/3 alone), off or
    /// all (default auto)
    #[argh(option, from_str_fn(winograd), arg_name = "which")]
    pub(crate) winograd: Option<Winograd>,

    /// leave convolutions of these names direct; may be given again
    #[argh(option, arg_name = "glob")]
    pub(crate) keep_direct: Vec<String>,

    /// for mixed: what pictures may lose of PSNR against the truth, in dB (default 0.1); the levels of the networks that
    /// cost most by int8 stay in f16, as many as that takes
    #[argh(option, arg_name = "dB")]
    pub(crate) max_loss: Option<f64>,

    /// for mixed, in place of --max-loss: how much of each network's work may stay in f16, in percent; what stays
    /// are the layers that add most noise to the network's result for their work
    #[argh(option, arg_name = "percent")]
    pub(crate) keep_share: Option<f64>,

    /// for mixed, in place of --max-loss: keep layers in f16 whose own estimated signal-to-noise ratio
    /// is less
    #[argh(option, arg_name = "dB")]
    pub(crate) min_sqnr: Option<f64>,

    /// write the calibration table too, where a folder was given
    #[argh(option, arg_name = "file.json")]
    pub(crate) table: Option<PathBuf>,

    /// write a quality report, one HTML file that needs nothing else; float and int8 model are compared
    /// where a folder was given
    #[argh(option, arg_name = "file.html")]
    pub(crate) report: Option<PathBuf>,

    /// write the quality report as JSON
    #[argh(option, arg_name = "file.json")]
    pub(crate) report_json: Option<PathBuf>,

    /// threads that calibrate, by default one for each core
    #[argh(option, arg_name = "n")]
    pub(crate) threads: Option<usize>,

    /// keep the autoencoder's encoder, which super-resolution does not need
    #[argh(switch)]
    pub(crate) with_encoder: bool,

    /// which U-Net weights of a CompVis checkpoint: auto (averaged where complete), yes or no (default auto)
    #[argh(option, from_str_fn(ema), default = "Ema::Auto", arg_name = "which")]
    pub(crate) ema: Ema,

    /// replace the output if it exists
    #[argh(switch)]
    pub(crate) overwrite: bool,

    /// print one JSON object
    #[argh(switch)]
    pub(crate) json: bool,
}

/// What is exported.
enum Source<'a> {
    /// A folder or file that says itself what it is.
    Checkpoint(&'a Path),
    /// Components one by one.
    #[cfg(feature = "onnx")]
    Onnx(OnnxParts),
}

fn source(args: &Args) -> Result<Source<'_>, UsageError> {
    let onnx = [&args.unet, &args.decoder, &args.encoder];
    match (&args.checkpoint, onnx.iter().any(|f| f.is_some())) {
        (Some(_), false)
            if args.scheduler.is_some() || args.latent_scale != 1.0 || args.latent_shift != 0.0 =>
        {
            Err(UsageError(
                "--scheduler, --latent-scale and --latent-shift are for ONNX files; a CHECKPOINT says these itself"
                    .to_owned(),
            ))
        }
        (Some(path), false) => Ok(Source::Checkpoint(path)),
        (None, true) => onnx_source(args),
        (None, false) => Err(UsageError(
            "name a CHECKPOINT to export: a diffusers folder, or a CompVis .ckpt or .safetensors file"
                .to_owned(),
        )),
        (Some(_), true) => Err(UsageError(
            "a CHECKPOINT holds all its components; --unet, --decoder and --encoder go without one"
                .to_owned(),
        )),
    }
}

#[cfg(feature = "onnx")]
fn onnx_source(args: &Args) -> Result<Source<'_>, UsageError> {
    Ok(Source::Onnx(OnnxParts {
        unet: args.unet.clone(),
        decoder: args.decoder.clone(),
        encoder: args.encoder.clone(),
        scheduler: args.scheduler.clone(),
        scale: args.latent_scale,
        shift: args.latent_shift,
    }))
}

#[cfg(not(feature = "onnx"))]
fn onnx_source(_: &Args) -> Result<Source<'_>, UsageError> {
    Err(UsageError(
        "this program was built without ONNX; build it with `cargo build --release --features onnx`, which needs a C compiler, or export the checkpoint the graphs came from"
            .to_owned(),
    ))
}

fn precision(name: &str) -> Result<Precision, String> {
    match name {
        "f32" => Ok(Precision::F32),
        "f16" => Ok(Precision::F16),
        "int8" => Ok(Precision::Int8),
        "mixed" => Ok(Precision::Mixed),
        _ => Err("a precision is f32, f16, int8 or mixed".to_owned()),
    }
}

fn method(name: &str) -> Result<Method, String> {
    Method::ALL
        .into_iter()
        .find(|m| m.name() == name)
        .ok_or_else(|| "a method is mse, percentile, entropy or minmax".to_owned())
}

fn winograd(name: &str) -> Result<Winograd, String> {
    match name {
        "auto" => Ok(Winograd::Auto),
        "off" => Ok(Winograd::Off),
        "rows" => Ok(Winograd::Rows),
        "all" => Ok(Winograd::All),
        _ => Err("it can be auto, rows, off or all".to_owned()),
    }
}

fn ema(name: &str) -> Result<Ema, String> {
    match name {
        "auto" => Ok(Ema::Auto),
        "yes" => Ok(Ema::Yes),
        "no" => Ok(Ema::No),
        _ => Err("it can be auto, yes or no".to_owned()),
    }
}

/// What `--json` prints.
#[derive(serde::Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    summary: &'a Summary,
    /// The quality report, where one was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    quality: Option<serde_json::Value>,
    seconds: f64,
    peak_rss_bytes: Option<u64>,
}

/// Exports and reports.
///
/// # Errors
/// A checkpoint that cannot be read or is refused, an output that cannot be written; [`Interrupted`].
pub(crate) fn run(args: &Args, interrupt: &Interrupt) -> anyhow::Result<()> {
    if args.steps.is_some_and(|s| !(1..=1000).contains(&s)) {
        return Err(UsageError("--steps can be 1 to 1000".to_owned()).into());
    }
    if args.eta.is_some_and(|e| !(0.0..=1.0).contains(&e)) {
        return Err(UsageError("--eta can be 0 to 1".to_owned()).into());
    }
    if args.consistency.is_some_and(|c| !(0.0..=1.0).contains(&c)) {
        return Err(UsageError("--consistency can be 0 to 1".to_owned()).into());
    }
    let source = source(args)?;
    let quantized = quantized::Request::of(args)?;
    output::check(&args.output, args.overwrite)?;
    let options = ExportOptions {
        precision: args.precision,
        overwrite: args.overwrite,
        encoder: args.with_encoder || args.encoder.is_some(),
        name: args.name.clone(),
        license: args.license.clone(),
        steps: args.steps,
        eta: args.eta,
        consistency: args.consistency,
        ema: args.ema,
        ..ExportOptions::default()
    };
    let start = Instant::now();
    let job = Job { source, options, interrupt };
    let (summary, quality) = match quantized {
        None => (job.export(&args.output, &job.options)?, None),
        Some(request) => request.run(args, &job)?,
    };
    let seconds = start.elapsed().as_secs_f64();
    for note in &summary.notes {
        remark(&format!("note: {note}"));
    }
    if args.json {
        let peak_rss_bytes = peak_rss_bytes();
        return say_json(&Report { summary: &summary, quality, seconds, peak_rss_bytes });
    }
    let components: Vec<String> =
        summary.components.iter().map(|c| format!("{} {}", c.role, count(c.parameters))).collect();
    let int8 = summary.layers.iter().filter(|l| l.int8).count();
    let layers = match (
        summary.layers.len(),
        summary.layers.iter().filter(|l| l.winograd.is_some()).count(),
    ) {
        (0, _) => String::new(),
        (all, 0) => format!("; {int8} of {all} layers are int8"),
        (all, fewer) => {
            format!("; {int8} of {all} layers are int8, {fewer} by Winograd's algorithms")
        }
    };
    Ok(say(&format!(
        "{}  {}, {}, from {}: {} parameters{layers}",
        summary.path.display(),
        bytes(summary.bytes),
        name_of(summary.precision),
        summary.source,
        components.join(", ")
    ))?)
}

/// The precision as `--precision` takes it.
fn name_of(precision: Precision) -> &'static str {
    match precision {
        Precision::F32 => "f32",
        Precision::F16 => "f16",
        Precision::Int8 => "int8",
        Precision::Mixed => "mixed",
    }
}

/// A checkpoint to export, once or twice.
struct Job<'a> {
    source: Source<'a>,
    options: ExportOptions,
    interrupt: &'a Interrupt,
}

impl Job<'_> {
    /// Exports to `output`, with progress on stderr.
    fn export(&self, output: &Path, options: &ExportOptions) -> anyhow::Result<Summary> {
        let mut progress = Progress::new("export", Unit::Bytes);
        let mut on_progress = |p: latile_export::Progress| {
            progress.at(p.done, p.total, p.stage);
            self.go_on()
        };
        match &self.source {
            Source::Checkpoint(path) => {
                latile_export::export(path, output, options, &mut on_progress)
            }
            #[cfg(feature = "onnx")]
            Source::Onnx(files) => export_onnx(files, output, options, &mut on_progress),
        }
        .map_err(|e| match e {
            ExportError::Cancelled => anyhow::Error::from(Interrupted),
            other => other.into(),
        })
    }

    fn go_on(&self) -> ControlFlow<()> {
        if self.interrupt.raised() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}
