//! Everything that is decided and checked before the first pixel: whether the model fits the task, the
//! steps, the tiles, the cost in multiply-accumulates and the pipeline's own bytes. [`super::budget`] then
//! fits a plan into the memory at hand.

use super::budget::{Strategy, advised, mib};
use super::consistency::Consistency;
use super::field::{Field, Scratch};
use super::resume::ResumeError;
use super::schedule::{Schedule, ScheduleError};
use super::tiles::{Grid, TileError, Tiling};
use crate::backend::{PrepareError, Room, RunError};
use crate::format::{
    ComponentSpec, LatentSpec, Model, ModelError, Role, Spacing, Task, TimestepProjection,
};
use crate::graph::{Graph, ShapeError, ValueKind};
use crate::tensor::Shape;
use std::path::PathBuf;

/// Channels of a picture.
pub const RGB: usize = 3;
/// Pictures of up to this many latent pixels, padding included, are one tile unless the caller says otherwise.
pub const WHOLE_PIXELS: usize = 128 * 128;
/// The largest tile side, in latent pixels, for larger pictures.
pub const DEFAULT_TILE: usize = 128;
/// The overlap of tiles in latent pixels; a quarter of the tile where that is less.
pub const DEFAULT_OVERLAP: usize = 16;

/// A part of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// The U-Net's steps.
    Denoise,
    /// Latents to pixels.
    Decode,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Denoise => "denoise",
            Self::Decode => "decode",
        })
    }
}

/// Why a picture was not made.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// The model has no such component.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The model is sound but not one for super-resolution.
    #[error("model {model} cannot upscale: {why}")]
    Unsuited {
        /// The model.
        model: String,
        /// What does not fit.
        why: String,
    },
    /// Steps, eta or spacing.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// Tile or overlap.
    #[error(transparent)]
    Tiles(#[from] TileError),
    /// Consistency out of range.
    #[error(
        "consistency {consistency} is not between 0 (the model's result as it is) and 1 (made consistent with the input)"
    )]
    Consistency {
        /// The value given.
        consistency: f32,
    },
    /// The size does not suit the model's graph.
    #[error("{stage}: {source}")]
    Shape {
        /// Where.
        stage: Stage,
        /// What the graph says.
        source: ShapeError,
    },
    /// The picture is empty, larger than can be addressed, or not what its size says.
    #[error("the picture is refused: {0}")]
    Picture(String),
    /// The noise given does not suit the picture.
    #[error("the noise is refused: {0}")]
    Noise(String),
    /// A session could not be made.
    #[error("{stage}: {source}")]
    Prepare {
        /// For what.
        stage: Stage,
        /// Why.
        source: PrepareError,
    },
    /// A session failed.
    #[error("{stage}: {source}")]
    Run {
        /// While doing what.
        stage: Stage,
        /// Why.
        source: RunError,
    },
    /// NaN or infinity came out.
    #[error(
        "{stage}: the result of {place} is not finite; the model is damaged or does not suit its own schedule"
    )]
    NonFinite {
        /// Where.
        stage: Stage,
        /// Step or tile.
        place: String,
    },
    /// The decoder gave one colour everywhere.
    #[error(
        "decode: every pixel came out the same ({value:?}), which no picture is; the model is damaged or its weights are missing"
    )]
    Constant {
        /// The colour, in the decoder's range.
        value: [f32; RGB],
    },
    /// Tiles were described for a run that has only one.
    #[error(
        "an exact run has one tile, the whole frame, so it takes neither a tile's size nor an overlap; leave --tile and --overlap out, or use --tiling blend"
    )]
    OneTile,
    /// No way of making the picture fits into the memory allowed.
    #[error(
        "{} do not suffice: the least this run can do with is {} ({strategy}); allow {} (--memory {}) or more, or use a smaller picture",
        mib(*.limit), mib(*.smallest), advised(*.smallest), advised(*.smallest)
    )]
    Budget {
        /// Bytes that the process may have.
        limit: usize,
        /// The smallest number of bytes that would do.
        smallest: usize,
        /// How the picture would be made with them.
        strategy: String,
    },
    /// The pipeline's own buffers could not be had.
    #[error("{bytes} bytes for {what} could not be had; use a smaller picture or tile")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// What for.
        what: &'static str,
    },
    /// The file that the latent stands in cannot be had, or fails.
    #[error(
        "cannot {action} the scratch file of {} in folder {}, which holds the latent because the memory allowed has no room for it: {source}; make room there, name another folder (--scratch), or allow {} more (--memory)",
        mib(*.bytes), folder.display(), mib(*.bytes)
    )]
    Scratch {
        /// `make`, `read`, `write`.
        action: &'static str,
        /// Where.
        folder: PathBuf,
        /// Of the whole file.
        bytes: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file that keeps what is finished is of another run, damaged, or cannot be written.
    #[error(transparent)]
    Resume(#[from] ResumeError),
    /// The progress callback asked to stop.
    #[error("stopped before the picture was complete")]
    Cancelled,
}

/// Numbers given in place of drawn noise.
#[derive(Clone, Debug, PartialEq)]
pub struct NoiseTensor {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements, row-major.
    pub data: Vec<f32>,
}

/// Noise given by the caller.
#[derive(Clone, Debug, PartialEq)]
pub struct GivenNoise {
    /// The latent to begin with, `[1, C, H, W]` or `[C, H, W]`, H and W as [`Plan::latent_size`].
    pub initial: NoiseTensor,
    /// The noise of each step, `[S, C, H, W]` or `[S, 1, C, H, W]`, S at least [`Plan::schedule`]'s steps.
    /// Where absent and eta is not 0, it is drawn from the seed as if the initial noise had been too.
    pub eta: Option<NoiseTensor>,
}

/// What a caller may choose; by default everything is the model's choice, and the seed 0.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// DDIM steps.
    pub steps: Option<u32>,
    /// 0 is deterministic, 1 is ancestral.
    pub eta: Option<f32>,
    /// Seed of the noise, as for `torch.manual_seed`.
    pub seed: u64,
    /// How timesteps are chosen.
    pub spacing: Option<Spacing>,
    /// How far the result is made consistent with the picture, 0 to 1 (see [`Consistency`]).
    pub consistency: Option<f32>,
    /// Largest tile side in latent pixels, rounded down to the model's multiple. By default a picture of up
    /// to [`WHOLE_PIXELS`] is one tile, and tiles of a larger one have at most [`DEFAULT_TILE`]; within a
    /// budget, what it allows.
    pub tile: Option<usize>,
    /// Least overlap of tiles in latent pixels, rounded up to the model's multiple. By default
    /// [`DEFAULT_OVERLAP`], or a quarter of the tile where that is less.
    pub overlap: Option<usize>,
    /// Whether the frame is one tile or several that are blended.
    pub tiling: Tiling,
    /// Of what tiles' GroupNorms take mean and variance.
    pub norms: NormScope,
    /// Noise in place of the seed's.
    pub noise: Option<GivenNoise>,
    /// Where a latent for which a budget has no room may stand instead; by default nowhere.
    pub scratch: Option<Scratch>,
}

/// Of what the GroupNorms of a tile take mean and variance. A picture of one tile is its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NormScope {
    /// Of the picture, estimated from some of its tiles before each step: all tiles are normalised alike,
    /// and the result comes near that of one tile.
    #[default]
    Picture,
    /// Of the tile, as in LDM's patch sampling: tiles differ in tone and contrast as they differ in content.
    Tile,
}

/// The most tiles that an estimate for the whole picture takes, and the share of all tiles.
const MOST_GATHERED: usize = 4;
const GATHERED_SHARE: usize = 4;

/// A run that has passed every check that needs no device.
#[derive(Debug)]
pub struct Plan<'a> {
    pub(super) model: &'a Model,
    pub(super) options: &'a Options,
    pub(super) latent: LatentSpec,
    /// Multiply-accumulates of the U-Net on one tile.
    pub(super) unet_macs: u64,
    pub(super) time: TimestepProjection,
    /// Multiply-accumulates of the decoder on one tile.
    pub(super) decoder_macs: u64,
    pub(super) schedule: Schedule,
    pub(super) consistency: f32,
    pub(super) grid: Grid,
    /// What tiles begin and end at multiples of.
    pub(super) multiple: usize,
    pub(super) size: [usize; 2],
    pub(super) padded: [usize; 2],
    /// How the run stays within its budget, where it has been given one.
    pub(super) strategy: Option<Strategy>,
    /// The tiles of the run that this one goes on from ([`super::resume::tiling`]).
    pub(super) before: Option<String>,
}

impl<'a> Plan<'a> {
    /// Plans the upscaling of a picture of `width × height` pixels.
    ///
    /// # Errors
    /// [`PipelineError`]: everything that can be wrong before a session is made.
    pub fn new(
        model: &'a Model,
        width: usize,
        height: usize,
        options: &'a Options,
    ) -> Result<Self, PipelineError> {
        let unsuited =
            |why: String| PipelineError::Unsuited { model: model.name().to_owned(), why };
        let manifest = model.manifest();
        if manifest.task != Task::SuperResolution {
            return Err(unsuited(
                "it is a set of components, not a super-resolution model; run them one by one"
                    .to_owned(),
            ));
        }
        let latent = manifest
            .latent
            .ok_or_else(|| unsuited("it does not describe its latent space".to_owned()))?;
        let scheduler = manifest
            .scheduler
            .as_ref()
            .ok_or_else(|| unsuited("it does not describe its noise schedule".to_owned()))?;
        let unet = model.component(Role::Unet)?;
        let decoder = model.component(Role::Decoder)?;
        let time = check_unet(unet, latent).map_err(unsuited)?;
        check_decoder(decoder, latent).map_err(unsuited)?;

        if width == 0 || height == 0 {
            return Err(PipelineError::Picture(format!(
                "it is {width}x{height} and has no pixels"
            )));
        }
        let multiple = lcm(unet.multiple as usize, decoder.multiple as usize);
        let factor = latent.factor as usize;
        let pad = |side: usize| side.div_ceil(multiple).checked_mul(multiple);
        let widest = latent.channels as usize + RGB;
        // Whatever the run holds of the whole picture, latent or pixels, is within this.
        let addressable = |[h, w]: [usize; 2]| {
            let pixels = h.checked_mul(factor)?.checked_mul(w.checked_mul(factor)?)?;
            let bytes = pixels.checked_mul(widest)?.checked_mul(4 * size_of::<f32>())?;
            (bytes <= isize::MAX as usize).then_some([h, w])
        };
        let padded = pad(height)
            .zip(pad(width))
            .and_then(|(h, w)| addressable([h, w]))
            .ok_or_else(|| {
                PipelineError::Picture(format!("{width}x{height} is more than can be addressed"))
            })?;

        let steps = options.steps.unwrap_or(manifest.defaults.steps);
        let eta = options.eta.unwrap_or(manifest.defaults.eta);
        let schedule = Schedule::new(scheduler, steps, eta, options.spacing)?;
        let consistency = options.consistency.unwrap_or(manifest.defaults.consistency);
        if !(0.0..=1.0).contains(&consistency) {
            return Err(PipelineError::Consistency { consistency });
        }
        let grid = make_grid(padded, multiple, options)?;
        let plan = Self {
            model,
            options,
            latent,
            unet_macs: tile_macs(unet, Stage::Denoise, grid.tile(), 1)
                .map_err(|e| e.into_error(model))?,
            time,
            decoder_macs: tile_macs(decoder, Stage::Decode, grid.tile(), factor)
                .map_err(|e| e.into_error(model))?,
            schedule,
            consistency,
            grid,
            multiple,
            size: [height, width],
            padded,
            strategy: None,
            before: None,
        };
        plan.check_noise()?;
        let first = plan.schedule.steps[0].timestep;
        if first < scheduler.train_timesteps / 4 * 3 {
            log::warn!(
                "sampling starts at timestep {first} of {}, where the model expects to see part of the picture already; \
                 use more steps or the spacing trailing",
                scheduler.train_timesteps
            );
        }
        Ok(plan)
    }

    /// The steps.
    #[must_use]
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// How far the result is made consistent with the picture; 0: not at all.
    #[must_use]
    pub fn consistency(&self) -> f32 {
        self.consistency
    }

    /// The tiles over the latent.
    #[must_use]
    pub fn grid(&self) -> &Grid {
        &self.grid
    }

    /// Height and width of the latent, padding included.
    #[must_use]
    pub fn latent_size(&self) -> [usize; 2] {
        self.padded
    }

    /// Height and width of the result.
    #[must_use]
    pub fn output_size(&self) -> [usize; 2] {
        let factor = self.latent.factor as usize;
        self.size.map(|side| side * factor)
    }

    /// Multiply-accumulates of the whole run.
    #[must_use]
    pub fn macs(&self) -> u64 {
        let steps = self.schedule.steps.len() as u64;
        let tile = self.unet_macs.saturating_mul(steps);
        let tile = tile.saturating_add(self.decoder_macs);
        tile.saturating_mul((self.grid.tiles() + self.gathered(&self.grid)) as u64)
    }

    /// How many tiles of `grid` are run first, for the picture's norms.
    pub(super) fn gathered(&self, grid: &Grid) -> usize {
        match (self.options.norms, grid.tiles()) {
            (NormScope::Tile, _) | (_, 1) => 0,
            (NormScope::Picture, tiles) => (tiles / GATHERED_SHARE).clamp(1, MOST_GATHERED),
        }
    }

    /// What the run was fitted into its budget by; none before [`Plan::within`].
    #[must_use]
    pub fn strategy(&self) -> Option<&Strategy> {
        self.strategy.as_ref()
    }

    /// What the session of `stage` is given.
    pub(super) fn room(&self, stage: Stage) -> Room {
        let stages = self.strategy.iter().flat_map(|s| &s.stages);
        stages.filter(|s| s.stage == stage).map(|s| s.choice.room()).next().unwrap_or_default()
    }

    /// Bytes of memory of the latent and of one stage's buffers, at the stage that needs more. The picture
    /// that comes in and the one that goes out are the caller's.
    #[must_use]
    pub fn pipeline_bytes(&self) -> usize {
        let [denoise, decode] = self.stage_bytes(&self.grid);
        self.field_bytes(self.scratch().is_some()) + denoise.max(decode)
    }

    /// Bytes of the latent.
    pub(super) fn latent_bytes(&self) -> usize {
        self.field_bytes(false)
    }

    /// Bytes of memory that the latent takes, in memory or `in_file`.
    pub(super) fn field_bytes(&self, in_file: bool) -> usize {
        Field::bytes(self.padded, self.latent.channels as usize, in_file)
    }

    /// Where the latent stands, if not in memory.
    pub(super) fn scratch(&self) -> Option<&Scratch> {
        let in_file = self.strategy.as_ref().is_some_and(|s| s.scratch_bytes > 0);
        self.options.scratch.as_ref().filter(|_| in_file)
    }

    /// Bytes of either stage's buffers where the tiles are those of `grid`.
    pub(super) fn stage_bytes(&self, grid: &Grid) -> [usize; 2] {
        let [h, w] = grid.tile();
        let (channels, factor) = (self.latent.channels as usize, self.latent.factor as usize);
        let floats = |n: usize| n * size_of::<f32>();
        let time = floats(self.time.dim as usize);
        let denoise = floats(h * w * (2 * channels + RGB)) + time + grid.blend_bytes(channels);
        let decode = floats(h * w * (channels + factor * factor * RGB))
            + grid.scaled(factor).blend_bytes(RGB)
            + if self.consistency > 0.0 { Consistency::bytes(self.size, factor) } else { 0 };
        [denoise, decode]
    }

    /// Tiles of at most `side` over this picture.
    pub(super) fn tiles(&self, side: usize) -> Result<Grid, TileError> {
        tiles(self.padded, self.multiple, side, self.options.overlap)
    }

    fn check_noise(&self) -> Result<(), PipelineError> {
        let Some(noise) = &self.options.noise else {
            return Ok(());
        };
        let [h, w] = self.padded;
        let channels = self.latent.channels as usize;
        let field = [channels, h, w];
        let check = |name: &str, t: &NoiseTensor, fits: bool, wanted: String| {
            let elements = t.shape.iter().try_fold(1usize, |product, &d| product.checked_mul(d));
            if !fits || elements != Some(t.data.len()) {
                return Err(PipelineError::Noise(format!(
                    "{name} is {:?} with {} elements, this picture needs {wanted}",
                    t.shape,
                    t.data.len()
                )));
            }
            if t.data.iter().any(|v| !v.is_finite()) {
                return Err(PipelineError::Noise(format!("{name} is not finite")));
            }
            Ok(())
        };
        let shape = &noise.initial.shape[..];
        let fits = shape == field || shape.strip_prefix(&[1]) == Some(&field);
        let wanted = format!("[1, {channels}, {h}, {w}]");
        check("the initial noise", &noise.initial, fits, wanted)?;
        if let (Some(eta), true) = (&noise.eta, self.schedule.eta > 0.0) {
            let steps = self.schedule.steps.len();
            let fits = eta.shape.split_first().is_some_and(|(&s, rest)| {
                s >= steps && (rest == field || rest.strip_prefix(&[1]) == Some(&field))
            });
            let wanted = format!("[{steps}, {channels}, {h}, {w}]");
            check("the steps' noise", eta, fits, wanted)?;
        }
        Ok(())
    }
}

fn make_grid(
    padded: [usize; 2],
    multiple: usize,
    options: &Options,
) -> Result<Grid, PipelineError> {
    if options.tiling == Tiling::Exact {
        if options.tile.is_some() || options.overlap.is_some() {
            return Err(PipelineError::OneTile);
        }
        return Ok(Grid::whole(padded, multiple)?);
    }
    let whole = padded[0] * padded[1] <= WHOLE_PIXELS;
    let side = match options.tile {
        Some(side) => side,
        None if whole => padded[0].max(padded[1]),
        None => DEFAULT_TILE.max(multiple),
    };
    Ok(tiles(padded, multiple, side, options.overlap)?)
}

/// Tiles of at most `side`. The default overlap gives way to the tile; one that was asked for does not.
fn tiles(
    padded: [usize; 2],
    multiple: usize,
    side: usize,
    overlap: Option<usize>,
) -> Result<Grid, TileError> {
    let largest = (side / multiple).saturating_sub(1) * multiple;
    let overlap = overlap.unwrap_or_else(|| DEFAULT_OVERLAP.min(side / 4).min(largest));
    Grid::new(padded, multiple, side, overlap)
}

/// Why a component does not do as part of the pipeline.
enum Misfit {
    Shape(Stage, ShapeError),
    Why(String),
}

impl Misfit {
    fn into_error(self, model: &Model) -> PipelineError {
        match self {
            Self::Shape(stage, source) => PipelineError::Shape { stage, source },
            Self::Why(why) => PipelineError::Unsuited { model: model.name().to_owned(), why },
        }
    }
}

/// Multiply-accumulates of `spec` on one tile, which must come out `factor` times as large.
fn tile_macs(
    spec: &ComponentSpec,
    stage: Stage,
    [h, w]: [usize; 2],
    factor: usize,
) -> Result<u64, Misfit> {
    let graph = &spec.graph;
    let shapes = graph.infer(&[(h, w)]).map_err(|source| Misfit::Shape(stage, source))?;
    let out = shapes[graph.outputs[0].value.index()];
    let wanted = Shape::Map { h: h * factor, w: w * factor, c: out.channels() };
    if out != wanted {
        return Err(Misfit::Why(format!("its {} makes {out} of {h}x{w}, not {wanted}", spec.role)));
    }
    Ok(graph.macs(&shapes).max(1))
}

/// Channels of the graph's maps and vectors, in or out.
fn kinds(graph: &Graph, inputs: bool) -> Vec<ValueKind> {
    let ports = if inputs { &graph.inputs } else { &graph.outputs };
    ports.iter().map(|p| graph.kind(p.value)).collect()
}

fn check_unet(unet: &ComponentSpec, latent: LatentSpec) -> Result<TimestepProjection, String> {
    let time = unet.timestep.ok_or("its unet does not say how it takes a timestep")?;
    let channels = latent.channels;
    let sample = ValueKind::Map(channels + RGB as u32);
    let mut inputs = kinds(&unet.graph, true);
    inputs.sort_by_key(|k| matches!(k, ValueKind::Vector(_)));
    if inputs != [sample, ValueKind::Vector(time.dim)] {
        return Err(format!(
            "its unet takes {inputs:?}, not a latent of {channels} channels with a picture of {RGB} ({sample:?}) and a timestep ({:?})",
            ValueKind::Vector(time.dim)
        ));
    }
    let outputs = kinds(&unet.graph, false);
    if outputs != [ValueKind::Map(channels)] {
        return Err(format!("its unet gives {outputs:?}, not a latent of {channels} channels"));
    }
    Ok(time)
}

fn check_decoder(decoder: &ComponentSpec, latent: LatentSpec) -> Result<(), String> {
    let inputs = kinds(&decoder.graph, true);
    if inputs != [ValueKind::Map(latent.channels)] {
        return Err(format!(
            "its decoder takes {inputs:?}, not a latent of {} channels",
            latent.channels
        ));
    }
    let outputs = kinds(&decoder.graph, false);
    if outputs != [ValueKind::Map(RGB as u32)] {
        return Err(format!("its decoder gives {outputs:?}, not a picture of {RGB} channels"));
    }
    Ok(())
}

fn lcm(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}
