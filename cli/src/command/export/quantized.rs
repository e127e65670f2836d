//! The way to an int8 model: float export, calibration, int8 export, comparison, report.

use super::{Args, Job, levels};
use crate::command::calibrate;
use crate::console::{plain, remark};
use crate::exit::{Interrupted, UsageError};
use crate::output;
use crate::picture;
use crate::progress::{Progress, Unit};
use latile_calibration::{CalibrationError, Comparison, Options, PictureSet, Table};
use latile_cpu::session::CpuBackend;
use latile_export::quantize::KEEP_SHARE;
use latile_export::report::{Pictures, QualityReport};
use latile_export::{ExportOptions, Glob, Mixed, Quantization, Summary, Winograd};
use latile_runtime::format::{Model, Precision};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// What the arguments say about quantization, checked.
pub(super) struct Request<'a> {
    from: From<'a>,
}

/// Where activation ranges come from.
enum From<'a> {
    /// Pictures that the float model is run on.
    Pictures(&'a Path),
    /// A table made before.
    Table(&'a Path),
}

/// The float model of a folder's calibration, what it was run on, and with what.
pub(super) struct Float {
    /// Removed, with all that is in it, when dropped.
    pub(super) folder: tempfile::TempDir,
    pub(super) path: PathBuf,
    /// The folder of pictures.
    pub(super) pictures: PathBuf,
    pub(super) set: PictureSet,
    pub(super) backend: CpuBackend,
}

impl<'a> Request<'a> {
    /// None where the model is to be a float one.
    ///
    /// # Errors
    /// [`UsageError`] for options that do not go together, and outputs that cannot be written.
    pub(super) fn of(args: &'a Args) -> anyhow::Result<Option<Self>> {
        let usage = |why: &str| Err(UsageError(why.to_owned()).into());
        let given = [
            ("--calibration", args.calibration.is_some()),
            ("--method", args.method.is_some()),
            ("--keep-f16", !args.keep_f16.is_empty()),
            ("--winograd", args.winograd.is_some()),
            ("--keep-direct", !args.keep_direct.is_empty()),
            ("--max-loss", args.max_loss.is_some()),
            ("--keep-share", args.keep_share.is_some()),
            ("--min-sqnr", args.min_sqnr.is_some()),
            ("--table", args.table.is_some()),
            ("--report", args.report.is_some()),
            ("--report-json", args.report_json.is_some()),
            ("--threads", args.threads.is_some()),
        ];
        let mixed = args.precision == Precision::Mixed;
        if !mixed && args.precision != Precision::Int8 {
            return match given.iter().find(|g| g.1) {
                Some((name, _)) => {
                    usage(&format!("{name} is for --precision int8 and --precision mixed"))
                }
                None => Ok(None),
            };
        }
        let Some(path) = &args.calibration else {
            return usage(
                "an int8 model needs activation ranges, which are measured and never guessed: give --calibration a folder of pictures, or a table that latile calibrate made",
            );
        };
        let choices = [
            ("--max-loss", args.max_loss.is_some()),
            ("--keep-share", args.keep_share.is_some()),
            ("--min-sqnr", args.min_sqnr.is_some()),
        ];
        let chosen: Vec<&str> = choices.iter().filter(|c| c.1).map(|c| c.0).collect();
        match chosen[..] {
            [name, ..] if !mixed => {
                return usage(&format!(
                    "{name} is for --precision mixed; name layers by --keep-f16 instead"
                ));
            }
            [one, other, ..] => {
                return usage(&format!(
                    "{one} and {other} choose in different ways; give one of them"
                ));
            }
            _ => {}
        }
        if args.max_loss.is_some_and(|db| !(0.0..=10.0).contains(&db)) {
            return usage("--max-loss can be 0 to 10 dB");
        }
        if args.keep_share.is_some_and(|share| !(0.0..=100.0).contains(&share)) {
            return usage("--keep-share can be 0 to 100 percent");
        }
        if args.min_sqnr.is_some_and(|db| !(0.0..=100.0).contains(&db)) {
            return usage("--min-sqnr can be 0 to 100 dB");
        }
        if args.winograd == Some(Winograd::Off) && !args.keep_direct.is_empty() {
            return usage(
                "--winograd off leaves every convolution direct; --keep-direct names some of them",
            );
        }
        let from = if path.is_dir() { From::Pictures(path) } else { From::Table(path) };
        if let (From::Table(_), Some(_)) = (&from, &args.table) {
            return usage(
                "--table keeps the table of a folder of pictures; --calibration names a table already",
            );
        }
        if let (From::Table(_), Some(_)) = (&from, args.max_loss) {
            return usage(
                "--max-loss is measured on pictures, and --calibration names a table: name the folder, or the levels that stay in f16 by --keep-f16",
            );
        }
        let outputs = [Some(&args.output), args.table.as_ref(), args.report.as_ref()];
        let outputs: Vec<&PathBuf> =
            outputs.into_iter().chain([args.report_json.as_ref()]).flatten().collect();
        for (i, path) in outputs.iter().enumerate() {
            if outputs[..i].contains(path) {
                return usage(&format!("{} is named for two outputs", path.display()));
            }
            output::check(path, args.overwrite)?;
        }
        Ok(Some(Self { from }))
    }

    /// Does all of it. The second result is the quality report as JSON, where one was asked for.
    ///
    /// # Errors
    /// Those of an export and of a calibration; whatever the end, the float model is removed.
    pub(super) fn run(
        self,
        args: &Args,
        job: &Job<'_>,
    ) -> anyhow::Result<(Summary, Option<serde_json::Value>)> {
        let calibration = Options::default();
        let (mut table, float) = match self.from {
            From::Table(path) => (Table::read(path)?, None),
            From::Pictures(folder) => {
                let (table, float) = calibrated(args, job, folder, &calibration)?;
                (table, Some(float))
            }
        };
        let mixed = match (job.options.precision, args.min_sqnr, &float) {
            (Precision::Mixed, Some(db), _) => Some(Mixed::MinSqnr(db)),
            (Precision::Mixed, None, Some(float)) if args.keep_share.is_none() => {
                let all = quantizing(args, job, table.clone(), None);
                let limit = args.max_loss.unwrap_or(latile_export::levels::MAX_LOSS_DB);
                Some(Mixed::Levels(levels::kept(job, float, &all, &calibration, limit)?))
            }
            (Precision::Mixed, None, float) => {
                by_share(args, job, float.as_ref(), &mut table, &calibration)?
            }
            _ => None,
        };
        let options = quantizing(args, job, table, mixed);
        // Invariant: it was put there above.
        let Some(Quantization { table, .. }) = &options.quantization else {
            return Ok((job.export(&args.output, &options)?, None));
        };
        let wanted = args.report.is_some() || args.report_json.is_some();
        let (summary, quality) = match (&float, wanted) {
            (Some(float), true) => {
                // The output appears once all that can fail, or be interrupted, is done.
                let path = float.folder.path().join("int8.latile");
                let summary = job.export(&path, &options)?;
                let measured = compared(job, float, &path, &calibration)?;
                let quality = report(args, &summary, table, Some(&measured))?;
                output::write(&args.output, args.overwrite, |file| {
                    std::io::copy(&mut File::open(&path)?, file)?;
                    Ok(job.interrupt.check()?)
                })?;
                (Summary { path: args.output.clone(), ..summary }, Some(quality))
            }
            (None, true) => {
                remark(
                    "note: the report holds estimates alone; --calibration with a folder of pictures compares the models too",
                );
                let summary = job.export(&args.output, &options)?;
                let quality = report(args, &summary, table, None)?;
                (summary, Some(quality))
            }
            (_, false) => (job.export(&args.output, &options)?, None),
        };
        if let Some(path) = &args.table {
            table.write(path, args.overwrite)?;
        }
        let json = match quality {
            Some(quality) => Some(quality.write(args)?),
            None => None,
        };
        Ok((summary, json))
    }
}

/// Layers chosen one by one.
fn by_share(
    args: &Args,
    job: &Job<'_>,
    float: Option<&Float>,
    table: &mut Table,
    calibration: &Options,
) -> anyhow::Result<Option<Mixed>> {
    let unmeasured = table.components.iter().all(|c| c.layers.iter().all(|l| l.loss.is_none()));
    match float {
        Some(float) => measured(args, job, float, table, calibration)?,
        None if unmeasured => remark(
            "note: the table does not say what each layer adds to the result, so layers are chosen by estimates, which may make a worse picture than int8 alone; --calibration with a folder of pictures chooses by pictures, and says by which --keep-f16 to repeat that with a table",
        ),
        None => {}
    }
    let share = args.keep_share.map_or(KEEP_SHARE, |percent| percent / 100.0);
    Ok(Some(Mixed::Share(share)))
}

/// The job's options with those of its quantization.
fn quantizing(args: &Args, job: &Job<'_>, table: Table, mixed: Option<Mixed>) -> ExportOptions {
    let quantization = Quantization {
        table,
        method: args.method.unwrap_or_default(),
        keep_f16: args.keep_f16.iter().map(Glob::new).collect(),
        mixed,
        winograd: args.winograd.unwrap_or_default(),
        keep_direct: args.keep_direct.iter().map(Glob::new).collect(),
    };
    ExportOptions { quantization: Some(quantization), ..job.options.clone() }
}

/// Finds out what each int8 layer adds to the result's noise, and puts it into `table`.
fn measured(
    args: &Args,
    job: &Job<'_>,
    float: &Float,
    table: &mut Table,
    options: &Options,
) -> anyhow::Result<()> {
    let path = float.folder.path().join("all-int8.latile");
    let int8 = ExportOptions {
        precision: Precision::Int8,
        overwrite: true,
        ..quantizing(args, job, table.clone(), None)
    };
    job.export(&path, &int8)?;
    let (model, int8) = (Model::open(&float.path)?, Model::open(&path)?);
    let mut progress = Progress::new("measure", Unit::Macs);
    let runs = latile_calibration::trajectory::record(
        &model,
        &float.backend,
        &float.set,
        options,
        &mut |picture, stage, done, total| {
            progress.at(done, total, &format!("{}, {stage}", plain(picture)));
            job.go_on()
        },
    )
    .map_err(cancelled)?;
    drop(progress);
    let mut progress = Progress::new("measure", Unit::Runs);
    latile_export::sensitivity::measure(
        &model,
        &int8,
        &float.backend,
        &runs,
        table,
        float.folder.path(),
        &mut |role, layer, done, total| {
            progress.at(done, total, &format!("{role} without {}", plain(layer)));
            job.go_on()
        },
    )
    .map_err(|e| match e {
        latile_export::ExportError::Cancelled => anyhow::Error::from(Interrupted),
        other => other.into(),
    })
}

/// A quality report, made but not yet written.
struct Quality {
    json: serde_json::Value,
    html: String,
}

impl Quality {
    /// Writes the files that were asked for; gives the JSON.
    fn write(self, args: &Args) -> anyhow::Result<serde_json::Value> {
        if let Some(path) = &args.report_json {
            let text = serde_json::to_string_pretty(&self.json)? + "\n";
            output::write(path, args.overwrite, |file| Ok(file.write_all(text.as_bytes())?))?;
        }
        if let Some(path) = &args.report {
            output::write(path, args.overwrite, |file| Ok(file.write_all(self.html.as_bytes())?))?;
        }
        Ok(self.json)
    }
}

fn report(
    args: &Args,
    summary: &Summary,
    table: &Table,
    measured: Option<&Comparison>,
) -> anyhow::Result<Quality> {
    let name = args.name.as_deref().unwrap_or(&table.model.name);
    let report = QualityReport::new(name, summary, table, measured);
    let pictures = measured.map(|m| Pictures::new(&m.example, picture::png)).transpose()?;
    // By way of text, which has a float's shortest digits.
    let json = serde_json::from_str(&serde_json::to_string(&report)?)?;
    Ok(Quality { json, html: report.html(pictures.as_ref()) })
}

/// Exports the float model beside the output and calibrates it.
fn calibrated(
    args: &Args,
    job: &Job<'_>,
    folder: &Path,
    options: &Options,
) -> anyhow::Result<(Table, Float)> {
    let name = args.output.file_name().unwrap_or_default().to_string_lossy();
    let beside = match args.output.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let scratch = tempfile::Builder::new()
        .prefix(&format!(".{name}."))
        .suffix(".float")
        .tempdir_in(beside)?;
    let path = scratch.path().join("model.latile");
    let float = ExportOptions { precision: Precision::F32, ..job.options.clone() };
    job.export(&path, &float)?;
    let model = Model::open(&path)?;
    let set =
        latile_calibration::read_pictures(&model, folder, options, &mut |p| calibrate::decode(p))?;
    for s in &set.skipped {
        remark(&format!("skipped: {}: {}", plain(&s.name), plain(&s.why)));
    }
    if !set.skipped.is_empty() {
        remark(&format!(
            "calibrating with {} pictures, {} skipped",
            set.samples.len(),
            set.skipped.len()
        ));
    }
    job.interrupt.check()?;
    let backend = crate::command::cpu(args.threads)?;
    let mut progress = Progress::new("calibrate", Unit::Macs);
    let table = latile_calibration::calibrate(&model, &backend, &set, options, &mut |p| {
        let next = format!("pass {} of 2, {}, {}", p.pass, plain(p.picture), p.stage);
        progress.at(p.done, p.total, &next);
        job.go_on()
    })
    .map_err(cancelled)?;
    Ok((table, Float { folder: scratch, path, pictures: folder.to_owned(), set, backend }))
}

fn compared(
    job: &Job<'_>,
    float: &Float,
    int8: &Path,
    options: &Options,
) -> anyhow::Result<Comparison> {
    let (a, b) = (Model::open(&float.path)?, Model::open(int8)?);
    let mut progress = Progress::new("compare", Unit::Macs);
    latile_calibration::compare(
        &a,
        &b,
        &float.backend,
        &float.set,
        options,
        &mut |picture, stage, done, total| {
            progress.at(done, total, &format!("{}, {stage}", plain(picture)));
            job.go_on()
        },
    )
    .map_err(cancelled)
}

/// A calibration's error, an interruption as such.
pub(super) fn cancelled(e: CalibrationError) -> anyhow::Error {
    match e {
        CalibrationError::Cancelled => Interrupted.into(),
        other => other.into(),
    }
}
