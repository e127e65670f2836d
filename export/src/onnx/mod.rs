//! ONNX graphs of a U-Net, a decoder and an encoder, as diffusers' models are exported by PyTorch (opset 17 by tracing,
//! opset 18 and later by its newer exporter).
//!
//! Lives here: the reader over tract-onnx (`file`), the recogniser that puts operators together again
//! (`recognise`, `layers`, `patterns`, `codebook`, `time`), and the step that gives the result the native importer's
//! form (`canon`). Never here: execution; constants are folded, networks are not run.
//!
//! tract's reader holds a file whole, so this route needs about the memory of the largest file beside what the others
//! need: for the published super-resolution model, whose U-Net is 455 MB, the peak was 922 MB resident, half of it the
//! file's map. The folder and checkpoint routes stay below 50 MB.

mod canon;
mod codebook;
mod constants;
mod file;
mod fold;
mod layers;
mod patterns;
mod recognise;
mod sym;
mod tensor;
mod time;
mod view;

use crate::diffusers::read_scheduler;
use crate::model::{Component, Model};
use crate::source::WeightSource;
use crate::tensors::Recipe;
use crate::write::{self, Progress, Summary};
use crate::{ExportError, ExportOptions};
use file::{OnnxFile, OnnxSource};
use latile_runtime::format::{
    BetaSchedule, LatentSpec, Prediction, Role, SchedulerSpec, Spacing, Task,
};
use latile_runtime::graph::Graph;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// The files that make up a model.
#[derive(Clone, Debug, PartialEq)]
pub struct OnnxParts {
    /// The denoiser: inputs a map and a timestep.
    pub unet: Option<PathBuf>,
    /// Latent to picture.
    pub decoder: Option<PathBuf>,
    /// Picture to latent.
    pub encoder: Option<PathBuf>,
    /// A diffusers `scheduler_config.json`; without it LDM's own noise schedule is assumed, and said so.
    pub scheduler: Option<PathBuf>,
    /// The decoder takes `latent / scale + shift`.
    pub scale: f32,
    /// See `scale`.
    pub shift: f32,
}

impl Default for OnnxParts {
    fn default() -> Self {
        Self { unet: None, decoder: None, encoder: None, scheduler: None, scale: 1.0, shift: 0.0 }
    }
}

fn fail(path: &Path, why: impl Into<String>) -> ExportError {
    ExportError::Onnx { path: path.to_owned(), why: why.into() }
}

/// Exports ONNX files to the `.latile` file `output`; see [`crate::export`].
///
/// # Errors
/// [`ExportError`]: a file cannot be read, its graph is not understood (the node is named), or the output cannot be
/// written.
pub fn export_onnx(
    parts: &OnnxParts,
    output: &Path,
    options: &ExportOptions,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Summary, ExportError> {
    let mut model = Model::empty("onnx", Vec::new());
    let files = [
        (Role::Unet, &parts.unet),
        (Role::Decoder, &parts.decoder),
        (Role::Encoder, &parts.encoder),
    ];
    let mut name = None;
    // What was read of each: input and output channels, and rows of the input and of the output.
    let mut read: Vec<(Role, u32, u32, (usize, usize))> = Vec::new();
    for (role, path) in files {
        let Some(path) = path else { continue };
        if role == Role::Encoder && !options.encoder {
            continue;
        }
        name.get_or_insert_with(|| crate::stem(path));
        let latent = read.iter().find(|r| r.0 == Role::Decoder).map(|r| r.1);
        let factor = add(&mut model, role, path, latent, options)?;
        if let Some(Component { graph, .. }) = model.components.last() {
            let (input, out) = (&graph.inputs[0], &graph.outputs[0]);
            let channels = |v| graph.kind(v).channels();
            read.push((role, channels(input.value), channels(out.value), factor));
        }
    }
    let Some(name) = name else {
        return Err(fail(
            output,
            "no ONNX file was given; name at least a U-Net, a decoder or an encoder",
        ));
    };
    let of = |role: Role| read.iter().find(|r| r.0 == role).copied();
    if !(parts.scale.is_finite() && parts.scale > 0.0 && parts.shift.is_finite()) {
        let why = format!(
            "a latent scale of {} and shift of {}; expected a scale above zero",
            parts.scale, parts.shift
        );
        return Err(fail(output, why));
    }
    if let Some((_, channels, _, (rows_in, rows_out))) = of(Role::Decoder) {
        let factor = (rows_out / rows_in.max(1)) as u32;
        model.latent =
            Some(LatentSpec { channels, factor, scale: parts.scale, shift: parts.shift });
    }
    if let (Some(unet), Some(decoder)) = (of(Role::Unet), of(Role::Decoder))
        && unet.2 == decoder.1
        && unet.1 == decoder.1 + decoder.2
    {
        model.task = Task::SuperResolution;
    }
    model.scheduler = match &parts.scheduler {
        Some(path) => {
            let config = read_scheduler(path)?;
            model.notes.extend(config.note);
            Some(config.spec)
        }
        None if of(Role::Unet).is_some() => {
            model.notes.push(
                "ONNX files say nothing of the noise schedule: that of LDM's super-resolution (betas 0.0015 to 0.0155) \
                 is assumed; name the model's scheduler_config.json to be sure"
                    .to_owned(),
            );
            Some(ldm_scheduler())
        }
        None => None,
    };
    write::write(model, output, &name, options, progress)
}

fn ldm_scheduler() -> SchedulerSpec {
    SchedulerSpec {
        train_timesteps: 1000,
        betas: BetaSchedule::ScaledLinear { start: 0.0015, end: 0.0155 },
        prediction: Prediction::Epsilon,
        spacing: Spacing::Leading,
        steps_offset: 1,
        set_alpha_to_one: false,
        clip_sample: None,
        zero_terminal_snr: false,
    }
}

/// Reads one file and adds its component; gives rows of its input and of its output.
fn add(
    model: &mut Model,
    role: Role,
    path: &Path,
    latent: Option<u32>,
    options: &ExportOptions,
) -> Result<(usize, usize), ExportError> {
    let packed = options.precision.dtype();
    let file = OnnxFile::open(path)?;
    let (input, output) = match role {
        Role::Unet => ("sample", "sample"),
        Role::Decoder => ("latents", "sample"),
        Role::Encoder => ("sample", "latents"),
    };
    let mut found = recognise::recognise(&file, packed, input, output)?;
    let channels = found.graph.kind(found.graph.outputs[0].value).channels();
    if role == Role::Encoder && latent.is_some_and(|l| channels == 2 * l) {
        "moments".clone_into(&mut found.graph.outputs[0].name);
    }
    if (role == Role::Unet) != found.time.is_some() {
        let why = if role == Role::Unet {
            "it does not depend on a timestep"
        } else {
            "it depends on a timestep"
        };
        return Err(fail(path, format!("{why}, so it is not a model's {role}")));
    }
    let (rows_in, rows_out) = found.factor;
    if rows_in == 0 || rows_out == 0 || (role == Role::Decoder && !rows_out.is_multiple_of(rows_in))
    {
        return Err(fail(path, format!("{rows_in} rows become {rows_out}")));
    }
    let multiple = match role {
        Role::Decoder => 1,
        _ => downsampling(&found.graph),
    };
    let (graph, sources) = match canon::canonical(role, &found.graph, found.time, packed) {
        Some((graph, map)) => {
            let sources = map.into_iter().map(|i| found.sources[i].clone()).collect();
            (graph, sources)
        }
        None => {
            model.notes.push(format!(
                "{}: not built like diffusers' own models; its operators are kept in their own order and names",
                path.display()
            ));
            (found.graph, found.sources)
        }
    };
    let source = model.sources.len();
    let onnx: Box<dyn WeightSource> = Box::new(OnnxSource::new(file, found.computed));
    model.sources.push(onnx);
    let recipe = |(spec, (tensor, part)): (_, &(String, _))| {
        Recipe::find(
            &model.sources,
            source,
            std::slice::from_ref(tensor),
            Clone::clone(part),
            spec,
            role.name(),
        )
    };
    let recipes = graph.weights.iter().zip(&sources).map(recipe).collect::<Result<_, _>>()?;
    model.components.push(Component { role, multiple, timestep: found.time, graph, recipes });
    Ok(found.factor)
}

/// By how much the smallest map is smaller than the input.
fn downsampling(graph: &Graph) -> u32 {
    const ROWS: usize = 1 << 12;
    let maps = graph
        .inputs
        .iter()
        .filter(|p| matches!(graph.kind(p.value), latile_runtime::graph::ValueKind::Map(_)));
    let sizes: Vec<(usize, usize)> = maps.map(|_| (ROWS, ROWS)).collect();
    let Ok(shapes) = graph.infer(&sizes) else { return 1 };
    let rows = shapes.iter().filter_map(|s| match *s {
        latile_runtime::tensor::Shape::Map { h, .. } if h > 0 => Some(h),
        latile_runtime::tensor::Shape::Map { .. }
        | latile_runtime::tensor::Shape::Vector { .. } => None,
    });
    (ROWS / rows.min().unwrap_or(ROWS).max(1)) as u32
}
