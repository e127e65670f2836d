//! Calibration as a whole, on super-resolution networks small enough to be written down.
//!
//! Size: the networks that are written down here serve the runs and the tables that are tampered with alike.
#![allow(clippy::unwrap_used)]

use latile_calibration::{
    CalibrationError, LayerTable, Method, Options, PictureSet, Progress, RgbPicture, Table,
    TableError, calibrate, int8_layers, read_pictures,
};
use latile_cpu::isa::Level;
use latile_cpu::session::CpuBackend;
use latile_runtime::format::{
    BetaSchedule, Defaults, LatentSpec, Manifest, Metadata, Model, Precision, Prediction, Role,
    SchedulerSpec, Spacing, Task, TimestepProjection, Writer,
};
use latile_runtime::graph::{
    Graph, Layout, Node, Op, Pad, Port, ValueId, ValueKind, WeightId, WeightSpec,
};
use latile_runtime::tensor::DType;
use std::fs::File;
use std::ops::ControlFlow;
use std::path::Path;

/// A graph under construction with its weights' values, plain or packed.
struct Net {
    graph: Graph,
    weights: Vec<Vec<f32>>,
    state: u32,
}

impl Net {
    fn new(inputs: &[(&str, ValueKind)]) -> Self {
        let mut net = Self {
            graph: Graph {
                inputs: Vec::new(),
                outputs: Vec::new(),
                values: Vec::new(),
                weights: Vec::new(),
                nodes: Vec::new(),
            },
            weights: Vec::new(),
            state: 11,
        };
        for (name, kind) in inputs {
            let value = net.value(*kind);
            net.graph.inputs.push(Port { name: (*name).to_owned(), value });
        }
        net
    }

    fn value(&mut self, kind: ValueKind) -> ValueId {
        self.graph.values.push(kind);
        ValueId(self.graph.values.len() as u32 - 1)
    }

    fn node(&mut self, name: &str, op: Op, inputs: &[ValueId], kind: ValueKind) -> ValueId {
        let output = self.value(kind);
        self.graph.nodes.push(Node { name: name.to_owned(), op, inputs: inputs.to_vec(), output });
        output
    }

    /// A 3 × 3 convolution, or a linear layer where `side` is 1; weights even in ± `spread`.
    fn layer(&mut self, name: &str, x: ValueId, n: u32, side: u32, spread: f32) -> ValueId {
        let kind = self.graph.kind(x);
        let c = kind.channels();
        let conv = matches!(kind, ValueKind::Map(_)) && side > 1;
        let shape = if conv { vec![n, c, side, side] } else { vec![n, c] };
        let weight = self.matrix(name, shape, n, spread);
        let op = if conv {
            let (stride, pad) = ([1, 1], Pad::all(side / 2));
            Op::Conv2d { weight, bias: None, kernel: [side; 2], stride, pad, quant: None }
        } else {
            Op::Linear { weight, bias: None, quant: None }
        };
        let kind = if matches!(kind, ValueKind::Map(_)) {
            ValueKind::Map(n)
        } else {
            ValueKind::Vector(n)
        };
        self.node(name, op, &[x], kind)
    }

    /// The same of the upsampled map, in one; `n` at most 16.
    fn up_layer(&mut self, name: &str, x: ValueId, n: u32, spread: f32) -> ValueId {
        let shape = vec![64, self.graph.kind(x).channels(), 2, 2];
        let weight = self.matrix(name, shape, n, spread);
        self.node(name, Op::UpConv2x { weight, bias: None, quant: None }, &[x], ValueKind::Map(n))
    }

    /// A weight whose panels, as often as they begin anew, make `n` channels.
    fn matrix(&mut self, name: &str, shape: Vec<u32>, n: u32, spread: f32) -> WeightId {
        let depth: u32 = shape[1..].iter().product();
        let mut values = vec![0f32; (shape[0].next_multiple_of(16) * depth) as usize];
        for (i, v) in values.iter_mut().enumerate() {
            self.state = self.state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let (panel, lane) = (i as u32 / (depth * 16) % n.div_ceil(16), i as u32 % 16);
            if panel * 16 + lane < n {
                *v = spread * ((self.state >> 8) as f32 / (1 << 23) as f32 - 1.0);
            }
        }
        let (dtype, layout) = (DType::F32, Layout::Packed16);
        self.graph.weights.push(WeightSpec {
            name: format!("{name}.weight"),
            shape,
            dtype,
            layout,
        });
        self.weights.push(values);
        WeightId(self.graph.weights.len() as u32 - 1)
    }

    fn silu(&mut self, name: &str, x: ValueId) -> ValueId {
        let kind = self.graph.kind(x);
        self.node(name, Op::Silu, &[x], kind)
    }

    fn output(mut self, name: &str, value: ValueId) -> Self {
        self.graph.outputs.push(Port { name: name.to_owned(), value });
        self
    }
}

/// Latents of 3 channels, pictures twice as large; with a skip connection, a shortcut and a dead layer.
fn unet(wide: f32) -> Net {
    let inputs = [("sample", ValueKind::Map(6)), ("time_proj", ValueKind::Vector(8))];
    let mut net = Net::new(&inputs);
    let first = net.layer("conv_in", ValueId(0), 8, 3, wide);
    let time = net.layer("time", ValueId(1), 8, 1, 0.5);
    let with_time = net.node("add_time", Op::AddChannel, &[first, time], ValueKind::Map(8));
    let deep = net.silu("act", with_time);
    let deep = net.layer("middle", deep, 20, 3, 0.02);
    net.layer("unused", deep, 4, 3, 1.0);
    let both = net.node("concat", Op::Concat, &[deep, first], ValueKind::Map(28));
    let out = net.layer("shortcut", both, 5, 1, 0.3);
    let out = net.silu("act_out", out);
    let out = net.layer("conv_out", out, 3, 3, 0.3);
    net.output("out", out)
}

fn decoder() -> Net {
    let mut net = Net::new(&[("latents", ValueKind::Map(3))]);
    let x = net.layer("conv_in", ValueId(0), 8, 3, 0.4);
    let x = net.silu("act", x);
    let x = net.node("up", Op::Upsample2x, &[x], ValueKind::Map(8));
    let x = net.layer("conv_out", x, 3, 3, 0.4);
    net.output("picture", x)
}

fn encoder() -> Net {
    let mut net = Net::new(&[("picture", ValueKind::Map(3))]);
    let x = net.layer("conv_in", ValueId(0), 4, 3, 0.4);
    let x = net.node("down", Op::AvgPool2x, &[x], ValueKind::Map(4));
    let x = net.layer("conv_out", x, 6, 3, 0.4);
    net.output("moments", x)
}

fn manifest() -> Manifest {
    Manifest {
        metadata: Metadata {
            name: "tiny".to_owned(),
            source_hash: "5eed".to_owned(),
            ..Metadata::default()
        },
        precision: Precision::F32,
        task: Task::SuperResolution,
        latent: Some(LatentSpec { channels: 3, factor: 2, scale: 1.0, shift: 0.0 }),
        scheduler: Some(SchedulerSpec {
            train_timesteps: 1000,
            betas: BetaSchedule::ScaledLinear { start: 0.0015, end: 0.0155 },
            prediction: Prediction::Epsilon,
            spacing: Spacing::Compvis,
            steps_offset: 0,
            set_alpha_to_one: false,
            clip_sample: None,
            zero_terminal_snr: false,
        }),
        defaults: Defaults { steps: 4, eta: 1.0, consistency: 0.0 },
        components: Vec::new(),
    }
}

fn write(dir: &Path, manifest: Manifest, nets: &[(Role, &Net)]) -> Model {
    let path = dir.join("tiny.latile");
    let mut writer = Writer::new(File::create(&path).unwrap()).unwrap();
    for (role, net) in nets {
        let time = TimestepProjection { dim: 8, flip_sin_to_cos: true, freq_shift: 0.0 };
        let time = (*role == Role::Unet).then_some(time);
        writer.begin(*role, 1, time, &[], net.graph.clone()).unwrap();
        for values in &net.weights {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            writer.weight(&bytes).unwrap();
        }
    }
    writer.finish(manifest).unwrap();
    Model::open(&path).unwrap()
}

fn tiny(dir: &Path) -> Model {
    let (unet, decoder, encoder) = (unet(0.4), decoder(), encoder());
    let nets = [(Role::Unet, &unet), (Role::Decoder, &decoder), (Role::Encoder, &encoder)];
    write(dir, manifest(), &nets)
}

const OPTIONS: Options =
    Options { steps: 4, eta: None, count: 3, groups: 4, size: 8, seed: 5, percentile: 99.9 };

/// Files whose bytes seed a picture; one that begins with `?` is broken.
fn decode(path: &Path) -> Result<RgbPicture, String> {
    let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
    if bytes[0] == b'?' {
        return Err("its content is not a picture".to_owned());
    }
    let rgb = (0..40 * 30 * 3).map(|i: u32| (i * u32::from(bytes[0]) / 7 % 256) as u8).collect();
    Ok(RgbPicture { width: 40, height: 30, rgb })
}

fn pictures(dir: &Path, contents: &[&str]) -> PictureSet {
    let folder = dir.join("pictures");
    std::fs::create_dir_all(&folder).unwrap();
    for (i, text) in contents.iter().enumerate() {
        std::fs::write(folder.join(format!("{i}.png")), text).unwrap();
    }
    read_pictures(&tiny(dir), &folder, &OPTIONS, &mut decode).unwrap()
}

fn go(_: &Progress<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn on(level: Level, threads: usize) -> CpuBackend {
    CpuBackend::new(threads, level).unwrap()
}

fn run(model: &Model, set: &PictureSet) -> Result<Table, CalibrationError> {
    calibrate(model, &on(Level::best(), 2), set, &OPTIONS, &mut go)
}

#[test]
fn every_layer_that_is_run_has_its_ranges() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny(dir.path());
    let set = pictures(dir.path(), &["a", "?", "k", "z"]);
    let mut last = (0, 0);
    let table = calibrate(&model, &on(Level::best(), 1), &set, &OPTIONS, &mut |p| {
        assert!(p.done <= p.total && (p.pass, p.done) >= last, "{p:?} after {last:?}");
        last = (p.pass, p.done);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(last.0, 2);
    assert_eq!(table.data.len(), 3);
    assert_eq!((&table.skipped[0].name[..], table.skipped.len()), ("1.png", 1));
    assert_eq!(table.sampling.timesteps, [751, 501, 251, 1]);
    assert_eq!((table.sampling.eta, table.sampling.seed), (1.0, 5));
    table.fits(model.manifest()).unwrap();

    let unet = table.component(Role::Unet).unwrap();
    assert_eq!(unet.timestep_groups, [250, 500, 750, 1000]);
    let names: Vec<&str> = unet.layers.iter().map(|l| l.name.as_str()).collect();
    assert_eq!(names, ["conv_in", "middle", "shortcut", "conv_out"], "no vectors, nothing dead");
    for l in &unet.layers {
        assert_eq!(l.groups.len(), 4);
        for g in &l.groups {
            assert_eq!(g.samples, 3 * 64 * u64::from(l.channels), "{}", l.name);
            let r = g.ranges.unwrap();
            for method in Method::ALL {
                assert!(r.by(method).error >= r.mse.error * 0.999);
            }
            assert!(r.mse.sqnr_db(g.power) > 30.0, "{} {g:?}", l.name);
        }
    }
    // What SiLU makes is never below −0.2785.
    let middle = unet.layer("middle").unwrap();
    assert!(middle.input_scale.is_some() || middle.groups.iter().all(|g| g.min >= -0.2785));
    assert!(middle.channel_mean.iter().zip(&middle.channel_ms).all(|(m, s)| m * m <= s * 1.0001));
    // The quiet half of the concatenation has a factor of its own.
    let shortcut = unet.layer("shortcut").unwrap();
    assert_eq!(shortcut.segments, [20, 8]);
    let scale = shortcut.input_scale.as_ref().unwrap();
    let mean = |s: &[f32]| s.iter().sum::<f32>() / s.len() as f32;
    assert!(mean(&scale[..20]) > 3.0 * mean(&scale[20..]), "{scale:?}");

    let decoder = table.component(Role::Decoder).unwrap();
    assert!(decoder.timestep_groups.is_empty());
    let seen: Vec<u64> = decoder.layers.iter().map(|l| l.groups[0].samples).collect();
    assert_eq!(seen, [3 * 64 * 3, 3 * 64 * 8], "before upsampling");
    let encoder = table.component(Role::Encoder).unwrap();
    assert_eq!(encoder.layers[0].groups[0].samples, 3 * 256 * 3);
    // Pictures are seen from −1 to 1, and this one is used whole.
    assert!(encoder.layers[0].channel_max.iter().all(|m| (0.9..=1.0).contains(m)));
}

/// What Winograd's algorithm would read has ranges where a convolution of 3 × 3 reads its map as it is observed.
#[test]
fn convolutions_have_ranges_of_pairs() {
    let dir = tempfile::tempdir().unwrap();
    let table = run(&tiny(dir.path()), &pictures(dir.path(), &["a", "k", "z"])).unwrap();
    let with = |role| -> Vec<&str> {
        let layers = &table.component(role).unwrap().layers;
        let all = |l: &&LayerTable| l.groups.iter().all(|g| g.winograd.is_some());
        let none = |l: &&LayerTable| l.groups.iter().all(|g| g.winograd.is_none());
        assert!(layers.iter().all(|l| all(&l) || none(&l)));
        layers.iter().filter(all).map(|l| l.name.as_str()).collect()
    };
    assert_eq!(with(Role::Unet), ["conv_in", "middle", "conv_out"]);
    assert_eq!(with(Role::Decoder), ["conv_in"], "the other one reads an enlarged map");
    assert_eq!(with(Role::Encoder), ["conv_in", "conv_out"]);
    for l in &table.component(Role::Unet).unwrap().layers {
        let Some(pairs) = l.winograd(Method::MinMax) else { continue };
        for (g, [apart, sum, difference]) in l.groups.iter().zip(pairs) {
            // Neither of two values is beyond the extremes, zeros at the row's ends included.
            let (lo, hi) = (g.min.min(0.0), g.max.max(0.0));
            for r in [apart, difference] {
                assert!(r.scale * 255.0 <= 2.0 * (hi - lo) * 1.001, "{} {r:?} {g:?}", l.name);
            }
            assert!(sum.scale * 255.0 <= 2.0 * (hi - lo) * 1.001, "{} {sum:?} {g:?}", l.name);
            assert!(sum.scale * 255.0 >= 0.2 * (hi - lo), "{} {sum:?} {g:?}", l.name);
        }
        for ([a, s, d], best) in l.winograd(Method::Mse).unwrap().iter().zip(&l.groups) {
            let w = best.winograd.unwrap();
            for method in Method::ALL {
                let [apart, sum, difference] = w.by(method);
                assert!(apart.error >= a.error * 0.999, "{method}");
                assert!(sum.error >= s.error * 0.999, "{method}");
                assert!(difference.error >= d.error * 0.999, "{method}");
            }
        }
    }
}

/// A table of version 1 is one of today without the ranges that it did not have.
#[test]
fn an_older_table_is_read() {
    let (model, mut json) = sound();
    json["version"] = 1.into();
    for component in json["components"].as_array_mut().unwrap() {
        for layer in component["layers"].as_array_mut().unwrap() {
            for group in layer["groups"].as_array_mut().unwrap() {
                group.as_object_mut().unwrap().remove("winograd");
            }
        }
    }
    let old = Table::parse("t", json.to_string().as_bytes()).unwrap();
    old.fits(model.manifest()).unwrap();
    let layers = || old.components.iter().flat_map(|c| &c.layers);
    assert!(layers().all(|l| l.winograd(Method::Mse).is_none()));
    assert!(layers().all(|l| l.ranges(Method::Mse).is_some()));
    assert!(old.to_json().starts_with("{\"version\": 1,") && !old.to_json().contains("winograd"));
}

/// A table made of one form of an enlarged map's convolution serves the other.
#[test]
fn upsampling_in_one_with_its_convolution_has_the_same_inputs() {
    let dir = tempfile::tempdir().unwrap();
    let set = pictures(dir.path(), &["a", "k", "z"]);
    let mut net = Net::new(&[("latents", ValueKind::Map(3))]);
    let x = net.layer("conv_in", ValueId(0), 8, 3, 0.4);
    let x = net.silu("act", x);
    let x = net.up_layer("conv_out", x, 3, 0.4);
    let net = net.output("picture", x);
    let unet = unet(0.4);
    let of = |folder: &str, decoder: &Net| {
        let folder = dir.path().join(folder);
        std::fs::create_dir(&folder).unwrap();
        let model = write(&folder, manifest(), &[(Role::Unet, &unet), (Role::Decoder, decoder)]);
        let table = run(&model, &set).unwrap();
        table.fits(model.manifest()).unwrap();
        (table, model)
    };
    let ((two, pair), (one, in_one)) = (of("two", &decoder()), of("one", &net));
    two.fits(in_one.manifest()).unwrap();
    one.fits(pair.manifest()).unwrap();
    let layers = [&one, &two].map(|t| t.component(Role::Decoder).unwrap().layers.clone());
    assert_eq!(layers[0][0], layers[1][0]);
    let seen = |l: &LayerTable| {
        let LayerTable { name, channels, segments, neighbour, .. } = l.clone();
        let channel = [l.channel_max.clone(), l.channel_mean.clone(), l.channel_ms.clone()];
        (name, channels, segments, neighbour, channel, l.groups[0].samples)
    };
    assert_eq!(seen(&layers[0][1]), seen(&layers[1][1]));
}

/// BLAKE3 of the table below.
const TABLE_HASH: &str = "f57c5f5c544b5eb967d495870965600241a51bdbdee6b3032de6bfbfb745d206";

#[test]
fn the_same_table_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny(dir.path());
    let set = pictures(dir.path(), &["a", "k", "z"]);
    let first = run(&model, &set).unwrap().to_json();
    // Written by x86-64; other architectures must come to the same bytes.
    assert_eq!(blake3::hash(first.as_bytes()).to_hex().as_str(), TABLE_HASH);
    for level in Level::available() {
        for threads in [1, 3] {
            let table = calibrate(&model, &on(level, threads), &set, &OPTIONS, &mut go).unwrap();
            assert!(table.to_json() == first, "{level:?}, {threads} threads");
        }
    }
    let other = Options { seed: 6, ..OPTIONS };
    let other = calibrate(&model, &on(Level::best(), 2), &set, &other, &mut go).unwrap();
    assert_ne!(other.to_json(), first, "the noise matters");
}

#[test]
fn nonsense_in_an_activation_names_its_layer() {
    let dir = tempfile::tempdir().unwrap();
    let set = pictures(dir.path(), &["a"]);
    for (bad, layer, words) in [
        (f32::NAN, "conv_in", "unet layer middle reads NaN at timestep 751, on picture 0.png"),
        (f32::INFINITY, "middle", "unet layer shortcut reads"),
        (3e30, "conv_in", "unet layer"),
    ] {
        let mut net = unet(0.4);
        let i = net.graph.weights.iter().position(|w| w.name == format!("{layer}.weight")).unwrap();
        net.weights[i][0] = bad;
        let dec = decoder();
        let model = write(dir.path(), manifest(), &[(Role::Unet, &net), (Role::Decoder, &dec)]);
        let err = run(&model, &set).unwrap_err();
        assert!(matches!(err, CalibrationError::Activation { .. }), "{err}");
        assert!(err.to_string().contains(words), "{err}");
    }
    // In the decoder there is no timestep to name.
    let (net, mut dec) = (unet(0.4), decoder());
    dec.weights[0][5] = f32::NAN;
    let model = write(dir.path(), manifest(), &[(Role::Unet, &net), (Role::Decoder, &dec)]);
    let err = run(&model, &set).unwrap_err().to_string();
    assert!(err.contains("decoder layer conv_out reads NaN, on picture 0.png"), "{err}");
    // What only the result shows is the pipeline's to say.
    let mut dec = decoder();
    dec.weights[1][0] = f32::NAN;
    let model = write(dir.path(), manifest(), &[(Role::Unet, &net), (Role::Decoder, &dec)]);
    let err = run(&model, &set).unwrap_err().to_string();
    assert!(err.contains("picture 0.png") && err.contains("not finite"), "{err}");
}

#[test]
fn a_layer_that_reads_nothing_but_zeros_has_no_range() {
    let dir = tempfile::tempdir().unwrap();
    let set = pictures(dir.path(), &["a", "k"]);
    let (mut net, dec) = (unet(0.4), decoder());
    // SiLU(0) is 0, and what conv_out reads is nothing else.
    let i = net.graph.weights.iter().position(|w| w.name == "shortcut.weight").unwrap();
    net.weights[i].fill(0.0);
    let model = write(dir.path(), manifest(), &[(Role::Unet, &net), (Role::Decoder, &dec)]);
    let table = run(&model, &set).unwrap();
    let silent: Vec<_> = table.silent().collect();
    assert_eq!(silent, [(Role::Unet, "conv_out")]);
    let layer = table.component(Role::Unet).unwrap().layer("conv_out").unwrap();
    assert_eq!(layer.ranges(Method::Mse), None);
    assert_eq!((layer.groups[0].min, layer.groups[0].max), (0.0, 0.0));
    // Such a table is sound, and says so again when it is read.
    let again = Table::parse("t", table.to_json().as_bytes()).unwrap();
    assert_eq!(again, table);
    assert!(table.to_json().contains("\"ranges\": null"));
}

#[test]
fn a_few_steps_have_a_few_groups() {
    let dir = tempfile::tempdir().unwrap();
    let (model, set) = (tiny(dir.path()), pictures(dir.path(), &["a"]));
    let options = Options { steps: 1, eta: Some(0.0), ..OPTIONS };
    let table = calibrate(&model, &on(Level::best(), 1), &set, &options, &mut go).unwrap();
    let unet = table.component(Role::Unet).unwrap();
    assert_eq!(unet.timestep_groups, [1000]);
    assert_eq!(table.sampling.eta, 0.0);
    assert!(unet.layers.iter().all(|l| l.groups.len() == 1));
}

#[test]
fn what_cannot_be_calibrated_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let set = pictures(dir.path(), &["a"]);
    let (net, dec) = (unet(0.4), decoder());
    let nets = [(Role::Unet, &net), (Role::Decoder, &dec)];
    let refuse = |change: &dyn Fn(&mut Manifest), words: &str| {
        let mut m = manifest();
        change(&mut m);
        let err = run(&write(dir.path(), m, &nets), &set).unwrap_err().to_string();
        assert!(err.contains(words), "{err}");
    };
    refuse(&|m| m.task = Task::Components, "never made of random ones");
    refuse(&|m| m.precision = Precision::Mixed, "int8 model already");
    refuse(&|m| m.metadata.source_hash.clear(), "which weights it was made of");

    let model = tiny(dir.path());
    let wrong = |options: Options, words: &str| {
        let err = calibrate(&model, &on(Level::best(), 1), &set, &options, &mut go).unwrap_err();
        assert!(err.to_string().contains(words), "{err}");
    };
    wrong(Options { size: 200, ..OPTIONS }, "8 to 128");
    wrong(Options { size: 16, ..OPTIONS }, "16x16 were given, the model needs some of 32x32");
    wrong(Options { groups: 0, ..OPTIONS }, "1 to 64");
    wrong(Options { count: 0, ..OPTIONS }, "0 pictures");
    wrong(Options { steps: 0, ..OPTIONS }, "0 steps");
    wrong(Options { eta: Some(2.0), ..OPTIONS }, "eta 2");
    wrong(Options { percentile: f32::NAN, ..OPTIONS }, "50 to 100");
    let mut asked = 0;
    let err = calibrate(&model, &on(Level::best(), 1), &set, &OPTIONS, &mut |_| {
        asked += 1;
        if asked < 3 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    assert!(matches!(err, Err(CalibrationError::Cancelled)), "{err:?}");
}

/// A sound table, as JSON to tamper with.
fn sound() -> (Model, serde_json::Value) {
    let dir = tempfile::tempdir().unwrap();
    let (model, set) = (tiny(dir.path()), pictures(dir.path(), &["a", "k"]));
    let table = run(&model, &set).unwrap();
    (model, serde_json::from_str(&table.to_json()).unwrap())
}

#[test]
fn a_table_survives_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let (model, set) = (tiny(dir.path()), pictures(dir.path(), &["a", "k"]));
    let table = run(&model, &set).unwrap();
    let path = dir.path().join("t.json");
    table.write(&path, false).unwrap();
    assert!(matches!(table.write(&path, false), Err(TableError::Persist(_))));
    table.write(&path, true).unwrap();
    assert_eq!(Table::read(&path).unwrap(), table);
    // One line for each array of numbers and each group of each layer.
    let text = table.to_json();
    assert!(text.ends_with("}\n") && text.lines().count() > 60, "{text}");
    let layers: usize = table.components.iter().map(|c| c.layers.len()).sum();
    assert_eq!(text.lines().filter(|l| l.contains("\"channel_max\": [")).count(), layers);
    assert_eq!(text.lines().filter(|l| l.contains("\"samples\": ")).count(), 4 * 4 + 2 + 2);

    let err = Table::read(&dir.path().join("none.json")).unwrap_err().to_string();
    assert!(err.contains("none.json"), "{err}");
    assert!(matches!(Table::read(dir.path()), Err(TableError::Io { .. })));
}

#[test]
fn another_models_table_does_not_fit() {
    let (model, json) = sound();
    let table = |json: &serde_json::Value| Table::parse("t", json.to_string().as_bytes()).unwrap();
    table(&json).fits(model.manifest()).unwrap();
    let mut other = json.clone();
    other["model"]["source_hash"] = "feed".into();
    let err = table(&other).fits(model.manifest()).unwrap_err().to_string();
    assert!(err.contains("feed") && err.contains("5eed"), "{err}");

    let mut lacking = json.clone();
    let layers = lacking["components"][0]["layers"].as_array_mut().unwrap();
    assert_eq!(layers.remove(1)["name"], "middle");
    let err = table(&lacking).fits(model.manifest()).unwrap_err().to_string();
    assert!(err.contains("unet: middle: the table does not have it"), "{err}");

    let mut narrow = json.clone();
    narrow["components"][0]["layers"][0]["name"] = "conv_out".into();
    narrow["components"][0]["layers"][3]["name"] = "conv_in".into();
    let err = table(&narrow).fits(model.manifest()).unwrap_err().to_string();
    assert!(err.contains("conv_in: it has 6 input channels, the table says 5"), "{err}");

    let mut fewer = json.clone();
    fewer["components"].as_array_mut().unwrap().pop();
    let err = table(&fewer).fits(model.manifest()).unwrap_err().to_string();
    assert!(err.contains("has no encoder"), "{err}");
    assert_eq!(int8_layers(&model.component(Role::Unet).unwrap().graph).count(), 4);
}

#[test]
fn a_hostile_table_is_refused() {
    let (_, json) = sound();
    let layer = "/components/0/layers/1";
    let range = |field: &str| format!("{layer}/groups/2/ranges/mse/{field}");
    let null = serde_json::Value::Null;
    for (at, value, words) in [
        ("/version".to_owned(), 4.into(), "version 4"),
        ("/model/source_hash".to_owned(), "".into(), "which model's weights"),
        ("/data".to_owned(), serde_json::json!([]), "names no data"),
        ("/components".to_owned(), serde_json::json!([]), "no component"),
        ("/components/1/role".to_owned(), "unet".into(), "unet twice"),
        ("/components/1/role".to_owned(), "vocoder".into(), "not understood"),
        ("/components/0/timestep_groups".to_owned(), serde_json::json!([9, 9]), "do not rise"),
        ("/components/0/timestep_groups".to_owned(), serde_json::json!([0, 9]), "do not rise"),
        ("/components/0/timestep_groups".to_owned(), serde_json::json!([500]), "4 groups"),
        (format!("{layer}/name"), "conv_in".into(), "conv_in of unet twice"),
        (format!("{layer}/channels"), 7.into(), "add up to 7"),
        (format!("{layer}/channels"), 0.into(), "no channels"),
        (format!("{layer}/segments"), serde_json::json!([4294967295u32, 9]), "add up to 8"),
        (format!("{layer}/neighbour"), 1.5.into(), "not 0 to 1"),
        (format!("{layer}/channel_max/3"), 1e39.into(), "channel_max of channel 3"),
        (format!("{layer}/channel_ms"), serde_json::json!([1.0]), "1 numbers for 8"),
        (format!("{layer}/input_scale/0"), 0.0.into(), "input_scale of channel 0"),
        (format!("{layer}/input_scale/7"), (-1.0).into(), "input_scale of channel 7"),
        (format!("{layer}/input_scale/7"), 1e-44.into(), "input_scale of channel 7"),
        (format!("{layer}/groups/0/samples"), 0.into(), "no samples"),
        (format!("{layer}/groups/0/max"), (-1e9).into(), "which cannot be"),
        (format!("{layer}/groups/0/power"), (-1.0).into(), "which cannot be"),
        (range("scale"), null.clone(), "not understood"),
        (range("scale"), "NaN".into(), "not understood"),
        (range("scale"), 0.0.into(), "group 2: its mse range has scale 0"),
        (range("scale"), (-0.1).into(), "mse range"),
        (range("scale"), 1e-40.into(), "mse range"),
        (range("scale"), 1e300.into(), "mse range"),
        (range("error"), (-1.0).into(), "mse range"),
        (range("zero_point"), 256.into(), "not understood"),
        ("/version".to_owned(), 0.into(), "reads versions 1 to 3"),
        (
            format!("{layer}/groups/1/winograd/sum/entropy/scale"),
            0.0.into(),
            "group 1: of sums, its entropy range has scale 0",
        ),
        (
            format!("{layer}/groups/1/winograd/apart/mse/error"),
            (-1.0).into(),
            "of pixels two apart, its mse range",
        ),
        (format!("{layer}/groups/1/winograd/difference"), null.clone(), "not understood"),
        (
            format!("{layer}/groups/0/squares/4/mse/scale"),
            (-0.5).into(),
            "group 0: of squares, its mse range has scale -0.5",
        ),
        (format!("{layer}/groups/0/squares"), serde_json::json!([]), "not understood"),
        (range("zero_point"), 1.5.into(), "not understood"),
    ] {
        let mut bad = json.clone();
        *bad.pointer_mut(&at).unwrap_or_else(|| panic!("{at}")) = value.clone();
        let err = Table::parse("t.json", bad.to_string().as_bytes()).unwrap_err().to_string();
        assert!(err.contains("t.json is refused") && err.contains(words), "{at} {value}: {err}");
        assert!(err.contains("calibrate the model again"), "{err}");
    }
    let mut unknown = json.clone();
    unknown["components"][0]["layers"][0]["colour"] = 1.into();
    let err = Table::parse("t", unknown.to_string().as_bytes()).unwrap_err().to_string();
    assert!(err.contains("unknown field `colour`"), "{err}");
    for text in ["", "{", "[]", "null", "\u{feff}{}", "{\"version\": 1}"] {
        assert!(Table::parse("t", text.as_bytes()).is_err(), "{text}");
    }
    let deep = "[".repeat(100_000);
    assert!(Table::parse("t", deep.as_bytes()).is_err(), "nesting ends in an error, not a crash");
}
