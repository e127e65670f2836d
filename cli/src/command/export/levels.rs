//! Which levels of a mixed model stay in f16: trial exports, and the pictures they make.
//!
//! Lives here: the way from a folder of pictures to the levels, and what is said of them. Never here: the search
//! (`latile_export::levels`), or what a picture loses (`latile_calibration::judge`).

use super::Job;
use super::quantized::{Float, cancelled};
use crate::command::calibrate;
use crate::console::{plain, remark};
use crate::progress::{Progress, Unit};
use latile_calibration::{Judge, Options, Verdict};
use latile_export::levels::{self, Choice, KeptLevel, Limits};
use latile_export::{ExportOptions, Glob};
use latile_runtime::format::{Model, Precision};
use std::path::Path;

/// The levels that stay in f16 so that pictures lose at most `max_loss` dB; `all` exports the model with none.
///
/// # Errors
/// Those of an export, and of a run of a model.
pub(super) fn kept(
    job: &Job<'_>,
    float: &Float,
    all: &ExportOptions,
    calibration: &Options,
    max_loss: f64,
) -> anyhow::Result<Vec<KeptLevel>> {
    let path = float.folder.path().join("trial.latile");
    let steps = {
        let model = Model::open(&float.path)?;
        calibration.steps.min(model.manifest().defaults.steps)
    };
    let sampling = Options { steps, ..calibration.clone() };
    let others = float
        .set
        .others(&float.pictures, latile_calibration::judge::PICTURES, &mut |p| calibrate::decode(p))
        .map_err(cancelled)?;
    if others.is_none() {
        remark(
            "note: the folder has no picture beyond those that ranges were made of, so the model is judged on these, which flatters it; put four more into it",
        );
    }
    let set = others.as_ref().unwrap_or(&float.set);
    let judge = {
        let mut progress = Progress::new("judge", Unit::Macs);
        let mut tell = |picture: &str, stage: &str, done, total| {
            progress.at(done, total, &format!("in float, {}, {stage}", plain(picture)));
            job.go_on()
        };
        let model = Model::open(&float.path)?;
        Judge::new(&model, &float.backend, set, &sampling, &mut tell).map_err(cancelled)?
    };
    let mut progress = Progress::new("judge", Unit::Macs);
    let (mut done, mut levels) = (0, Vec::new());
    let mut verdict_on = |path: &Path, what: &str, most: u64| -> anyhow::Result<Verdict> {
        let model = Model::open(path)?;
        let macs = judge.macs(&model)?;
        let verdict = judge
            .verdict(&model, &mut |picture, stage, now, _| {
                let next = format!("{what}, {}, {stage}", plain(picture));
                progress.at(done + now, most * macs, &next);
                job.go_on()
            })
            .map_err(cancelled)?;
        done += macs;
        Ok(verdict)
    };
    let export = |kept: &[Glob]| {
        let mut options =
            ExportOptions { precision: Precision::Int8, overwrite: true, ..all.clone() };
        if let Some(quantization) = &mut options.quantization {
            quantization.keep_f16.extend_from_slice(kept);
        }
        job.export(&path, &options).map(drop)
    };
    export(&[])?;
    levels.extend(levels::levels(&Model::open(&path)?, sampling.steps)?);
    let most = levels::verdicts(levels.len());
    let choice = levels::choose(&levels, &Limits::of_loss(max_loss), &mut |kept| {
        let globs: Vec<Glob> = kept.iter().map(|&i| levels[i].glob.clone()).collect();
        export(&globs)?;
        let what = format!("{} of {} levels in f16", kept.len(), levels.len());
        verdict_on(&path, &what, most)
    })?;
    std::fs::remove_file(&path)?;
    drop(progress);
    remark(&said(&choice, max_loss));
    Ok(choice.kept)
}

/// What came of a search, in words.
fn said(choice: &Choice, max_loss: f64) -> String {
    let lost = match &choice.verdict {
        Some(v) => format!(
            "its pictures lose {:.3} dB against the truth, and are {:.1} dB from the float model's on average, {:.1} at worst",
            v.loss(),
            v.paired(),
            v.worst_paired()
        ),
        None => format!(
            "with any level in int8 its pictures lose more than {max_loss} dB, or differ too much"
        ),
    };
    if choice.kept.is_empty() {
        return format!("note: all levels are int8: {lost}");
    }
    let globs: Vec<String> =
        choice.kept.iter().map(|l| format!("--keep-f16 '{}'", plain(l.glob.text()))).collect();
    format!("note: {lost}; the same with a table: --precision int8 {}", globs.join(" "))
}
