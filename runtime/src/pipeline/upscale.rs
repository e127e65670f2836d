//! Super-resolution as its caller sees it: the picture, the progress, the report, the result.
//!
//! A small picture conditions the denoising of a latent on its own grid, and the decoder makes the latent a
//! picture `factor` times as large (Rombach et al. 2022, section 4.4). How that is run is [`super::run`]'s.

use super::plan::{Options, PipelineError, Plan, RGB, Stage};
use crate::backend::Backend;
use crate::format::{Model, Spacing};
use std::ops::ControlFlow;

/// A picture to upscale, rows from the top, three interleaved channels.
#[derive(Clone, Copy, Debug)]
pub struct Picture<'a> {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `height × width × 3` samples.
    pub pixels: Pixels<'a>,
}

/// A picture's samples.
#[derive(Clone, Copy, Debug)]
pub enum Pixels<'a> {
    /// 0 to 255.
    Rgb8(&'a [u8]),
    /// 0 to 65535.
    Rgb16(&'a [u16]),
    /// −1 to 1.
    Unit(&'a [f32]),
}

/// How far a run is: told before each tile, and once when all is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The part of the run.
    pub stage: Stage,
    /// The step that comes, from 0; `steps` while decoding.
    pub step: usize,
    /// Steps of the run.
    pub steps: usize,
    /// The tile that comes, from 0; `tiles` when all is done.
    pub tile: usize,
    /// Tiles of the picture.
    pub tiles: usize,
    /// Multiply-accumulates done, in both stages.
    pub done: u64,
    /// Multiply-accumulates of the run, at least 1.
    pub total: u64,
}

/// What a run did.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The backend.
    pub backend: String,
    /// The instruction set or device.
    pub isa: String,
    /// Threads that shared the work.
    pub threads: usize,
    /// The noise's seed.
    pub seed: u64,
    /// DDIM's eta.
    pub eta: f32,
    /// How timesteps were chosen.
    pub spacing: Spacing,
    /// How far the result was made consistent with the picture; 0: not at all.
    pub consistency: f32,
    /// Steps run, which may be one more than asked for.
    pub steps: usize,
    /// What the U-Net was told at each step.
    pub timesteps: Vec<u32>,
    /// Height and width of the latent, padding included.
    pub latent_size: [usize; 2],
    /// Height and width of a tile, in latent pixels.
    pub tile: [usize; 2],
    /// Smallest overlap of tiles, vertically and horizontally, in latent pixels; 0 along an axis with one.
    pub overlap: [usize; 2],
    /// Tiles of the picture.
    pub tiles: usize,
    /// Billions of multiply-accumulates, all steps and tiles.
    pub gmac: f64,
    /// Billions of them that an earlier, interrupted run had done ([`Plan::resume`]).
    pub gmac_before: f64,
    /// The larger of the two sessions' arenas, which exist one after the other; their sum in a
    /// [`Runner`](super::Runner), which keeps both.
    pub arena_bytes: usize,
    /// The sessions' mapped weights, likewise.
    pub weight_bytes: usize,
    /// The pipeline's own buffers ([`Plan::pipeline_bytes`], with [`Plan::resume_bytes`] where the run is kept;
    /// [`Plan::runner_bytes`] in a runner), and the result's where it made it.
    pub pipeline_bytes: usize,
    /// The file in which the latent was; 0 where it was in memory.
    pub scratch_bytes: usize,
}

/// A picture made larger.
#[derive(Clone, Debug, PartialEq)]
pub struct Upscaled {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `height × width × 3`.
    pub rgb: Vec<u8>,
    /// How it was made.
    pub report: Report,
}

/// The progress callback; it stops the run by [`ControlFlow::Break`].
pub type OnProgress<'a> = dyn FnMut(&Progress) -> ControlFlow<()> + 'a;

/// Takes row `y` of the result: `width · 3` samples, nominally −1 to 1, not clamped.
pub type RowSink<'a> = dyn FnMut(usize, &[f32]) + 'a;

/// Upscales `picture` to 8 bits a sample.
///
/// # Errors
/// [`PipelineError`].
pub fn upscale(
    backend: &dyn Backend,
    model: &Model,
    picture: Picture<'_>,
    options: &Options,
    progress: &mut OnProgress<'_>,
) -> Result<Upscaled, PipelineError> {
    let plan = Plan::new(model, picture.width, picture.height, options)?;
    let [height, width] = plan.output_size();
    let line = width * RGB;
    let mut rgb = buffer(height * line, 0u8, "the result")?;
    let mut report = plan.run(backend, picture, progress, &mut |y, row| {
        for (byte, &value) in rgb[y * line..][..line].iter_mut().zip(row) {
            *byte = to_byte(value);
        }
    })?;
    report.pipeline_bytes += rgb.len();
    Ok(Upscaled { width, height, rgb, report })
}

/// Upscales `picture`, giving away each row of the result as soon as it is complete, from the top.
///
/// # Errors
/// [`PipelineError`]. Rows may have been given away before it.
pub fn upscale_rows(
    backend: &dyn Backend,
    model: &Model,
    picture: Picture<'_>,
    options: &Options,
    progress: &mut OnProgress<'_>,
    sink: &mut RowSink<'_>,
) -> Result<Report, PipelineError> {
    Plan::new(model, picture.width, picture.height, options)?.run(backend, picture, progress, sink)
}

/// A decoder's sample, nominally −1 to 1, as a byte, rounded as diffusers' `numpy_to_pil` does (half to even).
#[must_use]
pub fn to_byte(value: f32) -> u8 {
    ((value.clamp(-1.0, 1.0) / 2.0 + 0.5) * 255.0).round_ties_even() as u8
}

/// `len` elements, or an error that says what they were for.
pub(super) fn buffer<T: Copy>(
    len: usize,
    fill: T,
    what: &'static str,
) -> Result<Vec<T>, PipelineError> {
    let mut v = Vec::new();
    v.try_reserve_exact(len).map_err(|_| PipelineError::OutOfMemory {
        bytes: len.saturating_mul(size_of::<T>()),
        what,
    })?;
    v.resize(len, fill);
    Ok(v)
}
