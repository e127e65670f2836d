//! The `.latile` file: one memory-mapped file with weights, graph, scheduler and metadata.
//!
//! Lives here: the header ([`header`]), the manifest's types ([`manifest`]), the validating reader
//! ([`Model`]), which also fetches weights ahead of use and gives their memory back, and the streaming
//! writer ([`Writer`]). `docs/format.md` specifies every byte. The reader trusts nothing: each length,
//! offset, enum and checksum is checked before use, and a hostile file gets an error, never a panic.

pub mod header;
pub mod manifest;
mod map;
mod reader;
mod writer;

pub use manifest::{
    BetaSchedule, ComponentSpec, Defaults, LatentSpec, Manifest, Metadata, Precision, Prediction,
    Role, SchedulerSpec, Spacing, Task, TimestepProjection, WeightPlace,
};
pub use reader::{Held, LoadedComponent, Model, ModelError};
pub use writer::{WriteError, Writer};
