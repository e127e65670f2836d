//! Quantized exports, with a table made here by the interpreter: what they compute, what is in them, what is
//! refused. The same bytes on every machine.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{Map, fixtures, read_maps, run_observed};
use latile_calibration::table::{Datum, ModelId, Sampling, VERSION};
use latile_calibration::{
    ComponentTable, GroupTable, LayerTable, Method, Range, Ranges, SquareRanges, Table,
    WinogradRanges,
};
use latile_export::quantize::{MOST_NOISE_DB, MOST_SQUARE_NOISE_DB};
use latile_export::{
    ExportError, ExportOptions, Glob, LayerSummary, Mixed, Progress, Quantization, Summary,
    Winograd, export,
};
use latile_runtime::format::{Model, Precision, Role};
use latile_runtime::graph::{Layout, Op, Winograd as Algorithm};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

fn go(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn folder() -> PathBuf {
    fixtures().join("models/sr")
}

/// What a component is run on: the first picture of the fixture at each of its timesteps.
fn cases(model: &Model, role: Role) -> Vec<(f64, Vec<(&'static str, Map)>)> {
    let file = match role {
        Role::Unet => "unet/io.safetensors",
        _ => "vqvae/decoder_io.safetensors",
    };
    let io = read_maps(&folder().join(file));
    (0..3)
        .map(|case| match role {
            Role::Unet => {
                let timestep = io[&format!("{case}.inputs.timestep")].data[0];
                let spec = model.component(role).unwrap().timestep.unwrap();
                let mut projected = vec![0f32; spec.dim as usize];
                spec.project(timestep as f32, &mut projected);
                let data = projected.into_iter().map(f64::from).collect();
                let time = Map { h: 1, w: 1, c: spec.dim as usize, data };
                let sample = io[&format!("{case}.inputs.sample")].clone();
                (timestep, vec![("sample", sample), ("time_proj", time)])
            }
            _ => (0.0, vec![("latents", io[&format!("{case}.inputs.latents")].clone())]),
        })
        .collect()
}

/// What one layer read, over all cases of each group.
#[derive(Default)]
struct Seen {
    maps: Vec<Vec<Map>>,
}

/// A table of the small model: ranges from least to largest, and one channel in two scaled to have the same
/// largest value as its neighbour.
fn table(float: &Model, bounds: &[u32]) -> Table {
    let mut components = Vec::new();
    for role in [Role::Unet, Role::Decoder] {
        let groups = if role == Role::Unet { bounds } else { &[] };
        let mut order = Vec::new();
        let mut seen: BTreeMap<String, Seen> = BTreeMap::new();
        for (timestep, inputs) in cases(float, role) {
            let group = groups.iter().position(|&b| timestep < f64::from(b));
            let group = group.unwrap_or(groups.len().saturating_sub(1));
            run_observed(float, role, 0, &inputs, &mut |name, map| {
                if !order.contains(&name.to_owned()) {
                    order.push(name.to_owned());
                }
                let seen = seen.entry(name.to_owned()).or_default();
                seen.maps.resize_with(groups.len().max(1), Vec::new);
                seen.maps[group].push(map.clone());
            });
        }
        let layers = order.iter().map(|name| layer(name, &seen[name].maps)).collect();
        components.push(ComponentTable { role, timestep_groups: groups.to_vec(), layers });
    }
    let metadata = &float.manifest().metadata;
    Table {
        version: VERSION,
        model: ModelId { name: metadata.name.clone(), source_hash: metadata.source_hash.clone() },
        data: vec![Datum { name: "a.png".into(), blake3: "00".into(), size: [16, 16] }],
        skipped: Vec::new(),
        sampling: Sampling {
            timesteps: vec![1],
            spacing: None,
            eta: 0.0,
            seed: 0,
            size: 16,
            percentile: 100.0,
        },
        components,
    }
}

/// Ranges from least to largest.
fn spread(values: &[f32]) -> Ranges {
    let min = values.iter().copied().fold(0f32, f32::min);
    let max = values.iter().copied().fold(0f32, f32::max);
    let scale = (max - min) / 255.0;
    let zero_point = (-min / scale).round_ties_even() as u8;
    let error = |&v: &f32| {
        let q = ((v / scale).round_ties_even() + f32::from(zero_point)).clamp(0.0, 255.0);
        f64::from(v - (q - f32::from(zero_point)) * scale).powi(2)
    };
    let error = (values.iter().map(error).sum::<f64>() / values.len() as f64) as f32;
    let range = Range { scale, zero_point, error };
    Ranges { minmax: range, percentile: range, mse: range, entropy: range }
}

/// What Winograd's algorithm reads of maps padded by one: pixels two apart, sums or differences of neighbours.
fn pairs(maps: &[Map], scale: &[f32], kind: usize) -> Vec<f32> {
    let mut all = Vec::new();
    for m in maps {
        for (y, x, c) in (0..m.h * m.w * m.c).map(|i| (i / m.c / m.w, i / m.c % m.w, i % m.c)) {
            let at = |x: usize| match x.checked_sub(1) {
                Some(x) if x < m.w => m.data[(y * m.w + x) * m.c + c] as f32 * scale[c],
                _ => 0.0,
            };
            match kind {
                0 => all.push(at(x) - at(x + 2)),
                1 => all.push(at(x + 1) + at(x + 2)),
                _ => all.push(at(x + 2) - at(x + 1)),
            }
        }
    }
    all
}

/// The same of squares: kind i down and then j across is number 3 i + j.
fn squares(maps: &[Map], scale: &[f32], number: usize) -> Vec<f32> {
    let of = |kind: usize, x: [f32; 4], odd: bool| match (kind, odd) {
        (0, false) => x[0] - x[2],
        (0, true) => x[1] - x[3],
        (1, _) => x[1] + x[2],
        _ => x[2] - x[1],
    };
    let mut all = Vec::new();
    for m in maps {
        for (y, x, c) in (0..m.h * m.w * m.c).map(|i| (i / m.c / m.w, i / m.c % m.w, i % m.c)) {
            if y % 2 == 1 || x % 2 == 1 {
                continue;
            }
            let at = |y: usize, x: usize| match (y.checked_sub(1), x.checked_sub(1)) {
                (Some(y), Some(x)) if y < m.h && x < m.w => {
                    m.data[(y * m.w + x) * m.c + c] as f32 * scale[c]
                }
                _ => 0.0,
            };
            for odd in 0..4 {
                let column =
                    |i: usize| of(number / 3, [0, 1, 2, 3].map(|j| at(y + j, x + i)), odd / 2 == 1);
                all.push(of(number % 3, [0, 1, 2, 3].map(column), odd % 2 == 1));
            }
        }
    }
    all
}

fn layer(name: &str, groups: &[Vec<Map>]) -> LayerTable {
    let c = groups.iter().flatten().next().unwrap().c;
    let all = || groups.iter().flatten().flat_map(|m| m.data.iter().enumerate());
    let count = all().count() as f64 / c as f64;
    let mut moments = vec![(0f64, 0f64, 0f64); c];
    for (i, v) in all() {
        let m = &mut moments[i % c];
        *m = (m.0 + v / count, m.1 + v * v / count, m.2.max(v.abs()));
    }
    let (mut product, mut square) = (0.0, 0.0);
    for m in groups.iter().flatten() {
        for y in 0..m.h {
            for x in 0..m.w {
                for (ch, moment) in moments.iter().enumerate() {
                    let at = |x: usize| m.data[(y * m.w + x) * c + ch] - moment.0;
                    square += at(x) * at(x) / m.w as f64;
                    if x + 1 < m.w {
                        product += at(x) * at(x + 1) / (m.w - 1) as f64;
                    }
                }
            }
        }
    }
    let input_scale: Vec<f32> = (0..c)
        .map(|i| if i % 2 == 1 { (moments[i - 1].2 / moments[i].2) as f32 } else { 1.0 })
        .collect();
    let group = |maps: &Vec<Map>| {
        let pairs = [0, 1, 2].map(|kind| spread(&pairs(maps, &input_scale, kind)));
        let scaled = || {
            maps.iter()
                .flat_map(|m| m.data.iter().enumerate())
                .map(|(i, &v)| v as f32 * input_scale[i % c])
        };
        let min = scaled().fold(0f32, f32::min);
        let max = scaled().fold(0f32, f32::max);
        let samples = scaled().count();
        let mean = |f: &dyn Fn(f32) -> f64| scaled().map(f).sum::<f64>() / samples as f64;
        let [apart, sum, difference] = pairs;
        GroupTable {
            samples: samples as u64,
            min,
            max,
            power: mean(&|v| f64::from(v).powi(2)) as f32,
            ranges: Some(spread(&scaled().collect::<Vec<f32>>())),
            winograd: Some(WinogradRanges { apart, sum, difference }),
            squares: Some(SquareRanges(std::array::from_fn(|k| {
                spread(&squares(maps, &input_scale, k))
            }))),
        }
    };
    LayerTable {
        name: name.to_owned(),
        channels: c as u32,
        segments: vec![c as u32],
        neighbour: (product / square).clamp(0.0, 1.0) as f32,
        channel_max: moments.iter().map(|m| m.2 as f32).collect(),
        channel_mean: moments.iter().map(|m| m.0 as f32).collect(),
        channel_ms: moments.iter().map(|m| m.1 as f32).collect(),
        groups: groups.iter().map(group).collect(),
        input_scale: Some(input_scale),
        loss: None,
    }
}

fn options(precision: Precision, quantization: Option<Quantization>) -> ExportOptions {
    ExportOptions {
        precision,
        quantization,
        overwrite: true,
        encoder: false,
        ..ExportOptions::default()
    }
}

fn by(table: &Table) -> Quantization {
    Quantization {
        table: table.clone(),
        method: Method::Mse,
        keep_f16: Vec::new(),
        mixed: None,
        winograd: Winograd::Off,
        keep_direct: Vec::new(),
    }
}

fn float(dir: &Path) -> Model {
    let path = dir.join("float.latile");
    export(&folder(), &path, &options(Precision::F32, None), &mut go).unwrap();
    Model::open(&path).unwrap()
}

fn int8(dir: &Path, how: Quantization) -> (Model, Summary) {
    let precision = if how.mixed.is_some() { Precision::Mixed } else { Precision::Int8 };
    let path = dir.join("int8.latile");
    let summary = export(&folder(), &path, &options(precision, Some(how)), &mut go).unwrap();
    let model = Model::open(&path).unwrap();
    model.verify().unwrap();
    (model, summary)
}

/// Signal-to-noise ratio in dB, over all cases.
fn sqnr(a: &Model, b: &Model, role: Role) -> f64 {
    let (mut signal, mut noise) = (0.0, 0.0);
    for (timestep, inputs) in cases(a, role) {
        let group = |m: &Model| m.component(role).unwrap().timestep_group(timestep as f32);
        let x = run_observed(a, role, group(a), &inputs, &mut |_, _| {});
        let y = run_observed(b, role, group(b), &inputs, &mut |_, _| {});
        signal += x.data.iter().map(|v| v * v).sum::<f64>();
        noise += x.data.iter().zip(&y.data).map(|(x, y)| (x - y).powi(2)).sum::<f64>();
    }
    10.0 * (signal / noise).log10()
}

#[test]
fn int8_computes_nearly_what_float_computes() {
    let dir = tempfile::tempdir().unwrap();
    let float = float(dir.path());
    let (model, summary) = int8(dir.path(), by(&table(&float, &[300, 700, 1000])));
    for role in [Role::Unet, Role::Decoder] {
        let found = sqnr(&float, &model, role);
        assert!(found > 25.0, "{role}: {found:.1} dB");
    }
    let unet = model.component(Role::Unet).unwrap();
    assert_eq!(unet.timestep_groups, [300, 700, 1000]);
    let layers: Vec<_> = unet.graph.nodes.iter().filter_map(|n| n.op.quant()).collect();
    assert!(layers.len() > 30, "{}", layers.len());
    assert!(layers.iter().all(|q| q.ranges.len() == 3 && q.input_scale.is_some()));
    assert_eq!(summary.method, Some(Method::Mse));
    let int8 = |c: &str| summary.layers.iter().filter(|l| l.component == c && l.int8).count();
    assert_eq!(int8("unet"), layers.len());
    let float: Vec<&str> =
        summary.layers.iter().filter(|l| !l.int8).map(|l| l.layer.as_str()).collect();
    assert_eq!(
        float,
        ["conv_in", "conv_out", "post_quant_conv", "decoder.conv_in", "decoder.conv_out"]
    );
    for l in summary.layers.iter().filter(|l| l.int8) {
        let groups = if l.component == "unet" { 3 } else { 1 };
        assert_eq!((l.sqnr_db.len(), l.input_sqnr_db.len()), (groups, groups), "{l:?}");
        assert!(l.worst_db().unwrap() > 15.0, "{l:?}");
        assert!(l.why.is_none() && l.weight_sqnr_db.unwrap() > 20.0, "{l:?}");
    }
    let bytes = &summary.components[0].bytes;
    assert!(bytes.int8 > 3 * bytes.float && bytes.float > 0 && bytes.int8_scales > 0, "{bytes:?}");
}

/// A layer's parts follow its weight, and it is stored as docs/format.md says.
#[test]
fn the_parts_of_a_layer_lie_together() {
    let dir = tempfile::tempdir().unwrap();
    let float = float(dir.path());
    let (model, _) = int8(dir.path(), by(&table(&float, &[])));
    let component = model.load(Role::Unet).unwrap();
    let graph = &component.spec().graph;
    let node = graph.nodes.iter().find(|n| n.name == "down_blocks.1.resnets.0.conv1").unwrap();
    let first = graph.weights.iter().position(|w| w.name == "down_blocks.1.resnets.0.conv1.weight");
    let names: Vec<&str> =
        graph.weights[first.unwrap()..][..5].iter().map(|w| w.name.as_str()).collect();
    let of = |part: &str| format!("down_blocks.1.resnets.0.conv1.{part}");
    let expected = ["weight", "weight_scale", "weight_sum", "input_scale", "bias"].map(of);
    assert_eq!(names, expected.each_ref().map(String::as_str));
    let q = node.op.quant().unwrap();
    let ids = node.op.weights();
    assert_eq!(graph.weight(ids[0]).layout, Layout::Packed16x4);
    let stored = component.weight(ids[0]);
    let n = graph.weight(ids[0]).shape[0] as usize;
    let sums: Vec<i32> = component
        .weight(q.weight_sum)
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| i32::from_le_bytes(*b))
        .collect();
    let mut counted = vec![0i32; n.next_multiple_of(16)];
    let per_tile = stored.len() / n.div_ceil(16);
    for (i, &b) in stored.iter().enumerate() {
        counted[i / per_tile * 16 + i / 4 % 16] += i32::from(b as i8);
    }
    assert_eq!(counted[..n], sums);
    assert!(stored.iter().all(|&b| b as i8 != -128));
}

/// How many layers are direct for this reason.
fn direct(summary: &Summary, why: &str) -> usize {
    let says = |l: &&LayerSummary| l.direct.as_ref().is_some_and(|d| d.contains(why));
    summary.layers.iter().filter(says).count()
}

/// By Winograd's algorithm an int8 model computes nearly the same, and is stored as docs/format.md says.
#[test]
fn fewer_products_compute_nearly_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let float = float(dir.path());
    let table = table(&float, &[300, 700, 1000]);
    let (plain, before) = int8(dir.path(), by(&table));
    let found = [Role::Unet, Role::Decoder].map(|role| sqnr(&float, &plain, role));
    assert!(before.layers.iter().all(|l| l.winograd.is_none()));
    drop(plain);
    let mut old = table.clone();
    for g in old.components.iter_mut().flat_map(|c| &mut c.layers).flat_map(|l| &mut l.groups) {
        g.squares = None;
    }
    for (algorithm, table, lost) in [(Algorithm::Rows, &old, 4.0), (Algorithm::Square, &table, 8.0)]
    {
        let all = Quantization { winograd: Winograd::All, ..by(table) };
        let done = int8(dir.path(), all);
        are_computed_by(algorithm, &float, done, (&before, found, lost));
    }
}

fn are_computed_by(
    algorithm: Algorithm,
    float: &Model,
    (model, summary): (Model, Summary),
    (before, found, most_lost): (&Summary, [f64; 2], f32),
) {
    for (role, direct) in [Role::Unet, Role::Decoder].into_iter().zip(found) {
        let found = sqnr(float, &model, role);
        assert!(
            found > direct - f64::from(most_lost) && found > 25.0,
            "{role}: {found:.1} dB, was {direct:.1} dB"
        );
        let component = model.load(role).unwrap();
        let graph = &component.spec().graph;
        let mut fewer = 0;
        for node in &graph.nodes {
            let (Some((weight, bias, Some(q))), Op::Conv2d { kernel, .. }) =
                (node.op.matrix(), &node.op)
            else {
                continue;
            };
            let can = *kernel == [3, 3] && !node.name.contains("downsampler");
            assert_eq!(q.winograd, can.then_some(algorithm));
            if !can {
                continue;
            }
            fewer += 1;
            let n = graph.kind(node.output).channels();
            let c = graph.kind(node.inputs[0]).channels();
            let [h, w] = algorithm.kernel();
            assert_eq!(graph.weight(weight).shape, [algorithm.filters(n), c, h, w]);
            assert_eq!(graph.weight(q.weight_scale).shape, [algorithm.filters(n)]);
            assert_eq!(graph.weight(q.weight_sum).shape, [algorithm.filters(n)]);
            assert_eq!(graph.weight(bias.unwrap()).shape, [n]);
            let groups = if role == Role::Unet { 3 } else { 1 };
            assert_eq!(q.ranges.len(), groups * algorithm.ranges());
        }
        let summed = summary
            .layers
            .iter()
            .filter(|l| l.component == role.name() && l.winograd == Some(algorithm));
        assert!(fewer > 5 && fewer == summed.count(), "{role}: {fewer}");
    }
    for (l, before) in
        summary.layers.iter().zip(&before.layers).filter(|(l, _)| l.winograd.is_some())
    {
        let (noise, rows) = (l.winograd_noise_db.unwrap(), before.winograd_noise_db.unwrap());
        assert!(l.direct.is_none() && (noise == rows || algorithm == Algorithm::Square), "{l:?}");
        assert!(before.direct.as_ref().unwrap().contains("--winograd off"), "{before:?}");
        // The estimates say so too.
        let lost = before.worst_db().unwrap() - l.worst_db().unwrap();
        assert!((-1.0..most_lost + 2.5).contains(&lost), "{l:?} {lost}");
    }
    let of = |s: &Summary| s.components[0].bytes.int8;
    assert!(of(&summary) > of(before) && of(&summary) < of(before) * 4, "padded to sixteen");
}

/// What is asked to stay direct does, what the table does not know too, and both say why.
#[test]
fn a_layer_that_stays_direct_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let float = float(dir.path());
    let mut table = table(&float, &[]);
    let how = |table: &Table| Quantization {
        winograd: Winograd::All,
        keep_direct: vec![Glob::new("decoder.*")],
        ..by(table)
    };
    let (model, summary) = int8(dir.path(), how(&table));
    let quants = |role| {
        let nodes = model.component(role).unwrap().graph.nodes.clone();
        nodes.into_iter().filter(|n| n.op.quant().is_some_and(|q| q.winograd.is_some())).count()
    };
    assert_eq!(quants(Role::Decoder), 0);
    assert!(quants(Role::Unet) > 10 && summary.notes.is_empty(), "{:?}", summary.notes);
    assert!(direct(&summary, "--keep-direct decoder.* asks") > 5);

    let lost = Quantization { keep_direct: vec![Glob::new("conv9")], ..how(&table) };
    let path = dir.path().join("lost.latile");
    let e = export(&folder(), &path, &options(Precision::Int8, Some(lost)), &mut go).unwrap_err();
    assert!(e.to_string().contains("no layer fits --keep-direct conv9"), "{e}");

    // A table of version 1.
    for g in table.components.iter_mut().flat_map(|c| &mut c.layers).flat_map(|l| &mut l.groups) {
        (g.winograd, g.squares) = (None, None);
    }
    table.version = 1;
    let (_, summary) = int8(dir.path(), Quantization { keep_direct: Vec::new(), ..how(&table) });
    assert!(summary.layers.iter().all(|l| l.winograd.is_none() && l.winograd_noise_db.is_none()));
    assert!(summary.notes.iter().any(|n| n.contains("calibrate the model again")));
    assert!(direct(&summary, "no ranges") > 10);
}

/// The same of a model by Winograd's algorithm where that is quiet enough, or where a mixed one has room for its noise.
#[test]
fn fewer_products_have_the_same_bytes_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let float = float(dir.path());
    let table = rounded(&table(&float, &[500, 1000]));
    let auto = Quantization { winograd: Winograd::Auto, ..by(&table) };
    let (_, summary) = int8(dir.path(), auto.clone());
    for l in summary.layers.iter().filter(|l| l.winograd_noise_db.is_some()) {
        let most = match l.winograd {
            Some(Algorithm::Square) => MOST_SQUARE_NOISE_DB,
            _ => MOST_NOISE_DB,
        };
        let quiet = l.winograd_noise_db.unwrap() <= most;
        let small = l.direct.as_ref().is_some_and(|why| why.contains("too few"));
        let taken = (l.winograd.is_some(), l.direct.is_none());
        assert_eq!(taken, (quiet && !small, quiet && !small), "{l:?}");
    }
    let count = |s: &Summary| s.layers.iter().filter(|l| l.winograd.is_some()).count();
    assert!(count(&summary) > 0);
    let bytes = std::fs::read(dir.path().join("int8.latile")).unwrap();
    assert_eq!(blake3::hash(&bytes).to_hex().as_str(), WINOGRAD_HASH);
    // A layer whose noise would put it below the least ratio is direct rather than float.
    let mixed = Quantization { mixed: Some(Mixed::MinSqnr(33.0)), ..auto };
    let (_, fewer) = int8(dir.path(), mixed);
    let off = Quantization { mixed: Some(Mixed::MinSqnr(33.0)), ..by(&table) };
    let (_, without) = int8(dir.path(), off);
    let int8s = |s: &Summary| s.layers.iter().map(|l| l.int8).collect::<Vec<_>>();
    assert_eq!(int8s(&fewer), int8s(&without));
    assert!(direct(&fewer, "by Winograd's algorithm its estimated SQNR") > 0);
    assert!(count(&fewer) < count(&summary));
}

const WINOGRAD_HASH: &str = "c13d4c603ef5f677c6a1f056de327d676a7b79ed21b6a6ed80246c4ce1f0424a";

/// x86 and Arm write the same file: this hash was made on x86.
#[test]
fn the_same_bytes_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let float = float(dir.path());
    let table = table(&float, &[500, 1000]);
    // The interpreter's table is computed with the platform's exp: rounded, it is the same everywhere.
    let table = rounded(&table);
    let mixed = Quantization {
        mixed: Some(Mixed::MinSqnr(33.0)),
        keep_f16: vec![Glob::new("unet.down_blocks.0.*.conv1")],
        ..by(&table)
    };
    let (model, summary) = int8(dir.path(), mixed.clone());
    assert_eq!(model.manifest().precision, Precision::Mixed);
    let kept = |why: &str| {
        summary.layers.iter().filter(|l| l.why.as_ref().is_some_and(|w| w.contains(why))).count()
    };
    assert_eq!(kept("--keep-f16 unet.down_blocks.0.*.conv1 asks for it"), 2);
    assert!(kept("less than 33 dB") > 0, "{:?}", summary.layers);
    assert!(summary.layers.iter().filter(|l| l.int8).all(|l| l.worst_db().unwrap() >= 33.0));
    let bytes = std::fs::read(dir.path().join("int8.latile")).unwrap();
    let (_, again) = int8(dir.path(), mixed);
    assert_eq!(bytes, std::fs::read(dir.path().join("int8.latile")).unwrap());
    assert_eq!(summary, again);
    assert_eq!(blake3::hash(&bytes).to_hex().as_str(), HASH);
}

const HASH: &str = "8751f2cafd7ddad07202d9acbf0394886f14eb11721f51befeb28f86e49a17c8";

/// The table with twelve bits to a number.
fn rounded(table: &Table) -> Table {
    let round = |v: &mut f32| {
        *v = f32::from_bits((v.to_bits() + (1 << 11)) & !((1 << 12) - 1));
    };
    let mut table = table.clone();
    for l in table.components.iter_mut().flat_map(|c| &mut c.layers) {
        round(&mut l.neighbour);
        l.channel_mean.iter_mut().for_each(round);
        l.channel_ms.iter_mut().for_each(round);
        l.input_scale.iter_mut().flatten().for_each(round);
        for g in &mut l.groups {
            round(&mut g.power);
            let pairs =
                g.winograd.iter_mut().flat_map(|w| [&mut w.apart, &mut w.sum, &mut w.difference]);
            for r in g.ranges.iter_mut().chain(pairs) {
                for r in [&mut r.minmax, &mut r.percentile, &mut r.mse, &mut r.entropy] {
                    round(&mut r.scale);
                    round(&mut r.error);
                }
            }
        }
    }
    table
}

#[test]
fn a_layer_whose_input_is_zero_stays_float() {
    let dir = tempfile::tempdir().unwrap();
    let float = float(dir.path());
    let mut table = table(&float, &[]);
    table.components[0].layers[5].groups[0].ranges = None;
    let name = table.components[0].layers[5].name.clone();
    let (model, summary) = int8(dir.path(), by(&table));
    let l = summary.layers.iter().find(|l| l.layer == name).unwrap();
    assert!(!l.int8 && l.why.as_ref().unwrap().contains("zero"), "{l:?}");
    let node =
        model.component(Role::Unet).unwrap().graph.nodes.iter().find(|n| n.name == name).unwrap();
    assert!(node.op.quant().is_none());
}

#[test]
fn what_does_not_fit_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let float = float(dir.path());
    let table = table(&float, &[]);
    let out = dir.path().join("refused.latile");
    let refused = |precision, how: Option<Quantization>, words: &[&str]| {
        let e = export(&folder(), &out, &options(precision, how), &mut go).unwrap_err();
        for word in words {
            assert!(e.to_string().contains(word), "{word:?} in {e}");
        }
        assert!(!out.exists());
        e
    };
    let e = refused(Precision::Int8, None, &["measured and never guessed", "folder of pictures"]);
    assert!(matches!(e, ExportError::NoCalibration));
    refused(Precision::Mixed, None, &["calibration table"]);
    refused(Precision::F16, Some(by(&table)), &["no int8 layers"]);

    let mut other = table.clone();
    other.model = ModelId { name: "other".into(), source_hash: "ab".into() };
    refused(Precision::Int8, Some(by(&other)), &["other", "sr", "calibrate this model"]);

    let mut short = table.clone();
    let gone = short.components[1].layers.remove(3).name;
    refused(Precision::Int8, Some(by(&short)), &["decoder", &gone, "calibrate the model again"]);
    let mut wide = table.clone();
    wide.components[0].layers[2].channels += 1;
    refused(Precision::Int8, Some(by(&wide)), &["unet", "input channels"]);
    let mut half = table.clone();
    half.components.pop();
    refused(Precision::Int8, Some(by(&half)), &["no decoder"]);
    let mut timed = table.clone();
    timed.components[1].timestep_groups = vec![1000];
    refused(Precision::Int8, Some(by(&timed)), &["decoder", "takes no timestep"]);

    let lost = Quantization { keep_f16: vec![Glob::new("up_block*.conv9")], ..by(&table) };
    refused(Precision::Int8, Some(lost), &["up_block*.conv9", "no layer fits"]);
    let mut tiny = table.clone();
    tiny.components[0].layers[4].input_scale.as_mut().unwrap()[0] = 1e-30;
    let name = tiny.components[0].layers[4].name.clone();
    refused(Precision::Int8, Some(by(&tiny)), &[&name, "absurdly large"]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn the_encoder_stays_float() {
    let dir = tempfile::tempdir().unwrap();
    let float = float(dir.path());
    let how = by(&table(&float, &[]));
    let path = dir.path().join("m.latile");
    let options = ExportOptions { encoder: true, ..options(Precision::Int8, Some(how)) };
    let summary = export(&folder(), &path, &options, &mut go).unwrap();
    let encoder: Vec<_> = summary.layers.iter().filter(|l| l.component == "encoder").collect();
    assert!(encoder.len() > 10 && encoder.iter().all(|l| !l.int8 && l.why.is_some()));
    Model::open(&path).unwrap().verify().unwrap();
}
