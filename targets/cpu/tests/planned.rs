//! A plan counts every buffer of a run: what the run allocates is what the plan says, and the sessions' own
//! descriptions, which are small. Alone in its program, so that no other test's allocations are counted.
#![allow(clippy::unwrap_used)]

#[path = "common/counting.rs"]
mod counting;
#[path = "common/effort.rs"]
mod effort;

use counting::peak_bytes;
use effort::cases;
use latile_cpu::session::CpuBackend;
use latile_runtime::backend::Backend;
use latile_runtime::format::Model;
use latile_runtime::pipeline::budget::Mode;
use latile_runtime::pipeline::{Budget, Options, Picture, Pixels, Plan, Resume, Scratch, Strategy};
use std::ops::ControlFlow;
use std::path::Path;

/// What a run may allocate beside its buffers, arenas and lowered graphs: lists of tiles, names, reports.
const SLACK: usize = 48 << 10;

#[test]
fn a_run_allocates_what_its_plan_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/photo-x4.latile");
    let model = Model::open(&path).unwrap();
    let folder = tempfile::tempdir().unwrap();
    // What is counted does not depend on the processor: where it is emulated the two small cases that come first.
    let all = [
        ([40, 52], Some(24), 1, Mode::Resumed, false),
        ([24, 40], Some(24), 1, Mode::Once, true),
        ([700, 24], Some(24), 1, Mode::Resumed, true),
        ([24, 20], None, 1, Mode::Warm, false),
        ([20, 24], None, 1, Mode::Once, false),
        ([37, 18], None, 2, Mode::Once, false),
        ([40, 52], Some(24), 2, Mode::Once, false),
        ([40, 52], Some(24), 2, Mode::Warm, false),
        ([40, 52], Some(24), 2, Mode::Warm, true),
    ];
    let count = cases(all.len(), 2);
    for (size, tile, threads, mode, in_file) in all.into_iter().take(count) {
        let backend = CpuBackend::from_env(threads).unwrap();
        let [height, width] = size;
        let scratch = in_file.then(|| Scratch::new(folder.path()).at_least(0));
        let options =
            Options { tile, steps: Some(2), eta: Some(0.5), scratch, ..Options::default() };
        let budget = Budget { mode, ..Budget::default() };
        let new = || Plan::new(&model, width, height, &options).unwrap();
        let all = new().strategies(&backend, &budget).unwrap();
        let largest = all.all().iter().filter(|s| s.scratch_bytes > 0).map(Strategy::peak).max();
        let limit = in_file.then(|| largest.unwrap());
        let plan = new().within(&backend, &Budget { limit, ..budget }).unwrap();
        let latent = plan.latent_size().iter().product::<usize>() * 8 * size_of::<f32>();
        assert_eq!(plan.strategy().unwrap().scratch_bytes, if in_file { latent } else { 0 });
        let pixels: Vec<u8> = (0..height * width * 3).map(|i| (i * 31 % 251) as u8).collect();
        let picture = Picture { width, height, pixels: Pixels::Rgb8(&pixels) };
        let stages = &plan.strategy().unwrap().stages;
        // What sessions take beside their arenas.
        let lowered = stages.each_ref().map(|s| {
            let [h, w] = plan.grid().tile();
            let (session, bytes) = peak_bytes(|| {
                backend.prepare(&model, s.stage.role(), h, w, s.choice.room()).unwrap()
            });
            bytes - session.stats().arena_bytes
        });
        let progress = &mut |_: &_| ControlFlow::Continue(());
        let sink = &mut |_, _: &[f32]| {};
        let ((), peak) = peak_bytes(|| match mode {
            Mode::Once => drop(plan.run(&backend, picture, progress, sink).unwrap()),
            Mode::Resumed => {
                let resume = Resume::new(folder.path().join(format!("run{height}")));
                drop(plan.resume(&backend, picture, &resume, progress, sink).unwrap());
            }
            Mode::Warm => {
                let mut runner = plan.runner(&backend).unwrap();
                runner.run(picture, progress, sink).unwrap();
            }
        });
        let planned = stages.each_ref().map(|s| s.parts.pipeline + s.parts.arena);
        let planned = planned.into_iter().max().unwrap();
        let beside: usize = match mode {
            Mode::Warm => lowered.iter().sum(),
            _ => *lowered.iter().max().unwrap(),
        };
        assert!(beside < 1 << 20, "lowered graphs of {beside} bytes");
        let at =
            format!("{size:?} {tile:?} {mode:?} {in_file}: {peak} allocated, {planned} planned");
        assert!(peak >= planned, "{at}");
        assert!(peak <= planned + beside + SLACK, "{at}, {beside} beside");
    }
}
