//! The `.latile` reader against its writer, and against files that were cut, changed or made to deceive.
#![allow(clippy::unwrap_used)]

use latile_runtime::format::{
    Defaults, Held, LatentSpec, Manifest, Metadata, Model, Precision, Role, Task, Writer,
};
use latile_runtime::graph::{
    Graph, Layout, Node, Op, Pad, Port, ValueId, ValueKind, WeightId, WeightSpec,
};
use latile_runtime::tensor::DType;
use std::io::Cursor;

/// A 3×3 convolution 3 → 20 with bias, then SiLU: one packed weight beyond a page, one small plain one.
fn graph() -> Graph {
    let w = |name: &str, shape: &[u32], layout| WeightSpec {
        name: name.into(),
        shape: shape.to_vec(),
        dtype: DType::F32,
        layout,
    };
    Graph {
        inputs: vec![Port { name: "sample".into(), value: ValueId(0) }],
        outputs: vec![Port { name: "sample".into(), value: ValueId(2) }],
        values: vec![ValueKind::Map(30), ValueKind::Map(20), ValueKind::Map(20)],
        weights: vec![
            w("conv.bias", &[20], Layout::Plain),
            w("conv.weight", &[20, 30, 3, 3], Layout::Packed16),
        ],
        nodes: vec![
            Node {
                name: "conv".into(),
                op: Op::Conv2d {
                    weight: WeightId(1),
                    bias: Some(WeightId(0)),
                    kernel: [3, 3],
                    stride: [1, 1],
                    pad: Pad::all(1),
                    quant: None,
                },
                inputs: vec![ValueId(0)],
                output: ValueId(1),
            },
            Node { name: "act".into(), op: Op::Silu, inputs: vec![ValueId(1)], output: ValueId(2) },
        ],
    }
}

/// As [`graph`], but its convolution doubles the map.
fn doubling() -> Graph {
    let mut graph = graph();
    graph.weights[0].shape = vec![128];
    graph.weights[1].shape = vec![128, 30, 2, 2];
    graph.nodes[0].op = Op::UpConv2x { weight: WeightId(1), bias: Some(WeightId(0)), quant: None };
    graph
}

fn manifest() -> Manifest {
    Manifest {
        metadata: Metadata { name: "test".into(), ..Metadata::default() },
        precision: Precision::F32,
        task: Task::Components,
        latent: Some(LatentSpec { channels: 3, factor: 4, scale: 0.3, shift: 0.0 }),
        scheduler: None,
        defaults: Defaults { steps: 4, eta: 0.0, consistency: 0.0 },
        components: Vec::new(),
    }
}

fn model_bytes() -> Vec<u8> {
    bytes_of(&graph())
}

fn bytes_of(graph: &Graph) -> Vec<u8> {
    let mut writer = Writer::new(Cursor::new(Vec::new())).unwrap();
    for role in [Role::Unet, Role::Decoder] {
        writer.begin(role, 1, None, &[], graph.clone()).unwrap();
        for (i, spec) in graph.weights.iter().enumerate() {
            writer.weight(&vec![i as u8 + 1; spec.stored_bytes().unwrap()]).unwrap();
        }
    }
    writer.finish(manifest()).unwrap().into_inner()
}

fn open(bytes: &[u8]) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.latile");
    std::fs::write(&path, bytes).unwrap();
    let checked = |held| {
        let model = Model::open_held(&path, held).map_err(|e| e.to_string())?;
        model.verify().map_err(|e| e.to_string())
    };
    let found = checked(Held::Mapped);
    assert_eq!(checked(Held::Read), found, "a file is judged the same however it is held");
    found
}

#[test]
fn what_is_written_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.latile");
    std::fs::write(&path, model_bytes()).unwrap();
    let model = Model::open(&path).unwrap();
    let c = model.load(Role::Decoder).unwrap();
    assert_eq!(c.spec().graph, graph());
    assert_eq!(c.weight(WeightId(0)), &[1u8; 80]);
    assert_eq!(c.weight(WeightId(1)), &vec![2u8; 32 * 30 * 9 * 4][..]);
    assert_eq!(c.weight(WeightId(1)).as_ptr() as usize % 4096, 0, "large weights start a page");
    assert!(model.load(Role::Encoder).unwrap_err().to_string().contains("unet, decoder"));
    assert_eq!(model_bytes(), model_bytes(), "the same model gives the same bytes");
}

#[test]
fn what_is_held_is_read_and_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.latile");
    std::fs::write(&path, model_bytes()).unwrap();
    for held in [Held::Mapped, Held::Read] {
        let model = Model::open_held(&path, held).unwrap();
        assert_eq!(model.file_len() as u64, std::fs::metadata(&path).unwrap().len());
        let c = model.load(Role::Decoder).unwrap();
        let (bias, weight) = (WeightId(0), WeightId(1));
        assert_eq!(c.place_of(c.weight(bias)), Some(0..80));
        let place = c.place_of(c.weight(weight)).unwrap();
        assert_eq!(place, 4096..4096 + 32 * 30 * 9 * 4);
        assert!(place.end <= c.bytes() && c.bytes().is_multiple_of(4096));
        assert_eq!(c.place_of(&[0; 80]), None);
        let block = c.block_of(place.clone());
        assert!(block.start <= place.start && place.end <= block.end && block.end <= c.bytes());
        assert_eq!(c.can_release(), held == Held::Mapped && cfg!(target_os = "linux"));
        // Given back, fetched, given back whole: the bytes are the same.
        c.release(place.clone());
        assert_eq!(c.weight(weight), &vec![2u8; 32 * 30 * 9 * 4][..]);
        c.prefetch(0..c.bytes());
        c.release(0..c.bytes());
        assert_eq!(c.weight(bias), &[1u8; 80]);
        // What is read is shared while it is used.
        let again = model.load(Role::Decoder).unwrap();
        assert_eq!(again.weight(bias).as_ptr(), c.weight(bias).as_ptr());
        assert_ne!(c.weight(bias).as_ptr(), model.load(Role::Unet).unwrap().weight(bias).as_ptr());
        // For pricing: as long, and as aligned.
        let priced = model.unchecked(Role::Decoder).unwrap();
        assert_eq!(priced.place_of(priced.weight(weight)), Some(place));
        assert_eq!(priced.weight(bias).as_ptr() as usize % 64, 0);
    }
}

#[test]
fn a_model_cut_at_any_length_is_refused() {
    let bytes = model_bytes();
    let cuts = (0..bytes.len()).filter(|n| n % 509 == 0 || *n < 100 || *n > bytes.len() - 300);
    for cut in cuts {
        assert!(open(&bytes[..cut]).is_err(), "cut at {cut} was accepted");
    }
    let mut longer = bytes;
    longer.push(0);
    assert!(open(&longer).unwrap_err().contains("appended"));
}

#[test]
fn a_model_with_any_byte_changed_is_refused() {
    let bytes = model_bytes();
    assert!(open(&bytes).is_ok());
    let manifest_at = u64::from_le_bytes(bytes[40..48].try_into().unwrap()) as usize;
    let interesting = (0..bytes.len())
        .filter(|&i| i < 70 || i % 251 == 0 || (4096..4300).contains(&i) || i + 40 > bytes.len());
    for at in interesting.chain([manifest_at, manifest_at - 1]) {
        for bit in [0, 7] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            assert!(open(&damaged).is_err(), "bit {bit} of byte {at} changed unnoticed");
        }
    }
}

/// Replaces the manifest's text and mends both checksums, as an attacker would.
fn with_manifest(edit: impl Fn(&str) -> String) -> Vec<u8> {
    of_version(&model_bytes(), 2, edit)
}

/// As [`with_manifest`], of `bytes`, which then say that they are of version `version`.
fn of_version(bytes: &[u8], version: u32, edit: impl Fn(&str) -> String) -> Vec<u8> {
    let at = u64::from_le_bytes(bytes[40..48].try_into().unwrap()) as usize;
    let text = edit(std::str::from_utf8(&bytes[at..]).unwrap());
    let mut out = bytes[..at].to_vec();
    out.extend_from_slice(text.as_bytes());
    let header = latile_runtime::format::header::Header {
        version,
        weights_len: (at - 4096) as u64,
        manifest_len: text.len() as u64,
        manifest_crc: crc32c::crc32c(text.as_bytes()),
    };
    out[..64].copy_from_slice(&header.to_bytes());
    out
}

#[test]
fn manifests_made_to_deceive_are_refused() {
    assert!(open(&with_manifest(str::to_owned)).is_ok());
    let cases: &[(&str, &str, &str)] = &[
        ("a hole between weights", "\"offset\":4096", "\"offset\":8192"),
        ("an offset that overflows", "\"offset\":0", "\"offset\":18446744073709551552"),
        ("an extent beyond the file", "\"extent\":4096", "\"extent\":1099511627776"),
        ("a weight of another shape", "[20,30,3,3]", "[20,30,3,5]"),
        ("a weight whose size overflows", "[20,30,3,3]", "[1048576,1048576,1048576,1048576]"),
        ("a value that does not exist", "\"inputs\":[1]", "\"inputs\":[9]"),
        ("a value used before it is made", "\"inputs\":[0]", "\"inputs\":[2]"),
        ("a weight that does not exist", "\"weight\":1", "\"weight\":7"),
        ("a kernel of no size", "\"kernel\":[3,3]", "\"kernel\":[0,3]"),
        ("a stride of zero", "\"stride\":[1,1]", "\"stride\":[1,0]"),
        ("a pad wider than the kernel", "\"top\":1", "\"top\":60"),
        ("an operator nobody knows", "\"op\":\"silu\"", "\"op\":\"system\""),
        ("a field nobody knows", "\"task\":", "\"hook\":1,\"task\":"),
        ("a component twice", "\"role\":\"decoder\"", "\"role\":\"unet\""),
        ("a latent scale of zero", "\"scale\":0.3", "\"scale\":0"),
        ("no steps", "\"steps\":4", "\"steps\":0"),
        ("a multiple of zero", "\"multiple\":1", "\"multiple\":0"),
        ("an empty manifest", "", ""),
    ];
    for (what, from, to) in cases {
        let bytes = with_manifest(|text| {
            if from.is_empty() {
                "{}".to_owned()
            } else {
                assert!(text.contains(from), "{what}: {from} is not in {text}");
                text.replacen(from, to, 1)
            }
        });
        assert!(open(&bytes).is_err(), "{what} was accepted");
    }
    let deep = with_manifest(|_| "[".repeat(100_000));
    assert!(open(&deep).is_err(), "nesting without end was accepted");
}

#[test]
fn a_file_is_of_the_oldest_version_that_holds_it() {
    let (plain, new) = (model_bytes(), bytes_of(&doubling()));
    assert_eq!((plain[8], new[8]), (2, 3));
    assert_eq!((open(&plain), open(&new)), (Ok(()), Ok(())));
    let of = |bytes: &[u8], version| open(&of_version(bytes, version, str::to_owned));
    assert_eq!((of(&plain, 3), of(&new, 4)), (Ok(()), Ok(())));
    let e = of(&new, 2).unwrap_err();
    assert!(e.contains("of format version 3") && e.contains("export the model again"), "{e}");
    for version in [0, 1, 6, u32::MAX] {
        let e = of(&plain, version).unwrap_err();
        assert!(e.contains(&format!("version {version}, this build reads 2 to 5")), "{e}");
    }
}

#[test]
fn a_doubling_convolution_has_four_filters_a_channel() {
    let good = doubling();
    good.validate().unwrap();
    let shapes = good.infer(&[(5, 7)]).unwrap();
    assert_eq!((shapes[1].pixels(), shapes[1].channels()), (10 * 14, 20));
    // 20 channels of 2 x 2 outputs a pixel, each of 2 x 2 pixels of 30 channels; not the 32 that fill panels.
    assert_eq!(good.macs(&shapes), 5 * 7 * 20 * 16 * 30);
    let huge = good.infer(&[(isize::MAX as usize / 240, 1)]).unwrap_err().to_string();
    assert!(huge.contains("conv"), "{huge}");
    for shape in [vec![80, 30, 2, 2], vec![20, 30, 3, 3], vec![128, 30, 3, 3], vec![128, 31, 2, 2]]
    {
        let mut bad = good.clone();
        bad.weights[1].shape = shape;
        let e = bad.validate().unwrap_err().to_string();
        assert!(e.contains("expected [128, 30, 2, 2]"), "{e}");
    }
    let mut bad = good.clone();
    bad.weights[0].shape = vec![20];
    assert!(bad.validate().unwrap_err().to_string().contains("expected [128]"));
    let mut bad = good;
    bad.values[1] = ValueKind::Vector(20);
    assert!(bad.validate().is_err());
}

#[test]
fn another_kind_of_file_is_named_as_such() {
    assert!(open(b"\x89PNG\r\n\x1a\n0000").unwrap_err().contains("does not begin as a .latile"));
    assert!(open(b"").unwrap_err().contains("cut off or is not a model"));
}
