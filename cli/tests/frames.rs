//! `upscale --frames`: what comes out of a stream, and how it ends.
#![cfg(all(feature = "export", unix))]
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

const SIZE: [u32; 2] = [8, 6];
const IN: usize = 8 * 6 * 3;
const OUT: usize = IN * 16;
/// With a spacing of which there is nothing to warn.
const HOW: [&str; 6] = ["--model", "sr.latile", "--steps", "2", "--spacing", "trailing"];

/// Frame `n` of a moving picture, as rgb24.
fn frame(n: usize) -> Vec<u8> {
    (0..IN).map(|i| (i * 5 + n * 40 + i * i % 17) as u8).collect()
}

fn frames(dir: &Path, more: &[&str]) -> Command {
    let mut command = latile(dir);
    command.args(["upscale", "--frames", "8x6"]).args(HOW).args(more);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// What became of a stream.
struct Streamed {
    code: Option<i32>,
    out: Vec<u8>,
    err: String,
}

/// Sends `input` while the result is read.
fn stream(command: &mut Command, input: &[u8]) -> Streamed {
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::thread::scope(|s| {
        s.spawn(move || {
            // It may end before it has read everything.
            let _ = stdin.write_all(input);
        });
        let done = child.wait_with_output().unwrap();
        Streamed {
            code: done.status.code(),
            out: done.stdout,
            err: String::from_utf8(done.stderr).unwrap(),
        }
    })
}

/// Each frame as `upscale` makes it of a file.
fn singles(dir: &Path, count: usize) -> Vec<Vec<u8>> {
    (0..count)
        .map(|n| {
            let picture = image::RgbImage::from_raw(SIZE[0], SIZE[1], frame(n)).unwrap();
            picture.save(dir.join("one.png")).unwrap();
            let mut command = latile(dir);
            command.args(["upscale", "one.png", "one-4x.png", "--overwrite"]).args(HOW);
            run(&mut command).done();
            image::open(dir.join("one-4x.png")).unwrap().to_rgb8().into_raw()
        })
        .collect()
}

#[test]
fn every_frame_is_what_upscale_makes_of_it() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    let expected = singles(dir.path(), 3);
    let input: Vec<u8> = (0..3).flat_map(frame).collect();

    let piped = stream(&mut frames(dir.path(), &["-", "-"]), &input);
    assert_eq!(piped.code, Some(0), "{}", piped.err);
    assert!(piped.out == expected.concat());
    assert!(piped.err.contains("standard output  3 frames of 32x24, 2 steps"), "{}", piped.err);

    // One PNG file after the other: an image reader takes each from where the last one ended.
    let args = ["-", "-", "--output-format", "png", "--threads", "1"];
    let png = stream(&mut frames(dir.path(), &args), &input);
    assert_eq!(png.code, Some(0), "{}", png.err);
    let end = b"IEND\xaeB`\x82";
    let mut rest = &png.out[..];
    for frame in &expected {
        let len = rest.windows(end.len()).position(|w| w == end).unwrap() + end.len();
        let (one, after) = rest.split_at(len);
        assert!(image::load_from_memory(one).unwrap().to_rgb8().into_raw() == *frame);
        rest = after;
    }
    assert!(rest.is_empty());

    // Files in and out, and the report.
    put(dir.path(), "in.rgb", &input);
    let args = ["in.rgb", "out.rgb", "--json", "--tile", "32"];
    let report = run(&mut frames(dir.path(), &args)).json();
    assert!(std::fs::read(dir.path().join("out.rgb")).unwrap() == expected.concat());
    assert_eq!(report["frames"], 3);
    assert_eq!(report["output_size"], serde_json::json!([24, 32]));
    assert!(report["frames_per_s"].as_f64().unwrap() > 0.0, "{report}");
    assert!(report["arena_bytes"].as_u64().unwrap() > 0, "{report}");
    run(&mut frames(dir.path(), &["in.rgb", "out.rgb"])).refused(6, &["--overwrite"]);
    let again = run(&mut frames(dir.path(), &["in.rgb", "out.rgb", "--overwrite"]));
    assert!(again.done().contains("out.rgb  3 frames of 32x24"), "{again:?}");

    // FIFOs, as a camera's program might hold them open.
    let fifos = "mkfifo a b && (cat in.rgb > a &) && (cat b > copy.rgb & echo $! > pid)";
    assert!(
        Command::new("sh").current_dir(dir.path()).args(["-c", fifos]).status().unwrap().success()
    );
    run(&mut frames(dir.path(), &["a", "b", "--json"])).json();
    let copied = || std::fs::read(dir.path().join("copy.rgb")).unwrap() == expected.concat();
    let begun = std::time::Instant::now();
    while !copied() {
        assert!(begun.elapsed().as_secs() < 20, "cat has not ended");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn input_that_ends_in_a_frame_is_said_and_whole_frames_stay() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    let expected = singles(dir.path(), 2).concat();
    let mut input: Vec<u8> = (0..2).flat_map(frame).collect();
    input.extend(&frame(2)[..61]);
    let words = ["standard input is refused", "frame 3, with 61 of its 144 bytes", "--frames"];

    let cut = stream(&mut frames(dir.path(), &["-", "-"]), &input);
    assert_eq!(cut.code, Some(3), "{}", cut.err);
    assert!(cut.out == expected);
    assert!(words.iter().all(|w| cut.err.contains(w)), "{}", cut.err);

    let cut = stream(&mut frames(dir.path(), &["-", "out.rgb"]), &input);
    assert_eq!((cut.code, cut.out.len()), (Some(3), 0), "{}", cut.err);
    assert!(std::fs::read(dir.path().join("out.rgb")).unwrap() == expected);

    let none = stream(&mut frames(dir.path(), &["-", "none.rgb"]), b"");
    assert_eq!(none.code, Some(3), "{}", none.err);
    assert!(none.err.contains("frame 1, with 0 of its 144 bytes"), "{}", none.err);
    assert!(!dir.path().join("none.rgb").exists());
}

/// Frames without end, until the child is gone.
fn endless(child: &mut Child) -> std::thread::JoinHandle<usize> {
    let mut stdin = child.stdin.take().unwrap();
    std::thread::spawn(move || {
        (0..).take_while(|&n| stdin.write_all(&frame(n % 50)).is_ok()).count()
    })
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    let mut child = frames(dir.path(), &["-", "-"]).spawn().unwrap();
    let writer = endless(&mut child);
    let mut first = vec![0; OUT];
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut first).unwrap();
    drop(stdout);
    let done = child.wait_with_output().unwrap();
    assert_eq!(done.status.code(), Some(141));
    assert_eq!(String::from_utf8(done.stderr).unwrap(), "", "as quiet as other programs");
    writer.join().unwrap();
    assert!(first == singles(dir.path(), 1)[0]);
}

#[test]
fn signals_end_it_between_frames() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    let signal = |child: &Child, name: &str| {
        let kill = format!("kill -{name} {}", child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    };
    // While frames flow: whole ones only, and a file keeps them.
    let expected = singles(dir.path(), 1).concat();
    for (name, out) in [("INT", "-"), ("TERM", "out.rgb")] {
        let mut child = frames(dir.path(), &["-", out]).spawn().unwrap();
        let writer = endless(&mut child);
        let mut stdout = child.stdout.take().unwrap();
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            stdout.read_to_end(&mut all).unwrap();
            all
        });
        std::thread::sleep(std::time::Duration::from_millis(1500));
        signal(&child, name);
        let done = child.wait_with_output().unwrap();
        let err = String::from_utf8(done.stderr).unwrap();
        assert_eq!(done.status.code(), Some(130), "{err}");
        let mut all = reader.join().unwrap();
        writer.join().unwrap();
        if out != "-" {
            all = std::fs::read(dir.path().join(out)).unwrap();
        }
        assert!(all.len() >= OUT && all.len().is_multiple_of(OUT), "{}", all.len());
        assert!(all[..OUT] == expected[..]);
        let words = format!("latile: interrupted; {} frames were complete", all.len() / OUT);
        assert!(err.contains(&words), "{words} in {err}");
    }
    // While no frame comes.
    let mut child = frames(dir.path(), &["-", "-"]).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&frame(0)).unwrap();
    stdin.write_all(&frame(1)[..5]).unwrap();
    let mut first = vec![0; OUT];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    let sent = std::time::Instant::now();
    signal(&child, "TERM");
    let done = child.wait_with_output().unwrap();
    assert_eq!(done.status.code(), Some(130));
    assert!(sent.elapsed().as_secs() < 10, "{:?}", sent.elapsed());
    assert!(String::from_utf8(done.stderr).unwrap().contains("1 frame was complete"));
    drop(stdin);
}

/// Resident memory does not grow from the 100th frame to the 1,000th.
#[test]
#[cfg(target_os = "linux")]
fn memory_stays_over_a_thousand_frames() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    let args = ["-", "-", "--threads", "1"];
    let mut child = frames(dir.path(), &args).spawn().unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let resident = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<usize>().unwrap()
    };
    let mut out = vec![0; OUT];
    let (mut early, mut most) = (0, 0);
    for n in 1..=1000 {
        stdin.write_all(&frame(n)).unwrap();
        stdout.read_exact(&mut out).unwrap();
        match n {
            100 => early = resident(),
            _ if n > 100 && n % 50 == 0 => most = most.max(resident()),
            _ => {}
        }
    }
    println!("resident at frame 100: {early} kB; the most from there to frame 1,000: {most} kB");
    assert!(most <= early + 64, "{early} kB became {most} kB");
    drop(stdin);
    assert!(child.wait().unwrap().success());
}

#[test]
fn what_cannot_be_is_refused_before_the_first_frame() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    put(dir.path(), "in.rgb", &frame(0));
    let before = names(dir.path());
    for (args, code, words) in [
        (&["in.rgb", "-", "--json"][..], 2, &["--json", "standard output"][..]),
        (&["in.rgb", "out.rgb", "--resume", "r"], 2, &["--resume"]),
        (&["in.rgb", "out.rgb", "--resume-every", "1"], 2, &["--resume"]),
        (&["in.rgb", "out.rgb", "--output-format", "gif"], 2, &["raw or png"]),
        (&["none.rgb", "out.rgb"], 6, &["cannot read none.rgb"]),
        (&[".", "out.rgb"], 6, &["it is a folder"]),
        (&["in.rgb", "none/out.rgb"], 6, &["none/out.rgb", "create it first"]),
        (&["in.rgb", "out.rgb", "--tile", "0"], 2, &["tile"]),
        (&["in.rgb", "/dev/full"], 6, &["cannot write /dev/full", "space"]),
    ] {
        run(&mut frames(dir.path(), args)).refused(code, words);
    }
    for (size, words) in [
        ("8", "WIDTHxHEIGHT"),
        ("0x6", "0 pixels"),
        ("9000x9000", "81000000 pixels"),
        ("8192x8192", "megapixels"),
    ] {
        let args = ["upscale", "in.rgb", "out.rgb", "--model", "sr.latile", "--frames", size];
        let ran = run_in(dir.path(), &args);
        ran.refused(if size == "8192x8192" { 3 } else { 2 }, &[words]);
    }
    for args in [["-", "out.png"], ["in.rgb", "-"]] {
        let ran = run(latile(dir.path()).arg("upscale").args(args));
        ran.refused(2, &["- stands for a stream of frames", "--frames"]);
    }
    run_in(dir.path(), &["upscale", "in.rgb", "out.png", "--output-format", "png"])
        .refused(2, &["--output-format is for --frames"]);
    assert_eq!(names(dir.path()), before);
}
