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
        run_in(dir.path(), &args).json()
    };
    let (low, high) = (plan(600), plan(30_000));
    let more = 300 * (30_000 - 600);
    // With the latent in a file, the picture's own pixels are all that grows, to the byte.
    let least = |report: &Value| {
        let base = number(&report["chosen"]["finish_bytes"], "base");
        number(report, "smallest_bytes") - base
    };
    assert_eq!(least(&high) - least(&low), 3 * more);
    let (low, high) = (&low["chosen"], &high["chosen"]);
    let picture = |way: &Value| way["stages"][1]["bytes"]["picture"].as_u64().unwrap();
    assert_eq!(picture(high) - picture(low), 3 * more);
    assert_eq!(high["finish_bytes"]["picture"], high["stages"][1]["bytes"]["picture"]);
    // The picture, eight channels of latent, and where rows come from; the result would be 48 bytes more.
    let grown = number(high, "peak_bytes") - number(low, "peak_bytes");
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
        // The base is measured at each start, and rounded to a MiB.
        assert!(high.0 - low.0 < result / 2 + MIB, "{output}: {peaks:?}, {result}");
        assert!(high.1.saturating_sub(low.1) < result / 2, "{output}: {peaks:?}, {result}");
    }
}

/// What `--memory` in a refusal's advice is.
fn advice(refused: &Ran) -> String {
    let advice = refused.stderr.split("--memory ").nth(1).unwrap();
    advice.chars().take_while(char::is_ascii_alphanumeric).collect()
}

/// A latent for which there is no room stands in a file: less memory, the same result, and nothing left.
#[test]
fn a_latent_without_room_stands_in_a_file() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    picture(dir.path(), "in.png", 64, 5_600);
    let upscale =
        ["upscale", "in.png", "out.png", "--model", "sr.latile", "--json", "--tile", "64"];
    let upscale = [&upscale[..], &["--steps", "1", "--eta", "1", "--threads", "2"]].concat();
    let run = |extra: &[&str]| run_in(dir.path(), &[&upscale[..], extra].concat());
    let free = run(&[]).json();
    assert_eq!(number(&free, "scratch_bytes"), 0);
    let expected = std::fs::read(dir.path().join("out.png")).unwrap();
    std::fs::remove_file(dir.path().join("out.png")).unwrap();
    let before = names(dir.path());

    let refused = run(&["--memory", "9M"]);
    refused.refused(5, &["do not suffice", "the latent in a file of 4.1 MiB"]);
    let least = advice(&refused);
    let report = run(&["--memory", &least]).json();
    assert_eq!(number(&report, "scratch_bytes"), 64 * 5_600 * 3 * 4);
    assert!(std::fs::read(dir.path().join("out.png")).unwrap() == expected);
    std::fs::remove_file(dir.path().join("out.png")).unwrap();
    let planned = number(&report, "planned_bytes");
    assert!(planned + 3 * MIB < number(&free, "planned_bytes"), "{report} {free}");
    #[cfg(target_os = "linux")]
    {
        let peak = number(&report, "peak_rss_bytes");
        assert!(peak <= planned + 4 * MIB, "{report}");
        assert!(peak + 2 * MIB < number(&free, "peak_rss_bytes"), "{report} {free}");
    }
    let plan = ["plan", "sr.latile", "--size", "64x5600", "--tile", "64", "--steps", "1"];
    let planned = |extra: &[&str]| {
        run_in(dir.path(), &[&plan[..], &["--threads", "2", "--memory", &least], extra].concat())
    };
    let json = planned(&["--json"]).json();
    assert_eq!(number(&json["chosen"], "scratch_bytes"), 64 * 5_600 * 3 * 4);
    assert!(number(&json, "smallest_bytes") <= number(&json["chosen"], "peak_bytes"));
    let said = planned(&["--svg", "m.svg"]);
    assert!(said.done().contains("the latent in a file of 4.1 MiB"), "{}", said.stdout);
    let svg = std::fs::read_to_string(dir.path().join("m.svg")).unwrap();
    assert!(svg.contains("the latent in a file of 4.1 MiB"));
    std::fs::remove_file(dir.path().join("m.svg")).unwrap();

    std::fs::create_dir(dir.path().join("disk")).unwrap();
    run(&["--scratch", "disk"]).refused(2, &["--scratch is for --memory"]);
    for folder in ["none", "in.png"] {
        run(&["--memory", &least, "--scratch", folder]).refused(6, &[folder, "create it first"]);
    }
    // No room on the disk, which shows before anything is computed.
    #[cfg(unix)]
    {
        let mut limited = latile_after("trap '' XFSZ; ulimit -f 2000", dir.path());
        let limited = limited.args(&upscale).args(["--memory", &least, "--scratch", "disk"]);
        let words = ["the scratch file of 4.1 MiB in folder disk", "--scratch", "make room"];
        common::run(limited).refused(6, &words);
    }
    std::fs::remove_dir(dir.path().join("disk")).unwrap();
    assert_eq!(names(dir.path()), before);
}

/// A WebP stands in memory whole: it is counted, and where there is no room for it a PNG is.
#[test]
fn a_webp_without_room_should_be_a_png() {
    let dir = tempfile::tempdir().unwrap();
    sr_model(dir.path());
    picture(dir.path(), "in.png", 500, 400);
    let run = |output: &str, memory: &str| {
        let args = ["upscale", "in.png", output, "--model", "sr.latile", "--memory", memory];
        let rest = ["--tile", "64", "--steps", "1", "--threads", "2", "--json", "--overwrite"];
        run_in(dir.path(), &[&args[..], &rest].concat())
    };
    let words = ["a WebP is collected in memory", "end the output in .png", "do not suffice"];
    let refused = run("out.webp", "1M");
    refused.refused(5, &words);
    let enough = advice(&refused);
    refused.refused(5, &[&format!("--memory {enough} then suffices")]);
    let png = run("out.png", &enough).json();
    let refused = run("out.webp", &enough);
    refused.refused(5, &words);
    refused.refused(5, &["this memory then suffices"]);
    // What it takes is told, and is enough.
    let webp = refused.stderr.split("(--memory ").nth(1).unwrap().split(')').next().unwrap();
    let report = run("out.webp", webp).json();
    let more = number(&report, "planned_bytes") - number(&png, "planned_bytes");
    assert!(more >= 2000 * 1600 * 3, "{more}");
    #[cfg(target_os = "linux")]
    {
        let (peak, planned) = (number(&report, "peak_rss_bytes"), number(&report, "planned_bytes"));
        assert!(peak <= planned + 4 * MIB, "{report}");
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
