//! ONNX files, read through tract-onnx's protobuf model and reduced to what the recogniser needs.

use super::fail;
use super::tensor::Tensor;
use crate::ExportError;
use crate::source::{SourceDtype, SourceError, SourceErrorKind, TensorInfo, WeightSource};
use half::{bf16, f16};
use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use tract_onnx::pb;
use tract_onnx::prelude::Framework;

/// Where a tensor's elements are, little-endian.
#[derive(Clone, Debug)]
enum Data {
    Inline(Vec<u8>),
    /// In another file, from `offset` on; `None` for the rest of the file.
    External {
        file: PathBuf,
        offset: u64,
        len: Option<u64>,
    },
}

/// A stored tensor.
#[derive(Clone, Debug)]
pub(super) struct OnnxTensor {
    pub(super) dims: Vec<usize>,
    /// `TensorProto.DataType`.
    dtype: i32,
    data: Data,
}

#[derive(Clone, Debug)]
pub(super) enum Attribute {
    Int(i64),
    Float(f32),
    Text(String),
    Ints(Vec<i64>),
    /// Held among the file's tensors under this name.
    Tensor(String),
    /// A subgraph or another kind that latent diffusion never has.
    Other,
}

#[derive(Clone, Debug, Default)]
pub(super) struct OnnxNode {
    pub(super) name: String,
    pub(super) op: String,
    pub(super) inputs: Vec<String>,
    pub(super) outputs: Vec<String>,
    pub(super) attributes: BTreeMap<String, Attribute>,
}

/// A graph input or output; a dimension without a fixed size is `None`.
#[derive(Clone, Debug)]
pub(super) struct OnnxPort {
    pub(super) name: String,
    pub(super) dims: Vec<Option<usize>>,
}

/// A file's graph, and its tensors by name.
pub(super) struct OnnxFile {
    pub(super) path: PathBuf,
    pub(super) nodes: Vec<OnnxNode>,
    pub(super) tensors: BTreeMap<String, OnnxTensor>,
    pub(super) inputs: Vec<OnnxPort>,
    pub(super) outputs: Vec<OnnxPort>,
}

impl OnnxTensor {
    fn elements(&self) -> Option<usize> {
        self.dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
    }

    pub(super) fn is_float(&self) -> bool {
        self.float().size().is_some()
    }

    fn element_bytes(&self) -> Option<usize> {
        Some(match self.dtype {
            1 | 6 => 4,
            7 | 11 => 8,
            2 | 3 | 9 => 1,
            10 | 16 => 2,
            _ => return None,
        })
    }

    fn float(&self) -> SourceDtype {
        match self.dtype {
            1 => SourceDtype::F32,
            10 => SourceDtype::F16,
            11 => SourceDtype::F64,
            16 => SourceDtype::BF16,
            other => SourceDtype::Other(format!("ONNX type {other}")),
        }
    }

    /// The elements' bytes, checked to be as many as the shape says.
    fn bytes(&self) -> Result<std::borrow::Cow<'_, [u8]>, String> {
        let expected =
            self.elements().zip(self.element_bytes()).and_then(|(n, b)| n.checked_mul(b));
        let expected =
            expected.ok_or_else(|| format!("type {} or its shape {:?}", self.dtype, self.dims))?;
        let bytes = match &self.data {
            Data::Inline(bytes) => std::borrow::Cow::Borrowed(&bytes[..]),
            Data::External { file, offset, len } => {
                let io = |e: std::io::Error| format!("{}: {e}", file.display());
                let mut f = std::fs::File::open(file).map_err(io)?;
                let held = f.metadata().map_err(io)?.len();
                let end = offset.checked_add(expected as u64).filter(|&e| e <= held);
                if end.is_none() || len.is_some_and(|l| l != expected as u64) {
                    return Err(format!(
                        "it would not lie whole in {}, which is truncated or another model's",
                        file.display()
                    ));
                }
                let mut out = vec![0u8; expected];
                f.seek(SeekFrom::Start(*offset)).map_err(io)?;
                f.read_exact(&mut out).map_err(io)?;
                std::borrow::Cow::Owned(out)
            }
        };
        if bytes.len() == expected {
            Ok(bytes)
        } else {
            Err(format!("{} bytes where its shape {:?} needs {expected}", bytes.len(), self.dims))
        }
    }

    /// As a constant to compute with.
    pub(super) fn load(&self) -> Result<Tensor, String> {
        fn each<const N: usize, T>(bytes: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
            bytes.as_chunks::<N>().0.iter().map(|b| f(*b)).collect()
        }
        let bytes = self.bytes()?;
        Ok(match self.dtype {
            1 => Tensor::floats(&self.dims, each(&bytes, f32::from_le_bytes)),
            11 => Tensor::floats(&self.dims, each(&bytes, |b| f64::from_le_bytes(b) as f32)),
            10 => Tensor::floats(&self.dims, each(&bytes, |b| f16::from_le_bytes(b).to_f32())),
            16 => Tensor::floats(&self.dims, each(&bytes, |b| bf16::from_le_bytes(b).to_f32())),
            7 => Tensor::ints(&self.dims, each(&bytes, i64::from_le_bytes)),
            6 => Tensor::ints(&self.dims, each(&bytes, |b| i64::from(i32::from_le_bytes(b)))),
            2 | 9 => Tensor::ints(&self.dims, bytes.iter().map(|&b| i64::from(b)).collect()),
            3 => Tensor::ints(&self.dims, bytes.iter().map(|&b| i64::from(b as i8)).collect()),
            other => return Err(format!("ONNX type {other}")),
        })
    }
}

impl OnnxFile {
    /// Reads a file.
    pub(super) fn open(path: &Path) -> Result<Self, ExportError> {
        let meta = std::fs::metadata(path)
            .map_err(|error| ExportError::Checkpoint { path: path.to_owned(), error })?;
        if !meta.is_file() || meta.len() == 0 {
            return Err(fail(path, "not an ONNX file: empty, or not a regular file"));
        }
        let model = tract_onnx::onnx()
            .proto_model_for_path(path)
            .map_err(|e| fail(path, format!("not an ONNX file, or damaged: {e}")))?;
        let opset = model
            .opset_import
            .iter()
            .find(|o| o.domain.is_empty() || o.domain == "ai.onnx")
            .map_or(0, |o| o.version);
        if !(13..=25).contains(&opset) {
            return Err(fail(
                path,
                format!("opset {opset}; 13 to 25 are supported, 17 is a safe choice"),
            ));
        }
        if !model.functions.is_empty() {
            return Err(fail(path, "it has local functions; export it again with them inlined"));
        }
        let Some(graph) = model.graph else {
            return Err(fail(path, "not an ONNX model: it holds no graph"));
        };
        if !graph.sparse_initializer.is_empty() {
            return Err(fail(path, "it has sparse initializers, which are not supported"));
        }
        let mut out = Self {
            path: path.to_owned(),
            nodes: Vec::with_capacity(graph.node.len()),
            tensors: BTreeMap::new(),
            inputs: graph.input.into_iter().map(port).collect(),
            outputs: graph.output.into_iter().map(port).collect(),
        };
        for mut t in graph.initializer {
            let name = std::mem::take(&mut t.name);
            let tensor = tensor(path, &name, t)?;
            out.tensors.insert(name, tensor);
        }
        for (index, n) in graph.node.into_iter().enumerate() {
            if !(n.domain.is_empty() || n.domain == "ai.onnx") {
                return Err(fail(
                    path,
                    format!(
                        "node {} is {}.{}, an operator outside ONNX's own",
                        n.name, n.domain, n.op_type
                    ),
                ));
            }
            let mut node = OnnxNode {
                name: n.name,
                op: n.op_type,
                inputs: n.input,
                outputs: n.output,
                attributes: BTreeMap::new(),
            };
            for a in n.attribute {
                // AttributeProto.AttributeType: 1 float, 2 int, 3 string, 4 tensor, 7 ints.
                let value = match (a.r#type, a.t) {
                    (1, _) => Attribute::Float(a.f),
                    (2, _) => Attribute::Int(a.i),
                    (3, _) => Attribute::Text(String::from_utf8_lossy(&a.s).into_owned()),
                    (4, Some(t)) => {
                        // No initializer is named so: names of nodes' own tensors cannot be referred to.
                        let name = format!("\u{0}{index}.{}", a.name);
                        out.tensors.insert(name.clone(), tensor(path, &a.name, t)?);
                        Attribute::Tensor(name)
                    }
                    (7, _) => Attribute::Ints(a.ints),
                    _ => Attribute::Other,
                };
                node.attributes.insert(a.name, value);
            }
            out.nodes.push(node);
        }
        // Older files list initializers among their inputs as well.
        out.inputs.retain(|p| !out.tensors.contains_key(&p.name));
        Ok(out)
    }
}

fn port(info: pb::ValueInfoProto) -> OnnxPort {
    use pb::tensor_shape_proto::dimension::Value;
    let shape = info.r#type.and_then(|t| t.value).and_then(|v| match v {
        pb::type_proto::Value::TensorType(t) => t.shape,
    });
    let dims = shape.map_or_else(Vec::new, |s| {
        s.dim
            .into_iter()
            .map(|d| match d.value {
                Some(Value::DimValue(v)) => usize::try_from(v).ok().filter(|&v| v > 0),
                _ => None,
            })
            .collect()
    });
    OnnxPort { name: info.name, dims }
}

fn tensor(path: &Path, name: &str, mut t: pb::TensorProto) -> Result<OnnxTensor, ExportError> {
    let dims: Option<Vec<usize>> = t.dims.iter().map(|&d| usize::try_from(d).ok()).collect();
    let Some(dims) = dims.filter(|d| d.len() <= 8) else {
        return Err(fail(path, format!("tensor {name} has the impossible shape {:?}", t.dims)));
    };
    let data = if t.external_data.is_empty() {
        Data::Inline(
            inline(&mut t)
                .ok_or_else(|| fail(path, format!("tensor {name} has type {}", t.data_type)))?,
        )
    } else {
        external(path, name, &t.external_data)?
    };
    Ok(OnnxTensor { dims, dtype: t.data_type, data })
}

/// The elements' bytes, from whichever field holds them.
fn inline(t: &mut pb::TensorProto) -> Option<Vec<u8>> {
    if !t.raw_data.is_empty() {
        return Some(std::mem::take(&mut t.raw_data));
    }
    let floats = t.float_data.iter().flat_map(|v| v.to_le_bytes());
    let doubles = t.double_data.iter().flat_map(|v| v.to_le_bytes());
    let longs = t.int64_data.iter().flat_map(|v| v.to_le_bytes());
    Some(match t.data_type {
        1 => floats.collect(),
        11 => doubles.collect(),
        7 => longs.collect(),
        6 => t.int32_data.iter().flat_map(|v| v.to_le_bytes()).collect(),
        // Smaller integers and the bits of half floats are kept as 32-bit integers.
        10 | 16 => t.int32_data.iter().flat_map(|v| (*v as u16).to_le_bytes()).collect(),
        2 | 3 | 9 => t.int32_data.iter().map(|v| *v as u8).collect(),
        _ => return None,
    })
}

/// Where a tensor's data lies outside the file; only beside it.
fn external(
    path: &Path,
    name: &str,
    entries: &[pb::StringStringEntryProto],
) -> Result<Data, ExportError> {
    let get = |key: &str| entries.iter().find(|e| e.key == key).map(|e| e.value.as_str());
    let location = get("location").unwrap_or_default();
    let plain = !location.is_empty()
        && Path::new(location)
            .components()
            .all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
    let number = |key: &str| get(key).map(|v| v.parse::<u64>().ok());
    match (plain, number("offset").unwrap_or(Some(0)), number("length")) {
        (true, Some(offset), None | Some(Some(_))) => Ok(Data::External {
            file: path.parent().unwrap_or(Path::new(".")).join(location),
            offset,
            len: number("length").flatten(),
        }),
        _ => Err(fail(
            path,
            format!(
                "tensor {name} names {location:?} as its data, which must be a file beside the model"
            ),
        )),
    }
}

/// An ONNX file's tensors as weights. The file is loaded when the first is read, and let go by
/// [`WeightSource::release`]: tract's reader holds all of a file's tensors at once.
pub(super) struct OnnxSource {
    path: PathBuf,
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, TensorInfo>,
    /// Weights that the exporter left to be computed from constants.
    computed: BTreeMap<String, Vec<f32>>,
    loaded: Mutex<Option<BTreeMap<String, OnnxTensor>>>,
}

impl OnnxSource {
    pub(super) fn new(file: OnnxFile, computed: BTreeMap<String, Tensor>) -> Self {
        let info = |t: &OnnxTensor| TensorInfo { shape: t.dims.clone(), dtype: t.float() };
        let mut tensors: BTreeMap<String, TensorInfo> =
            file.tensors.iter().map(|(n, t)| (n.clone(), info(t))).collect();
        for (name, t) in &computed {
            let known = TensorInfo { shape: t.dims.clone(), dtype: SourceDtype::F32 };
            tensors.insert(name.clone(), known);
        }
        let mut files = vec![file.path.clone()];
        for t in file.tensors.values() {
            if let Data::External { file, .. } = &t.data
                && !files.contains(file)
            {
                files.push(file.clone());
            }
        }
        let computed = computed.into_iter().map(|(n, t)| (n, t.as_floats())).collect();
        Self { path: file.path, files, tensors, computed, loaded: Mutex::new(None) }
    }

    fn error(&self, name: &str, why: String) -> SourceError {
        SourceError::new(&self.path, SourceErrorKind::Tensor { name: name.to_owned(), why })
    }
}

impl WeightSource for OnnxSource {
    fn path(&self) -> &Path {
        &self.path
    }

    fn files(&self) -> Vec<PathBuf> {
        self.files.clone()
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    fn read_f32(&self, name: &str, out: &mut Vec<f32>) -> Result<(), SourceError> {
        if let Some(values) = self.computed.get(name) {
            out.clone_from(values);
            return Ok(());
        }
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if loaded.is_none() {
            let file = OnnxFile::open(&self.path).map_err(|e| self.error(name, e.to_string()))?;
            *loaded = Some(file.tensors);
        }
        let Some(tensor) = loaded.as_ref().and_then(|l| l.get(name)) else {
            let kind = SourceErrorKind::NoSuchTensor { name: name.to_owned() };
            return Err(SourceError::new(&self.path, kind));
        };
        if tensor.float().size().is_none() {
            let (name, dtype) = (name.to_owned(), tensor.float().to_string());
            return Err(SourceError::new(&self.path, SourceErrorKind::Dtype { name, dtype }));
        }
        *out = tensor.load().map_err(|why| self.error(name, why))?.as_floats();
        Ok(())
    }

    fn release(&self) {
        *self.loaded.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
