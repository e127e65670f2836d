//! Errors that say what, where and what to do.

use crate::fake::{Fake, Shaped, pointwise_decoder, pointwise_unet, scheduler};
use latile_runtime::format::{LatentSpec, Role, SchedulerSpec, Spacing, Task};
use latile_runtime::pipeline::{
    GivenNoise, NoiseTensor, NormScope, Options, Picture, PipelineError, Pixels, Plan, upscale,
};
use std::ops::ControlFlow;

fn refusal(shaped: &Shaped, options: &Options) -> PipelineError {
    Plan::new(&shaped.build(), 8, 8, options).unwrap_err()
}

#[track_caller]
fn says(error: &PipelineError, words: &str) {
    assert!(error.to_string().contains(words), "{error}");
}

#[test]
fn models_for_other_tasks_are_refused() {
    let with = |change: &dyn Fn(&mut Shaped)| {
        let mut shaped = Shaped::default();
        change(&mut shaped);
        let error = refusal(&shaped, &Options::default());
        let fits = matches!(error, PipelineError::Unsuited { .. } | PipelineError::Model(_));
        assert!(fits, "{error:?}");
        error
    };
    let components = with(&|s| s.task = Task::Components);
    says(&components, "one by one");
    says(&with(&|s| s.timestep = None), "timestep");
    says(&with(&|s| s.unet = [5, 3]), "its unet takes");
    says(&with(&|s| s.unet = [6, 4]), "its unet gives");
    says(&with(&|s| s.decoder = [4, 3]), "its decoder takes");
    says(&with(&|s| s.decoder = [3, 1]), "its decoder gives");
    says(&with(&|s| s.doublings = 3), "64x64x3");
    says(&with(&|s| s.roles = vec![Role::Unet]), "no decoder");
    says(&with(&|s| s.roles = vec![Role::Decoder]), "no unet");
    let four = with(&|s| {
        s.latent = LatentSpec { channels: 4, ..s.latent };
    });
    says(&four, "4 channels");
}

#[test]
fn options_are_checked() {
    let refused = |options: Options| refusal(&Shaped::default(), &options);
    let with = Options::default;
    says(&refused(Options { steps: Some(0), ..with() }), "at least 1");
    says(&refused(Options { steps: Some(1001), ..with() }), "at most 1000");
    says(&refused(Options { eta: Some(-0.5), ..with() }), "eta -0.5");
    for consistency in [-0.1, 1.001, f32::NAN, f32::INFINITY] {
        let error = refused(Options { consistency: Some(consistency), ..with() });
        says(&error, &format!("consistency {consistency} is not between 0"));
    }
    says(&refused(Options { tile: Some(3), ..with() }), "multiples of 4");
    says(&refused(Options { tile: Some(0), ..with() }), "multiples of 4");
    let all = Options { tile: Some(8), overlap: Some(8), ..with() };
    says(&refused(all), "smaller overlap");
    let huge = Options { overlap: Some(usize::MAX), ..with() };
    says(&refused(huge), "smaller overlap");
    // The default overlap gives way to a small tile.
    let model = Shaped::default().build();
    let small = Options { tile: Some(4), ..with() };
    assert_eq!(Plan::new(&model, 16, 8, &small).unwrap().grid().tiles(), 8);
    let zero_snr = Shaped {
        scheduler: Some(SchedulerSpec { zero_terminal_snr: true, ..scheduler() }),
        ..Shaped::default()
    };
    let trailing = Options { spacing: Some(Spacing::Trailing), ..with() };
    says(&refusal(&zero_snr, &trailing), "timestep 999");
}

#[test]
fn pictures_are_checked() {
    let model = Shaped::default().build();
    let options = Options::default();
    for (width, height) in [(0, 5), (5, 0), (0, 0)] {
        let error = Plan::new(&model, width, height, &options).unwrap_err();
        says(&error, "no pixels");
    }
    for (width, height) in [(usize::MAX, 1), (1, usize::MAX - 1), (1 << 40, 1 << 40)] {
        let error = Plan::new(&model, width, height, &options).unwrap_err();
        says(&error, "more than can be addressed");
    }
    let run = |pixels: Pixels<'_>| {
        let picture = Picture { width: 2, height: 2, pixels };
        let fake = Fake::pointwise();
        let error = upscale(&fake, &model, picture, &options, &mut |_| ControlFlow::Continue(()))
            .unwrap_err();
        assert!(fake.prepared.borrow().is_empty(), "refused before anything is prepared");
        error
    };
    says(&run(Pixels::Rgb8(&[0; 11])), "11 samples");
    says(&run(Pixels::Unit(&[0.0; 13])), "13 samples");
    let mut unit = [0.0; 12];
    unit[8] = f32::NAN;
    says(&run(Pixels::Unit(&unit)), "column 0, row 1");
}

#[test]
fn a_picture_that_does_not_fit_in_memory_is_an_error() {
    let model = Shaped::default().build();
    let options = Options { tile: Some(64), ..Options::default() };
    // Addressable, but no machine has it: 2^54 bytes of latent and more of pixels.
    let side = 1 << 24;
    Plan::new(&model, side, side, &options).unwrap();
    let picture = Picture { width: side, height: side, pixels: Pixels::Rgb8(&[]) };
    let error =
        upscale(&Fake::pointwise(), &model, picture, &options, &mut |_| ControlFlow::Continue(()))
            .unwrap_err();
    assert!(matches!(error, PipelineError::OutOfMemory { .. }), "{error}");
}

#[test]
fn given_noise_is_checked() {
    let model = Shaped::default().build();
    let refused = |shape: &[usize], len: usize, eta: Option<&[usize]>, value: f32| {
        let tensor =
            |shape: &[usize], len| NoiseTensor { shape: shape.to_vec(), data: vec![value; len] };
        let options = Options {
            eta: Some(1.0),
            noise: Some(GivenNoise {
                initial: tensor(shape, len),
                eta: eta.map(|s| tensor(s, s.iter().product())),
            }),
            ..Options::default()
        };
        Plan::new(&model, 7, 5, &options).err().map(|e| {
            assert!(matches!(e, PipelineError::Noise(_)));
            e.to_string()
        })
    };
    // 7×5 pixels are padded to 8×8.
    assert_eq!(refused(&[1, 3, 8, 8], 192, None, 0.1), None);
    assert_eq!(refused(&[3, 8, 8], 192, Some(&[4, 3, 8, 8]), 0.1), None);
    assert_eq!(refused(&[3, 8, 8], 192, Some(&[5, 1, 3, 8, 8]), 0.1), None);
    let wrong = |found: Option<String>, words: &str| {
        let found = found.unwrap();
        assert!(found.contains(words), "{found}");
    };
    wrong(refused(&[1, 3, 5, 7], 105, None, 0.1), "needs [1, 3, 8, 8]");
    wrong(refused(&[1, 8, 8, 3], 192, None, 0.1), "needs [1, 3, 8, 8]");
    wrong(refused(&[2, 3, 8, 8], 384, None, 0.1), "needs [1, 3, 8, 8]");
    wrong(refused(&[1, 3, 8, 8], 191, None, 0.1), "191 elements");
    wrong(refused(&[3, 8, 8], 192, Some(&[3, 3, 8, 8]), 0.1), "needs [4, 3, 8, 8]");
    wrong(refused(&[3, 8, 8], 192, Some(&[4, 2, 3, 8, 8]), 0.1), "needs [4, 3, 8, 8]");
    wrong(refused(&[3, 8, 8], 192, None, f32::INFINITY), "not finite");
}

#[test]
fn results_that_are_no_picture_are_errors() {
    let model = Shaped::default().build();
    let norms = NormScope::Tile;
    let options = Options { tile: Some(8), overlap: Some(4), norms, ..Options::default() };
    let rgb = vec![90u8; 12 * 12 * 3];
    let run = |fake: Fake| fake.upscale(&model, &rgb, [12, 12], &options).unwrap_err();
    let unet = run(Fake::new(
        |call| {
            call.out.fill(0.5);
            if call.run == 5 {
                call.out[7] = f32::NAN;
            }
        },
        pointwise_decoder,
    ));
    let found = matches!(unet, PipelineError::NonFinite { .. });
    assert!(found, "{unet}");
    says(&unet, "step 2 (timestep 500)");
    let decoder = run(Fake::new(pointwise_unet, |call| {
        let bad = call.run == 2;
        call.out.fill(0.5);
        call.out[1] = if bad { f32::INFINITY } else { 0.1 };
    }));
    says(&decoder, "tile 3 of 4");
    let flat = run(Fake::new(pointwise_unet, |call| {
        for pixel in call.out.chunks_mut(3) {
            pixel.copy_from_slice(&[0.1, 0.2, 0.3]);
        }
    }));
    assert!(
        matches!(flat, PipelineError::Constant { value } if value == [0.1, 0.2, 0.3]),
        "{flat}"
    );
    // One pixel that differs, in the last tile, makes it a picture.
    let fake = Fake::new(pointwise_unet, |call| {
        call.out.fill(0.5);
        if call.run == 3 {
            call.out[100] = 0.4;
        }
    });
    fake.upscale(&model, &rgb, [12, 12], &options).unwrap();
}
