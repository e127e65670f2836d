//! `latile inspect`: what a model file holds, from its descriptors alone.

use crate::bundled;
use crate::console::{bytes, count, plain, say, say_json};
use argh::FromArgs;
use latile_runtime::format::{
    BetaSchedule, ComponentSpec, Defaults, LatentSpec, Manifest, Metadata, Precision,
    SchedulerSpec, Task, TimestepProjection, WeightPlace,
};
use latile_runtime::graph::{Layout, Port, ValueKind, WeightSpec};
use std::path::PathBuf;

/// Shows what a .latile file holds. Reads its descriptors only, never its weights.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "inspect", help_triggers("-h", "--help"))]
pub(crate) struct Args {
    /// the .latile file; by default the bundled model
    #[argh(positional, arg_name = "MODEL")]
    pub(crate) model: Option<PathBuf>,

    /// list every weight
    #[argh(switch)]
    pub(crate) tensors: bool,

    /// print one JSON object
    #[argh(switch)]
    pub(crate) json: bool,
}

#[derive(serde::Serialize)]
struct Report<'a> {
    model: &'a str,
    bytes: usize,
    metadata: &'a Metadata,
    precision: Precision,
    task: Task,
    latent: Option<LatentSpec>,
    scheduler: Option<SchedulerSpec>,
    defaults: Defaults,
    components: Vec<Component<'a>>,
}

#[derive(serde::Serialize)]
struct Component<'a> {
    role: &'static str,
    inputs: Vec<PortReport<'a>>,
    outputs: Vec<PortReport<'a>>,
    multiple: u32,
    timestep: Option<TimestepProjection>,
    operators: usize,
    weights: usize,
    parameters: u64,
    weight_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    tensors: Option<Vec<Tensor<'a>>>,
}

#[derive(serde::Serialize)]
struct PortReport<'a> {
    name: &'a str,
    kind: &'static str,
    channels: u32,
}

#[derive(serde::Serialize)]
struct Tensor<'a> {
    name: &'a str,
    shape: &'a [u32],
    dtype: &'static str,
    layout: Layout,
    #[serde(flatten)]
    place: WeightPlace,
}

/// Reads and prints.
///
/// # Errors
/// A file that cannot be read or is no sound model.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let model = bundled::open(args.model.as_deref(), None)?;
    let m = model.manifest();
    if args.json {
        return say_json(&Report {
            model: model.name(),
            bytes: model.file_len(),
            metadata: &m.metadata,
            precision: m.precision,
            task: m.task,
            latent: m.latent,
            scheduler: m.scheduler,
            defaults: m.defaults,
            components: m.components.iter().map(|c| component(c, args.tensors)).collect(),
        });
    }
    let mut lines = vec![format!(
        "{}  {}, {}",
        model.name(),
        bytes(model.file_len() as u64),
        m.precision.dtype()
    )];
    describe(m, &mut lines);
    for c in &m.components {
        describe_component(c, &mut lines);
        if args.tensors {
            lines.extend(c.graph.weights.iter().zip(&c.places).map(describe_tensor));
        }
    }
    Ok(say(&lines.join("\n"))?)
}

fn component(c: &ComponentSpec, tensors: bool) -> Component<'_> {
    Component {
        role: c.role.name(),
        inputs: c.graph.inputs.iter().map(|p| port(c, p)).collect(),
        outputs: c.graph.outputs.iter().map(|p| port(c, p)).collect(),
        multiple: c.multiple,
        timestep: c.timestep,
        operators: c.graph.nodes.len(),
        weights: c.graph.weights.len(),
        parameters: parameters(c),
        weight_bytes: weight_bytes(c),
        tensors: tensors.then(|| {
            let all = c.graph.weights.iter().zip(&c.places);
            all.map(|(w, &place)| Tensor {
                name: &w.name,
                shape: &w.shape,
                dtype: w.dtype.name(),
                layout: w.layout,
                place,
            })
            .collect()
        }),
    }
}

fn port<'a>(c: &ComponentSpec, port: &'a Port) -> PortReport<'a> {
    let kind = c.graph.kind(port.value);
    PortReport {
        name: &port.name,
        kind: match kind {
            ValueKind::Map(_) => "map",
            ValueKind::Vector(_) => "vector",
        },
        channels: kind.channels(),
    }
}

/// Elements of all weights, as shaped.
fn parameters(c: &ComponentSpec) -> u64 {
    let elements = |w: &WeightSpec| w.shape.iter().map(|&d| u64::from(d)).product::<u64>();
    c.graph.weights.iter().map(elements).sum()
}

fn weight_bytes(c: &ComponentSpec) -> u64 {
    c.places.iter().map(|p| p.extent).sum()
}

fn describe(m: &Manifest, lines: &mut Vec<String>) {
    let mut line = |name: &str, text: String| lines.push(format!("  {name:<10} {text}"));
    let or_unknown = |s: &str| {
        if s.is_empty() { "unknown".to_owned() } else { plain(s) }
    };
    line("name", or_unknown(&m.metadata.name));
    line("licence", or_unknown(&m.metadata.license));
    line(
        "source",
        format!(
            "{}, blake3 {}",
            or_unknown(&m.metadata.source),
            or_unknown(&m.metadata.source_hash)
        ),
    );
    line("written by", or_unknown(&m.metadata.producer));
    let task = match m.task {
        Task::SuperResolution => "super-resolution",
        Task::Components => "components, run one by one",
    };
    line("task", task.to_owned());
    if let Some(l) = m.latent {
        line(
            "latent",
            format!(
                "{} channels, a pixel stands for {f}x{f}, scale {}, shift {}",
                l.channels,
                l.scale,
                l.shift,
                f = l.factor
            ),
        );
    }
    if let Some(s) = m.scheduler {
        let betas = match s.betas {
            BetaSchedule::Linear { start, end } => format!("linear {start} to {end}"),
            BetaSchedule::ScaledLinear { start, end } => format!("scaled linear {start} to {end}"),
        };
        let clip = s.clip_sample.map_or(String::new(), |c| format!(", clipped to {c}"));
        line(
            "scheduler",
            format!(
                "{} timesteps, betas {betas}, predicts {}, {} spacing{clip}",
                s.train_timesteps,
                name_of(&s.prediction),
                name_of(&s.spacing)
            ),
        );
        line("defaults", format!("{} steps, eta {}", m.defaults.steps, m.defaults.eta));
    }
}

/// The name that an enum has in the manifest.
fn name_of(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(s)) => s,
        _ => "?".to_owned(),
    }
}

fn describe_component(c: &ComponentSpec, lines: &mut Vec<String>) {
    let list = |ports: &[Port]| {
        let all: Vec<String> = ports
            .iter()
            .map(|p| {
                let shape = match c.graph.kind(p.value) {
                    ValueKind::Map(n) => format!("[1, {n}, H, W]"),
                    ValueKind::Vector(n) => format!("[{n}]"),
                };
                format!("{} {shape}", plain(&p.name))
            })
            .collect();
        all.join(", ")
    };
    lines.push(format!("{}", c.role));
    lines.push(format!("  {:<10} {}", "takes", list(&c.graph.inputs)));
    lines.push(format!("  {:<10} {}", "gives", list(&c.graph.outputs)));
    if c.multiple > 1 {
        lines.push(format!("  {:<10} multiples of {}", "H and W", c.multiple));
    }
    lines.push(format!(
        "  {:<10} {} parameters in {} weights, {}; {} operators",
        "size",
        count(parameters(c)),
        c.graph.weights.len(),
        bytes(weight_bytes(c)),
        c.graph.nodes.len()
    ));
}

fn describe_tensor((w, p): (&WeightSpec, &WeightPlace)) -> String {
    let shape: Vec<String> = w.shape.iter().map(u32::to_string).collect();
    format!(
        "  {:>12} {:>10} {} {:<9} {} [{}]",
        p.offset,
        p.extent,
        w.dtype,
        name_of(&w.layout),
        plain(&w.name),
        shape.join(", ")
    )
}
