//! `--memory`, `--tiling` and `latile plan`: what is promised, kept and refused.
#![cfg(all(feature = "export", feature = "bundled"))]
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn number(report: &Value, name: &str) -> u64 {
    report[name].as_u64().unwrap_or_else(|| panic!("{name} in {report}"))
}

#[test]
fn amounts_and_tilings_that_mean_nothing() {
    let dir = tempfile::tempdir().unwrap();
    picture(dir.path(), "in.png", 20, 16);
    for (memory, words) in [
        ("banana", "is not an amount of memory"),
        ("-5M", "is not an amount of memory"),
        ("0", "no memory at all"),
        ("99999999T", "more memory than can be addressed"),
    ] {
        let memory = format!("--memory={memory}");
        let help = "give a size above 0 such as 256M";
        run_in(dir.path(), &["upscale", "in.png", "out.png", &memory]).refused(2, &[words, help]);
        run_in(dir.path(), &["plan", "--size", "20x16", &memory]).refused(2, &[words, help]);
        let bench = ["bench", "--component", "unet", "--latent", "8x8", &memory];
        run_in(dir.path(), &bench).refused(2, &[words, help]);
    }
    run_in(dir.path(), &["plan", "--size", "20x16", "--tiling", "maybe"])
        .refused(2, &["exact, blend or auto"]);
    run_in(dir.path(), &["plan", "--size", "20"]).refused(2, &["WIDTHxHEIGHT"]);
    run_in(dir.path(), &["plan"]).refused(2, &["--size"]);
    for tile in [["--tile", "8"], ["--overlap", "4"]] {
        let args = ["upscale", "in.png", "out.png", "--tiling", "exact", tile[0], tile[1]];
        run_in(dir.path(), &args).refused(2, &["an exact run has one tile", "--tiling blend"]);
    }
    assert_eq!(names(dir.path()), ["in.png"]);
}

#[test]
fn sizes_beyond_limits() {
    let dir = tempfile::tempdir().unwrap();
    for (size, words) in [
        ("20000x20000", "6400 megapixels of at most 268"),
        ("4294967295x4294967295", "is more than can be addressed"),
    ] {
        run_in(dir.path(), &["plan", "--size", size]).refused(3, &[words]);
    }
}

/// Too little is refused before anything is made, with an amount that then works.
#[test]
fn a_budget_that_cannot_do() {
    let dir = tempfile::tempdir().unwrap();
    picture(dir.path(), "in.png", 40, 30);
    let upscale = ["upscale", "in.png", "out.png", "--threads", "2", "--steps", "1", "--json"];
    for (tiling, words) in [("exact", "the whole frame at once"), ("auto", "blended tiles")] {
        let with = |memory: &str| {
            let mut args = upscale.to_vec();
            args.extend(["--tiling", tiling, "--overwrite", "--memory", memory]);
            run_in(dir.path(), &args)
        };
        let refused = with("1M");
        refused.refused(5, &["1.0 MiB do not suffice", "the least this run can do with is", words]);
        let advice = refused.stderr.split("(--memory ").nth(1).unwrap();
        let advice = advice.split(')').next().unwrap();
        assert_eq!(names(dir.path()), ["in.png"]);
        let report = with(advice).json();
        let allowed: u64 = advice.trim_end_matches('M').parse().unwrap();
        assert!(number(&report, "planned_bytes") <= allowed * MIB, "{report}");
        #[cfg(target_os = "linux")]
        assert!(number(&report, "peak_rss_bytes") <= (allowed + 4) * MIB, "{report}");
        std::fs::remove_file(dir.path().join("out.png")).unwrap();
    }
    let bench =
        ["bench", "--component", "unet", "--latent", "32x32", "--threads", "2", "--runs", "1"];
    let with = |memory: &str| {
        let mut args = bench.to_vec();
        args.extend(["--json", "--memory", memory]);
        run_in(dir.path(), &args)
    };
    let refused = with("2M");
    refused.refused(5, &["2.0 MiB do not suffice", "the unet alone at 32x32"]);
    let advice = refused.stderr.split("(--memory ").nth(1).unwrap().split(')').next().unwrap();
    let report = with(advice).json();
    let allowed: u64 = advice.trim_end_matches('M').parse().unwrap();
    assert!(number(&report, "planned_bytes") <= allowed * MIB, "{report}");
}

/// 48 MB of pixels are not read where 40 MiB are allowed.
#[test]
fn a_picture_that_alone_is_too_large() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path(), "in.png", &png_bomb(4000));
    run_in(dir.path(), &["upscale", "in.png", "out.png", "--memory", "40M"])
        .refused(5, &["in.png: its pixels alone take 45.8 MiB", "40.0 MiB are allowed"]);
    assert_eq!(names(dir.path()), ["in.png"]);
}

/// What is planned is what is taken: the arena to the byte, the process within 4 MiB.
#[test]
fn a_plan_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    for ([w, h], extra) in [
        ([16, 16], &[][..]),
        ([90, 70], &[]),
        ([90, 70], &["--tiling", "exact", "--memory", "300M"]),
        ([90, 70], &["--tile", "40"]),
        ([90, 70], &["--memory", "26M"]),
    ] {
        picture(dir.path(), "in.png", w, h);
        let size = format!("{w}x{h}");
        let mut planned = vec!["plan", "--size", &size, "--steps", "1", "--threads", "2", "--json"];
        planned.extend(extra);
        let plan = run_in(dir.path(), &planned).json();
        let mut run = vec!["upscale", "in.png", "out.png", "--steps", "1", "--threads", "2"];
        run.extend(["--json", "--overwrite"]);
        run.extend(extra);
        let report = run_in(dir.path(), &run).json();
        let chosen = &plan["chosen"];
        let stages = chosen["stages"].as_array().unwrap();
        let arena = stages.iter().map(|s| s["bytes"]["arena"].as_u64().unwrap()).max();
        assert_eq!(arena, Some(number(&report, "arena_bytes")), "{plan} {report}");
        assert_eq!(chosen["tile"], report["tile"]);
        assert_eq!(chosen["tiles"], report["tiles"]);
        assert!((chosen["gmac"].as_f64().unwrap() - report["gmac"].as_f64().unwrap()).abs() < 1e-6);
        assert!(chosen["seconds"].as_f64().unwrap() > 0.0);
        // The picture's own decoding makes the two processes differ a little.
        let (said, meant) = (number(chosen, "peak_bytes"), number(&report, "planned_bytes"));
        assert!(said.abs_diff(meant) <= 2 * MIB, "{said} {meant}");
        #[cfg(target_os = "linux")]
        {
            let peak = number(&report, "peak_rss_bytes");
            assert!(peak <= meant + 4 * MIB, "{size} {extra:?}: {peak} of {meant}");
        }
    }
}

/// A result is written as its rows come: what takes them is as large for any height, and so is the peak but
/// for what the picture itself takes and its latent.
#[test]
fn a_taller_result_takes_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let plan = |height: u64| {
        let size = format!("300x{height}");
        let args = ["plan", "--size", &size, "--tile", "40", "--threads", "2", "--json"];
        run_in(dir.path(), &args).json()["chosen"].clone()
    };
    let (low, high) = (plan(600), plan(30_000));
    let more = 300 * (30_000 - 600);
    let picture = |way: &Value| way["stages"][1]["bytes"]["picture"].as_u64().unwrap();
    assert_eq!(picture(&high) - picture(&low), 3 * more);
    assert_eq!(high["finish_bytes"]["picture"], high["stages"][1]["bytes"]["picture"]);
    // The picture, eight channels of latent, and where rows come from; the result would be 48 bytes more.
    let grown = number(&high, "peak_bytes") - number(&low, "peak_bytes");
    assert!(grown <= 36 * more, "{grown} for {more} pixels");

    sr_model(dir.path());
    let run = |output: &str, height: u32| {
        let name = format!("{height}.png");
        common::picture(dir.path(), &name, 128, height);
        let tile = ["--tile", "64", "--tiling", "blend", "--steps", "1", "--threads", "2"];
        let mut args = vec!["upscale", &name, output, "--model", "sr.latile", "--json"];
        args.extend(tile);
        run_in(dir.path(), &args).json()
    };
    for output in ["out.png", "out.jpg"] {
        let mut peaks = Vec::new();
        for height in [128, 1536] {
            let report = run(output, height);
            let planned = number(&report, "planned_bytes");
            #[cfg(target_os = "linux")]
            {
                let peak = number(&report, "peak_rss_bytes");
                assert!(peak <= planned + 4 * MIB, "{output} {height}: {peak} of {planned}");
            }
            peaks.push((planned, report["peak_rss_bytes"].as_u64().unwrap_or(planned)));
            let made = image::image_dimensions(dir.path().join(output)).unwrap();
            assert_eq!(u64::from(made.1), report["output_size"][0].as_u64().unwrap());
            std::fs::remove_file(dir.path().join(output)).unwrap();
        }
        let factor_squared = 16;
        let result = 128 * (1536 - 128) * 3 * factor_squared;
        let [low, high] = peaks[..] else { panic!("two heights") };
        assert!(high.0 - low.0 < result / 2, "{output}: {peaks:?}, {result}");
        assert!(high.1.saturating_sub(low.1) < result / 2, "{output}: {peaks:?}, {result}");
    }
}

#[test]
fn neighbours_are_what_their_budgets_buy() {
    let dir = tempfile::tempdir().unwrap();
    let plan = |memory: Option<u64>| {
        let mut args = vec!["plan".to_owned(), "--size=160x130".into(), "--json".into()];
        args.push("--threads=2".into());
        args.extend(memory.map(|m| format!("--memory={m}")));
        let words: Vec<&str> = args.iter().map(String::as_str).collect();
        run_in(dir.path(), &words)
    };
    let free = plan(None).json();
    let less = &free["cheaper"];
    assert!(number(less, "peak_bytes") < number(&free["chosen"], "peak_bytes"), "{free}");
    // Two MiB for a base that differs from start to start.
    let there = plan(Some(number(less, "peak_bytes") + 2 * MIB)).json();
    assert_eq!(there["chosen"]["tile"], less["tile"], "{there}");
    assert_eq!(there["chosen"]["stages"][1]["way"], less["stages"][1]["way"]);
    let smallest = number(&free, "smallest_bytes");
    assert_eq!(plan(Some(smallest + 2 * MIB)).code, Some(0));
    plan(Some(smallest / 2)).refused(5, &["do not suffice"]);
}

#[test]
fn a_plan_in_words_and_as_a_picture() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["plan", "--size", "64x48", "--memory", "200M", "--threads", "2", "--svg", "m.svg"];
    let said = run_in(dir.path(), &args);
    for words in [
        "photo-x4: 64x48 to 256x192, 4 steps",
        "exact, the whole frame at once",
        "of 200.0 MiB at most",
        "where the memory goes at its peak",
        "arena",
        "with less",
        "with more       nothing faster",
        "####",
    ] {
        assert!(said.done().contains(words), "{words:?} in {}", said.stdout);
    }
    let svg = std::fs::read_to_string(dir.path().join("m.svg")).unwrap();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{svg}");
    for words in ["denoise", "decode", "arena", "weights", "base"] {
        assert!(svg.contains(words), "{words}");
    }
    assert!(
        !svg.contains("NaN") && !svg.contains("inf") && !svg.contains("http://www.w3.org/1999")
    );
    run_in(dir.path(), &args).refused(6, &["m.svg exists already", "--overwrite"]);
    let other = ["plan", "--size", "64x48", "--svg", "m.png"];
    run_in(dir.path(), &other).refused(2, &["end its name in .svg"]);
    assert_eq!(names(dir.path()), ["m.svg"]);
}
