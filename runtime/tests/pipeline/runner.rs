//! A runner gives what single runs give, and prepares once.

use crate::fake::{Fake, Shaped};
use latile_runtime::format::Role;
use latile_runtime::pipeline::{Generator, Options, Picture, PipelineError, Pixels, Plan};
use std::ops::ControlFlow;

fn frames(count: usize, [h, w]: [usize; 2]) -> Vec<Vec<u8>> {
    let mut g = Generator::new(5);
    (0..count).map(|_| (0..h * w * 3).map(|_| g.next_u32() as u8).collect()).collect()
}

/// Tiles, noise between steps, and consistency: whatever keeps something from row to row or tile to tile.
#[test]
fn frames_are_what_single_runs_make_of_them() {
    let size = [10usize, 14usize];
    let model = Shaped { consistency: 0.7, ..Shaped::default() }.build();
    for tile in [None, Some(8)] {
        let options = Options {
            steps: Some(3),
            eta: Some(0.5),
            seed: 9,
            tile,
            overlap: Some(4),
            ..Options::default()
        };
        let plan = Plan::new(&model, size[1], size[0], &options).unwrap();
        let frames = frames(3, size);
        let picture = |i: usize| Picture {
            width: size[1],
            height: size[0],
            pixels: Pixels::Rgb8(&frames[i]),
        };
        let single: Vec<Vec<f32>> = (0..frames.len())
            .map(|i| {
                let mut out = Vec::new();
                let goes_on = &mut |_: &_| ControlFlow::Continue(());
                let sink = &mut |_, row: &[f32]| out.extend_from_slice(row);
                plan.run(&Fake::pointwise(), picture(i), goes_on, sink).unwrap();
                out
            })
            .collect();

        let fake = Fake::pointwise();
        fake.most.set(2);
        let mut runner = plan.runner(&fake).unwrap();
        let [h, w] = plan.grid().tile();
        assert_eq!(*fake.prepared.borrow(), [(Role::Unet, [h, w]), (Role::Decoder, [h, w])]);
        assert_eq!(runner.report().arena_bytes, 3000, "both stages are there at once");
        assert!(runner.report().pipeline_bytes > plan.pipeline_bytes());
        // Each frame, stopped before every callback in turn and run again: what was left half-way is forgotten.
        for i in [0, 1, 1, 2, 0] {
            let callbacks = plan.grid().tiles() * 4 + 1;
            for stop in (0..callbacks).chain([usize::MAX]) {
                let mut out = Vec::new();
                let mut calls = 0;
                let on_progress = &mut |_: &_| {
                    calls += 1;
                    if calls > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                };
                let sink = &mut |y, row: &[f32]| {
                    assert_eq!(out.len(), y * row.len());
                    out.extend_from_slice(row);
                };
                let result = runner.run(picture(i), on_progress, sink);
                if stop < callbacks {
                    assert!(matches!(result, Err(PipelineError::Cancelled)), "{result:?}");
                } else {
                    result.unwrap();
                    assert_eq!(out, single[i], "frame {i}, tile {tile:?}");
                }
            }
        }
        assert_eq!(fake.prepared.borrow().len(), 2);
        let wrong = Picture { width: 8, height: 8, pixels: Pixels::Rgb8(&[0; 192]) };
        let goes_on = &mut |_: &_| ControlFlow::Continue(());
        let refused = runner.run(wrong, goes_on, &mut |_, _| ()).unwrap_err();
        assert!(refused.to_string().contains("planned for 14x10"), "{refused}");
    }
}
