//! What the tests of the whole share: fixtures, and components run on them.
//!
//! Lives here: reading the numbers under `fixtures/` ([`Tensors`]), exporting a checkpoint to a scratch
//! folder ([`Exported`]), running a component on tensors as diffusers has them ([`run`]) and measuring a
//! result ([`relative_error`]). Never here: expectations computed by latile itself, or anything a product
//! crate would want. Everything panics with what went wrong: its callers are tests.
#![allow(clippy::unwrap_used)]

#[path = "../../targets/cpu/tests/common/effort.rs"]
mod effort;

pub use effort::cases;

use latile_export::{ExportOptions, export};
use latile_runtime::backend::{Backend, Room, Session};
use latile_runtime::format::{Model, Precision, Role};
use latile_runtime::tensor::Shape;
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// The file or folder `name` of the fixtures.
#[must_use]
pub fn fixture(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name);
    assert!(path.exists(), "fixture {} is missing", path.display());
    path
}

/// The JSON fixture `name`.
#[must_use]
pub fn fixture_json(name: &str) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

/// A tensor as diffusers has it: row-major, maps NCHW.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements; integers are converted.
    pub data: Vec<f32>,
}

impl Tensor {
    /// The elements of a `[1, C, H, W]` tensor as `H × W` pixels of `C`.
    #[must_use]
    pub fn to_nhwc(&self) -> Vec<f32> {
        let [1, c, h, w] = self.shape[..] else { panic!("{:?} is no map of batch 1", self.shape) };
        transpose(&self.data, c, h * w)
    }

    /// `h × w` pixels of `c` as a `[1, C, H, W]` tensor.
    #[must_use]
    pub fn from_nhwc(data: &[f32], [h, w, c]: [usize; 3]) -> Self {
        Self { shape: vec![1, c, h, w], data: transpose(data, h * w, c) }
    }
}

fn transpose(from: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    assert_eq!(from.len(), rows * columns);
    (0..columns).flat_map(|x| (0..rows).map(move |y| from[y * columns + x])).collect()
}

/// The tensors of a safetensors file.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensors(BTreeMap<String, Tensor>);

impl Tensors {
    /// Reads `path`.
    #[must_use]
    pub fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |view: &safetensors::tensor::TensorView<'_>| Tensor {
            shape: view.shape().to_vec(),
            data: match view.dtype() {
                Dtype::F32 => floats(view.data(), f32::from_le_bytes),
                Dtype::I64 => floats(view.data(), |b| i64::from_le_bytes(b) as f32),
                Dtype::U8 => view.data().iter().map(|&b| f32::from(b)).collect(),
                other => panic!("{}: {other:?}", path.display()),
            },
        };
        Self(file.tensors().iter().map(|(n, v)| (n.clone(), tensor(v))).collect())
    }

    /// The tensor `name`, if there is one.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name)
    }

    /// The tensor `name`.
    #[must_use]
    pub fn tensor(&self, name: &str) -> &Tensor {
        self.get(name).unwrap_or_else(|| panic!("no tensor {name} among {:?}", self.0.keys()))
    }

    /// Recorded calls, numbered from 0: the inputs of each by name, and its outputs.
    #[must_use]
    pub fn cases(&self) -> Vec<Case<'_>> {
        let of = |i: usize, part: &str| -> BTreeMap<&str, &Tensor> {
            let prefix = format!("{i}.{part}.");
            let named = |(n, t)| Some((str::strip_prefix(n, &prefix)?, t));
            self.0.iter().map(|(n, t)| (n.as_str(), t)).filter_map(named).collect()
        };
        let cases: Vec<_> = (0..)
            .map(|i| Case { inputs: of(i, "inputs"), outputs: of(i, "outputs") })
            .take_while(|c| !c.inputs.is_empty())
            .collect();
        assert!(!cases.is_empty(), "no cases among {:?}", self.0.keys());
        cases
    }
}

fn floats<const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    let (whole, rest) = bytes.as_chunks::<N>();
    assert!(rest.is_empty());
    whole.iter().map(|&b| number(b)).collect()
}

/// One recorded call of a network.
#[derive(Clone, Debug)]
pub struct Case<'a> {
    /// What went in.
    pub inputs: BTreeMap<&'a str, &'a Tensor>,
    /// What came out.
    pub outputs: BTreeMap<&'a str, &'a Tensor>,
}

/// A checkpoint, exported to a folder that goes with it.
#[derive(Debug)]
pub struct Exported {
    /// The model.
    pub model: Model,
    /// Its file.
    pub path: PathBuf,
    _folder: tempfile::TempDir,
}

/// Exports `checkpoint`, encoder included.
#[must_use]
pub fn exported(checkpoint: &Path, precision: Precision) -> Exported {
    exported_with(
        checkpoint,
        &ExportOptions { precision, encoder: true, ..ExportOptions::default() },
    )
}

/// As [`exported`], with options of the caller's choice.
#[must_use]
pub fn exported_with(checkpoint: &Path, options: &ExportOptions) -> Exported {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.latile");
    export(checkpoint, &path, options, &mut |_| ControlFlow::Continue(()))
        .unwrap_or_else(|e| panic!("{}: {e}", checkpoint.display()));
    Exported { model: Model::open(&path).unwrap(), path, _folder: folder }
}

/// Runs component `role` of `model` once on `inputs`, named and shaped as diffusers has them, and gives its
/// outputs the same way.
#[must_use]
pub fn run(
    backend: &dyn Backend,
    model: &Model,
    role: Role,
    inputs: &BTreeMap<&str, &Tensor>,
) -> BTreeMap<String, Tensor> {
    let spec = model.component(role).unwrap();
    let [h, w] = inputs
        .values()
        .find_map(|t| match t.shape[..] {
            [1, _, h, w] => Some([h, w]),
            _ => None,
        })
        .unwrap();
    let mut session: Box<dyn Session + '_> =
        backend.prepare(model, role, h, w, Room::default()).unwrap();
    let given: Vec<Vec<f32>> = session
        .inputs()
        .iter()
        .map(|port| match (port.shape, inputs.get(port.name.as_str())) {
            (Shape::Map { .. }, Some(t)) => t.to_nhwc(),
            (Shape::Vector { .. }, Some(t)) => t.data.clone(),
            (_, None) => {
                assert_eq!(port.name, "time_proj", "no input for {}", port.name);
                let mut projected = vec![0.0; port.shape.elements().unwrap()];
                spec.timestep.unwrap().project(inputs["timestep"].data[0], &mut projected);
                projected
            }
        })
        .collect();
    let mut results: Vec<Vec<f32>> = session
        .outputs()
        .iter()
        .map(|port| vec![f32::NAN; port.shape.elements().unwrap()])
        .collect();
    {
        let given: Vec<&[f32]> = given.iter().map(Vec::as_slice).collect();
        let mut results: Vec<&mut [f32]> = results.iter_mut().map(Vec::as_mut_slice).collect();
        session.run(&given, &mut results).unwrap();
    }
    session
        .outputs()
        .iter()
        .zip(results)
        .map(|(port, data)| {
            let tensor = match port.shape {
                Shape::Map { h, w, c } => Tensor::from_nhwc(&data, [h, w, c]),
                Shape::Vector { len } => Tensor { shape: vec![1, len], data },
            };
            (port.name.clone(), tensor)
        })
        .collect()
}

/// The largest difference between `found` and `expected`, over the range of `expected`.
#[must_use]
pub fn relative_error(found: &Tensor, expected: &Tensor) -> f32 {
    assert_eq!(found.shape, expected.shape);
    let most = expected.data.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let least = expected.data.iter().copied().fold(f32::INFINITY, f32::min);
    let differences = found.data.iter().zip(&expected.data).map(|(a, b)| (a - b).abs());
    // NaN must not be lost, as `max` would lose it.
    let worst = differences.fold(0.0f32, |m, d| if m.is_nan() || d <= m { m } else { d });
    worst / (most - least)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_relative_to_the_range_and_nan_is_one() {
        let t = |data: &[f32]| Tensor { shape: vec![data.len()], data: data.to_vec() };
        assert_eq!(relative_error(&t(&[0.0, 4.5]), &t(&[0.0, 4.0])), 0.125);
        assert!(relative_error(&t(&[f32::NAN, 4.0]), &t(&[0.0, 4.0])).is_nan());
        assert!(relative_error(&t(&[0.0, f32::NAN]), &t(&[0.0, 4.0])).is_nan());
    }

    #[test]
    fn maps_are_turned_and_turned_back() {
        let t = Tensor { shape: vec![1, 2, 2, 3], data: (0..12).map(|v| v as f32).collect() };
        let nhwc = t.to_nhwc();
        assert_eq!(nhwc[..4], [0.0, 6.0, 1.0, 7.0]);
        assert_eq!(Tensor::from_nhwc(&nhwc, [2, 3, 2]), t);
    }
}
