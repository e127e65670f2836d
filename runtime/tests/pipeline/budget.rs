//! A run within a budget: the plan keeps it, the run keeps the plan, and a refusal says what would do.

use crate::fake::{Fake, Shaped};
use latile_runtime::backend::{Backend, Residency};
use latile_runtime::format::Role;
use latile_runtime::pipeline::budget::{Choice, Mode, StagePlan, advised};
use latile_runtime::pipeline::{
    Budget, Caller, Options, Pace, Picture, PipelineError, Pixels, Plan, Resume, Scratch, Stage,
    Strategy, Tiling,
};
use proptest::prelude::*;
use std::ops::ControlFlow;
use std::time::Duration;

/// What a test may vary.
#[derive(Clone, Debug)]
struct Case {
    size: [usize; 2],
    multiple: u32,
    ways: usize,
    options: Options,
    base: usize,
    caller: Caller,
    so_far: usize,
    mode: Mode,
    /// The limit, as a share of what the greediest strategy takes.
    share: f64,
}

fn cases() -> impl Strategy_<Value = Case> {
    let tiling = prop_oneof![Just(Tiling::Auto), Just(Tiling::Exact), Just(Tiling::Blend)];
    let size = [1usize..180, 1usize..180];
    let multiple = prop_oneof![Just(1u32), Just(4), Just(8)];
    let scratch = prop_oneof![Just(None), Just(Some(0usize)), Just(Some(60_000))];
    let rest = (2usize..6, 1u32..4, prop_oneof![Just(0f32), Just(1.0)], 0usize..500_000);
    let caller = (0usize..100_000, 0usize..100_000, 0usize..900_000, 0usize..1_000_000);
    let mode = prop_oneof![Just(Mode::Once), Just(Mode::Resumed), Just(Mode::Warm)];
    (tiling, size, multiple, rest, caller, (0.0..1.1f64, mode, scratch)).prop_map(
        |(
            tiling,
            size,
            multiple,
            (ways, steps, consistency, base),
            caller,
            (share, mode, scratch),
        )| Case {
            size,
            multiple,
            ways,
            options: Options {
                steps: Some(steps),
                consistency: Some(consistency),
                tiling,
                scratch: scratch.map(|n| Scratch::new(std::env::temp_dir()).at_least(n)),
                ..Options::default()
            },
            base,
            caller: Caller { input: caller.0, result: caller.1, finish: caller.2 },
            so_far: caller.3,
            mode,
            share,
        },
    )
}

use proptest::strategy::Strategy as Strategy_;

/// Runs `plan` as `mode` says, and compares what its sessions took with what its strategy says.
fn check_run(plan: &Plan<'_>, fake: &Fake, [height, width]: [usize; 2], mode: Mode) {
    let pixels = vec![100u8; height * width * 3];
    let picture = Picture { width, height, pixels: Pixels::Rgb8(&pixels) };
    fake.rooms.borrow_mut().clear();
    let progress = &mut |_: &_| ControlFlow::Continue(());
    let sink = &mut |_, _: &[f32]| {};
    let folder = tempfile::tempdir().unwrap();
    let report = match mode {
        Mode::Once => plan.run(fake, picture, progress, sink).unwrap(),
        Mode::Resumed => {
            let resume = Resume::new(folder.path().join("run"));
            plan.resume(fake, picture, &resume, progress, sink).unwrap()
        }
        Mode::Warm => {
            fake.most.set(2);
            let mut runner = plan.runner(fake).unwrap();
            runner.run(picture, progress, sink).unwrap();
            runner.report().clone()
        }
    };
    let strategy = plan.strategy().unwrap();
    let [unet, decoder] = &strategy.stages;
    let session = |s: &StagePlan| (s.stage.role(), s.choice.offer.arena_bytes, s.choice.weights);
    assert_eq!(*fake.rooms.borrow(), [session(unet), session(decoder)]);
    assert_eq!(report.arena_bytes, unet.parts.arena.max(decoder.parts.arena));
    if mode != Mode::Resumed {
        assert_eq!(report.pipeline_bytes, unet.parts.pipeline.max(decoder.parts.pipeline));
    }
    assert_eq!(report.gmac, strategy.macs() as f64 / 1e9);
    assert_eq!(report.tiles, strategy.grid.tiles());
    assert_eq!(report.scratch_bytes, strategy.scratch_bytes);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn what_is_planned_fits_and_is_what_is_used(case in cases()) {
        let model = Shaped { multiple: case.multiple, ..Shaped::default() }.build();
        let fake = Fake::with_ways(case.ways);
        let [height, width] = case.size;
        let plan = || Plan::new(&model, width, height, &case.options).unwrap();
        let Case { base, caller, so_far, mode, .. } = case;
        let budget = Budget { limit: None, base, caller, so_far, mode };
        let all = plan().strategies(&fake, &budget).unwrap();
        let peaks = all.all().iter().map(Strategy::peak);
        let limit = (peaks.max().unwrap() as f64 * case.share) as usize;
        let budget = |limit| Budget { limit: Some(limit), ..budget };

        let at = match plan().within(&fake, &budget(limit)) {
            Ok(plan) => {
                let strategy = plan.strategy().unwrap();
                prop_assert!(strategy.peak() <= limit);
                prop_assert!(case.options.tiling != Tiling::Exact || strategy.is_exact());
                // Nothing that fits and counts as much is faster.
                for other in all.all().iter().filter(|s| s.peak() <= limit && s.is_exact() == strategy.is_exact()) {
                    prop_assert!(other.work() >= strategy.work());
                }
                check_run(&plan, &fake, case.size, mode);
                limit
            }
            Err(PipelineError::Budget { limit: said, smallest, .. }) => {
                prop_assert_eq!(said, limit);
                prop_assert!(smallest > limit);
                let plan = plan().within(&fake, &budget(smallest)).unwrap();
                prop_assert_eq!(plan.strategy().unwrap().peak(), smallest);
                check_run(&plan, &fake, case.size, mode);
                let refused = Plan::new(&model, width, height, &case.options).unwrap().within(&fake, &budget(smallest - 1));
                let refused = matches!(refused, Err(PipelineError::Budget { smallest: s, .. }) if s == smallest);
                prop_assert!(refused);
                smallest
            }
            Err(other) => return Err(TestCaseError::fail(other.to_string())),
        };
        // The neighbours are what their budgets buy.
        let chosen = all.choose(at).unwrap();
        if let Some(less) = all.cheaper(chosen) {
            prop_assert!(less.peak() < chosen.peak());
            prop_assert_eq!(all.choose(less.peak()), Some(less));
        }
        if let Some(more) = all.better(chosen) {
            prop_assert!(more.peak() > chosen.peak());
            prop_assert!(more.work() < chosen.work() || more.is_exact() && !chosen.is_exact());
            prop_assert_eq!(all.choose(more.peak()), Some(more));
        }
    }
}

fn plan_with<'a>(
    model: &'a latile_runtime::format::Model,
    options: &'a Options,
    fake: &Fake,
    limit: Option<usize>,
) -> Plan<'a> {
    let budget = Budget { limit, ..Budget::default() };
    Plan::new(model, 160, 150, options).unwrap().within(fake, &budget).unwrap()
}

#[test]
fn without_a_limit_a_plan_stays_as_it_was() {
    let model = Shaped::default().build();
    let options = Options::default();
    let before = Plan::new(&model, 160, 150, &options).unwrap();
    let fake = Fake::with_ways(3);
    let plan = plan_with(&model, &options, &fake, None);
    assert_eq!(plan.grid(), before.grid());
    assert!(before.strategy().is_none() && plan.grid().tiles() > 1);
    let strategy = plan.strategy().unwrap();
    for stage in &strategy.stages {
        assert_eq!(stage.choice.offer.way, "fake 0");
        assert_eq!(stage.choice.weights, Residency::Keep);
    }
    assert_eq!(plan.macs(), strategy.macs());
    check_run(&plan, &fake, [150, 160], Mode::Once);
}

/// With plenty of room an exact run; with less the same frame in slower ways; then tiles.
#[test]
fn less_room_is_answered_by_slower_ways_and_then_by_tiles() {
    let model = Shaped::default().build();
    let options = Options::default();
    let fake = Fake::with_ways(3);
    let ample = plan_with(&model, &options, &fake, Some(1 << 30));
    let ample = ample.strategy().unwrap();
    assert!(ample.is_exact());
    assert_eq!(ample.to_string(), "exact, the whole frame at once, unet fake 0, decoder fake 0");

    let mut last = ample.clone();
    let mut seen = vec![last.to_string()];
    let all = Plan::new(&model, 160, 150, &options)
        .unwrap()
        .strategies(&fake, &Budget::default())
        .unwrap();
    while let Some(less) = all.cheaper(&last) {
        assert!(less.peak() < last.peak());
        // Once blended, an exact run never comes back with less memory.
        assert!(last.is_exact() || !less.is_exact());
        last = less.clone();
        seen.push(last.to_string());
    }
    assert_eq!(Some(&last), all.smallest());
    assert!(
        seen.iter().any(|s| s.starts_with("exact") && s.contains("decoder fake 1")),
        "{seen:?}"
    );
    assert!(!last.is_exact() && last.to_string().ends_with("decoder fake 2"), "{last}");
    // And back up again, to the top.
    let mut climbing = last;
    while let Some(more) = all.better(&climbing) {
        climbing = more.clone();
    }
    assert_eq!(climbing, *ample);
}

#[test]
fn a_tiling_that_was_asked_for_is_kept() {
    let model = Shaped::default().build();
    let fake = Fake::with_ways(4);
    let with = |tiling| Options { tiling, ..Options::default() };
    let (exact, blend) = (with(Tiling::Exact), with(Tiling::Blend));
    assert_eq!(plan_with(&model, &exact, &fake, None).grid().tiles(), 1);
    assert!(plan_with(&model, &exact, &fake, Some(1 << 30)).strategy().unwrap().is_exact());
    assert!(!plan_with(&model, &blend, &fake, Some(1 << 30)).strategy().unwrap().is_exact());
    let side = Options { tile: Some(40), overlap: Some(8), ..Options::default() };
    let plan = plan_with(&model, &side, &fake, Some(1 << 30));
    assert!(plan.grid().tile().iter().all(|&t| t <= 40) && plan.grid().tiles() > 1);
    for (tile, overlap) in [(Some(40), None), (None, Some(8))] {
        let both = Options { tile, overlap, ..exact.clone() };
        let error = Plan::new(&model, 160, 150, &both).unwrap_err();
        assert!(matches!(error, PipelineError::OneTile), "{error}");
        assert!(error.to_string().contains("leave --tile and --overlap out"), "{error}");
    }
}

/// A run that goes on has the tiles it began with, whatever it may have now, as long as they fit.
#[test]
fn a_run_that_goes_on_keeps_its_tiles() {
    let model = Shaped::default().build();
    let (options, fake) = (Options { steps: Some(3), ..Options::default() }, Fake::with_ways(3));
    let pixels = vec![100u8; 150 * 160 * 3];
    let picture = Picture { width: 160, height: 150, pixels: Pixels::Rgb8(&pixels) };
    let run = |plan: &Plan<'_>, resume: &Resume, stop: usize| {
        let (mut out, mut calls) = (Vec::new(), 0);
        let progress = &mut |_: &_| {
            calls += 1;
            if calls > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let sink = &mut |_, row: &[f32]| out.extend_from_slice(row);
        plan.resume(&fake, picture, resume, progress, sink).map(|_| out)
    };
    let folder = tempfile::tempdir().unwrap();
    let kept = |name: &str| Resume::new(folder.path().join(name)).every(Duration::from_secs(600));
    let new = || Plan::new(&model, 160, 150, &options).unwrap();
    let budget = |limit| Budget { limit, mode: Mode::Resumed, ..Budget::default() };

    let all = new().strategies(&fake, &budget(None)).unwrap();
    let little = all.smallest().unwrap().peak();
    let first = new().going_on(&kept("run")).within(&fake, &budget(Some(little))).unwrap();
    assert_ne!(first.grid(), new().grid(), "no file, no tiles to keep");
    let expected = run(&first, &kept("whole"), usize::MAX).unwrap();
    assert!(matches!(run(&first, &kept("run"), 7), Err(PipelineError::Cancelled)));
    for limit in [None, Some(1 << 30), Some(little)] {
        let free = new().within(&fake, &budget(limit)).unwrap();
        assert!(limit == Some(little) || free.grid() != first.grid());
        let plan = new().going_on(&kept("run")).within(&fake, &budget(limit)).unwrap();
        assert_eq!(plan.grid(), first.grid(), "{limit:?}");
        std::fs::copy(kept("run").path(), kept("copy").path()).unwrap();
        assert!(run(&plan, &kept("copy"), usize::MAX).unwrap() == expected);
    }

    // Tiles that do not fit: the choice is free, and the run is told that it is another.
    let ample = new().within(&fake, &budget(None)).unwrap();
    assert!(matches!(run(&ample, &kept("ample"), 3), Err(PipelineError::Cancelled)));
    let plan = new().going_on(&kept("ample")).within(&fake, &budget(Some(little))).unwrap();
    assert_eq!(plan.grid(), first.grid());
    let refused = run(&plan, &kept("ample"), usize::MAX).unwrap_err().to_string();
    assert!(refused.contains("its tiling is"), "{refused}");
    // What is no resume file has no tiles to say.
    std::fs::write(kept("other").path(), b"something else").unwrap();
    let plan = new().going_on(&kept("other")).within(&fake, &budget(None)).unwrap();
    assert_eq!(plan.grid(), new().grid());
}

#[test]
fn a_refusal_says_what_would_do() {
    let model = Shaped::default().build();
    let options = Options { tiling: Tiling::Exact, ..Options::default() };
    let fake = Fake::with_ways(2);
    let budget = Budget { limit: Some(1 << 20), base: 5 << 20, ..Budget::default() };
    let error = Plan::new(&model, 160, 150, &options).unwrap().within(&fake, &budget).unwrap_err();
    let PipelineError::Budget { smallest, .. } = error else { panic!("{error}") };
    let text = error.to_string();
    for words in ["1.0 MiB do not suffice", "exact, the whole frame at once", "--memory"] {
        assert!(text.contains(words), "{text}");
    }
    assert!(text.contains(&format!("--memory {}", advised(smallest))), "{text}");
    assert!(fake.prepared.borrow().is_empty(), "refused before anything is prepared");
}

/// A component alone, as `run` and `bench` have it.
#[test]
fn a_component_takes_the_cheapest_way_that_fits() {
    let model = Shaped::default().build();
    let fake = Fake::with_ways(3);
    let offers = || fake.offers(&model, Role::Unet, 8, 8).unwrap();
    let ample = Choice::within(offers(), 1, usize::MAX).unwrap();
    assert_eq!((ample.offer.way.as_str(), ample.weights), ("fake 0", Residency::Keep));
    let least = Choice::within(offers(), 1, 0).unwrap_err();
    let smallest = Choice::within(offers(), 1, least).unwrap();
    assert_eq!((smallest.bytes(), smallest.weights), (least, Residency::Drop));
    assert_eq!(smallest.room().arena, Some(smallest.offer.arena_bytes));
    assert_eq!(Choice::within(offers(), 1, least - 1).unwrap_err(), least);
    // Weights that are dropped are read again for each run but the first.
    assert_eq!((smallest.reread_bytes(0), smallest.reread_bytes(3)), (0, 150_000));
}

#[test]
fn a_pace_predicts_by_stages() {
    let model = Shaped::default().build();
    let fake = Fake::with_ways(2);
    let options = Options::default();
    let plan = plan_with(&model, &options, &fake, None);
    let strategy = plan.strategy().unwrap();
    let pace = Pace::measure(&fake, &model, strategy, Duration::from_millis(40)).unwrap();
    assert!(pace.unet > 0.0 && pace.decoder > 0.0);
    let pace = Pace { unet: 1e6, decoder: 2e6 };
    let [unet, decoder] = &strategy.stages;
    assert_eq!((unet.stage, decoder.stage), (Stage::Denoise, Stage::Decode));
    let seconds = unet.macs() as f64 / 1e6 + decoder.macs() as f64 / 2e6;
    assert!((pace.seconds(strategy) - seconds).abs() < 1e-9 * seconds);
}
