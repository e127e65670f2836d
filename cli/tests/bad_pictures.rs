//! Pictures that must be refused, each with its message and exit code 3, and outputs that cannot be.
#![cfg(feature = "export")]
#![allow(clippy::unwrap_used)]

mod common;

use common::*;

const UPSCALE: [&str; 5] = ["upscale", "in.png", "out.png", "--model", "sr.latile"];

#[test]
fn a_text_file_named_png() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    put(dir.path(), "in.png", b"Dear reader, this is a letter.\n");
    run_in(dir.path(), &UPSCALE).refused(
        3,
        &["in.png is refused", "its content is not a picture", "give a PNG, JPEG or WebP"],
    );
    assert_eq!(names(dir.path()), ["in.png", "sr.latile"]);
}

/// 507 MB of pixels in a sound file of 3 MB: refused within an address space that could not hold them.
#[test]
#[cfg(unix)]
fn a_png_bomb() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    put(dir.path(), "in.png", &png_bomb(13_000));
    let words = ["in.png is refused", "13000x13000 is 169 megapixels", "crop or shrink"];
    run_in(dir.path(), &UPSCALE).refused(3, &words);
    run(latile_after("ulimit -v 300000", dir.path()).args(UPSCALE)).refused(3, &words);
    run_in(dir.path(), &["compare", "in.png", "in.png"]).refused(3, &words);
    // The generator makes sound files: a small one is read.
    put(dir.path(), "small.png", &png_bomb(300));
    let same = run_in(dir.path(), &["compare", "small.png", "small.png", "--json"]).json();
    assert_eq!(same["identical"], true);
    assert_eq!(same["width"], 300);
}

#[test]
fn a_picture_without_pixels() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    put(dir.path(), "in.png", &png_bomb(0));
    run_in(dir.path(), &UPSCALE).refused(3, &["in.png is refused", "its width or height is 0"]);
    put(dir.path(), "in.png", b"");
    run_in(dir.path(), &UPSCALE).refused(3, &["in.png is refused", "the file is empty"]);
}

#[test]
fn a_damaged_picture() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    for name in ["in.png", "in.webp"] {
        let whole = std::fs::read(picture(dir.path(), name, 40, 30)).unwrap();
        put(dir.path(), name, &whole[..whole.len() / 2]);
        run_in(dir.path(), &["upscale", name, "out.png", "--model", "sr.latile"])
            .refused(3, &[name, "data is damaged", "copy or save the file again"]);
    }
}

#[test]
fn pictures_that_cannot_be_compared() {
    let dir = tempfile::tempdir().unwrap();
    picture(dir.path(), "a.png", 20, 10);
    picture(dir.path(), "b.png", 10, 20);
    run_in(dir.path(), &["compare", "a.png", "b.png"])
        .refused(3, &["b.png is refused", "it has 10x20 pixels, a.png has 20x10"]);
    run_in(dir.path(), &["compare", "a.png", "none.png"])
        .refused(6, &["cannot read picture none.png", "No such file"]);
}

#[test]
fn an_output_is_refused_before_any_work() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    // The input does not exist: only a check of the output that comes first can be what is said.
    run_in(path, &["upscale", "none.png", "out.tiff"])
        .refused(2, &["out.tiff names no picture format", ".png, .jpg or .webp"]);
    run_in(path, &["upscale", "none.png", "out.jpg", "--quality", "0"])
        .refused(2, &["--quality is 0"]);
    put(path, "there.png", b"precious");
    run_in(path, &["upscale", "none.png", "there.png"])
        .refused(6, &["there.png exists already", "--overwrite"]);
    assert_eq!(std::fs::read(path.join("there.png")).unwrap(), b"precious");
    run_in(path, &["upscale", "none.png", "no/such/folder/out.png"])
        .refused(6, &["cannot write no/such/folder/out.png"]);
    std::fs::create_dir(path.join("folder.png")).unwrap();
    run_in(path, &["upscale", "none.png", "folder.png", "--overwrite"])
        .refused(6, &["cannot write folder.png", "it is a folder"]);
    assert_eq!(names(path), ["folder.png", "there.png"]);
}

#[test]
#[cfg(target_os = "linux")]
fn a_device_is_not_replaced_by_a_file() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/dev/full", dir.path().join("out.png")).unwrap();
    run_in(dir.path(), &["upscale", "none.png", "out.png", "--overwrite"])
        .refused(6, &["cannot write out.png", "not a regular file"]);
}

#[test]
fn what_jpeg_cannot_hold_is_refused_before_the_run() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    let clear = image::RgbaImage::from_pixel(8, 8, image::Rgba([9, 9, 9, 100]));
    clear.save(dir.path().join("in.png")).unwrap();
    run_in(dir.path(), &["upscale", "in.png", "out.jpg", "--model", "sr.latile"])
        .refused(2, &["transparent parts", ".png or .webp"]);
    assert_eq!(names(dir.path()), ["in.png", "sr.latile"]);
}

/// A file may grow to 4 kB here, which neither a picture nor a model fits in: as on a full disk, the write
/// fails in the middle.
#[test]
#[cfg(unix)]
fn a_full_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    sr_model(path);
    picture(path, "in.png", 24, 20);
    let full = "trap '' XFSZ; ulimit -f 8";
    run(latile_after(full, path).args(UPSCALE)).refused(6, &["cannot write out.png", "large"]);
    let source = fixture("models/sr");
    run(latile_after(full, path).arg("export").arg(&source).args(["-o", "m.latile"]))
        .refused(6, &["m.latile", "large"]);
    assert_eq!(names(path), ["in.png", "sr.latile"], "nothing half written is left");
}

#[test]
#[cfg(target_os = "linux")]
fn a_result_that_cannot_be_printed() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let ran = run(latile(dir.path()).args(["inspect", "sr.latile"]).stdout(full));
    ran.refused(6, &["cannot write standard output", "No space left"]);
}
