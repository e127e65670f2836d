//! Int8 layers in graphs and files: what a sound one is, and what is refused.
#![allow(clippy::unwrap_used)]

use latile_runtime::format::{
    Defaults, Manifest, Metadata, Model, Precision, Role, Task, TimestepProjection, Writer,
};
use latile_runtime::graph::{
    Graph, Layout, Node, Op, Pad, Port, Quant, QuantRange, ValueId, ValueKind, WeightId,
    WeightSpec, Winograd,
};
use latile_runtime::tensor::DType;
use std::io::Cursor;

/// A 3×3 int8 convolution 30 → 20 with two activation ranges, beside a vector input.
fn graph() -> Graph {
    let w = |name: &str, shape: &[u32], dtype, layout| WeightSpec {
        name: name.into(),
        shape: shape.to_vec(),
        dtype,
        layout,
    };
    Graph {
        inputs: vec![
            Port { name: "sample".into(), value: ValueId(0) },
            Port { name: "time_proj".into(), value: ValueId(1) },
        ],
        outputs: vec![Port { name: "sample".into(), value: ValueId(2) }],
        values: vec![ValueKind::Map(30), ValueKind::Vector(8), ValueKind::Map(20)],
        weights: vec![
            w("conv.weight", &[20, 30, 3, 3], DType::I8, Layout::Packed16x4),
            w("conv.weight_scale", &[20], DType::F32, Layout::Plain),
            w("conv.weight_sum", &[20], DType::I32, Layout::Plain),
            w("conv.input_scale", &[30], DType::F32, Layout::Plain),
        ],
        nodes: vec![Node {
            name: "conv".into(),
            op: Op::Conv2d {
                weight: WeightId(0),
                bias: None,
                kernel: [3, 3],
                stride: [1, 1],
                pad: Pad::all(1),
                quant: Some(Quant {
                    ranges: vec![
                        QuantRange { scale: 0.02, zero_point: 14 },
                        QuantRange { scale: 0.03, zero_point: 9 },
                    ],
                    weight_scale: WeightId(1),
                    weight_sum: WeightId(2),
                    input_scale: Some(WeightId(3)),
                    winograd: None,
                }),
            },
            inputs: vec![ValueId(0)],
            output: ValueId(2),
        }],
    }
}

fn quant(graph: &mut Graph) -> &mut Quant {
    let Op::Conv2d { quant: Some(q), .. } = &mut graph.nodes[0].op else { unreachable!() };
    q
}

fn write(graph: &Graph, groups: &[u32], timestep: Option<TimestepProjection>) -> Vec<u8> {
    let mut writer = Writer::new(Cursor::new(Vec::new())).unwrap();
    writer.begin(Role::Unet, 1, timestep, groups, graph.clone()).unwrap();
    for spec in &graph.weights {
        writer.weight(&vec![1; spec.stored_bytes().unwrap()]).unwrap();
    }
    let manifest = Manifest {
        metadata: Metadata { name: "test".into(), ..Metadata::default() },
        precision: Precision::Int8,
        task: Task::Components,
        latent: None,
        scheduler: None,
        defaults: Defaults { steps: 4, eta: 0.0, consistency: 0.0 },
        components: Vec::new(),
    };
    writer.finish(manifest).unwrap().into_inner()
}

const TIME: Option<TimestepProjection> =
    Some(TimestepProjection { dim: 8, flip_sin_to_cos: true, freq_shift: 0.0 });

fn open(bytes: &[u8]) -> Result<Vec<u32>, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.latile");
    std::fs::write(&path, bytes).unwrap();
    let model = Model::open(&path).map_err(|e| e.to_string())?;
    model.verify().map_err(|e| e.to_string())?;
    Ok(model.component(Role::Unet).unwrap().timestep_groups.clone())
}

#[test]
fn int8_layers_keep_channels_in_fours_and_sixteens() {
    let weight = &graph().weights[0];
    assert_eq!(weight.stored_bytes(), Some(32 * 32 * 9));
}

#[test]
fn an_int8_model_is_read_back_with_its_groups() {
    assert_eq!(open(&write(&graph(), &[500, 1000], TIME)), Ok(vec![500, 1000]));
}

#[test]
fn a_timestep_finds_its_group() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.latile");
    std::fs::write(&path, write(&graph(), &[500, 1000], TIME)).unwrap();
    let model = Model::open(&path).unwrap();
    let unet = model.component(Role::Unet).unwrap();
    for (t, group) in [(0.0, 0), (499.0, 0), (499.5, 0), (500.0, 1), (999.0, 1), (2000.0, 1)] {
        assert_eq!(unet.timestep_group(t), group, "timestep {t}");
    }
}

#[test]
fn groups_and_ranges_must_agree() {
    for (groups, time, why) in [
        (&[1000][..], TIME, "another number of activation ranges"),
        (&[], TIME, "another number of activation ranges"),
        (&[1000, 500], TIME, "bounds must rise"),
        (&[500, 500], TIME, "bounds must rise"),
        (&[0, 500], TIME, "bounds must rise"),
        (&[500, 1000], None, "only a component with a timestep"),
    ] {
        let error = open(&write(&graph(), groups, time)).unwrap_err();
        assert!(error.contains(why), "{groups:?}: {error}");
    }
}

#[test]
fn unsound_int8_layers_are_refused() {
    type Edit = fn(&mut Graph);
    let cases: [(Edit, &str); 11] = [
        (|g| quant(g).ranges.clear(), "0 activation ranges"),
        (|g| quant(g).ranges[1].scale = 0.0, "an activation scale of 0"),
        (|g| quant(g).ranges[1].scale = -0.1, "an activation scale of -0.1"),
        (|g| quant(g).ranges[1].scale = f32::NAN, "an activation scale of NaN"),
        (|g| quant(g).ranges[1].scale = f32::INFINITY, "an activation scale of inf"),
        (|g| quant(g).weight_sum = WeightId(1), "expected i32"),
        (|g| quant(g).weight_scale = WeightId(9), "does not exist"),
        (|g| quant(g).input_scale = Some(WeightId(1)), "expected [30]"),
        (|g| g.weights[0].layout = Layout::Packed16, "expected Packed16x4"),
        (|g| g.weights[0].dtype = DType::F16, "expected i8"),
        (
            |g| {
                g.weights[0].shape[1] = 8000;
                g.weights[3].shape[0] = 8000;
                g.values[0] = ValueKind::Map(8000);
            },
            "an int8 sum over 72000 products",
        ),
    ];
    for (edit, why) in cases {
        let mut g = graph();
        edit(&mut g);
        let error = g.validate().unwrap_err().to_string();
        assert!(error.contains(why), "{error}, expected {why}");
    }
    let mut g = graph();
    let Op::Conv2d { quant, .. } = &mut g.nodes[0].op else { unreachable!() };
    *quant = None;
    let error = g.validate().unwrap_err().to_string();
    assert!(error.contains("expected Packed16"), "int8 weights need their scales: {error}");
}

/// The same layer by one of Winograd's algorithms.
fn winograd(by: Winograd) -> Graph {
    let mut g = graph();
    let mut ranges = vec![QuantRange { scale: 0.02, zero_point: 128 }; by.ranges()];
    if by == Winograd::Square {
        ranges[0] = QuantRange { scale: 0.001, zero_point: 0 };
    }
    let ranges = ranges.repeat(2);
    let n = g.weights[0].shape[0];
    *quant(&mut g) = Quant { ranges, winograd: Some(by), ..quant(&mut graph()).clone() };
    let rows = by.filters(n);
    let [h, w] = by.kernel();
    g.weights[0].shape = vec![rows, g.weights[0].shape[1], h, w];
    g.weights[1].shape = vec![rows];
    g.weights[2].shape = vec![rows];
    g
}

#[test]
fn a_winograd_layer_has_several_ranges_a_group_and_a_version_of_its_own() {
    for (by, version, products) in [(Winograd::Rows, 4u32, 6), (Winograd::Square, 5, 4)] {
        let g = winograd(by);
        let bytes = write(&g, &[500, 1000], TIME);
        assert_eq!(bytes[8..12], version.to_le_bytes());
        assert_eq!(open(&bytes), Ok(vec![500, 1000]));
        let error = open(&write(&g, &[300, 600, 1000], TIME)).unwrap_err();
        assert!(error.contains("another number of activation ranges"), "{error}");
        let mut older = bytes;
        older[8..12].copy_from_slice(&(version - 1).to_le_bytes());
        assert!(open(&older).is_err(), "version {} has no such layers", version - 1);
        // So many multiply-adds for nine.
        let shapes = g.infer(&[(4, 6)]).unwrap();
        assert_eq!(g.macs(&shapes) * 9, graph().macs(&shapes) * products);
    }
}

/// Files of version 4 say `true` for rows, and such are written still.
#[test]
fn algorithms_keep_the_names_that_files_have() {
    for (by, stored) in [(Winograd::Rows, "true"), (Winograd::Square, "\"square\"")] {
        assert_eq!(serde_json::to_string(&by).unwrap(), stored);
        assert_eq!(serde_json::from_str::<Winograd>(stored).unwrap(), by);
    }
    for bad in ["false", "\"rows\"", "4", "null"] {
        assert!(serde_json::from_str::<Winograd>(bad).is_err(), "{bad}");
    }
}

/// The bytes of squares are made of words.
#[test]
fn words_suit_the_bytes_made_of_them() {
    assert_eq!(Winograd::factor(1.0, 16.0), Some(2048));
    assert_eq!(Winograd::factor(1.0, 1.0), None, "32768 is no i16");
    assert_eq!(Winograd::factor(1e-9, 1.0), None, "a factor of 0");
    assert_eq!(Winograd::factor(f32::NAN, 1.0), None);
    let ranges = vec![QuantRange { scale: 0.03, zero_point: 0 }; Winograd::MOST_RANGES];
    let mut square = ranges.clone();
    square[1].scale = 0.3;
    // 32768 / 10 is 3276.8, and 3277 is used.
    assert_eq!(Winograd::Square.step(&square, 0), 0.03 * (32768.0 / 3277.0));
    assert_eq!(Winograd::Rows.step(&ranges, 2), 0.03);
    type Edit = fn(&mut QuantRange);
    let cases: [(Edit, &str); 3] = [
        (|r| r.zero_point = 3, "words whose zero point is 3"),
        (|r| r.scale = 1e-9, "too far apart"),
        (|r| r.scale = 0.02, "too far apart"),
    ];
    for (edit, why) in cases {
        // Those of the second group.
        let mut g = winograd(Winograd::Square);
        edit(&mut quant(&mut g).ranges[Winograd::MOST_RANGES]);
        let error = g.validate().unwrap_err().to_string();
        assert!(error.contains(why), "{error}, expected {why}");
    }
}

#[test]
fn unsound_winograd_layers_are_refused() {
    type Edit = fn(&mut Graph);
    let cases: [(Edit, &str); 5] = [
        (|g| _ = quant(g).ranges.pop(), "5 activation ranges"),
        (|g| quant(g).winograd = None, "expected ["),
        (|g| g.weights[0].shape[3] = 3, "has shape"),
        (
            |g| {
                let Op::Conv2d { stride, .. } = &mut g.nodes[0].op else { unreachable!() };
                *stride = [1, 2];
            },
            "strides of 1",
        ),
        (
            |g| {
                let Op::Conv2d { weight, bias, quant, .. } = g.nodes[0].op.clone() else {
                    unreachable!()
                };
                g.nodes[0].op = Op::Linear { weight, bias, quant };
            },
            "only a convolution",
        ),
    ];
    for (edit, why) in cases {
        let mut g = winograd(Winograd::Rows);
        edit(&mut g);
        let error = g.validate().unwrap_err().to_string();
        assert!(error.contains(why), "{error}, expected {why}");
    }
}

#[test]
fn int8_attention_is_left_out_of_the_file_unless_asked_for_and_has_a_limit() {
    let attention = |channels: u32, int8: bool| Graph {
        inputs: vec![Port { name: "x".into(), value: ValueId(0) }],
        outputs: vec![Port { name: "y".into(), value: ValueId(1) }],
        values: vec![ValueKind::Map(channels); 2],
        weights: Vec::new(),
        nodes: vec![Node {
            name: "attention".into(),
            op: Op::Attention { heads: 2, scale: 0.5, int8 },
            inputs: vec![ValueId(0); 3],
            output: ValueId(1),
        }],
    };
    for int8 in [false, true] {
        let graph = attention(131_072, int8);
        graph.validate().unwrap();
        let text = serde_json::to_string(&graph).unwrap();
        assert_eq!(text.contains("int8"), int8, "{text}");
        assert_eq!(serde_json::from_str::<Graph>(&text).unwrap(), graph);
    }
    attention(131_074, false).validate().unwrap();
    let error = attention(131_074, true).validate().unwrap_err().to_string();
    assert!(error.contains("65537 products") && error.contains("attention"), "{error}");
}
