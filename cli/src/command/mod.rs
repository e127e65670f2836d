//! The commands, a module each: arguments, work, report.

pub(crate) mod bench;
#[cfg(feature = "export")]
pub(crate) mod calibrate;
pub(crate) mod compare;
pub(crate) mod devices;
#[cfg(feature = "export")]
pub(crate) mod export;
pub(crate) mod inspect;
pub(crate) mod run;
pub(crate) mod upscale;

use crate::args::Command;
use crate::exit::UsageError;
use crate::interrupt::Interrupt;
use latile_cpu::session::CpuBackend;
use latile_runtime::format::{Held, Role};
use latile_runtime::tensor::{ArenaError, Shape};

/// Does what the command line says.
///
/// # Errors
/// The command's; [`crate::exit::classify`] gives the exit code.
pub(crate) fn run(command: Command, interrupt: &Interrupt) -> anyhow::Result<()> {
    match command {
        Command::Upscale(args) => upscale::run(&args, interrupt),
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
