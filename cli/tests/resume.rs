//! `upscale --resume`: runs that are killed go on and give the same file.
#![cfg(all(feature = "export", unix))]
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// 20 tiles and 12 steps with noise in between.
const RUN: [&str; 11] = [
    "upscale",
    "in.png",
    "out.png",
    "--model",
    "sr.latile",
    "--steps",
    "12",
    "--eta",
    "0.5",
    "--tile",
    "8",
];

fn start(dir: &Path) -> Command {
    let mut command = latile(dir);
    command.args(RUN).args(["--overlap", "4", "--threads", "1"]);
    command
}

fn resumed(dir: &Path) -> Command {
    let mut command = start(dir);
    command.args(["--resume", "run.resume", "--resume-every", "0"]);
    command
}

/// How far the file is: the step of its base, and its length.
fn progress(path: &Path) -> Option<(u32, usize)> {
    let bytes = std::fs::read(path).ok()?;
    Some((u32::from_le_bytes(bytes.get(12..16)?.try_into().ok()?), bytes.len()))
}

fn setup() -> (tempfile::TempDir, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    picture(dir.path(), "in.png", 24, 17);
    run(&mut start(dir.path())).done();
    let out = dir.path().join("out.png");
    let expected = std::fs::read(&out).unwrap();
    std::fs::remove_file(out).unwrap();
    (dir, expected)
}

/// SIGKILL again and again, wherever the run happens to be.
#[test]
fn a_run_killed_again_and_again_makes_the_same_file() {
    let (dir, expected) = setup();
    let state = dir.path().join("run.resume");
    let (mut kills, mut last) = (0, (0, 0));
    let begun = Instant::now();
    let code = loop {
        let mut child =
            resumed(dir.path()).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        // Killed once it has gone on a little, and a moment more that is another one each time.
        let begin = Instant::now();
        let enough = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break Some(status.code());
            }
            let at = progress(&state).unwrap_or_default();
            if at > last && begin.elapsed() > Duration::from_millis(10 + 3 * kills) {
                break None;
            }
            assert!(begun.elapsed() < Duration::from_secs(120), "it does not end");
            std::thread::sleep(Duration::from_millis(1));
        };
        if let Some(code) = enough {
            break code;
        }
        // `kill` on unix is SIGKILL.
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        let now = progress(&state).expect("the old state or the new one is there");
        assert!(now.0 >= last.0, "{last:?} {now:?}");
        last = now;
        assert!(!dir.path().join("out.png").exists());
    };
    assert_eq!(code, Some(0));
    println!("{kills} kills in {:?}", begun.elapsed());
    assert!(kills >= 5, "{kills} kills are too few to show anything");
    assert!(std::fs::read(dir.path().join("out.png")).unwrap() == expected);
    assert_eq!(names(dir.path()), ["in.png", "out.png", "sr.latile"]);
}

#[test]
fn ctrl_c_keeps_the_run_and_says_so() {
    let (dir, expected) = setup();
    let state = dir.path().join("run.resume");
    let child = resumed(dir.path()).stderr(Stdio::piped()).spawn().unwrap();
    while progress(&state).is_none_or(|(step, _)| step < 3) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let kill = format!("kill -INT {}", child.id());
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    let done = child.wait_with_output().unwrap();
    let err = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.code(), Some(130), "{err}");
    let words =
        "interrupted; no output was written; run the same command again to go on from run.resume";
    assert!(err.contains(words), "{err}");

    // Another picture, other options: refused, with what differs, and the file stays.
    let before = std::fs::read(&state).unwrap();
    run(resumed(dir.path()).args(["--seed", "5"]))
        .refused(8, &["run.resume is of another run", "its seed is 0, here it is 5"]);
    picture(dir.path(), "in.png", 17, 24);
    run(&mut resumed(dir.path())).refused(8, &["its picture is 24x17"]);
    picture(dir.path(), "in.png", 24, 17);
    for (bytes, word) in [
        (&before[..before.len().min(900)], "was cut off"),
        (&[&before[..60], b"?", &before[61..]].concat()[..], "checksum"),
    ] {
        std::fs::write(&state, bytes).unwrap();
        run(&mut resumed(dir.path())).refused(8, &["run.resume is damaged", word, "delete it"]);
        assert!(std::fs::read(&state).unwrap() == bytes);
    }
    std::fs::write(&state, &before).unwrap();

    // Another number of threads is the same run.
    let report = run(resumed(dir.path()).args(["--json"])).json();
    assert!(report["gmac_before"].as_f64().unwrap() > 0.0, "{report}");
    assert!(std::fs::read(dir.path().join("out.png")).unwrap() == expected);
    assert_eq!(names(dir.path()), ["in.png", "out.png", "sr.latile"]);
}

#[test]
fn a_resume_file_that_cannot_be_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    picture(dir.path(), "in.png", 8, 8);
    let before = names(dir.path());
    let with = |more: &[&str]| {
        let args = ["upscale", "in.png", "out.png", "--model", "sr.latile", "--steps", "1"];
        run(latile(dir.path()).args(args).args(more))
    };
    with(&["--resume", "in.png"]).refused(8, &["in.png is not a resume file"]);
    with(&["--resume", "out.png"]).refused(2, &["--resume and the output are both out.png"]);
    with(&["--resume", "./out.png"]).refused(2, &["both ./out.png"]);
    with(&["--resume", "none/r"]).refused(6, &["none/r", "create it first"]);
    with(&["--resume", "."]).refused(6, &["directory"]);
    with(&["--resume", "r", "--resume-every", "-1"]).refused(2, &["--resume-every"]);
    with(&["--resume", "r", "--resume-every", "NaN"]).refused(2, &["--resume-every"]);
    with(&["--resume-every", "1"]).refused(2, &["is for --resume"]);
    assert_eq!(names(dir.path()), before);
}

/// The disk, or its share of it, is full in the middle of a run: the run ends, and goes on when there is room.
#[test]
fn a_full_disk_costs_nothing_that_was_kept() {
    let (dir, expected) = setup();
    let mut limited = latile_after("trap '' XFSZ; ulimit -f 60", dir.path());
    limited.args(RUN).args(["--overlap", "4", "--threads", "1", "--resume", "run.resume"]);
    let ran = run(limited.args(["--resume-every", "0"]));
    ran.refused(6, &["cannot write resume file run.resume"]);
    run(&mut resumed(dir.path())).done();
    assert!(std::fs::read(dir.path().join("out.png")).unwrap() == expected);
}
