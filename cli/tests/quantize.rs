//! `latile export --precision int8|mixed`: from a folder of pictures to a model and its report; what is refused.
#![cfg(feature = "export")]
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;

/// A folder of a few pictures, one of them broken.
fn pictures(dir: &Path) {
    let folder = dir.join("photos");
    std::fs::create_dir(&folder).unwrap();
    picture(&folder, "a.png", 256, 270);
    picture(&folder, "<b>.png", 300, 256);
    put(&folder, "c.png", b"no picture at all");
    put(&folder, "notes.txt", b"");
}

fn export(dir: &Path, more: &[&str]) -> Ran {
    let source = fixture("models/sr");
    run(latile(dir).arg("export").arg(source).args(["-o", "m.latile"]).args(more))
}

/// The whole way, once: what all tests of a finished export look at.
#[test]
fn a_folder_of_pictures_makes_a_model_a_table_and_a_report() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    pictures(dir);
    let args = "--precision int8 --calibration photos --table t.json --report r.html --report-json r.json --json --consistency 0.25";
    let args: Vec<&str> = args.split(' ').collect();
    let ran = export(dir, &args);
    let report = ran.json();
    for word in ["skipped: c.png: its content is not a picture", "with 2 pictures, 1 skipped"] {
        assert!(ran.stderr.contains(word), "{ran:?}");
    }
    assert_eq!(names(dir), ["m.latile", "photos", "r.html", "r.json", "t.json"]);
    assert_eq!((&report["precision"], &report["method"]), (&"int8".into(), &"mse".into()));
    assert_eq!(report["path"], "m.latile");
    let size = std::fs::metadata(dir.join("m.latile")).unwrap().len();
    assert_eq!(report["bytes"], size);

    let quality = &report["quality"];
    let file: Value = serde_json::from_slice(&std::fs::read(dir.join("r.json")).unwrap()).unwrap();
    assert_eq!(&file, quality);
    assert_eq!(quality["bytes"], size);
    assert_eq!(quality["pictures"], serde_json::json!(["<b>.png", "a.png"]));
    assert_eq!(quality["skipped"][0]["name"], "c.png");
    let layers = quality["layers"].as_array().unwrap();
    assert_eq!(layers.len(), report["layers"].as_array().unwrap().len());
    let groups = quality["timestep_groups"].as_array().unwrap().len();
    assert_eq!(groups, 4);
    let by = |name: &str| layers.iter().filter(|l| l["winograd"] == name).count();
    // The fixture has too few channels for squares.
    assert!(by("rows") > 0 && by("square") == 0);
    for l in layers {
        // Whoever could be computed by Winograd's algorithm is, or says why not.
        let known = l["winograd_noise_db"].as_f64();
        let computed = l["winograd"].is_string();
        assert_eq!(known.is_some(), computed || l["direct"].is_string(), "{l}");
        let small = l["direct"].as_str().is_some_and(|why| why.contains("too few"));
        let most = if l["winograd"] == "square" { 9.0 } else { 6.0 };
        assert!(known.is_none_or(|db| (db <= most && !small) == computed), "{l}");
        let expected = if l["component"] == "unet" { groups } else { 1 };
        for field in ["sqnr_db", "measured_input_sqnr_db"] {
            let n = l[field].as_array().unwrap().len();
            let examined = l["int8"].as_bool().unwrap() || field != "sqnr_db";
            assert_eq!(n, if examined { expected } else { 0 }, "{field} of {l}");
        }
    }
    // Nothing has gone wrong on the way to the first layer of each network.
    assert_eq!(layers[0]["layer"], "conv_in");
    assert_eq!(layers[0]["measured_input_sqnr_db"][0], 150.0);
    // The fixture's heads are narrow, so its attentions are float; their results are measured nonetheless.
    let attentions = quality["attentions"].as_array().unwrap();
    assert!(attentions.len() > 4);
    for a in attentions {
        assert!(a["int8"] == false && a["why"].as_str().unwrap().contains("channels"), "{a}");
        let expected = if a["component"] == "unet" { groups } else { 1 };
        assert_eq!(a["measured_sqnr_db"].as_array().unwrap().len(), expected, "{a}");
    }
    for r in quality["measured"]["results"].as_array().unwrap() {
        for db in r["sqnr_db"].as_array().unwrap() {
            assert!((20.0..100.0).contains(&db.as_f64().unwrap()), "{r}");
        }
    }
    let psnr = quality["measured"]["example"]["psnr_db"].as_f64().unwrap();
    assert!((25.0..100.0).contains(&psnr), "{psnr}");
    let worst: Vec<u64> =
        quality["worst"].as_array().unwrap().iter().map(|i| i.as_u64().unwrap()).collect();
    assert_eq!(worst.len(), 10);
    html_is_sound(&std::fs::read_to_string(dir.join("r.html")).unwrap(), quality);

    // The model makes pictures, and knows its own consistency.
    picture(dir, "in.png", 16, 16);
    let made = run_in(dir, &["upscale", "in.png", "out.png", "--model", "m.latile", "--json"]);
    assert_eq!(made.json()["consistency"], 0.25);

    // The table alone gives the same model; a mixed one keeps what it is told to keep, and says why.
    let model = std::fs::read(dir.join("m.latile")).unwrap();
    let by_table = ["--calibration", "t.json", "--overwrite", "--json"];
    let again =
        export(dir, &[&by_table[..], &["--precision", "int8", "--consistency", "0.25"]].concat());
    assert_eq!(again.json()["layers"], report["layers"]);
    assert_eq!(std::fs::read(dir.join("m.latile")).unwrap(), model);
    let more = ["--precision", "mixed", "--min-sqnr", "36", "--keep-f16", "unet.mid_block.*"];
    let more = [&more[..], &["--keep-f16", "decoder.up_blocks.0.*", "--method", "minmax"]].concat();
    let report = export(dir, &[&by_table[..], &more, &["--report", "s.html"]].concat()).json();
    let why = |l: &Value| l["why"].as_str().unwrap_or_default().to_owned();
    for l in report["layers"].as_array().unwrap() {
        let (name, unet) = (l["layer"].as_str().unwrap(), l["component"] == "unet");
        if unet && name.starts_with("mid_block.") {
            assert_eq!(why(l), "--keep-f16 unet.mid_block.* asks for it");
        }
        if why(l).contains("SQNR") {
            let least = |v: &Value| {
                v.as_array().unwrap().iter().map(|d| d.as_f64().unwrap()).fold(f64::MAX, f64::min)
            };
            assert!(least(&l["sqnr_db"]) < 36.0, "{l}");
        }
    }
    let count = |word: &str| {
        report["layers"].as_array().unwrap().iter().filter(|l| why(l).contains(word)).count()
    };
    assert!(count("SQNR") > 0 && count("decoder.up_blocks.0.*") > 4);
    assert_eq!(report["quality"]["measured"], Value::Null);
    html_is_sound(&std::fs::read_to_string(dir.join("s.html")).unwrap(), &report["quality"]);
    refusals_of_tables(dir);
}

/// What each layer does to the result is measured, kept in the table, and decides what stays in f16.
#[test]
fn a_mixed_model_spends_its_share_where_it_shows() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    pictures(dir);
    let quality = |args: &str| {
        let args: Vec<&str> = args.split(' ').collect();
        let more = ["--calibration", "photos", "--json", "--overwrite", "--report", "r.html"];
        export(dir, &[&more[..], &args].concat()).json()["quality"].clone()
    };
    let int8 = quality("--precision int8");
    let mixed = quality("--precision mixed --keep-share 30 --table t.json");
    let mixed_file = std::fs::read(dir.join("m.latile")).unwrap();
    // The noise in what the networks make went down by more than a share of the work at random would take.
    let noise = |quality: &Value, network: usize| -> f64 {
        let list = quality["measured"]["results"][network]["sqnr_db"].as_array().unwrap();
        list.iter().map(|db| 10f64.powf(-db.as_f64().unwrap() / 10.0)).sum()
    };
    for network in [0, 1] {
        let (before, after) = (noise(&int8, network), noise(&mixed, network));
        assert!(after < 0.65 * before, "network {network}: {after:e} of {before:e}");
    }
    let kept = |quality: &Value| -> Vec<String> {
        let layers = quality["layers"].as_array().unwrap().iter();
        let why = |l: &Value| l["why"].as_str().unwrap_or_default().to_owned();
        layers.map(why).filter(|w| w.contains("less noise")).collect()
    };
    assert!(kept(&mixed).len() > 1 && kept(&int8).is_empty(), "{:?}", kept(&mixed));
    for why in kept(&mixed) {
        let number = |word: &str| -> f64 {
            let rest = why.split(word).nth(1).unwrap();
            rest.trim_start().split(' ').next().unwrap().parse().unwrap()
        };
        assert!(number("the result has") > 0.0 && number("it is") <= 30.0, "{why}");
    }
    // The table says so too, and gives the same model by itself.
    let table: Value = serde_json::from_slice(&std::fs::read(dir.join("t.json")).unwrap()).unwrap();
    let measured: Vec<f64> = table["components"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|c| c["layers"].as_array().unwrap())
        .filter_map(|l| l["loss"].as_f64())
        .collect();
    assert!(measured.len() > 40 && measured.iter().all(|l| (0.0..=1.0).contains(l)));
    let more = ["--precision", "mixed", "--keep-share", "30", "--overwrite"];
    let ran = export(dir, &[&more[..], &["--calibration", "t.json"]].concat());
    assert!(ran.code == Some(0) && !ran.stderr.contains("estimates"), "{ran:?}");
    assert_eq!(std::fs::read(dir.join("m.latile")).unwrap(), mixed_file);
}

/// What levels do to the picture is measured, as many stay in f16 as the limit takes, and the note says how to repeat it.
#[test]
fn a_mixed_model_keeps_the_levels_that_cost_pictures_most() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    pictures(dir);
    let mixed = |args: &str| {
        let args: Vec<&str> = args.split(' ').filter(|a| !a.is_empty()).collect();
        let more = ["--precision", "mixed", "--calibration", "photos", "--json", "--overwrite"];
        let ran = export(dir, &[&more[..], &["--table", "t.json"], &args].concat());
        assert_eq!(ran.code, Some(0), "{ran:?}");
        (ran.json()["layers"].clone(), ran.stderr)
    };
    let kept = |layers: &Value| -> BTreeSet<String> {
        let layers = layers.as_array().unwrap().iter();
        let why = layers.filter_map(|l| l["why"].as_str()?.split_once(" in int8 would move"));
        why.map(|(glob, _)| glob.to_owned()).collect()
    };
    // Where nothing may be lost, levels stay, in whole, and each says what it would do.
    let (layers, said) = mixed("--max-loss 0");
    let globs = kept(&layers);
    assert!(!globs.is_empty() && said.contains("note: the folder has no picture beyond"), "{said}");
    for layer in layers.as_array().unwrap() {
        let name = format!(
            "{}.{}",
            layer["component"].as_str().unwrap(),
            layer["layer"].as_str().unwrap()
        );
        if globs.iter().any(|g| name.starts_with(g.trim_end_matches('*'))) {
            assert_eq!(layer["int8"], false, "{name}");
        }
    }
    // The same with the table and what the note says.
    let model = std::fs::read(dir.join("m.latile")).unwrap();
    let mut again = vec!["--precision", "int8", "--calibration", "t.json", "--overwrite", "--json"];
    for glob in &globs {
        assert!(said.contains(&format!("--keep-f16 '{glob}'")), "{said}");
        again.extend(["--keep-f16", glob]);
    }
    let int8 = export(dir, &again).json()["layers"].clone();
    let which = |layers: &Value| -> Vec<bool> {
        layers.as_array().unwrap().iter().map(|l| l["int8"].as_bool().unwrap()).collect()
    };
    assert_eq!(which(&int8), which(&layers));
    // Down to the precision's name and the notes, that is the same file.
    assert!(std::fs::read(dir.join("m.latile")).unwrap().len().abs_diff(model.len()) < 4096);
    assert!(!dir.join("trial.latile").exists());
}

/// Tables that cannot be used, in a folder with a sound one.
fn refusals_of_tables(dir: &Path) {
    let by =
        |table: &str| export(dir, &["--precision", "int8", "--calibration", table, "--overwrite"]);
    let text = std::fs::read_to_string(dir.join("t.json")).unwrap();
    let table: Value = serde_json::from_str(&text).unwrap();
    let hash = table["model"]["source_hash"].as_str().unwrap();
    put(dir, "other.json", text.replace(hash, &"ab".repeat(32)).as_bytes());
    by("other.json").refused(4, &["is of model sr", "abab", "calibrate this model"]);
    let layer = "up_blocks.1.resnets.1.conv2";
    put(dir, "short.json", text.replacen(layer, "another_layer", 1).as_bytes());
    by("short.json").refused(4, &["does not fit unet", layer, "calibrate the model again"]);
    put(dir, "cut.json", &text.as_bytes()[..text.len() / 2]);
    by("cut.json").refused(4, &["cut.json is refused", "not understood"]);
    by("none.json").refused(6, &["cannot read calibration table none.json"]);
    by("m.latile").refused(4, &["m.latile is refused"]);
    let more = ["--precision", "int8", "--calibration", "t.json", "--overwrite"];
    export(dir, &[&more[..], &["--keep-f16", "no_such.*"]].concat())
        .refused(2, &["no layer fits --keep-f16 no_such.*"]);
    export(dir, &[&more[..], &["--keep-direct", "no_such.*"]].concat())
        .refused(2, &["no layer fits --keep-direct no_such.*"]);
    // A table of version 1 knows nothing of Winograd's algorithm.
    let mut old = table.clone();
    old["version"] = 1.into();
    for component in old["components"].as_array_mut().unwrap() {
        for layer in component["layers"].as_array_mut().unwrap() {
            for group in layer["groups"].as_array_mut().unwrap() {
                group.as_object_mut().unwrap().remove("winograd");
                group.as_object_mut().unwrap().remove("squares");
            }
        }
    }
    put(dir, "old.json", old.to_string().as_bytes());
    let ran = by("old.json");
    assert!(ran.code == Some(0) && ran.stderr.contains("every convolution is direct"), "{ran:?}");
    export(dir, &[&more[..], &["--table", "u.json"]].concat())
        .refused(2, &["names a table already"]);
    assert!(!dir.join("u.json").exists());
}

/// The drawing at the start of `text` is well-formed XML: elements nest, attributes are quoted and given once, and
/// what must be escaped is.
fn svg_is_well_formed(text: &str) {
    let plain = |text: &str| {
        assert!(!text.contains(['<', '>', '"', '\'']), "{text}");
        for part in text.split('&').skip(1) {
            let entity = part.split(';').next().unwrap();
            assert!(["amp", "lt", "gt", "quot", "#39"].contains(&entity), "&{part}");
        }
    };
    let mut open: Vec<&str> = Vec::new();
    let mut rest = text;
    loop {
        let start = rest.find('<').unwrap();
        plain(&rest[..start]);
        let end = rest.find('>').unwrap();
        let (tag, after) = (&rest[start + 1..end], &rest[end + 1..]);
        rest = after;
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "{tag}");
            if open.is_empty() {
                return;
            }
            continue;
        }
        let alone = tag.strip_suffix('/');
        let (name, mut attributes) =
            alone.unwrap_or(tag).split_once(' ').unwrap_or((alone.unwrap_or(tag), ""));
        assert!(name.chars().all(|c| c.is_ascii_alphanumeric()), "{tag}");
        let mut seen: Vec<&str> = Vec::new();
        while !attributes.trim().is_empty() {
            let (key, value) = attributes.split_once("=\"").unwrap();
            let (value, more) = value.split_once('"').unwrap();
            let key = key.trim_start();
            assert!(key.chars().all(|c| c.is_ascii_alphabetic() || c == '-'), "{tag}");
            assert!(!seen.contains(&key), "{key} twice in {tag}");
            plain(value);
            seen.push(key);
            attributes = more;
        }
        if alone.is_none() {
            open.push(name);
        }
    }
}

/// Every tag that is opened is closed, nothing is loaded from anywhere, and the numbers are the JSON's.
fn html_is_sound(html: &str, quality: &Value) {
    for word in ["http:", "https:", "src=\"/", "@import", "url(", "<link", "href"] {
        assert!(!html.contains(word), "{word}");
    }
    assert!(!html.contains("<b>"), "a name became markup");
    let mut open: Vec<String> = Vec::new();
    let mut rest = html;
    while let Some(start) = rest.find('<') {
        let end = start + rest[start..].find('>').unwrap();
        let tag = &rest[start + 1..end];
        rest = &rest[end + 1..];
        let name: String = tag
            .trim_start_matches('/')
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric() || *c == '!')
            .collect();
        if tag.starts_with('/') {
            assert_eq!(open.pop().as_deref(), Some(name.as_str()), "{tag}");
        } else if !tag.ends_with('/') && !["!DOCTYPE", "meta", "img", "input"].contains(&&*name) {
            if name == "script" || name == "style" {
                rest = &rest[rest.find(&format!("</{name}>")).unwrap()..];
            }
            open.push(name);
        }
    }
    assert!(open.is_empty(), "{open:?}");
    let drawings: Vec<&str> = html.match_indices("<svg").map(|(i, _)| &html[i..]).collect();
    assert!(drawings.len() > 2);
    drawings.into_iter().for_each(svg_is_well_formed);

    let cell = |v: &Value| v.as_f64().map_or("–".to_owned(), |v| format!("{:.1}", v as f32));
    let listed = |v: &Value| {
        let all: Vec<String> = v.as_array().unwrap().iter().map(cell).collect();
        if all.is_empty() { "–".to_owned() } else { all.join(" / ") }
    };
    let worst = between(html, "<table id=\"worst\">", "</table>");
    let rows: Vec<&str> = worst.lines().filter(|l| l.starts_with("<tr><td>")).collect();
    assert_eq!(rows.len(), quality["worst"].as_array().unwrap().len());
    for (row, i) in rows.iter().zip(quality["worst"].as_array().unwrap()) {
        let l = &quality["layers"][i.as_u64().unwrap() as usize];
        let expected = [
            l["component"].as_str().unwrap().to_owned(),
            l["layer"].as_str().unwrap().to_owned(),
            listed(&l["sqnr_db"]),
            listed(&l["input_sqnr_db"]),
            cell(&l["weight_sqnr_db"]),
            listed(&l["measured_input_sqnr_db"]),
        ];
        let found: Vec<&str> = row.split("<td").skip(1).map(|c| between(c, ">", "</td>")).collect();
        assert_eq!(found, expected);
    }
    // Each number of the heat maps.
    let layers = quality["layers"].as_array().unwrap();
    let mut cells = 0;
    for l in layers {
        for (field, what) in [("sqnr_db", "estimated"), ("measured_input_sqnr_db", "measured")] {
            for v in l[field].as_array().unwrap().iter().filter(|v| !v.is_null()) {
                let title = format!(
                    "<title>{}, {what}: {} dB</title>",
                    l["layer"].as_str().unwrap(),
                    cell(v)
                );
                assert!(html.contains(&title), "{title}");
                cells += 1;
            }
        }
    }
    assert_eq!(html.matches("<title>").count(), cells + 1);
    let attention = between(html, "<table id=\"attention\">", "</table>");
    for a in quality["attentions"].as_array().unwrap() {
        let name = a["attention"].as_str().unwrap();
        let row = attention.lines().find(|l| l.contains(&format!("<td>{name}</td>"))).unwrap();
        assert!(row.contains(&format!(">{}</td></tr>", listed(&a["measured_sqnr_db"]))), "{row}");
        assert_eq!(row.contains("<td>int8</td>"), a["int8"] == true, "{row}");
    }
    let kept = between(html, "<table id=\"kept\">", "</table>");
    let asked = layers.iter().filter(|l| l["winograd"].is_string() || l["direct"].is_string());
    let computed = between(html, "<table id=\"winograd\">", "</table>");
    assert_eq!(computed.matches("<tr><td>").count(), asked.count());
    let floats = layers.iter().filter(|l| l["int8"] == false);
    assert_eq!(kept.matches("<tr><td>").count(), floats.clone().count());
    let escaped = |why: &Value| why.as_str().unwrap().replace('\'', "&#39;");
    floats.for_each(|l| assert!(kept.contains(&escaped(&l["why"])), "{l}"));
    let pictures = if quality["measured"].is_null() { 0 } else { 3 };
    assert_eq!(html.matches("src=\"data:image/png;base64,iVBORw0KGgo").count(), pictures);
}

fn between<'a>(text: &'a str, from: &str, to: &str) -> &'a str {
    let start = text.find(from).unwrap_or_else(|| panic!("{from} in {text}")) + from.len();
    &text[start..][..text[start..].find(to).unwrap()]
}

#[test]
fn no_data_no_int8() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let int8 = ["--precision", "int8"];
    export(dir, &int8).refused(2, &["measured and never guessed", "--calibration"]);
    export(dir, &["--precision", "mixed"]).refused(2, &["folder of pictures"]);
    let with = |more: &[&str]| export(dir, &[&int8[..], more].concat());
    std::fs::create_dir(dir.join("empty")).unwrap();
    with(&["--calibration", "empty"]).refused(3, &["no data, no int8", "empty", "photographs"]);
    std::fs::create_dir(dir.join("broken")).unwrap();
    put(&dir.join("broken"), "x.png", b"\x89PNG\r\n\x1a\n");
    picture(&dir.join("broken"), "small.png", 40, 40);
    with(&["--calibration", "broken"]).refused(3, &["x.png", "small.png", "smaller than"]);
    assert_eq!(names(dir), ["broken", "empty"], "nothing is left behind");
}

#[test]
fn options_that_do_not_go_together_are_usage_errors() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    pictures(dir);
    for (args, word) in [
        ("--calibration photos", "--calibration is for --precision int8"),
        ("--precision f32 --report r.html", "--report is for --precision int8"),
        ("--precision f16 --keep-f16 x", "--keep-f16 is for"),
        ("--precision f16 --winograd auto", "--winograd is for"),
        ("--precision f32 --keep-direct x", "--keep-direct is for"),
        ("--precision int8 --calibration photos --winograd some", "auto, rows, off or all"),
        (
            "--precision int8 --calibration photos --winograd off --keep-direct x",
            "--winograd off leaves every convolution direct",
        ),
        (
            "--precision int8 --calibration photos --min-sqnr 30",
            "--min-sqnr is for --precision mixed",
        ),
        (
            "--precision int8 --calibration photos --keep-share 30",
            "--keep-share is for --precision mixed",
        ),
        ("--precision mixed --calibration photos --keep-share 101", "--keep-share can be 0 to 100"),
        ("--precision mixed --calibration photos --keep-share NaN", "--keep-share can be 0 to 100"),
        ("--precision mixed --calibration photos --keep-share 9 --min-sqnr 30", "give one of them"),
        ("--precision mixed --calibration photos --keep-share 9 --max-loss 1", "give one of them"),
        ("--precision mixed --calibration photos --max-loss -1", "--max-loss can be 0 to 10 dB"),
        ("--precision mixed --calibration t.json --max-loss 1", "name the folder"),
        ("--precision int8 --calibration photos --max-loss 1", "is for --precision mixed"),
        ("--precision mixed --calibration photos --min-sqnr -1", "--min-sqnr can be 0 to 100"),
        ("--precision mixed --calibration photos --min-sqnr NaN", "--min-sqnr can be 0 to 100"),
        (
            "--precision int8 --calibration photos --method best",
            "mse, percentile, entropy or minmax",
        ),
        ("--precision int4", "f32, f16, int8 or mixed"),
        ("--precision int8 --calibration photos --report m.latile", "named for two outputs"),
        ("--consistency 2", "--consistency can be 0 to 1"),
        ("--precision int8 --calibration photos --threads 0", "--threads is 0"),
    ] {
        export(dir, &args.split(' ').collect::<Vec<_>>()).refused(2, &[word]);
    }
    let args = "--precision int8 --calibration photos --report no/r.html";
    export(dir, &args.split(' ').collect::<Vec<_>>()).refused(6, &["no/r.html", "create it first"]);
    assert_eq!(names(dir), ["photos"], "nothing is left behind");
}

/// Ctrl-C leaves nothing, the float model under way included.
#[cfg(unix)]
#[test]
fn an_interrupted_export_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    pictures(dir);
    let source = fixture("models/sr");
    let args =
        ["--precision", "int8", "--calibration", "photos", "-o", "m.latile", "--report", "r.html"];
    let mut child = latile(dir)
        .arg("export")
        .arg(source)
        .args(args)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    // The float model's folder stands as soon as the work begins.
    while names(dir).len() == 1 {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let kill = std::process::Command::new("kill").arg("-INT").arg(child.id().to_string()).status();
    assert!(kill.unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(names(dir), ["photos"]);
}
