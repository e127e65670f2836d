//! The one boundary to hardware.
//!
//! A [`Backend`] turns a component of a model into a [`Session`] at one fixed size; the session runs it.
//! Both speak f32, NHWC, batch 1. The pipeline knows nothing else about a device. What a target does
//! behind this line (fusing, packing, threads) stays there.

use crate::format::{Model, ModelError, Role};
use crate::graph::ShapeError;
use crate::tensor::{ArenaError, Shape};

/// A value that enters or leaves a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortSpec {
    /// The port's name in the graph.
    pub name: String,
    /// Its shape at the session's size.
    pub shape: Shape,
}

/// What a prepared session is and costs.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionStats {
    /// The backend, `cpu` for the CPU target.
    pub backend: String,
    /// The instruction set or device in use.
    pub isa: String,
    /// Threads that share the work, the caller's included.
    pub threads: usize,
    /// Bytes of the arena, exactly what was planned: activations and scratch.
    pub arena_bytes: usize,
    /// Bytes of weights used where they are mapped.
    pub weight_bytes: usize,
    /// Multiply-accumulates of one run.
    pub macs: u64,
}

/// What a backend is, for `latile devices` and logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `cpu`, …
    pub backend: String,
    /// What it runs on.
    pub device: String,
    /// Whether it can be used here, and why not.
    pub usable: Result<(), String>,
    /// Particulars, such as kernels by instruction set.
    pub details: Vec<String>,
}

/// Why a session could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The model has no such component, or its bytes are damaged.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The size does not suit the graph.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The arena could not be had.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// The backend cannot run this component.
    #[error("{backend} cannot run {layer}: {why}")]
    Unsupported {
        /// The backend.
        backend: String,
        /// The layer.
        layer: String,
        /// What it lacks.
        why: String,
    },
    /// The backend itself cannot be set up.
    #[error("{backend} cannot be used: {why}")]
    Unavailable {
        /// The backend.
        backend: String,
        /// Why, and what to do.
        why: String,
    },
}

/// Why a run failed.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The caller's buffers do not have the ports' sizes.
    #[error("{port}: {found} elements given, the session expects {expected}")]
    WrongSize {
        /// Port name.
        port: String,
        /// Elements expected.
        expected: usize,
        /// Elements given.
        found: usize,
    },
    /// Another number of buffers than the session has ports.
    #[error("{found} buffers given, the session has {expected} {direction}")]
    WrongPorts {
        /// `inputs` or `outputs`.
        direction: &'static str,
        /// Ports of the session.
        expected: usize,
        /// Buffers given.
        found: usize,
    },
    /// A worker stopped by a bug; the session must not be used again.
    #[error("a worker thread failed while running {layer}; this is a bug, please report it")]
    Worker {
        /// The layer.
        layer: String,
    },
    /// The result holds NaN or infinity.
    #[error("{port}: the result is not finite; the model or its input is damaged")]
    NonFinite {
        /// Port name.
        port: String,
    },
}

/// Hardware that can run components.
pub trait Backend {
    /// What it is and whether it can be used.
    fn info(&self) -> DeviceInfo;

    /// Makes component `role` of `model` ready to run with its map inputs at `height × width`.
    ///
    /// # Errors
    /// [`PrepareError`]; nothing is left behind.
    fn prepare<'m>(
        &self,
        model: &'m Model,
        role: Role,
        height: usize,
        width: usize,
    ) -> Result<Box<dyn Session + 'm>, PrepareError>;
}

/// A component, ready to run at one size.
pub trait Session {
    /// What goes in, in order.
    fn inputs(&self) -> &[PortSpec];

    /// What comes out, in order.
    fn outputs(&self) -> &[PortSpec];

    /// Runs once. Slices are f32, NHWC, in the order of the ports. Does not allocate.
    ///
    /// # Errors
    /// [`RunError`] where a slice has the wrong size, or the result is not finite.
    fn run(&mut self, inputs: &[&[f32]], outputs: &mut [&mut [f32]]) -> Result<(), RunError>;

    /// Chooses the group of timesteps ([`ComponentSpec::timestep_group`]) whose activation ranges int8
    /// layers use in the runs to come; 0 at first. Groups beyond the last count as the last. Sessions of
    /// models without int8 layers have nothing to choose.
    ///
    /// [`ComponentSpec::timestep_group`]: crate::format::ComponentSpec::timestep_group
    fn set_timestep_group(&mut self, group: usize);

    /// What it is and costs.
    fn stats(&self) -> SessionStats;
}
