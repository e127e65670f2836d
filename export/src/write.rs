//! Streams a model into its file: one tensor read, quantized, packed and written at a time.

use crate::model::{Component, Model};
use crate::quantize::{
    self, AttentionSummary, Item, LayerSummary, Planned, Quantization, Winograd,
};
use crate::source::WeightSource;
use crate::{ExportError, ExportOptions, pack, phases};
use latile_calibration::Method;
use latile_runtime::format::{Defaults, Manifest, Metadata, Precision, Task, WriteError, Writer};
use latile_runtime::graph::{Layout, WeightSpec};
use latile_runtime::persist::Output;
use serde::Serialize;
use std::fs::File;
use std::io::{BufWriter, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// How far an export has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// `hashing` the source, `ranking` layers by what int8 would cost them, `writing` the model.
    pub stage: &'static str,
    /// Bytes done of this stage.
    pub done: u64,
    /// Bytes of this stage.
    pub total: u64,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The model's file.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// `diffusers`, `compvis`, `onnx`.
    pub source: String,
    /// BLAKE3 of the source weights.
    pub source_hash: String,
    /// How weights are stored.
    pub precision: Precision,
    /// What the model does.
    pub task: Task,
    /// Its networks.
    pub components: Vec<ComponentSummary>,
    /// How activation ranges were chosen, where the model is quantized.
    pub method: Option<Method>,
    /// What became of each layer, where the model is quantized.
    pub layers: Vec<LayerSummary>,
    /// What became of each attention's products, where the model is quantized.
    pub attentions: Vec<AttentionSummary>,
    /// What was assumed or left out.
    pub notes: Vec<String>,
}

/// One network of a [`Summary`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ComponentSummary {
    /// `unet`, `decoder`, `encoder`.
    pub role: String,
    /// Operators.
    pub nodes: usize,
    /// Tensors.
    pub tensors: usize,
    /// Elements of the checkpoint's tensors, without padding.
    pub parameters: u64,
    /// Bytes in the file, by what they are.
    pub bytes: PartBytes,
}

/// Bytes of a component's weights, without the padding between them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PartBytes {
    /// Weights of int8 layers.
    pub int8: u64,
    /// Scales and sums that int8 layers need.
    pub int8_scales: u64,
    /// Weights of float layers.
    pub float: u64,
    /// Biases, norms and codebooks.
    pub other: u64,
}

/// DDIM steps a model is sampled with when neither its source nor the user says.
const STEPS: u32 = 20;

pub(crate) type Report<'a> = dyn FnMut(Progress) -> ControlFlow<()> + 'a;

pub(crate) fn write(
    model: Model,
    output: &Path,
    default_name: &str,
    options: &ExportOptions,
    progress: &mut Report<'_>,
) -> Result<Summary, ExportError> {
    let quantization = quantization(options)?;
    let mut out = Output::create(output, options.overwrite)?;
    let source_hash = hash(&model, progress)?;
    let name = options.name.clone().unwrap_or_else(|| default_name.to_owned());
    let Model { sources, .. } = model;
    let mut components: Vec<ComponentSummary> = model.components.iter().map(summary).collect();
    let mut folded = model.components;
    folded.iter_mut().for_each(phases::fold);
    let planned = plan(folded, &sources, quantization, &name, &source_hash, progress)?;
    let failed = |error| ExportError::Write { path: output.to_owned(), error };
    let total = planned.iter().flat_map(|c| &c.graph.weights).map(stored_bytes).sum();
    let mut writer = Writer::new(BufWriter::with_capacity(1 << 20, out.file())).map_err(failed)?;
    let mut weights = Weights { sources: &sources, ..Weights::default() };
    let mut done = 0u64;
    let (mut layers, mut attentions) = (Vec::new(), Vec::new());
    for (mut c, summary) in planned.into_iter().zip(&mut components) {
        summary.nodes = c.graph.nodes.len();
        summary.tensors = c.graph.weights.len();
        summary.bytes = part_bytes(&c);
        writer
            .begin(c.role, c.multiple, c.timestep, &c.timestep_groups, c.graph.clone())
            .map_err(failed)?;
        for i in 0..c.items.len() {
            let bytes = weights.stored(&mut c, i)?;
            writer.weight(bytes).map_err(failed)?;
            done += bytes.len() as u64;
            report(progress, "writing", done, total)?;
        }
        layers.append(&mut c.summaries);
        attentions.append(&mut c.attentions);
        for source in &sources {
            source.release();
        }
    }
    let manifest = Manifest {
        metadata: Metadata {
            name,
            license: options.license.clone().or(model.license).unwrap_or_default(),
            source: model.origin.to_owned(),
            source_hash: source_hash.clone(),
            producer: concat!("latile ", env!("CARGO_PKG_VERSION")).to_owned(),
        },
        precision: options.precision,
        task: model.task,
        latent: model.latent,
        scheduler: model.scheduler,
        defaults: Defaults {
            steps: options.steps.unwrap_or(STEPS),
            eta: options.eta.unwrap_or(0.0),
            consistency: options.consistency.unwrap_or(0.0),
        },
        components: Vec::new(),
    };
    let mut notes = model.notes;
    notes.extend(quantization.and_then(uncalibrated));
    writer.finish(manifest).map_err(failed)?;
    let bytes = out.file().metadata().map_err(|e| failed(WriteError::Io(e)))?.len();
    out.commit()?;
    Ok(Summary {
        path: output.to_owned(),
        bytes,
        source: model.origin.to_owned(),
        source_hash,
        precision: options.precision,
        task: model.task,
        components,
        method: quantization.map(|q| q.method),
        layers,
        attentions,
        notes,
    })
}

/// How the model is quantized, where it is to be.
fn quantization(options: &ExportOptions) -> Result<Option<&Quantization>, ExportError> {
    match (options.precision, &options.quantization) {
        (Precision::F32 | Precision::F16, None) => Ok(None),
        (Precision::Int8 | Precision::Mixed, Some(q)) => Ok(Some(q)),
        (Precision::Int8 | Precision::Mixed, None) => Err(ExportError::NoCalibration),
        (Precision::F32 | Precision::F16, Some(_)) => Err(ExportError::NotQuantized),
    }
}

/// What to say of a table that knows nothing of Winograd's algorithm, where that was not forbidden.
fn uncalibrated(how: &Quantization) -> Option<String> {
    let mut groups = how.table.components.iter().flat_map(|c| &c.layers).flat_map(|l| &l.groups);
    if how.winograd == Winograd::Off {
        return None;
    }
    let again = "calibrate the model again for one that takes less work";
    if groups.clone().all(|g| g.winograd.is_none()) {
        return Some(format!(
            "the calibration table has no ranges for Winograd's algorithms, so every convolution is direct; {again}"
        ));
    }
    let rows = how.winograd != Winograd::Rows && groups.all(|g| g.squares.is_none());
    rows.then(|| {
        format!("the calibration table has no ranges for Winograd's F(2 x 2, 3 x 3); {again}")
    })
}

/// Decides what becomes of each component's layers.
fn plan(
    components: Vec<Component>,
    sources: &[Box<dyn WeightSource>],
    quantization: Option<&Quantization>,
    name: &str,
    source_hash: &str,
    progress: &mut Report<'_>,
) -> Result<Vec<Planned>, ExportError> {
    let Some(how) = quantization else {
        return Ok(components.into_iter().map(|c| Planned::float(c, Vec::new())).collect());
    };
    how.table.is_of(name, source_hash)?;
    let total = components.iter().map(|c| quantize::examined_bytes(c, how)).sum();
    let mut done = 0u64;
    let mut at = |bytes: u64| {
        done += bytes;
        report(progress, "ranking", done.min(total), total)
    };
    let planned: Vec<Planned> = components
        .into_iter()
        .map(|c| quantize::plan(c, sources, how, &mut at))
        .collect::<Result<_, _>>()?;
    let kept = how.keep_f16.iter().map(|glob| ("--keep-f16", glob));
    for (option, glob) in kept.chain(how.keep_direct.iter().map(|glob| ("--keep-direct", glob))) {
        let mut layers = planned.iter().flat_map(|c| &c.summaries);
        let mut attentions = planned.iter().flat_map(|c| &c.attentions);
        let found = layers.any(|l| glob.is_of(&l.component, &l.layer))
            || attentions.any(|a| glob.is_of(&a.component, &a.attention));
        if !found {
            return Err(ExportError::NoSuchLayer { option, glob: glob.text().to_owned() });
        }
    }
    Ok(planned)
}

/// Weights on their way from the sources to the file.
#[derive(Default)]
struct Weights<'a> {
    sources: &'a [Box<dyn WeightSource>],
    values: Vec<f32>,
    bytes: Vec<u8>,
    /// The int8 layer whose parts are being written.
    layer: quantize::Quantized,
    /// What its input is multiplied by.
    input_scale: Vec<f32>,
}

impl Weights<'_> {
    /// Weight `i` of `c` as it lies in the file. The parts of a layer must be asked for in their order.
    fn stored(&mut self, c: &mut Planned, i: usize) -> Result<&[u8], ExportError> {
        let spec = &c.graph.weights[i];
        let part = match &c.items[i] {
            Item::Tensor(recipe) => {
                recipe.read(self.sources, spec, &mut self.values)?;
                &self.values
            }
            Item::Weight(index) => {
                let layer = c.layer(*index);
                self.layer = layer.quantize(self.sources, &mut self.values)?;
                self.input_scale.clear();
                self.input_scale.extend(layer.input_scale());
                let index = *index;
                c.examined(index, &self.layer);
                &self.values
            }
            Item::Scale => &self.layer.scale,
            Item::Sum => &self.layer.sum,
            Item::InputScale => &self.input_scale,
            Item::Bias(recipe) => {
                match recipe {
                    Some(recipe) => recipe.read(self.sources, spec, &mut self.values)?,
                    None => {
                        self.values.clear();
                        self.values.resize(self.layer.bias.len(), 0.0);
                    }
                }
                for (b, more) in self.values.iter_mut().zip(&self.layer.bias) {
                    *b += more;
                }
                &self.values
            }
        };
        let spec = &c.graph.weights[i];
        pack::pack(spec, part, &mut self.bytes).map_err(|o| match &c.items[i] {
            Item::Tensor(recipe) => ExportError::F16Overflow {
                path: recipe.path(self.sources),
                name: recipe.described(),
                value: o.value,
                index: o.index,
            },
            _ => ExportError::Quantize {
                layer: spec.name.clone(),
                why: format!(
                    "element {} would be {}, which is a bug; please report it",
                    o.index, o.value
                ),
            },
        })?;
        Ok(&self.bytes)
    }
}

fn report(
    progress: &mut Report<'_>,
    stage: &'static str,
    done: u64,
    total: u64,
) -> Result<(), ExportError> {
    match progress(Progress { stage, done, total }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(ExportError::Cancelled),
    }
}

fn stored_bytes(spec: &WeightSpec) -> u64 {
    spec.stored_bytes().unwrap_or(0) as u64
}

fn part_bytes(c: &Planned) -> PartBytes {
    let mut parts = PartBytes::default();
    for (spec, item) in c.graph.weights.iter().zip(&c.items) {
        let sum = match (item, spec.layout) {
            (Item::Weight(_), _) => &mut parts.int8,
            (Item::Scale | Item::Sum | Item::InputScale, _) => &mut parts.int8_scales,
            (_, Layout::Plain) => &mut parts.other,
            _ => &mut parts.float,
        };
        *sum += stored_bytes(spec);
    }
    parts
}

fn summary(c: &Component) -> ComponentSummary {
    let elements = |shape: &[u32]| shape.iter().map(|&d| u64::from(d)).product::<u64>();
    ComponentSummary {
        role: c.role.name().to_owned(),
        nodes: c.graph.nodes.len(),
        tensors: c.graph.weights.len(),
        parameters: c.graph.weights.iter().map(|w| elements(&w.shape)).sum(),
        bytes: PartBytes::default(),
    }
}

/// BLAKE3 over the bytes of every weight file, one after the other.
fn hash(model: &Model, progress: &mut Report<'_>) -> Result<String, ExportError> {
    let files: Vec<PathBuf> = model.sources.iter().flat_map(|s| s.files()).collect();
    let failed = |path: &Path, error| ExportError::Checkpoint { path: path.to_owned(), error };
    let mut total = 0;
    for path in &files {
        total += std::fs::metadata(path).map_err(|e| failed(path, e))?.len();
    }
    let mut hasher = blake3::Hasher::new();
    let mut chunk = vec![0u8; 1 << 20];
    let mut done = 0;
    for path in &files {
        let mut file = File::open(path).map_err(|e| failed(path, e))?;
        loop {
            let n = file.read(&mut chunk).map_err(|e| failed(path, e))?;
            if n == 0 {
                break;
            }
            hasher.update(&chunk[..n]);
            done += n as u64;
            report(progress, "hashing", done, total)?;
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}
