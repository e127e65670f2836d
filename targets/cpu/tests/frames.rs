//! The frames of a stream, but for the first, allocate nothing. Alone in its program, so that no other test's
//! allocations are counted.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/counting.rs"]
mod counting;

use common::Net;
use counting::allocations;
use latile_cpu::isa::Level;
use latile_cpu::session::CpuBackend;
use latile_runtime::format::{
    BetaSchedule, Defaults, LatentSpec, Manifest, Metadata, Model, Prediction, Role, SchedulerSpec,
    Spacing, Task,
};
use latile_runtime::pipeline::budget::Mode;
use latile_runtime::pipeline::{
    Budget, Options, Picture, Pixels, Plan, Scratch, Strategy, to_byte,
};
use latile_runtime::tensor::DType;
use std::ops::ControlFlow;

/// A U-Net and a decoder with the layers that real ones have, random weights, int8 where asked for.
fn model(dtype: DType, int8: Option<bool>) -> Model {
    let mut unet = Net::new(dtype, 8);
    unet.int8 = int8;
    let x = unet.map("sample", 6);
    let t = unet.vector("time_proj", 8);
    let h = unet.conv3(x, 16);
    let h = unet.resnet(h, 16, 4, Some(t));
    let h = unet.attention_block(h, 4, 2);
    let y = unet.conv3(h, 3);
    let y = unet.affine(y, 0.1, 0.0);
    unet.output("sample", y);
    let mut decoder = Net::new(dtype, 9);
    decoder.int8 = int8;
    let z = decoder.map("latents", 3);
    let h = decoder.conv3(z, 16);
    let h = decoder.upsample(h);
    let h = decoder.resnet(h, 16, 4, None);
    let y = decoder.conv3(h, 3);
    let y = decoder.affine(y, 0.1, 0.0);
    decoder.output("sample", y);
    unet.mapped(&[(Role::Unet, &unet), (Role::Decoder, &decoder)], |precision| Manifest {
        metadata: Metadata::default(),
        precision,
        task: Task::SuperResolution,
        latent: Some(LatentSpec { channels: 3, factor: 2, scale: 1.0, shift: 0.0 }),
        scheduler: Some(SchedulerSpec {
            train_timesteps: 1000,
            betas: BetaSchedule::ScaledLinear { start: 0.0015, end: 0.0155 },
            prediction: Prediction::Epsilon,
            spacing: Spacing::Trailing,
            steps_offset: 0,
            set_alpha_to_one: true,
            clip_sample: None,
            zero_terminal_snr: false,
        }),
        defaults: Defaults { steps: 3, eta: 0.5, consistency: 0.7 },
        components: Vec::new(),
    })
}

#[test]
fn frames_after_the_first_do_not_allocate() {
    let (h, w) = (11usize, 13usize);
    let frames: Vec<Vec<u8>> =
        (0..4u8).map(|n| (0..h * w * 3).map(|i| (i * 7) as u8 ^ n).collect()).collect();
    let fastest = Level::available().last().copied().unwrap();
    for (dtype, int8) in [(DType::F32, None), (DType::F16, None), (DType::F16, Some(true))] {
        let model = model(dtype, int8);
        for (tile, in_file) in [(None, false), (Some(6), false), (Some(6), true)] {
            let scratch = in_file.then(|| Scratch::new(std::env::temp_dir()).at_least(0));
            let options = Options { tile, overlap: Some(2), scratch, ..Options::default() };
            let mut plan = Plan::new(&model, w, h, &options).unwrap();
            assert_eq!(plan.grid().tiles() > 1, tile.is_some());
            let backend = CpuBackend::new(2, fastest).unwrap();
            if in_file {
                let budget = Budget { mode: Mode::Warm, ..Budget::default() };
                let all = plan.strategies(&backend, &budget).unwrap();
                let limit = all.smallest().map(Strategy::peak);
                plan = plan.within(&backend, &Budget { limit, ..budget }).unwrap();
                assert!(plan.strategy().unwrap().scratch_bytes > 0);
            }
            let mut runner = plan.runner(&backend).unwrap();
            let [_, width] = plan.output_size();
            let line = width * 3;
            let mut out = vec![0u8; plan.output_size()[0] * line];
            let mut firsts = Vec::new();
            for (number, frame) in frames.iter().chain(&frames).enumerate() {
                let picture = Picture { width: w, height: h, pixels: Pixels::Rgb8(frame) };
                let found = allocations(|| {
                    let sink = &mut |y: usize, row: &[f32]| {
                        let bytes = out[y * line..][..line].iter_mut();
                        bytes.zip(row).for_each(|(to, &v)| *to = to_byte(v));
                    };
                    runner.run(picture, &mut |_| ControlFlow::Continue(()), sink).unwrap();
                });
                assert!(number == 0 || found == 0, "frame {number} allocated {found} times");
                if number < frames.len() {
                    firsts.push(out.clone());
                } else {
                    assert_eq!(
                        out,
                        firsts[number - frames.len()],
                        "an equal frame, an equal result"
                    );
                }
            }
            assert!(firsts[0] != firsts[1]);
        }
    }
}
