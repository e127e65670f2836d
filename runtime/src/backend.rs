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
    /// The way it runs, as its [`Offer`] calls it.
    pub way: String,
    /// Bytes of weights resident at once, used where they are mapped.
    pub weight_bytes: usize,
    /// Multiply-accumulates of one run, what is computed more than once included.
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
    /// No way of running it fits the room that was given.
    #[error(
        "{role} at {height}x{width} cannot run in {limit} bytes; the least it can do with is {smallest}"
    )]
    NoRoom {
        /// The component.
        role: Role,
        /// Height of its map inputs.
        height: usize,
        /// Width of its map inputs.
        width: usize,
        /// Bytes of the arena allowed.
        limit: usize,
        /// Bytes of the smallest arena that would do.
        smallest: usize,
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
    /// Layers' inputs were to be seen in a session that does not store them.
    #[error("a session that runs {way} cannot show its layers' inputs; prepare one with more room")]
    Unobservable {
        /// How it runs.
        way: String,
    },
    /// The result holds NaN or infinity.
    #[error("{port}: the result is not finite; the model or its input is damaged")]
    NonFinite {
        /// Port name.
        port: String,
    },
}

/// What becomes of the memory that a layer's weights take once the layer has run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Residency {
    /// It stays, so that the next run finds it warm.
    #[default]
    Keep,
    /// It is given back to the system, which reads the weights again for the next run: about one layer's
    /// weights are resident at a time.
    Drop,
}

/// What a session may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Room {
    /// The most bytes of its arena; by default as many as the fastest way takes.
    pub arena: Option<usize>,
    /// What becomes of its weights.
    pub weights: Residency,
}

/// A way to run a component, priced but not prepared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// What the backend calls it, such as `whole` or `streamed 3`.
    pub way: String,
    /// Bytes of the arena, exactly what a session prepared with this much room has.
    pub arena_bytes: usize,
    /// Multiply-accumulates of one run, what is computed more than once included.
    pub macs: u64,
    /// Bytes of weights resident at once where they are kept.
    pub weights_kept: usize,
    /// Bytes of weights resident at once where they are dropped.
    pub weights_dropped: usize,
}

/// Hardware that can run components.
pub trait Backend {
    /// What it is and whether it can be used.
    fn info(&self) -> DeviceInfo;

    /// The ways to run component `role` of `model` at `height × width`: the fastest first, each one after
    /// it with a smaller arena, never none. All of them give the same bits. Nothing is reserved.
    ///
    /// # Errors
    /// [`PrepareError`].
    fn offers(
        &self,
        model: &Model,
        role: Role,
        height: usize,
        width: usize,
    ) -> Result<Vec<Offer>, PrepareError>;

    /// Makes component `role` of `model` ready to run with its map inputs at `height × width`, in the
    /// fastest way that `room` allows.
    ///
    /// # Errors
    /// [`PrepareError`]; nothing is left behind.
    fn prepare<'m>(
        &self,
        model: &'m Model,
        role: Role,
        height: usize,
        width: usize,
        room: Room,
    ) -> Result<Box<dyn Session + 'm>, PrepareError>;
}

/// Of what a session's GroupNorms take mean and variance in the runs to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Norms {
    /// Of the run itself.
    #[default]
    Own,
    /// Of the run itself, which is also gathered; what was gathered before is forgotten when this is chosen.
    Gather,
    /// Of all runs that were gathered, each counting alike: so that the tiles of a picture are normalised
    /// as one.
    Gathered,
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

    /// Chooses what GroupNorms use in the runs to come; [`Norms::Own`] at first.
    fn use_norms(&mut self, norms: Norms);

    /// What it is and costs.
    fn stats(&self) -> SessionStats;
}
