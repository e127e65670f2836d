//! The flow of a picture: frame → tile → latent → schedule → denoise → decode → blend → consistency, a
//! module each.
//!
//! Lives here: noise as `torch.randn` draws it ([`noise`]), DDIM ([`schedule`]), the grid of overlapping
//! tiles and their blending ([`tiles`]), back-projection onto the input ([`mod@consistency`]), what is checked
//! before the first pixel ([`plan`]), super-resolution as its caller sees it ([`mod@upscale`]), the run itself
//! ([`run`]), and what of it is kept for a run to go on after a power cut ([`resume`]). Hardware is reached
//! through [`crate::backend`] alone; tiles run one after the other on one thread, and the backend shares the
//! work inside each.

mod condition;
pub mod consistency;
pub mod noise;
pub mod plan;
pub mod resume;
pub mod run;
pub mod schedule;
pub mod tiles;
pub mod upscale;

pub use consistency::Consistency;
pub use noise::Generator;
pub use plan::{GivenNoise, NoiseTensor, Options, PipelineError, Plan, Stage};
pub use resume::{Resume, ResumeError};
pub use run::Runner;
pub use schedule::{Schedule, ScheduleError};
pub use tiles::{Grid, TileError};
pub use upscale::{Picture, Pixels, Progress, Report, Upscaled, to_byte, upscale, upscale_rows};
