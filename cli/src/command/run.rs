//! `latile run`: one component, tensors in, tensors out.

use crate::console::{plain, say, say_json};
use crate::exit::UsageError;
use crate::interrupt::Interrupt;
use crate::memory::{self, peak_rss_bytes};
use crate::output;
use crate::tensors::{self, Tensor, to_nchw, to_nhwc};
use argh::FromArgs;
use latile_runtime::backend::{Backend, PortSpec};
use latile_runtime::format::{ComponentSpec, Held, Model, Role};
use latile_runtime::graph::ValueKind;
use latile_runtime::tensor::Shape;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Runs one component of a model on tensors from a file.
#[derive(FromArgs, Debug)]
#[argh(
    subcommand,
    name = "run",
    help_triggers("-h", "--help"),
    example = "{command_name} sr.latile --component unet --inputs in.safetensors --outputs out.safetensors",
    note = "Tensors are named as in diffusers, float32, NCHW, batch 1: a U-Net takes sample and\ntimestep and gives sample; a decoder takes latents and gives sample; an encoder takes sample\nand gives latents or moments. latile inspect shows them all."
)]
pub(crate) struct Args {
    /// the .latile file
    #[argh(positional, arg_name = "MODEL")]
    pub(crate) model: PathBuf,

    /// unet, decoder or encoder
    #[argh(option, from_str_fn(super::role), arg_name = "name")]
    pub(crate) component: Role,

    /// the safetensors file to read
    #[argh(option, arg_name = "file")]
    pub(crate) inputs: PathBuf,

    /// the safetensors file to write
    #[argh(option, arg_name = "file")]
    pub(crate) outputs: PathBuf,

    /// map or read: whether the model's file is mapped (the default), or read into memory, for storage
    /// that should not be mapped
    #[argh(option, from_str_fn(super::weights), arg_name = "how")]
    pub(crate) weights: Option<Held>,

    /// threads, by default one for each core
    #[argh(option, arg_name = "n")]
    pub(crate) threads: Option<usize>,

    /// the most memory the process may have resident, weights included, such as 256M or 1.5G; K, M and G
    /// are powers of 1024
    #[argh(option, from_str_fn(memory::parse), arg_name = "size")]
    pub(crate) memory: Option<usize>,

    /// replace the output if it exists
    #[argh(switch)]
    pub(crate) overwrite: bool,

    /// print one JSON object
    #[argh(switch)]
    pub(crate) json: bool,
}

#[derive(serde::Serialize)]
struct Report<'a> {
    model: &'a str,
    component: &'static str,
    precision: &'static str,
    isa: String,
    threads: usize,
    outputs: Vec<Output>,
    seconds: f64,
    gmac: f64,
    gmac_per_s: f64,
    arena_bytes: usize,
    weight_bytes: usize,
    /// What the process was to have at most.
    planned_bytes: usize,
    way: String,
    peak_rss_bytes: Option<u64>,
}

#[derive(serde::Serialize)]
struct Output {
    name: String,
    shape: Vec<usize>,
}

/// Reads, runs, writes.
///
/// # Errors
/// Files that cannot be read or written, tensors that the component does not take, a model that is refused.
pub(crate) fn run(args: &Args, interrupt: &Interrupt) -> anyhow::Result<()> {
    output::check(&args.outputs, args.overwrite)?;
    let model = Model::open_held(&args.model, args.weights.unwrap_or_default())?;
    let spec = model.component(args.component)?;
    let mut given = tensors::read(&args.inputs)?;
    let (size, inputs) = gather(spec, &mut given, &args.inputs)?;
    let backend = super::cpu(args.threads)?;
    let [taken, given] = super::tensor_bytes(&model, args.component, size)?;
    let alone = super::Alone {
        role: args.component,
        size,
        runs: 1,
        limit: args.memory,
        resident: taken,
        // Results stand as they come, as planes, as bytes and as a file.
        tensors: taken.saturating_add(given.saturating_mul(4)),
    };
    let (room, planned_bytes) = alone.plan(&backend, &model)?;
    let mut session = backend.prepare(&model, args.component, size[0], size[1], room)?;
    let input_slices: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
    let mut results =
        session.outputs().iter().map(|p| super::buffer(p.shape)).collect::<Result<Vec<_>, _>>()?;
    let start = Instant::now();
    {
        let mut slices: Vec<&mut [f32]> = results.iter_mut().map(Vec::as_mut_slice).collect();
        session.run(&input_slices, &mut slices)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    interrupt.check()?;

    let tensors: Vec<(String, Tensor)> = session
        .outputs()
        .iter()
        .zip(&results)
        .map(|(port, data)| (port.name.clone(), leaving(port, data)))
        .collect();
    output::write(&args.outputs, args.overwrite, |file| {
        tensors::write(&tensors, file, &args.outputs)
    })?;

    let stats = session.stats();
    let gmac = stats.macs as f64 / 1e9;
    let report = Report {
        model: model.name(),
        component: args.component.name(),
        precision: model.manifest().precision.dtype().name(),
        isa: stats.isa,
        threads: stats.threads,
        outputs: tensors.into_iter().map(|(name, t)| Output { name, shape: t.shape }).collect(),
        seconds,
        gmac,
        gmac_per_s: gmac / seconds,
        arena_bytes: stats.arena_bytes,
        weight_bytes: stats.weight_bytes,
        planned_bytes,
        way: stats.way,
        peak_rss_bytes: peak_rss_bytes(),
    };
    if args.json {
        return say_json(&report);
    }
    let outputs: Vec<String> =
        report.outputs.iter().map(|o| format!("{} {:?}", o.name, o.shape)).collect();
    Ok(say(&format!(
        "{}  {} in {:.3} s, {:.1} GMAC/s on {} with {} threads",
        args.outputs.display(),
        outputs.join(", "),
        seconds,
        report.gmac_per_s,
        report.isa,
        report.threads
    ))?)
}

/// Height and width of the component's maps, and its inputs in order, NHWC.
fn gather(
    spec: &ComponentSpec,
    given: &mut Vec<(String, Tensor)>,
    path: &Path,
) -> anyhow::Result<([usize; 2], Vec<Vec<f32>>)> {
    let wrong = |why: String| UsageError(format!("{}: {why}", path.display()));
    let mut take = |name: &str| {
        let at = given.iter().position(|(n, _)| n == name)?;
        Some(given.swap_remove(at).1)
    };
    let mut size = None;
    let mut inputs = Vec::new();
    for port in &spec.graph.inputs {
        let name = &port.name;
        let found = take(name);
        let data = match (spec.graph.kind(port.value), found) {
            (ValueKind::Map(c), Some(t)) => {
                let [1, channels, h, w] = t.shape[..] else {
                    return Err(wrong(format!(
                        "{} has shape {:?}; {} takes [1, {c}, H, W]",
                        plain(name),
                        t.shape,
                        spec.role
                    ))
                    .into());
                };
                if channels != c as usize || h == 0 || w == 0 || size.is_some_and(|s| s != [h, w]) {
                    return Err(wrong(format!(
                        "{} has shape {:?}; {} takes [1, {c}, H, W] with one H and W for all its inputs",
                        plain(name), t.shape, spec.role
                    ))
                    .into());
                }
                let multiple = spec.multiple as usize;
                if h % multiple != 0 || w % multiple != 0 {
                    return Err(wrong(format!(
                        "{} is {h}x{w}; {} takes sides that are multiples of {multiple}",
                        plain(name),
                        spec.role
                    ))
                    .into());
                }
                size = Some([h, w]);
                to_nhwc(&t.data, channels)
            }
            (ValueKind::Vector(len), Some(t)) if t.data.len() == len as usize => t.data,
            (ValueKind::Vector(len), Some(t)) => {
                return Err(wrong(format!(
                    "{} has shape {:?}; {} takes {len} elements",
                    plain(name),
                    t.shape,
                    spec.role
                ))
                .into());
            }
            (ValueKind::Vector(len), None) => {
                let (Some(projection), Some(t)) =
                    (spec.timestep.filter(|_| name == "time_proj"), take("timestep"))
                else {
                    return Err(missing(spec, name, path).into());
                };
                let [timestep] = t.data[..] else {
                    return Err(wrong(format!(
                        "timestep has shape {:?}; give one number",
                        t.shape
                    ))
                    .into());
                };
                let mut out = vec![0.0; len as usize];
                projection.project(timestep, &mut out);
                out
            }
            (ValueKind::Map(_), None) => return Err(missing(spec, name, path).into()),
        };
        inputs.push(data);
    }
    if let Some((name, _)) = given.first() {
        return Err(
            wrong(format!("tensor {} is none that {} takes", plain(name), spec.role)).into()
        );
    }
    let size = size.ok_or_else(|| wrong(format!("{} takes no map", spec.role)))?;
    Ok((size, inputs))
}

fn missing(spec: &ComponentSpec, name: &str, path: &Path) -> UsageError {
    let takes: Vec<&str> = spec
        .graph
        .inputs
        .iter()
        .map(|p| match p.name.as_str() {
            "time_proj" if spec.timestep.is_some() => "timestep",
            name => name,
        })
        .collect();
    let name = if name == "time_proj" && spec.timestep.is_some() { "timestep" } else { name };
    UsageError(format!(
        "{} holds no tensor {name}; {} takes {}",
        path.display(),
        spec.role,
        takes.join(", ")
    ))
}

/// A result as it leaves: maps NCHW, vectors with a batch of 1.
fn leaving(port: &PortSpec, data: &[f32]) -> Tensor {
    match port.shape {
        Shape::Map { h, w, c } => Tensor { shape: vec![1, c, h, w], data: to_nchw(data, c) },
        Shape::Vector { len } => Tensor { shape: vec![1, len], data: data.to_vec() },
    }
}
