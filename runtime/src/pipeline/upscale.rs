//! Super-resolution: a small picture conditions the denoising of a latent on its own grid, and the decoder
//! makes the latent a picture `factor` times as large (Rombach et al. 2022, section 4.4).
//!
//! Each step runs the U-Net over every tile and blends the predictions, then moves the whole latent, so
//! tiles agree through one noise field. A picture whose sides are not multiples of what the model needs
//! is continued at its right and lower edge by reflection, and the result is cropped: no pixel is lost.
//! Rows of the result are made consistent with the picture, where that is wanted, as they leave the decoder.
//! The U-Net's session is dropped before the decoder's is made.

use super::consistency::Consistency;
use super::noise::Generator;
use super::plan::{GivenNoise, Options, PipelineError, Plan, RGB, Stage};
use super::tiles::{Blend, Grid, Weights};
use crate::backend::{Backend, Session, SessionStats};
use crate::format::{Model, Role, Spacing};
use crate::tensor::Shape;
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
    /// −1 to 1.
    Unit(&'a [f32]),
}

/// How far a run is. Called before each tile, and once when all is done.
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
    /// The larger of the two sessions' arenas, which never exist at once.
    pub arena_bytes: usize,
    /// The larger of the two sessions' mapped weights.
    pub weight_bytes: usize,
    /// The pipeline's own buffers ([`Plan::pipeline_bytes`]), and the result's where it made it.
    pub pipeline_bytes: usize,
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

/// A decoder's sample as a byte, rounded as diffusers' `numpy_to_pil` does (half to even).
fn to_byte(value: f32) -> u8 {
    ((value.clamp(-1.0, 1.0) / 2.0 + 0.5) * 255.0).round_ties_even() as u8
}

fn buffer<T: Copy>(len: usize, fill: T, what: &'static str) -> Result<Vec<T>, PipelineError> {
    let mut v = Vec::new();
    v.try_reserve_exact(len).map_err(|_| PipelineError::OutOfMemory {
        bytes: len.saturating_mul(size_of::<T>()),
        what,
    })?;
    v.resize(len, fill);
    Ok(v)
}

/// The picture as the U-Net sees it: −1 to 1, continued by reflection.
struct Condition<'a> {
    picture: Picture<'a>,
}

impl<'a> Condition<'a> {
    fn new(picture: Picture<'a>, [height, width]: [usize; 2]) -> Result<Self, PipelineError> {
        let found = match picture.pixels {
            Pixels::Rgb8(p) => p.len(),
            Pixels::Unit(p) => p.len(),
        };
        let refuse = |why: String| Err(PipelineError::Picture(why));
        if [picture.height, picture.width] != [height, width] {
            return refuse(format!(
                "it is {}x{}, the run was planned for {width}x{height}",
                picture.width, picture.height
            ));
        }
        if found != height * width * RGB {
            return refuse(format!(
                "{found} samples were given for {width}x{height} pixels of {RGB}"
            ));
        }
        if let Pixels::Unit(p) = picture.pixels
            && let Some(i) = p.iter().position(|v| !v.is_finite())
        {
            let pixel = i / RGB;
            return refuse(format!(
                "the pixel at column {}, row {} is not finite",
                pixel % width,
                pixel / width
            ));
        }
        Ok(Self { picture })
    }

    fn pixel(&self, y: usize, x: usize) -> [f32; RGB] {
        let Picture { width, height, .. } = self.picture;
        let start = (reflect(y, height) * width + reflect(x, width)) * RGB;
        std::array::from_fn(|c| match self.picture.pixels {
            Pixels::Rgb8(p) => 2.0 * (f32::from(p[start + c]) / 255.0) - 1.0,
            Pixels::Unit(p) => p[start + c],
        })
    }

    fn row(&self, y: usize, to: &mut [f32]) {
        for (x, pixel) in to.chunks_exact_mut(RGB).enumerate() {
            pixel.copy_from_slice(&self.pixel(y, x));
        }
    }
}

/// Where position `i` lies in `0..len` when the edges are mirrors; the edge itself is not repeated, and a
/// single element is all there is.
fn reflect(i: usize, len: usize) -> usize {
    if len == 1 {
        return 0;
    }
    let folded = i % (2 * (len - 1));
    folded.min(2 * (len - 1) - folded)
}

/// Keeps count and asks whether to go on.
struct Meter<'p, 'f> {
    on_progress: &'p mut OnProgress<'f>,
    at: Progress,
}

impl Meter<'_, '_> {
    fn ask(&mut self) -> Result<(), PipelineError> {
        match (self.on_progress)(&self.at) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(PipelineError::Cancelled),
        }
    }
}

impl Plan<'_> {
    /// Runs the plan on `picture`; rows of the result go to `sink` from the top.
    ///
    /// # Errors
    /// [`PipelineError`]. Rows may have been given away before it.
    pub fn run(
        &self,
        backend: &dyn Backend,
        picture: Picture<'_>,
        progress: &mut OnProgress<'_>,
        sink: &mut RowSink<'_>,
    ) -> Result<Report, PipelineError> {
        let condition = Condition::new(picture, self.size)?;
        let mut meter = Meter {
            on_progress: progress,
            at: Progress {
                stage: Stage::Denoise,
                step: 0,
                steps: self.schedule.steps.len(),
                tile: 0,
                tiles: self.grid.tiles(),
                done: 0,
                total: self.macs(),
            },
        };
        let (latent, unet) = self.denoise(backend, &condition, &mut meter)?;
        let decoder = self.decode(backend, &latent, &condition, &mut meter, sink)?;
        meter.at.tile = meter.at.tiles;
        meter.ask()?;
        Ok(Report {
            isa: if unet.isa == decoder.isa {
                unet.isa
            } else {
                format!("{}, {}", unet.isa, decoder.isa)
            },
            backend: unet.backend,
            threads: unet.threads.max(decoder.threads),
            seed: self.options.seed,
            eta: self.schedule.eta,
            spacing: self.schedule.spacing,
            consistency: self.consistency,
            steps: self.schedule.steps.len(),
            timesteps: self.schedule.timesteps(),
            latent_size: self.padded,
            tile: self.grid.tile(),
            overlap: [self.grid.rows.overlap(), self.grid.cols.overlap()],
            tiles: self.grid.tiles(),
            gmac: self.macs() as f64 / 1e9,
            arena_bytes: unet.arena_bytes.max(decoder.arena_bytes),
            weight_bytes: unet.weight_bytes.max(decoder.weight_bytes),
            pipeline_bytes: self.pipeline_bytes(),
        })
    }

    fn prepare<'s>(
        &'s self,
        backend: &dyn Backend,
        stage: Stage,
    ) -> Result<Box<dyn Session + 's>, PipelineError> {
        let role = stage.role();
        let [h, w] = self.grid.tile();
        let session = backend
            .prepare(self.model, role, h, w, self.room(stage))
            .map_err(|source| PipelineError::Prepare { stage, source })?;
        let stats = session.stats();
        log::info!(
            "{stage}: {role} on {} ({}), {} threads, {} tiles of {h}x{w}, arena {} bytes",
            stats.backend,
            stats.isa,
            stats.threads,
            self.grid.tiles(),
            stats.arena_bytes
        );
        Ok(session)
    }

    /// All steps. The latent has been checked to be finite after each.
    fn denoise(
        &self,
        backend: &dyn Backend,
        condition: &Condition<'_>,
        meter: &mut Meter<'_, '_>,
    ) -> Result<(Vec<f32>, SessionStats), PipelineError> {
        let stage = Stage::Denoise;
        let channels = self.latent.channels as usize;
        let (mut latent, mut noise) = self.initial_latent()?;
        let mut session = self.prepare(backend, stage)?;
        let stats = session.stats();
        let unet = self.model.component(Role::Unet)?;
        let time_first = matches!(session.inputs()[0].shape, Shape::Vector { .. });

        let [tile_h, tile_w] = self.grid.tile();
        let wide = channels + RGB;
        let mut sample = buffer(tile_h * tile_w * wide, 0f32, "a tile's input")?;
        let mut output = buffer(tile_h * tile_w * channels, 0f32, "a tile's output")?;
        let mut time_proj = buffer(self.time.dim as usize, 0f32, "the timestep")?;
        let mut blend = blend(&self.grid, channels, Weights::BorderDistance)?;
        let width = self.padded[1];
        for (index, step) in self.schedule.steps.iter().enumerate() {
            self.time.project(step.timestep as f32, &mut time_proj);
            session.set_timestep_group(unet.timestep_group(step.timestep as f32));
            meter.at.step = index;
            for (tile, (top, left)) in starts(&self.grid).enumerate() {
                meter.at.tile = tile;
                meter.ask()?;
                for (y, row) in sample.chunks_exact_mut(tile_w * wide).enumerate() {
                    for (x, pixel) in row.chunks_exact_mut(wide).enumerate() {
                        let at = ((top + y) * width + left + x) * channels;
                        let (z, lr) = pixel.split_at_mut(channels);
                        z.copy_from_slice(&latent[at..][..channels]);
                        lr.copy_from_slice(&condition.pixel(top + y, left + x));
                    }
                }
                let inputs: [&[f32]; 2] =
                    if time_first { [&time_proj, &sample] } else { [&sample, &time_proj] };
                session
                    .run(&inputs, &mut [&mut output])
                    .map_err(|source| PipelineError::Run { stage, source })?;
                // A row that is complete is read by no later tile of this step, so it can move on.
                blend.add(&output, &mut |y, row| {
                    step.update(&mut latent[y * row.len()..][..row.len()], row);
                });
                meter.at.done += self.unet_macs;
            }
            noise.add(index, step.sigma, channels, &mut latent);
            if latent.iter().any(|v| !v.is_finite()) {
                return Err(PipelineError::NonFinite {
                    stage,
                    place: format!("step {} (timestep {})", index + 1, step.timestep),
                });
            }
        }
        Ok((latent, stats))
    }

    /// The latent to begin with, NHWC, and the noise of the steps. DDIM's initial deviation is 1.
    fn initial_latent(&self) -> Result<(Vec<f32>, StepNoise<'_>), PipelineError> {
        let channels = self.latent.channels as usize;
        let pixels = self.padded[0] * self.padded[1];
        let mut latent = buffer(pixels * channels, 0f32, "the latent")?;
        let mut generator = Generator::new(self.options.seed);
        let given = self.options.noise.as_ref();
        // Drawn even where noise was given, so that the noise of the steps is the seed's either way.
        generator.randn_nhwc(channels, pixels, |i, value| latent[i] = value);
        if let Some(GivenNoise { initial, .. }) = given {
            for (c, plane) in initial.data.chunks_exact(pixels).enumerate() {
                for (pixel, &value) in plane.iter().enumerate() {
                    latent[pixel * channels + c] = value;
                }
            }
        }
        let noise = StepNoise {
            generator,
            given: given.and_then(|g| g.eta.as_ref()).map(|t| &t.data[..]),
            draw: self.schedule.eta > 0.0,
        };
        Ok((latent, noise))
    }

    /// The last stage, where it is wanted.
    fn make_consistency(&self) -> Result<Option<Consistency>, PipelineError> {
        if self.consistency == 0.0 {
            return Ok(None);
        }
        log::info!("consistency with the input {}", self.consistency);
        let factor = self.latent.factor as usize;
        let made = Consistency::new(self.size, factor, self.consistency);
        made.map(Some).ok_or_else(|| PipelineError::OutOfMemory {
            bytes: Consistency::bytes(self.size, factor),
            what: "consistency with the input",
        })
    }

    /// Latent to pixels, tile by tile; complete rows are made consistent with the picture.
    fn decode(
        &self,
        backend: &dyn Backend,
        latent: &[f32],
        condition: &Condition<'_>,
        meter: &mut Meter<'_, '_>,
        sink: &mut RowSink<'_>,
    ) -> Result<SessionStats, PipelineError> {
        let stage = Stage::Decode;
        meter.at.stage = stage;
        meter.at.step = meter.at.steps;
        let mut session = self.prepare(backend, stage)?;
        let stats = session.stats();
        let (channels, factor) = (self.latent.channels as usize, self.latent.factor as usize);
        let grid = self.grid.scaled(factor);
        let [tile_h, tile_w] = self.grid.tile();
        let [height, width] = self.output_size();
        let mut sample = buffer(tile_h * tile_w * channels, 0f32, "a tile's input")?;
        let mut output = buffer(tile_h * tile_w * factor * factor * RGB, 0f32, "a tile's pixels")?;
        let mut blend = blend(&grid, RGB, Weights::CrossFade)?;
        let mut consistency = self.make_consistency()?;
        let mut first = None;
        let mut constant = grid.rows.len() * grid.cols.len() > 1;
        for (tile, (top, left)) in starts(&self.grid).enumerate() {
            meter.at.tile = tile;
            meter.ask()?;
            for (y, row) in sample.chunks_exact_mut(tile_w * channels).enumerate() {
                let start = ((top + y) * self.padded[1] + left) * channels;
                for (to, from) in row.iter_mut().zip(&latent[start..]) {
                    *to = from / self.latent.scale + self.latent.shift;
                }
            }
            session
                .run(&[&sample], &mut [&mut output])
                .map_err(|source| PipelineError::Run { stage, source })?;
            if output.iter().any(|v| !v.is_finite()) {
                return Err(PipelineError::NonFinite {
                    stage,
                    place: format!("tile {} of {}", tile + 1, meter.at.tiles),
                });
            }
            let colour = *first.get_or_insert([output[0], output[1], output[2]]);
            constant = constant && output.chunks_exact(RGB).all(|pixel| pixel == colour);
            if constant && tile + 1 == meter.at.tiles {
                return Err(PipelineError::Constant { value: colour });
            }
            blend.add(&output, &mut |y, row| {
                if y >= height {
                    return;
                }
                let row = &row[..width * RGB];
                match &mut consistency {
                    None => sink(y, row),
                    Some(c) => c.push(y, row, &|i, input| condition.row(i, input), sink),
                }
            });
            meter.at.done += self.decoder_macs;
        }
        Ok(stats)
    }
}

/// Top left corners of the tiles, in order.
fn starts(grid: &Grid) -> impl Iterator<Item = (usize, usize)> {
    let (rows, cols) = (grid.rows.starts(), grid.cols.starts());
    rows.iter().flat_map(move |&top| cols.iter().map(move |&left| (top, left)))
}

fn blend(grid: &Grid, channels: usize, weights: Weights) -> Result<Blend<'_>, PipelineError> {
    Blend::new(grid, channels, weights).ok_or(PipelineError::OutOfMemory {
        bytes: grid.blend_bytes(channels),
        what: "the tiles' blending",
    })
}

/// Noise added after each step (eq. 16), drawn for the whole latent as `torch.randn` would.
struct StepNoise<'a> {
    generator: Generator,
    given: Option<&'a [f32]>,
    draw: bool,
}

impl StepNoise<'_> {
    /// Adds the noise of step `index` to `latent` (NHWC).
    fn add(&mut self, index: usize, sigma: f32, channels: usize, latent: &mut [f32]) {
        if !self.draw {
            return;
        }
        let pixels = latent.len() / channels;
        match self.given {
            Some(data) => {
                let field = &data[index * latent.len()..][..latent.len()];
                for (c, plane) in field.chunks_exact(pixels).enumerate() {
                    for (pixel, &value) in plane.iter().enumerate() {
                        latent[pixel * channels + c] += sigma * value;
                    }
                }
            }
            None => {
                self.generator.randn_nhwc(channels, pixels, |i, value| latent[i] += sigma * value)
            }
        }
    }
}
