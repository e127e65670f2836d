//! Budgets with real networks on the CPU: over random pictures, threads, tilings and limits, sessions take what
//! was planned, byte for byte, and a refusal names a budget that then works.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use latile_cpu::isa::Level;
use latile_cpu::session::CpuBackend;
use latile_runtime::backend::Backend;
use latile_runtime::format::{Model, Precision};
use latile_runtime::pipeline::budget::{Caller, Mode};
use latile_runtime::pipeline::{
    Budget, Generator, Options, Picture, PipelineError, Pixels, Plan, Report, Scratch, Strategy,
    Tiling,
};
use latile_tests::{cases, exported, fixture};
use std::collections::BTreeSet;
use std::ops::ControlFlow;

/// Every so many cases are run as well as planned.
const RUN_EVERY: usize = 10;

struct Dice(Generator);

impl Dice {
    fn of(&mut self, range: std::ops::Range<usize>) -> usize {
        range.start + self.0.next_u32() as usize % range.len()
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.of(0..from.len())].clone()
    }
}

fn upscaled(
    plan: &Plan<'_>,
    backend: &CpuBackend,
    [height, width]: [usize; 2],
) -> (Vec<f32>, Report) {
    let pixels: Vec<u8> = (0..height * width * 3).map(|i| (i * 37 % 253) as u8).collect();
    let picture = Picture { width, height, pixels: Pixels::Rgb8(&pixels) };
    let mut rows = Vec::new();
    let report = plan
        .run(backend, picture, &mut |_| ControlFlow::Continue(()), &mut |_, row| {
            rows.extend_from_slice(row);
        })
        .unwrap();
    (rows, report)
}

/// Each session, made as it was planned, is what was planned.
fn check_sessions(plan: &Plan<'_>, model: &Model, backend: &CpuBackend) {
    let strategy = plan.strategy().unwrap();
    let [h, w] = strategy.grid.tile();
    for stage in &strategy.stages {
        let session =
            backend.prepare(model, stage.stage.role(), h, w, stage.choice.room()).unwrap();
        let stats = session.stats();
        assert_eq!(stats.arena_bytes, stage.choice.offer.arena_bytes, "{strategy}");
        assert_eq!(stats.way, stage.choice.offer.way, "{strategy}");
        assert_eq!(stats.macs, stage.choice.offer.macs, "{strategy}");
        assert_eq!(stats.weight_bytes, stage.choice.weight_bytes(), "{strategy}");
    }
}

/// A quarter of the combinations: drawn anew for each `seed`, so that tests share them out among the cores.
fn budgets_are_kept_byte_for_byte(seed: u64) {
    let count = cases(80, 24);
    let models = [
        exported(&fixture("models/sr"), Precision::F32),
        exported(&fixture("models/photo"), Precision::F16),
        exported(&fixture("models/sr-odd"), Precision::F16),
    ];
    let backends: Vec<CpuBackend> =
        (1..5).map(|n| CpuBackend::new(n, Level::best()).unwrap()).collect();
    let mut dice = Dice(Generator::new(seed));
    let scratch = Scratch::new(std::env::temp_dir());
    let mut in_files = [0; 2];
    let (mut refused, mut seen) = (0, BTreeSet::new());
    for case in 0..count {
        let model = &models[dice.of(0..models.len())].model;
        let backend = &backends[dice.of(0..backends.len())];
        let size = [dice.of(1..90), dice.of(1..90)];
        let options = Options {
            steps: Some(1),
            tiling: dice.pick(&[Tiling::Auto, Tiling::Exact, Tiling::Blend]),
            eta: Some(dice.pick(&[0.0, 1.0])),
            consistency: Some(dice.pick(&[0.0, 1.0])),
            // From the first byte on, from some size on, or not at all.
            scratch: dice.pick(&[Some(0), Some(40_000), None]).map(|n| scratch.clone().at_least(n)),
            ..Options::default()
        };
        let caller = Caller {
            input: dice.of(0..9000),
            result: dice.of(0..90_000),
            finish: dice.of(0..90_000),
        };
        let mode = dice.pick(&[Mode::Once, Mode::Resumed, Mode::Warm]);
        let budget = Budget { base: dice.of(0..2_000_000), caller, mode, ..Budget::default() };
        let plan = || Plan::new(model, size[1], size[0], &options).unwrap();
        let all = plan().strategies(backend, &budget).unwrap();
        let peaks = || all.all().iter().map(Strategy::peak);
        let (least, most) = (peaks().min().unwrap(), peaks().max().unwrap());
        let limit = dice.of(least * 9 / 10..most + most / 20);
        let within =
            |limit: usize| plan().within(backend, &Budget { limit: Some(limit), ..budget });
        let plan = match within(limit) {
            Ok(plan) => plan,
            Err(PipelineError::Budget { smallest, .. }) => {
                assert_eq!((smallest, limit < smallest), (least, true));
                assert!(within(smallest - 1).is_err());
                refused += 1;
                within(smallest).unwrap()
            }
            Err(other) => panic!("{other}"),
        };
        let strategy = plan.strategy().unwrap();
        assert!(strategy.peak() <= limit.max(least), "{strategy}");
        seen.insert((strategy.is_exact(), strategy.stages[1].choice.offer.way.clone()));
        check_sessions(&plan, model, backend);
        in_files[0] += usize::from(strategy.scratch_bytes > 0);
        if case % RUN_EVERY == 0 {
            let (rows, report) = upscaled(&plan, backend, size);
            let arenas = strategy.stages.each_ref().map(|s| s.choice.offer.arena_bytes);
            assert_eq!(report.arena_bytes, arenas[0].max(arenas[1]));
            assert_eq!(report.scratch_bytes, strategy.scratch_bytes);
            if mode == Mode::Once {
                let pipeline = strategy.stages.each_ref().map(|s| s.parts.pipeline);
                assert_eq!(report.pipeline_bytes, pipeline[0].max(pipeline[1]));
            }
            in_files[1] += usize::from(strategy.scratch_bytes > 0);
            if strategy.is_exact() {
                // However little memory it was given, an exact run is the whole frame's, bit for bit.
                let exact = Options { tiling: Tiling::Exact, ..options.clone() };
                let whole = Plan::new(model, size[1], size[0], &exact).unwrap();
                assert!(rows == upscaled(&whole, backend, size).0, "{strategy}");
            }
        }
    }
    println!("{refused} of {count} limits refused; ways taken: {seen:?}");
    println!("{} with the latent in a file, {} of them run", in_files[0], in_files[1]);
    assert!(in_files[0] > count / 20, "{in_files:?}");
    assert!(
        refused > count / 10 && refused < count / 2,
        "{refused} refused: the limits test one side only"
    );
}

#[test]
fn the_first_quarter() {
    budgets_are_kept_byte_for_byte(11);
}

#[test]
fn the_second_quarter() {
    budgets_are_kept_byte_for_byte(12);
}

#[test]
fn the_third_quarter() {
    budgets_are_kept_byte_for_byte(13);
}

#[test]
fn the_fourth_quarter() {
    budgets_are_kept_byte_for_byte(14);
}
