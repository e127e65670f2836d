//! Streams a model into its file: one tensor read, packed and written at a time.

use crate::model::{Component, Model};
use crate::{ExportError, ExportOptions, pack};
use latile_runtime::format::{Defaults, Manifest, Metadata, Precision, Task, WriteError, Writer};
use latile_runtime::persist::Output;
use serde::Serialize;
use std::fs::File;
use std::io::{BufWriter, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// How far an export has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// `hashing` the source, then `writing` the model.
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
    /// Their elements, without padding.
    pub parameters: u64,
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
    let mut out = Output::create(output, options.overwrite)?;
    let source_hash = hash(&model, progress)?;
    let failed = |error| ExportError::Write { path: output.to_owned(), error };
    let total = model.components.iter().map(stored_bytes).sum();
    let mut writer = Writer::new(BufWriter::with_capacity(1 << 20, out.file())).map_err(failed)?;
    let (mut values, mut bytes) = (Vec::new(), Vec::new());
    let mut done = 0u64;
    let mut components = Vec::new();
    for c in model.components {
        components.push(summary(&c));
        let specs = c.graph.weights.clone();
        writer.begin(c.role, c.multiple, c.timestep, &[], c.graph).map_err(failed)?;
        for (spec, recipe) in specs.iter().zip(&c.recipes) {
            recipe.read(&model.sources, spec, &mut values)?;
            pack::pack(spec, &values, &mut bytes).map_err(|o| ExportError::F16Overflow {
                path: recipe.path(&model.sources),
                name: recipe.tensor.clone(),
                value: o.value,
                index: o.index,
            })?;
            writer.weight(&bytes).map_err(failed)?;
            done += bytes.len() as u64;
            report(progress, "writing", done, total)?;
        }
        for source in &model.sources {
            source.release();
        }
    }
    let manifest = Manifest {
        metadata: Metadata {
            name: options.name.clone().unwrap_or_else(|| default_name.to_owned()),
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
            consistency: 0.0,
        },
        components: Vec::new(),
    };
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
        notes: model.notes,
    })
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

fn stored_bytes(c: &Component) -> u64 {
    c.graph.weights.iter().filter_map(|w| w.stored_bytes()).map(|b| b as u64).sum()
}

fn summary(c: &Component) -> ComponentSummary {
    let elements = |shape: &[u32]| shape.iter().map(|&d| u64::from(d)).product::<u64>();
    ComponentSummary {
        role: c.role.name().to_owned(),
        nodes: c.graph.nodes.len(),
        tensors: c.graph.weights.len(),
        parameters: c.graph.weights.iter().map(|w| elements(&w.shape)).sum(),
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
