//! What happens to a picture between its two ends.

use crate::fake::{Call, Fake, Shaped, pointwise_decoder, pointwise_unet, scheduler};
use latile_runtime::backend::Norms;
use latile_runtime::format::{Prediction, Role, SchedulerSpec};
use latile_runtime::pipeline::{
    Consistency, Generator, GivenNoise, NoiseTensor, NormScope, Options, Picture, PipelineError,
    Pixels, Plan, Progress, Stage, upscale, upscale_rows,
};
use proptest::prelude::*;
use std::cell::RefCell;
use std::ops::ControlFlow;
use std::rc::Rc;

fn picture(height: usize, width: usize, seed: u64) -> Vec<u8> {
    let mut g = Generator::new(seed);
    (0..height * width * 3).map(|_| g.next_u32() as u8).collect()
}

/// Every tile for itself: the oracle knows nothing of what tiles share.
fn options(steps: u32, eta: f32, seed: u64) -> Options {
    let norms = NormScope::Tile;
    Options { steps: Some(steps), eta: Some(eta), seed, norms, ..Options::default() }
}

/// All of a run's result as floats.
pub(crate) fn floats(
    fake: &Fake,
    shaped: &Shaped,
    rgb: &[u8],
    size: [usize; 2],
    options: &Options,
) -> Vec<f32> {
    let model = shaped.build();
    let [height, width] = size;
    let mut out = Vec::new();
    let given = Picture { width, height, pixels: Pixels::Rgb8(rgb) };
    let line = width * shaped.latent.factor as usize * 3;
    let goes_on = &mut |_: &Progress| ControlFlow::Continue(());
    upscale_rows(fake, &model, given, options, goes_on, &mut |y, row| {
        assert_eq!((out.len(), row.len()), (y * line, line), "rows come in order, cropped");
        out.extend_from_slice(row);
    })
    .unwrap();
    assert_eq!(out.len(), line * height * shaped.latent.factor as usize);
    out
}

/// One latent pixel through DDIM and the pointwise networks, written down once more, in f64.
#[test]
fn a_whole_run_by_hand() {
    let spec = scheduler();
    let (size, steps) = ([4usize, 8usize], 5u32);
    for eta in [0.0f32, 0.6] {
        let shaped = Shaped::default();
        let rgb = picture(size[0], size[1], 3);
        let found = floats(&Fake::pointwise(), &shaped, &rgb, size, &options(steps, eta, 11));

        let betas = |t: usize| {
            let (a, b) = (0.0015f64.sqrt(), 0.0155f64.sqrt());
            (a + (b - a) * t as f64 / 999.0).powi(2)
        };
        let alpha = |t: i64| (0..=t).map(|t| 1.0 - betas(t as usize)).product::<f64>();
        let pixels = size[0] * size[1];
        let mut generator = Generator::new(11);
        let mut field = || {
            let mut planes = vec![0f64; pixels * 3];
            generator.randn(pixels * 3, |i, v| planes[i] = f64::from(v));
            planes
        };
        let mut z = field();
        let mut time = [0f32; 4];
        for i in (0..i64::from(steps)).rev() {
            let t = i * 200;
            shaped.timestep.unwrap().project(t as f32, &mut time);
            let (a, p) = (alpha(t), if t < 200 { 1.0 } else { alpha(t - 200) });
            let sigma = f64::from(eta) * ((1.0 - p) / (1.0 - a) * (1.0 - a / p)).sqrt();
            let old = z.clone();
            let noise = if eta > 0.0 { field() } else { vec![0.0; z.len()] };
            for pixel in 0..pixels {
                for c in 0..3 {
                    let lr = f64::from(rgb[pixel * 3 + c]) / 127.5 - 1.0;
                    let at = c * pixels + pixel;
                    let next = old[(c + 1) % 3 * pixels + pixel];
                    let eps = 0.4 * old[at] + 0.2 * f64::from(time[0]) * next - 0.3 * lr;
                    let x0 = (old[at] - (1.0 - a).sqrt() * eps) / a.sqrt();
                    let direction = (1.0 - p - sigma * sigma).sqrt() * eps;
                    z[at] = p.sqrt() * x0 + direction + sigma * noise[at];
                }
            }
        }
        assert_eq!(spec.train_timesteps, 1000);
        for (i, value) in found.iter().enumerate() {
            let (c, x, y) = (i % 3, i / 3 % (size[1] * 4), i / 3 / (size[1] * 4));
            let latent = z[c * pixels + y / 4 * size[1] + x / 4];
            let wanted = 0.6 * latent + 0.05 * ((y % 4) * 4 + x % 4) as f64 - 0.4;
            assert!((f64::from(*value) - wanted).abs() < 2e-5, "eta {eta}: {i}: {value} {wanted}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Networks that see one pixel at a time give the same picture tile by tile.
    #[test]
    fn tiles_of_a_pointwise_model_are_the_whole(
        h in 1usize..40, w in 1usize..40, units in 1usize..5, overlap in 0usize..8, eta in 0f32..=1.0, seed: u64,
    ) {
        let shaped = Shaped::default();
        let rgb = picture(h, w, 5);
        let whole = floats(&Fake::pointwise(), &shaped, &rgb, [h, w], &options(3, eta, seed));
        let tile = units * 4;
        let tiled = Options {
            tile: Some(tile),
            overlap: Some(overlap.min(tile - 4)),
            ..options(3, eta, seed)
        };
        let parts = floats(&Fake::pointwise(), &shaped, &rgb, [h, w], &tiled);
        for (a, b) in parts.iter().zip(&whole) {
            prop_assert!((a - b).abs() < 2e-5, "{} {}", a, b);
        }
    }

    /// What lies beyond the picture does not show in it.
    #[test]
    fn padding_does_not_leak(h in 1usize..14, w in 1usize..14, tile in 1usize..4) {
        let shaped = Shaped { multiple: 8, ..Shaped::default() };
        let given = Options { tile: Some(tile * 8), ..options(2, 1.0, 4) };
        let small = picture(h, w, 6);
        let (ph, pw) = (h.next_multiple_of(8), w.next_multiple_of(8));
        let mut large = picture(ph, pw, 7);
        for y in 0..h {
            large[y * pw * 3..][..w * 3].copy_from_slice(&small[y * w * 3..][..w * 3]);
        }
        let cropped = floats(&Fake::pointwise(), &shaped, &small, [h, w], &given);
        let whole = floats(&Fake::pointwise(), &shaped, &large, [ph, pw], &given);
        for y in 0..h * 4 {
            let (a, b) = (&cropped[y * w * 12..][..w * 12], &whole[y * pw * 12..][..w * 12]);
            prop_assert_eq!(a, b);
        }
    }
}

/// The condition a U-Net sees beyond the edge is the picture mirrored, without its edge twice.
#[test]
fn small_pictures_are_mirrored() {
    for (size, wanted) in [
        (3usize, [0usize, 1, 2, 1, 0, 1, 2, 1]),
        (1, [0; 8]),
        (2, [0, 1, 0, 1, 0, 1, 0, 1]),
        (7, [0, 1, 2, 3, 4, 5, 6, 5]),
    ] {
        let seen = Rc::new(RefCell::new(Vec::new()));
        let to_seen = Rc::clone(&seen);
        let fake = Fake::new(
            move |call| {
                to_seen.replace(call.sample.chunks(6).map(|p| p[3..].to_vec()).collect());
                pointwise_unet(call);
            },
            pointwise_decoder,
        );
        let shaped = Shaped { multiple: 8, ..Shaped::default() };
        let rgb = picture(size, size, 2);
        floats(&fake, &shaped, &rgb, [size, size], &options(1, 0.0, 0));
        for (i, pixel) in seen.borrow().iter().enumerate() {
            let from = (wanted[i / 8] * size + wanted[i % 8]) * 3;
            let there: Vec<f32> =
                rgb[from..from + 3].iter().map(|&b| f32::from(b) / 255.0 * 2.0 - 1.0).collect();
            assert_eq!(*pixel, there, "{size}: pixel {i}");
        }
    }
}

/// Predictions are blended by their distance to the tile's border, before the latent moves.
#[test]
fn seams_are_blended_by_border_distance() {
    // With the clean latent predicted, one step to ᾱ = 1 makes the latent the blended prediction itself.
    let shaped = Shaped {
        scheduler: Some(SchedulerSpec { prediction: Prediction::Sample, ..scheduler() }),
        ..Shaped::default()
    };
    let fake = Fake::new(
        |call| call.out.fill(call.run as f32 + 1.0),
        // A decoder that ignores its tile's place shows the latent.
        |call: Call<'_>| {
            let [_, w] = call.size;
            for (i, out) in call.out.chunks_mut(3).enumerate() {
                let from = (i / (w * 4) / 4 * w + i % (w * 4) / 4) * 3;
                out.copy_from_slice(&call.sample[from..from + 3]);
            }
        },
    );
    let tiled = Options { tile: Some(8), overlap: Some(4), ..options(1, 0.0, 0) };
    let (h, w) = (12, 16);
    let found = floats(&fake, &shaped, &picture(h, w, 1), [h, w], &tiled);
    let tiles = [(0, 0), (0, 4), (0, 8), (4, 0), (4, 4), (4, 8)];
    for y in 0..h {
        for x in 0..w {
            let (mut sum, mut norm) = (0f64, 0f64);
            for (i, (top, left)) in tiles.into_iter().enumerate() {
                if (top..top + 8).contains(&y) && (left..left + 8).contains(&x) {
                    let share = |p: usize| (p as f64 / 7.0).min(1.0 - p as f64 / 7.0);
                    let weight = share(y - top).min(share(x - left)).clamp(0.01, 0.5);
                    sum += weight * (i + 1) as f64;
                    norm += weight;
                }
            }
            let value = found[(y * 4 * w * 4 + x * 4) * 3];
            assert!((f64::from(value) - sum / norm).abs() < 1e-5, "{y} {x}: {value}");
        }
    }
    assert_eq!(fake.runs[0].get(), 6);
    assert_eq!(fake.runs[1].get(), 6);
}

#[test]
fn pictures_beyond_the_limit_are_tiled() {
    for (size, tile, tiles) in [
        ([128, 128], [128, 128], 1),
        ([64, 256], [64, 256], 1),
        ([128, 132], [128, 76], 2),
        ([100, 600], [100, 116], 6),
    ] {
        let shaped = Shaped::default();
        let model = shaped.build();
        let options = options(1, 0.0, 0);
        let plan = Plan::new(&model, size[1], size[0], &options).unwrap();
        assert_eq!((plan.grid().tile(), plan.grid().tiles()), (tile, tiles), "{size:?}");
        assert!(plan.grid().cols.starts().len() == 1 || plan.grid().cols.overlap() >= 16);
    }
}

#[test]
fn the_same_seed_is_the_same_picture() {
    let model = Shaped::default().build();
    let (rgb, size) = (picture(9, 17, 1), [9, 17]);
    let run = |options: &Options| Fake::pointwise().upscale(&model, &rgb, size, options).unwrap();
    let tiled = Options { tile: Some(8), ..options(4, 1.0, 77) };
    let first = run(&tiled);
    assert_eq!((first.width, first.height), (68, 36));
    assert_eq!(first.rgb.len(), 68 * 36 * 3);
    assert_eq!(run(&tiled), first);
    assert_ne!(run(&Options { seed: 78, ..tiled.clone() }).rgb, first.rgb);
    assert_ne!(run(&Options { eta: Some(0.0), ..tiled.clone() }).rgb, first.rgb);

    // Giving the seed's own initial noise changes nothing, with the steps' noise drawn or given.
    let mut g = Generator::new(77);
    let mut field = || {
        let mut data = vec![0f32; 3 * 12 * 20];
        g.randn(data.len(), |i, v| data[i] = v);
        data
    };
    let initial = NoiseTensor { shape: vec![1, 3, 12, 20], data: field() };
    let steps =
        NoiseTensor { shape: vec![4, 1, 3, 12, 20], data: (0..4).flat_map(|_| field()).collect() };
    for (seed, eta) in [(77, None), (5, Some(steps))] {
        let initial = initial.clone();
        let noise = Some(GivenNoise { initial, eta });
        let given = Options { noise, seed, ..tiled.clone() };
        assert_eq!(run(&given).rgb, first.rgb);
    }
}

#[test]
fn bytes_words_and_floats_are_the_same_picture() {
    let model = Shaped::default().build();
    let rgb = picture(5, 6, 1);
    let unit: Vec<f32> = rgb.iter().map(|&b| f32::from(b) / 255.0 * 2.0 - 1.0).collect();
    let options = options(2, 0.0, 1);
    let run = |pixels| {
        let picture = Picture { width: 6, height: 5, pixels };
        let fake = Fake::pointwise();
        upscale(&fake, &model, picture, &options, &mut |_| ControlFlow::Continue(())).unwrap()
    };
    assert_eq!(run(Pixels::Rgb8(&rgb)), run(Pixels::Unit(&unit)));
    let mut g = Generator::new(4);
    let deep: Vec<u16> = (0..rgb.len()).map(|_| g.next_u32() as u16).collect();
    let unit: Vec<f32> = deep.iter().map(|&v| f32::from(v) / 65535.0 * 2.0 - 1.0).collect();
    assert_eq!(run(Pixels::Rgb16(&deep)), run(Pixels::Unit(&unit)));
    // A byte b is the word 257 b, but for the last bit of a float.
    let words: Vec<u16> = rgb.iter().map(|&b| u16::from(b) * 257).collect();
    let [a, b] = [run(Pixels::Rgb16(&words)), run(Pixels::Rgb8(&rgb))].map(|u| u.rgb);
    assert!(a.iter().zip(&b).all(|(a, b)| a.abs_diff(*b) <= 1));
}

/// Clamped, scaled and rounded half to even, as NumPy rounds.
#[test]
fn samples_become_bytes() {
    let model = Shaped::default().build();
    let cases = [
        (-2.0, 0),
        (-1.0, 0),
        (0.0, 128),
        (1.0, 255),
        (7.5, 255),
        (0.5, 191),
        (-0.011_764_706, 126),
    ];
    for (value, byte) in cases {
        let fake = Fake::new(pointwise_unet, move |call| {
            call.out.fill(value);
            call.out[0] = 0.25;
        });
        let out = fake.upscale(&model, &picture(2, 2, 0), [2, 2], &options(1, 0.0, 0)).unwrap();
        assert_eq!(*out.rgb.last().unwrap(), byte, "{value}");
    }
}

#[test]
fn the_decoder_takes_the_latent_unscaled() {
    let mut shaped = Shaped::default();
    let plain = floats(&Fake::pointwise(), &shaped, &picture(4, 4, 1), [4, 4], &options(2, 0.0, 0));
    shaped.latent.scale = 0.5;
    shaped.latent.shift = 0.25;
    let scaled =
        floats(&Fake::pointwise(), &shaped, &picture(4, 4, 1), [4, 4], &options(2, 0.0, 0));
    for (i, (a, b)) in plain.iter().zip(&scaled).enumerate() {
        let (x, y) = (i / 3 % 16, i / 48);
        let pattern = 0.05 * ((y % 4) * 4 + x % 4) as f32 - 0.4;
        let wanted = ((a - pattern) / 0.6 / 0.5 + 0.25) * 0.6 + pattern;
        assert!((b - wanted).abs() < 1e-4, "{i}: {b} {wanted}");
    }
}

/// The ranges of int8 layers follow the timestep.
#[test]
fn sessions_are_told_the_timestep_group() {
    let shaped = Shaped { timestep_groups: vec![250, 500, 1000], ..Shaped::default() };
    let told = Rc::new(RefCell::new(Vec::new()));
    let to_told = Rc::clone(&told);
    let fake = Fake::new(
        move |call| {
            to_told.borrow_mut().push(call.timestep_group);
            pointwise_unet(call);
        },
        pointwise_decoder,
    );
    let tiled = Options { tile: Some(8), overlap: Some(4), ..options(4, 0.0, 0) };
    // Timesteps 750, 500, 250 and 0, two tiles each.
    floats(&fake, &shaped, &picture(8, 12, 1), [8, 12], &tiled);
    assert_eq!(*told.borrow(), [2, 2, 2, 2, 1, 1, 0, 0]);
}

#[test]
fn norms_are_gathered_before_each_step() {
    let told = Rc::new(RefCell::new(Vec::new()));
    let logs = [Rc::clone(&told), Rc::clone(&told)];
    let [unet, decoder] = logs;
    let fake = Fake::new(
        move |call| {
            unet.borrow_mut().push(('u', call.norms));
            pointwise_unet(call);
        },
        move |call| {
            decoder.borrow_mut().push(('d', call.norms));
            pointwise_decoder(call);
        },
    );
    let rgb = picture(12, 16, 1);
    let tiled = Options {
        tile: Some(8),
        overlap: Some(4),
        norms: NormScope::Picture,
        ..options(2, 0.0, 0)
    };
    let alike = floats(&fake, &Shaped::default(), &rgb, [12, 16], &tiled);
    // Of six tiles one is run first, at each of two steps and before decoding.
    let stage = |s| [vec![(s, Norms::Gather)], vec![(s, Norms::Gathered); 6]].concat();
    assert_eq!(*told.borrow(), [stage('u'), stage('u'), stage('d')].concat());
    // The fake has no norms, so what is made is the same.
    let own = Options { norms: NormScope::Tile, ..tiled.clone() };
    assert_eq!(floats(&Fake::pointwise(), &Shaped::default(), &rgb, [12, 16], &own), alike);
    let model = Shaped::default().build();
    let macs = |o: &Options| Plan::new(&model, 16, 12, o).unwrap().macs();
    assert_eq!(6 * macs(&tiled), 7 * macs(&own));
    // One tile is its own picture.
    told.borrow_mut().clear();
    let whole = Options { norms: NormScope::Picture, ..options(1, 0.0, 0) };
    floats(&fake, &Shaped::default(), &rgb, [12, 16], &whole);
    assert_eq!(*told.borrow(), [('u', Norms::Own), ('d', Norms::Own)]);
}

#[test]
fn progress_counts_every_tile_and_the_report_agrees() {
    let model = Shaped::default().build();
    let rgb = picture(12, 16, 1);
    let picture = Picture { width: 16, height: 12, pixels: Pixels::Rgb8(&rgb) };
    let options = Options { tile: Some(8), overlap: Some(4), ..options(3, 0.0, 1) };
    let fake = Fake::pointwise();
    let mut seen: Vec<Progress> = Vec::new();
    let result = upscale(&fake, &model, picture, &options, &mut |p| {
        seen.push(*p);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(seen.len(), 3 * 6 + 6 + 1);
    let (first, last) = (seen[0], seen[24]);
    assert_eq!((first.stage, first.step, first.tile, first.done), (Stage::Denoise, 0, 0, 0));
    assert_eq!((last.stage, last.step, last.tile, last.done), (Stage::Decode, 3, 6, last.total));
    assert!(seen.windows(2).all(|w| w[1].done > w[0].done));
    assert!(seen.iter().all(|p| (p.steps, p.tiles, p.total) == (3, 6, last.total)));
    // 8×8 pixels: 6·3 + 3·4/64 in the U-Net, 3·3 in the decoder.
    let (unet, decoder) = (64 * 18 + 12, 64 * 9);
    assert_eq!(last.total, 6 * (3 * unet + decoder));
    let report = result.report;
    assert_eq!(report.gmac, last.total as f64 / 1e9);
    assert_eq!((report.tile, report.overlap, report.tiles), ([8, 8], [4, 4], 6));
    assert_eq!((report.arena_bytes, report.weight_bytes), (2000, 10));
    assert_eq!((report.steps, report.timesteps), (3, vec![666, 333, 0]));
    assert_eq!((report.backend.as_str(), report.isa.as_str()), ("fake", "none"));
    let plan = Plan::new(&model, 16, 12, &options).unwrap();
    assert_eq!(report.pipeline_bytes, plan.pipeline_bytes() + 64 * 48 * 3);
    // The latent, a tile of 6 and of 3 channels, four times, and the decoder's blending of one tile row.
    assert_eq!(plan.pipeline_bytes(), 4 * (12 * 16 * 3 + 64 * 3 + 32 * 32 * 3 + 32 * 64 * 4));
    let strict = Options { consistency: Some(0.5), ..options.clone() };
    let strict = Plan::new(&model, 16, 12, &strict).unwrap();
    let more = strict.pipeline_bytes() - plan.pipeline_bytes();
    assert_eq!(more, Consistency::bytes([12, 16], 4));
    let prepared = fake.prepared.borrow();
    assert_eq!(*prepared, [(Role::Unet, [8, 8]), (Role::Decoder, [8, 8])]);
}

/// Wherever it is stopped, it stops there, and nothing runs afterwards.
#[test]
fn a_run_can_be_stopped_before_every_tile() {
    let model = Shaped::default().build();
    let rgb = picture(4, 12, 1);
    let picture = Picture { width: 12, height: 4, pixels: Pixels::Rgb8(&rgb) };
    let options = Options { tile: Some(8), overlap: Some(4), ..options(2, 0.0, 1) };
    for stop in 0..7 {
        let fake = Fake::pointwise();
        let mut calls = 0;
        let result = upscale(&fake, &model, picture, &options, &mut |_| {
            calls += 1;
            if calls > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(result, Err(PipelineError::Cancelled)), "{stop}");
        assert_eq!(fake.runs[0].get() + fake.runs[1].get(), stop);
    }
}
