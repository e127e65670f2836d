//! Runs whose latent is in a file: the bits of runs in memory, nothing left behind, and errors that say what to
//! do.

use crate::fake::{Call, Fake, Shaped, pointwise_decoder, pointwise_unet};
use latile_runtime::backend::Norms;
use latile_runtime::pipeline::budget::Mode;
use latile_runtime::pipeline::{
    Budget, Generator, GivenNoise, NoiseTensor, NormScope, Options, Picture, PipelineError, Pixels,
    Plan, Resume, Scratch, Strategy,
};
use std::cell::Cell;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

/// Not a multiple of four, which the model needs; of the padded one neither tile divides.
const SIZE: [usize; 2] = [27, 18];

fn rgb() -> Vec<u8> {
    let mut g = Generator::new(8);
    (0..SIZE[0] * SIZE[1] * 3).map(|_| g.next_u32() as u8).collect()
}

fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|v| v.to_bits()).collect()
}

/// As [`Fake::pointwise`], but gathered norms count: what is gathered is added to what is run with it.
fn fake() -> Fake {
    let gathered = Cell::new((Norms::Own, 0f32));
    Fake::new(
        move |call: Call<'_>| {
            let (before, sum) = gathered.get();
            let sum = match (before, call.norms) {
                (Norms::Gather, Norms::Gather) => sum + call.sample.iter().sum::<f32>(),
                (_, Norms::Gather) => call.sample.iter().sum(),
                (_, _) => sum,
            };
            gathered.set((call.norms, sum));
            let shift = if call.norms == Norms::Gathered { sum * 1e-4 } else { 0.0 };
            let out = call.out;
            pointwise_unet(Call { out: &mut *out, ..call });
            out.iter_mut().for_each(|v| *v += shift);
        },
        pointwise_decoder,
    )
}

/// `plan` with its latent in memory, or in a file.
fn placed<'a>(plan: impl Fn() -> Plan<'a>, fake: &Fake, mode: Mode, in_file: bool) -> Plan<'a> {
    let budget = Budget { mode, ..Budget::default() };
    let all = plan().strategies(fake, &budget).unwrap();
    let of = |s: &&Strategy| (s.scratch_bytes > 0) == in_file;
    let limit = all.all().iter().filter(of).map(Strategy::peak).min();
    let plan = plan().within(fake, &Budget { limit, ..budget }).unwrap();
    assert_eq!(plan.strategy().unwrap().scratch_bytes > 0, in_file);
    plan
}

fn given_noise([h, w]: [usize; 2]) -> GivenNoise {
    let mut g = Generator::new(77);
    let mut tensor = |shape: &[usize]| {
        let mut data = vec![0.0; shape.iter().product()];
        g.randn(data.len(), |i, v| data[i] = v);
        NoiseTensor { shape: shape.to_vec(), data }
    };
    GivenNoise { initial: tensor(&[1, 3, h, w]), eta: Some(tensor(&[3, 3, h, w])) }
}

/// All that a run is: eta, tiles, norms, noise; in one go, resumed wherever it was stopped (in the other place),
/// or for a frame.
#[test]
fn a_latent_in_a_file_gives_the_same_bits() {
    let (dir, rgb) = (tempfile::tempdir().unwrap(), rgb());
    let scratch = dir.path().join("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let model = Shaped { consistency: 0.6, ..Shaped::default() }.build();
    let picture = Picture { width: SIZE[1], height: SIZE[0], pixels: Pixels::Rgb8(&rgb) };
    let empty = || std::fs::read_dir(&scratch).unwrap().count() == 0;
    let mut seen = Vec::new();
    for eta in [0.0, 1.0] {
        for (tile, norms) in [(28, NormScope::Tile), (8, NormScope::Tile), (12, NormScope::Picture)]
        {
            for noise in [None, Some(given_noise([28, 20]))] {
                let options = Options {
                    steps: Some(3),
                    eta: Some(eta),
                    seed: 4,
                    tile: Some(tile),
                    overlap: Some(4),
                    norms,
                    noise,
                    scratch: Some(Scratch::new(&scratch).at_least(0)),
                    ..Options::default()
                };
                let plan = || Plan::new(&model, SIZE[1], SIZE[0], &options).unwrap();
                assert_eq!(plan().grid().tiles() > 1, tile < 28);
                let once = |in_file| {
                    let fake = fake();
                    let plan = placed(plan, &fake, Mode::Once, in_file);
                    let mut out = Vec::new();
                    let progress = &mut |_: &_| {
                        // On Unix the file has no name while the run goes on either.
                        assert!(cfg!(not(unix)) || empty());
                        ControlFlow::Continue(())
                    };
                    let sink = &mut |_, row: &[f32]| out.extend_from_slice(row);
                    let report = plan.run(&fake, picture, progress, sink).unwrap();
                    assert_eq!(report.scratch_bytes, if in_file { 28 * 20 * 3 * 4 } else { 0 });
                    assert_eq!(report.pipeline_bytes, plan.pipeline_bytes());
                    bits(&out)
                };
                let expected = once(false);
                assert!(once(true) == expected, "{options:?}");
                assert!(empty(), "nothing is left");
                assert!(!seen.contains(&expected), "another run, another result");

                let resumed = |in_file, path: &Path, stop: usize, every: u64| {
                    let fake = fake();
                    let plan = placed(plan, &fake, Mode::Resumed, in_file);
                    let (mut out, mut calls) = (Vec::new(), 0);
                    let progress = &mut |_: &_| {
                        calls += 1;
                        if calls > stop {
                            ControlFlow::Break(())
                        } else {
                            ControlFlow::Continue(())
                        }
                    };
                    let sink = &mut |_, row: &[f32]| out.extend_from_slice(row);
                    let resume = Resume::new(path).every(Duration::from_secs(every));
                    plan.resume(&fake, picture, &resume, progress, sink).map(|_| bits(&out))
                };
                for stop in (1..).step_by(14) {
                    let path = dir.path().join("run");
                    let (first, then) = (stop % 4 == 1, stop % 4 != 1);
                    match resumed(first, &path, stop, 0) {
                        Ok(out) => {
                            assert!(out == expected);
                            break;
                        }
                        Err(PipelineError::Cancelled) => {}
                        Err(e) => panic!("{e}"),
                    }
                    let out = resumed(then, &path, usize::MAX, 1000).unwrap();
                    assert!(out == expected, "stopped before callback {stop}: {options:?}");
                    std::fs::remove_file(path).unwrap();
                }
                std::fs::remove_file(dir.path().join("run")).unwrap();

                let fake = fake();
                fake.most.set(2);
                let warm = placed(plan, &fake, Mode::Warm, true);
                let mut runner = warm.runner(&fake).unwrap();
                for _ in 0..2 {
                    let mut out = Vec::new();
                    let progress = &mut |_: &_| ControlFlow::Continue(());
                    let sink = &mut |_, row: &[f32]| out.extend_from_slice(row);
                    runner.run(picture, progress, sink).unwrap();
                    assert!(bits(&out) == expected);
                }
                assert_eq!(runner.report().pipeline_bytes, warm.runner_bytes());
                drop(runner);
                assert!(empty());
                seen.push(expected);
            }
        }
    }
}

fn run(options: &Options, fake: &Fake) -> Result<(), PipelineError> {
    let (model, rgb) = (Shaped::default().build(), rgb());
    let picture = Picture { width: SIZE[1], height: SIZE[0], pixels: Pixels::Rgb8(&rgb) };
    let plan =
        placed(|| Plan::new(&model, SIZE[1], SIZE[0], options).unwrap(), fake, Mode::Once, true);
    plan.run(fake, picture, &mut |_| ControlFlow::Continue(()), &mut |_, _| ()).map(|_| ())
}

fn in_folder(folder: &Path) -> Options {
    Options {
        steps: Some(2),
        tile: Some(12),
        overlap: Some(4),
        scratch: Some(Scratch::new(folder).at_least(0)),
        ..Options::default()
    }
}

/// Refused before anything is prepared, in words that help.
#[test]
fn a_folder_that_cannot_have_the_file() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), b"").unwrap();
    for name in ["none", "file"] {
        let (folder, fake) = (dir.path().join(name), Fake::pointwise());
        let error = run(&in_folder(&folder), &fake).unwrap_err();
        assert!(matches!(error, PipelineError::Scratch { action: "make", .. }), "{error}");
        let text = error.to_string();
        for words in ["cannot make the scratch file", &folder.display().to_string(), "--scratch"] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert!(fake.prepared.borrow().is_empty());
    }
}

#[test]
fn a_result_that_is_not_finite_is_found_in_a_file_too() {
    let dir = tempfile::tempdir().unwrap();
    for step in 0..2 {
        let fake = Fake::new(
            move |call| {
                call.out.fill(if call.run / 6 == step { f32::NAN } else { 0.1 });
            },
            pointwise_decoder,
        );
        // Six tiles a step and nothing else.
        let own = Options { norms: NormScope::Tile, ..in_folder(dir.path()) };
        let error = run(&own, &fake).unwrap_err();
        let PipelineError::NonFinite { place, .. } = &error else { panic!("{error}") };
        assert!(place.starts_with(&format!("step {}", step + 1)), "{place}");
    }
}

/// Memory first: a file is taken where the limit leaves no other way that is as fast, and not for a latent
/// that is hardly anything.
#[test]
fn a_file_is_taken_where_the_limit_asks_for_it() {
    let model = Shaped::default().build();
    let fake = Fake::with_ways(3);
    let folder = std::env::temp_dir();
    let plain = Options { tile: Some(40), ..Options::default() };
    let with = |scratch| Options { scratch: Some(scratch), ..plain.clone() };
    let (any, large) = (with(Scratch::new(&folder).at_least(1)), with(Scratch::new(&folder)));
    let strategies = |options| {
        let plan = Plan::new(&model, 600, 500, options).unwrap();
        plan.strategies(&fake, &Budget::default()).unwrap()
    };
    let of = |options: &Options, limit| {
        let plan = Plan::new(&model, 600, 500, options).unwrap();
        let plan = plan.within(&fake, &Budget { limit, ..Budget::default() }).unwrap();
        plan.strategy().unwrap().clone()
    };
    let (memory, file) = (strategies(&plain), strategies(&any));
    assert_eq!(strategies(&large).all(), memory.all(), "3.4 MiB are hardly anything");
    // Nothing changes where there is room.
    assert_eq!(of(&any, None), of(&plain, None));
    let ample = memory.choose(usize::MAX).unwrap();
    assert_eq!(of(&any, Some(ample.peak())), *ample);

    // These networks do next to nothing, and in whatever way they run a file is more work. Where none fits:
    let least = memory.smallest().unwrap();
    assert_eq!(of(&any, Some(least.peak())), *least);
    let latent = 600 * 500 * 3 * 4;
    let spilled = of(&any, Some(least.peak() - 1));
    assert_eq!(spilled.scratch_bytes, latent);
    assert!(spilled.work() > least.work());
    assert!(spilled.to_string().ends_with(", the latent in a file of 3.4 MiB"), "{spilled}");
    // The same in a file takes two rows of it instead.
    let same = |s: &&Strategy| {
        let way = |s: &Strategy| s.stages.each_ref().map(|s| s.choice.clone());
        s.scratch_bytes > 0 && s.grid == least.grid && way(s) == way(least)
    };
    let same = file.all().iter().find(same).unwrap();
    assert_eq!(same.peak(), least.peak() - latent + 2 * 600 * 3 * 4);
    assert_eq!(same.macs(), least.macs());
    // The least there is has it in a file, and a refusal says so.
    let least = file.smallest().unwrap();
    assert!(least.peak() + latent / 2 < memory.smallest().unwrap().peak());
    let plan = Plan::new(&model, 600, 500, &any).unwrap();
    let budget = Budget { limit: Some(least.peak() - 1), ..Budget::default() };
    let refused = plan.within(&fake, &budget).unwrap_err().to_string();
    assert!(refused.contains("the latent in a file of 3.4 MiB"), "{refused}");
    // What it costs is said where the time is predicted.
    let [denoise, decode] = &least.stages;
    assert!(denoise.file_bytes > 4 * 3 * latent as u64 && decode.file_bytes > latent as u64);
}
