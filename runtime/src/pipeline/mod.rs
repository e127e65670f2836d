//! The flow of a picture: frame → tile → latent → schedule → denoise → decode → blend → consistency, a
//! module each.
//!
//! Lives here: noise as `torch.randn` draws it ([`noise`]), DDIM ([`schedule`]), the grid of overlapping
//! tiles and their blending ([`tiles`]), back-projection onto the input ([`mod@consistency`]), what is checked
//! before the first pixel ([`plan`]), the choice of a way that fits into memory ([`budget`]), the latent in
//! memory or in a file ([`field`]), how fast that will be ([`pace`]), super-resolution as its caller sees it ([`mod@upscale`]), the run itself
//! ([`run`]), and what of it is kept for a run to go on after a power cut ([`resume`]). Hardware is reached
//! through [`crate::backend`] alone; tiles run one after the other on one thread, and the backend shares the
//! work inside each.

pub mod budget;
mod condition;
pub mod consistency;
pub mod field;
pub mod noise;
pub mod pace;
pub mod plan;
pub mod resume;
pub mod run;
pub mod schedule;
pub mod tiles;
pub mod upscale;

pub use budget::{Budget, Caller, Strategies, Strategy};
pub use consistency::Consistency;
pub use field::Scratch;
pub use noise::Generator;
pub use pace::Pace;
pub use plan::{GivenNoise, NoiseTensor, NormScope, Options, PipelineError, Plan, Stage};
pub use resume::{Resume, ResumeError};
pub use run::Runner;
pub use schedule::{Schedule, ScheduleError};
pub use tiles::{Grid, TileError, Tiling};
pub use upscale::{Picture, Pixels, Progress, Report, Upscaled, to_byte, upscale, upscale_rows};
