//! The commands, a module each: arguments, work, report.

pub(crate) mod bench;
#[cfg(feature = "export")]
pub(crate) mod calibrate;
pub(crate) mod compare;
pub(crate) mod devices;
#[cfg(feature = "export")]
pub(crate) mod export;
pub(crate) mod inspect;
pub(crate) mod plan;
pub(crate) mod run;
pub(crate) mod upscale;

use crate::args::Command;
use crate::exit::UsageError;
use crate::interrupt::Interrupt;
use crate::memory;
use latile_cpu::session::CpuBackend;
use latile_runtime::backend::{Backend, PrepareError, Room};
use latile_runtime::format::{Held, Model, Role};
use latile_runtime::graph::ValueKind;
use latile_runtime::pipeline::PipelineError;
use latile_runtime::pipeline::budget::Choice;
use latile_runtime::tensor::{ArenaError, Shape};

/// Does what the command line says.
///
/// # Errors
/// The command's; [`crate::exit::classify`] gives the exit code.
pub(crate) fn run(command: Command, interrupt: &Interrupt) -> anyhow::Result<()> {
    match command {
        Command::Upscale(args) => upscale::run(&args, interrupt),
        Command::Plan(args) => plan::run(&args, interrupt),
        #[cfg(feature = "export")]
        Command::Calibrate(args) => calibrate::run(&args, interrupt),
        #[cfg(feature = "export")]
        Command::Export(args) => export::run(&args, interrupt),
        Command::Inspect(args) => inspect::run(&args),
        Command::Run(args) => run::run(&args, interrupt),
        Command::Bench(args) => bench::run(&args, interrupt),
        Command::Compare(args) => compare::run(&args),
        Command::Devices(args) => devices::run(&args),
    }
}

/// The CPU, with `threads` threads, or as many as there are cores.
fn cpu(threads: Option<usize>) -> anyhow::Result<CpuBackend> {
    const MOST: usize = 1024;
    let threads = match threads {
        None => CpuBackend::available_threads(),
        Some(n @ 1..=MOST) => n,
        Some(n) => {
            return Err(UsageError(format!("--threads is {n}; it can be 1 to {MOST}")).into());
        }
    };
    Ok(CpuBackend::from_env(threads)?)
}

/// A component that runs alone, as far as memory goes.
struct Alone {
    role: Role,
    /// Height and width of its maps.
    size: [usize; 2],
    /// How often it runs.
    runs: u64,
    /// What the process may take.
    limit: Option<usize>,
    /// Bytes of its tensors that are resident already.
    resident: usize,
    /// Bytes that its tensors take at most.
    tensors: usize,
}

impl Alone {
    /// What its session is given, and the bytes that the process then has at most. Called before anything
    /// reads the component's weights.
    ///
    /// # Errors
    /// [`PipelineError::Budget`] where no way of running it fits.
    fn plan(&self, backend: &dyn Backend, model: &Model) -> anyhow::Result<(Room, usize)> {
        let [height, width] = self.size;
        let around = memory::base_bytes(self.resident).saturating_add(self.tensors);
        let offers = backend.offers(model, self.role, height, width)?;
        let limit = self.limit.unwrap_or(usize::MAX);
        let choice =
            Choice::within(offers, self.runs, limit.saturating_sub(around)).map_err(|least| {
                PipelineError::Budget {
                    limit,
                    smallest: around.saturating_add(least),
                    strategy: format!("the {} alone at {width}x{height}", self.role),
                }
            })?;
        let room = self.limit.map_or_else(Room::default, |_| choice.room());
        Ok((room, around.saturating_add(choice.bytes())))
    }
}

/// Bytes of a component's inputs and of its outputs, as floats, with its maps at this size.
fn tensor_bytes(model: &Model, role: Role, size: [usize; 2]) -> anyhow::Result<[usize; 2]> {
    let graph = &model.component(role)?.graph;
    let is_map = |k: ValueKind| matches!(k, ValueKind::Map(_));
    let maps = graph.inputs.iter().filter(|p| is_map(graph.kind(p.value))).count();
    let shapes = graph.infer(&vec![(size[0], size[1]); maps]).map_err(PrepareError::from)?;
    Ok([&graph.inputs, &graph.outputs].map(|ports| {
        let elements = ports.iter().map(|p| shapes[p.value.index()].elements());
        let elements =
            elements.fold(0, |sum: usize, n| sum.saturating_add(n.unwrap_or(usize::MAX)));
        elements.saturating_mul(size_of::<f32>())
    }))
}

/// A zeroed buffer for a value of `shape`.
fn buffer(shape: Shape) -> Result<Vec<f32>, ArenaError> {
    let elements = shape.elements().unwrap_or(usize::MAX);
    let mut buffer = Vec::new();
    buffer.try_reserve_exact(elements).map_err(|_| ArenaError::OutOfMemory {
        bytes: elements.saturating_mul(size_of::<f32>()),
    })?;
    buffer.resize(elements, 0.0);
    Ok(buffer)
}

/// A component as the command line names it.
fn role(name: &str) -> Result<Role, String> {
    [Role::Unet, Role::Decoder, Role::Encoder]
        .into_iter()
        .find(|r| r.name() == name)
        .ok_or_else(|| "a component is unet, decoder or encoder".to_owned())
}

/// How the model's file is held, as `--weights` names it.
fn weights(name: &str) -> Result<Held, String> {
    match name {
        "map" => Ok(Held::Mapped),
        "read" => Ok(Held::Read),
        _ => Err("weights can be mapped or read: --weights map or --weights read".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_have_names() {
        assert_eq!(role("decoder"), Ok(Role::Decoder));
        assert!(role("vae").is_err());
    }

    #[test]
    fn weights_are_mapped_or_read() {
        assert_eq!(weights("map"), Ok(Held::default()));
        assert_eq!(weights("read"), Ok(Held::Read));
        assert!(weights("stream").is_err());
    }

    #[test]
    fn a_buffer_that_cannot_be_is_an_error() {
        assert_eq!(buffer(Shape::Vector { len: 3 }).unwrap(), [0.0; 3]);
        let impossible = Shape::Map { h: usize::MAX, w: 2, c: 1 };
        assert!(buffer(impossible).is_err());
    }
}
