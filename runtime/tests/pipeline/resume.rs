//! Runs that are stopped anywhere and go on give the bits of runs that were not, and files that are not theirs
//! are refused.

use crate::fake::{Fake, Shaped};
use latile_runtime::format::Spacing;
use latile_runtime::pipeline::{
    Generator, GivenNoise, NoiseTensor, NormScope, Options, Picture, PipelineError, Pixels, Plan,
    Progress, Report, Resume, ResumeError, Stage,
};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

const SIZE: [usize; 2] = [11, 18];

/// A run that can be stopped.
struct Case {
    shaped: Shaped,
    options: Options,
    rgb: Vec<u8>,
    every: Duration,
}

impl Case {
    fn new(options: Options) -> Self {
        let mut g = Generator::new(2);
        Self {
            shaped: Shaped { consistency: 0.8, ..Shaped::default() },
            options,
            rgb: (0..SIZE[0] * SIZE[1] * 3).map(|_| g.next_u32() as u8).collect(),
            every: Duration::ZERO,
        }
    }

    /// Runs until callback `stop`, and what came of it.
    fn run(
        &self,
        fake: &Fake,
        resume: Option<&Path>,
        stop: usize,
    ) -> (Result<Report, PipelineError>, Vec<f32>) {
        let model = self.shaped.build();
        let plan = Plan::new(&model, SIZE[1], SIZE[0], &self.options).unwrap();
        let picture = Picture { width: SIZE[1], height: SIZE[0], pixels: Pixels::Rgb8(&self.rgb) };
        let (mut out, mut calls) = (Vec::new(), 0);
        let mut before = None::<Progress>;
        let on_progress = &mut |p: &Progress| {
            if let Some(before) = before {
                assert!(p.done > before.done && p.done <= p.total, "{before:?} {p:?}");
            }
            before = Some(*p);
            calls += 1;
            if calls > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let sink = &mut |y, row: &[f32]| {
            assert_eq!(out.len(), y * row.len());
            out.extend_from_slice(row);
        };
        let result = match resume {
            None => plan.run(fake, picture, on_progress, sink),
            Some(path) => {
                let resume = Resume::new(path).every(self.every);
                plan.resume(fake, picture, &resume, on_progress, sink)
            }
        };
        (result, out)
    }

    /// The same run, kept less often.
    fn kept(&self, every: Duration) -> Self {
        let (shaped, options) = (self.shaped.clone(), self.options.clone());
        Self { shaped, options, rgb: self.rgb.clone(), every }
    }

    fn whole(&self) -> Vec<f32> {
        let (result, out) = self.run(&Fake::pointwise(), None, usize::MAX);
        result.unwrap();
        out
    }

    fn callbacks(&self) -> usize {
        let mut n = 0;
        while self.run(&Fake::pointwise(), None, n).0.is_err() {
            n += 1;
        }
        n
    }
}

fn options(steps: u32, eta: f32, tile: Option<usize>) -> Options {
    Options {
        steps: Some(steps),
        eta: Some(eta),
        seed: 4,
        tile,
        overlap: Some(4),
        norms: NormScope::Tile,
        ..Options::default()
    }
}

fn folder() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.resume");
    (dir, path)
}

fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|v| v.to_bits()).collect()
}

fn given_noise() -> GivenNoise {
    let mut g = Generator::new(77);
    let mut tensor = |shape: &[usize]| {
        let mut data = vec![0.0; shape.iter().product()];
        g.randn(data.len(), |i, v| data[i] = v);
        NoiseTensor { shape: shape.to_vec(), data }
    };
    GivenNoise { initial: tensor(&[1, 3, 12, 20]), eta: Some(tensor(&[3, 3, 12, 20])) }
}

/// Stopped before every callback, for each of them, then run to the end; every step and tile was computed
/// once and no more.
#[test]
fn a_run_stopped_anywhere_goes_on_with_the_same_bits() {
    for case in [
        Case::new(options(3, 0.0, None)),
        Case::new(options(3, 0.0, Some(8))),
        Case::new(options(3, 0.7, Some(12))),
        Case::new(Options { noise: Some(given_noise()), ..options(3, 0.7, Some(12)) }),
    ] {
        let whole = bits(&case.whole());
        let callbacks = case.callbacks();
        let seldom = case.kept(Duration::from_secs(1000));
        let fake = Fake::pointwise();
        case.run(&fake, None, usize::MAX).0.unwrap();
        let runs = [0, 1].map(|i| fake.runs[i].get());
        assert!(callbacks == runs[0] + runs[1] + 1, "{callbacks} {runs:?}");
        for stop in 0..callbacks {
            let (_dir, path) = folder();
            let fake = Fake::pointwise();
            let (result, _) = case.run(&fake, Some(&path), stop);
            assert!(matches!(result, Err(PipelineError::Cancelled)), "{result:?}");
            let (result, out) = seldom.run(&fake, Some(&path), usize::MAX);
            let report = result.unwrap();
            assert!(bits(&out) == whole, "stopped before callback {stop}");
            assert_eq!([0, 1].map(|i| fake.runs[i].get()), runs, "{stop}");
            assert_eq!(report.gmac_before > 0.0, stop > 0, "{stop}: {}", report.gmac_before);
            assert!(report.gmac_before <= report.gmac);
        }
        // Stopped at every callback, again and again.
        let (dir, path) = folder();
        let fake = Fake::pointwise();
        let mut starts = 1;
        while case.run(&fake, Some(&path), starts).0.is_err() {
            starts += 1;
        }
        let (result, out) = case.run(&fake, Some(&path), usize::MAX);
        result.unwrap();
        assert!(bits(&out) == whole);
        assert_eq!([0, 1].map(|i| fake.runs[i].get()), runs, "a finished run computes nothing");
        Resume::new(&path).remove().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        Resume::new(&path).remove().unwrap();
    }
}

/// Where steps take no time, they are not all written, and what is then on disk is an earlier step.
#[test]
fn a_run_that_is_kept_seldom_gives_the_same_bits_too() {
    let case = Case::new(options(3, 0.7, Some(12))).kept(Duration::from_secs(1000));
    let whole = bits(&case.whole());
    let mut ran = Vec::new();
    for stop in 0..case.callbacks() {
        let (_dir, path) = folder();
        case.run(&Fake::pointwise(), Some(&path), stop).0.unwrap_err();
        let fake = Fake::pointwise();
        let (result, out) = case.run(&fake, Some(&path), usize::MAX);
        result.unwrap();
        assert!(bits(&out) == whole, "stopped before callback {stop}");
        ran.push(fake.runs[0].get());
    }
    let steps = *ran.first().unwrap();
    assert!(ran.iter().any(|&r| r > 0 && r < steps), "the first step's tiles are kept: {ran:?}");
    assert_eq!(ran.last(), Some(&0), "decoding always begins with a base: {ran:?}");
}

/// A file cut short or changed anywhere is refused, or what is damaged is computed again: the bits are the same.
#[test]
fn a_damaged_file_never_gives_other_bits() {
    let case = Case::new(options(2, 0.5, Some(12)));
    let seldom = case.kept(Duration::from_secs(1000));
    let whole = bits(&case.whole());
    // With a tile of two kept, in the second step and in decoding.
    for stop in [3, 5] {
        let (_dir, path) = folder();
        case.run(&Fake::pointwise(), Some(&path), stop).0.unwrap_err();
        let good = std::fs::read(&path).unwrap();
        let head = 28 + u32::from_le_bytes(good[24..28].try_into().unwrap()) as usize + 4;
        let base = head + 12 * 20 * 3 * 4 + 4;
        assert!(base < good.len());
        let (mut refused, mut recalled) = (0, 0);
        let mut check = |bytes: &[u8], what: String, whole_base: bool| {
            std::fs::write(&path, bytes).unwrap();
            let fake = Fake::pointwise();
            let (result, out) = seldom.run(&fake, Some(&path), usize::MAX);
            match result {
                Ok(_) => {
                    assert!(whole_base, "{what}");
                    assert!(bits(&out) == whole, "{what}");
                    recalled += usize::from(fake.runs[usize::from(stop == 5)].get() == 1);
                }
                Err(PipelineError::Resume(e)) => {
                    assert!(!whole_base, "{what}: {e}");
                    assert!(e.to_string().contains("run.resume"), "{what}: {e}");
                    assert_eq!(std::fs::read(&path).unwrap(), bytes, "{what}: it is left as it is");
                    refused += 1;
                }
                Err(e) => panic!("{what}: {e}"),
            }
        };
        check(&good, "whole".to_owned(), true);
        let mut longer = good.clone();
        longer.extend([0; 5000]);
        check(&longer, "zeros appended".to_owned(), true);
        let tile = good.len() - base;
        for len in (0..base).step_by(17).chain((base..good.len()).step_by(tile / 50)) {
            check(&good[..len], format!("cut to {len}"), len >= base);
        }
        for at in (0..head).chain((head..base).step_by(29)).chain(base..base + 8) {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            check(&bytes, format!("byte {at} changed"), at >= base);
        }
        for at in (base + 8..good.len()).step_by(tile / 50) {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            check(&bytes, format!("byte {at} changed"), true);
        }
        assert!(refused > 400, "{refused}");
        assert_eq!(recalled, 2, "the tile is used where it is whole, and only there");
    }
}

#[test]
fn another_run_is_refused_and_what_differs_is_said() {
    let case = || Case::new(options(3, 0.7, Some(12)));
    let with = |change: &dyn Fn(&mut Case)| {
        let mut c = case();
        change(&mut c);
        c
    };
    let others: [(&str, Case); 10] = [
        ("its steps is 3, here it is 4", with(&|c| c.options.steps = Some(4))),
        ("its eta is 0.7, here it is 0.6", with(&|c| c.options.eta = Some(0.6))),
        ("its seed is 4, here it is 5", with(&|c| c.options.seed = 5)),
        (
            "its spacing is leading, here it is trailing",
            with(&|c| c.options.spacing = Some(Spacing::Trailing)),
        ),
        ("its consistency is 0.8, here it is 0.9", with(&|c| c.options.consistency = Some(0.9))),
        ("its tiling is", with(&|c| c.options.tile = Some(8))),
        ("its noise is drawn, here it is given", with(&|c| c.options.noise = Some(given_noise()))),
        ("its picture is 18x11", with(&|c| c.rgb[7] ^= 1)),
        ("its model is fake", with(&|c| c.shaped.latent.scale = 1.5)),
        ("its model is fake", with(&|c| c.shaped.timestep_groups = vec![500, 1000])),
    ];
    let (_dir, path) = folder();
    case().run(&Fake::pointwise(), Some(&path), 3).0.unwrap_err();
    let before = std::fs::read(&path).unwrap();
    for (words, other) in others {
        if other.shaped.timestep_groups.len() == 2 {
            // Only a model that is otherwise the same shows that the manifest counts.
            assert_eq!(other.shaped.latent.scale, 1.0);
        }
        let fake = Fake::pointwise();
        let (result, _) = other.run(&fake, Some(&path), usize::MAX);
        let error = result.unwrap_err();
        let text = error.to_string();
        assert!(text.contains(words) && text.contains("delete"), "{words}: {text}");
        assert_eq!(text.matches("its ").count(), 1, "one thing differs: {text}");
        let PipelineError::Resume(ResumeError::Other { differs, .. }) = error else {
            panic!("{text}");
        };
        assert_eq!(differs.len(), 1);
        assert!(fake.prepared.borrow().is_empty(), "{words}: refused before anything is prepared");
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }
    case().run(&Fake::pointwise(), Some(&path), usize::MAX).0.unwrap();
}

#[test]
fn files_of_another_kind_are_left_alone() {
    let (dir, path) = folder();
    let case = Case::new(options(1, 0.0, None));
    let run = |path: &Path| {
        let fake = Fake::pointwise();
        let error = case.run(&fake, Some(path), usize::MAX).0.unwrap_err();
        assert!(fake.prepared.borrow().is_empty());
        error.to_string()
    };
    for content in [&b""[..], b"x", b"my only photograph of the sea"] {
        std::fs::write(&path, content).unwrap();
        assert!(run(&path).contains("is not a resume file; name another one"));
        Resume::new(&path).remove().unwrap_err();
        assert_eq!(std::fs::read(&path).unwrap(), content);
    }
    std::fs::write(&path, b"\x89LATRUN\n\x63\0\0\0________________").unwrap();
    assert!(run(&path).contains("is of version 99, this build reads version 1"));
    assert!(run(&dir.path().join("none/run.resume")).contains("create it first"));
    assert!(run(dir.path()).contains("directory"));
}

/// The stage and step that a run begins with are those of the file.
#[test]
fn progress_begins_where_the_run_does() {
    let case = Case::new(options(3, 0.0, None));
    let (_dir, path) = folder();
    case.run(&Fake::pointwise(), Some(&path), 2).0.unwrap_err();
    let model = case.shaped.build();
    let plan = Plan::new(&model, SIZE[1], SIZE[0], &case.options).unwrap();
    let picture = Picture { width: SIZE[1], height: SIZE[0], pixels: Pixels::Rgb8(&case.rgb) };
    let mut seen = Vec::new();
    let on_progress = &mut |p: &Progress| {
        seen.push((p.stage, p.step));
        ControlFlow::Continue(())
    };
    let resume = Resume::new(&path).every(Duration::ZERO);
    plan.resume(&Fake::pointwise(), picture, &resume, on_progress, &mut |_, _| ()).unwrap();
    assert_eq!(seen, [(Stage::Denoise, 2), (Stage::Decode, 3), (Stage::Decode, 3)]);
}
