//! The bundled model, and with it the README's command.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use std::path::Path;

fn example(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(name);
    path.to_str().unwrap().to_owned()
}

/// The mean of each 4 × 4 block.
#[cfg(feature = "bundled")]
fn shrunk(large: &image::RgbImage) -> image::RgbImage {
    image::RgbImage::from_fn(large.width() / 4, large.height() / 4, |x, y| {
        let mut sum = [8u32; 3];
        for i in 0..16 {
            let p = large.get_pixel(x * 4 + i % 4, y * 4 + i / 4);
            sum.iter_mut().zip(p.0).for_each(|(s, v)| *s += u32::from(v));
        }
        image::Rgb(sum.map(|s| (s / 16) as u8))
    })
}

#[test]
#[cfg(feature = "bundled")]
fn the_readme_command() {
    let dir = tempfile::tempdir().unwrap();
    let input = example("chelsea.jpg");
    let report = run_in(dir.path(), &["upscale", &input, "out.png", "--json"]).json();
    assert_eq!(report["model"], "photo-x4");
    assert_eq!(report["output_size"], serde_json::json!([300, 448]));

    // Made small again, the result is the picture that went in: nothing was moved, recoloured or invented
    // at the scale that the input shows.
    let large = image::open(dir.path().join("out.png")).unwrap().to_rgb8();
    shrunk(&large).save(dir.path().join("small.png")).unwrap();
    let args = ["compare", &input, "small.png", "--min-psnr", "26", "--json"];
    let measures = run_in(dir.path(), &args).json();
    assert!(measures["ssim_rgb"].as_f64().unwrap() > 0.8, "{measures}");

    let again = run_in(dir.path(), &["upscale", &input, "again.png", "--threads", "1"]);
    again.done();
    let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    assert_eq!(read("out.png"), read("again.png"));
}

#[test]
#[cfg(feature = "bundled")]
fn the_bundled_model_describes_itself() {
    let dir = tempfile::tempdir().unwrap();
    let model = run_in(dir.path(), &["inspect", "--json"]).json();
    assert_eq!(model["metadata"]["name"], "photo-x4");
    assert!(!model["metadata"]["license"].as_str().unwrap().is_empty());
    assert_eq!(model["task"], "super_resolution");
    assert_eq!(model["latent"]["factor"], 4);
    assert!(model["bytes"].as_u64().unwrap() <= 25_000_000, "it is committed");
}

#[test]
#[cfg(not(feature = "bundled"))]
fn without_a_bundled_model_one_must_be_named() {
    let dir = tempfile::tempdir().unwrap();
    run_in(dir.path(), &["upscale", &example("chelsea.jpg"), "out.png"])
        .refused(2, &["built without a model", "--model FILE.latile"]);
    assert_eq!(names(dir.path()), [""; 0]);
}

#[test]
fn the_bundled_model_has_no_file_to_hold() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["upscale", &example("chelsea.jpg"), "out.png", "--weights", "read"];
    run_in(dir.path(), &args).refused(2, &["--weights", "bundled model", "--model"]);
    let args = ["bench", "--component=unet", "--latent=8x8", "--weights=stream"];
    run_in(dir.path(), &args).refused(2, &["--weights map or --weights read"]);
    assert_eq!(names(dir.path()), [""; 0]);
}
