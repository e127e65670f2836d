//! Runs a plan: denoising and decoding, once for a picture or again and again for the frames of a stream.
//!
//! Each step runs the U-Net over every tile and blends the predictions, then moves the whole latent, so
//! tiles agree through one noise field. A picture whose sides are not multiples of what the model needs
//! is continued at its right and lower edge by reflection, and the result is cropped: no pixel is lost.
//! Rows of the result are made consistent with the picture, where that is wanted, as they leave the decoder.
//!
//! A single picture drops the U-Net's session before the decoder's is made, which keeps the peak low. A
//! [`Runner`] keeps both sessions and every buffer, so that no frame but the first waits for them and none
//! allocates. What a journal is told of a run, so that it can go on after a power cut, is `resume`'s.

use super::condition::Condition;
use super::consistency::Consistency;
use super::field::{Field, Planes};
use super::noise::Generator;
use super::plan::{GivenNoise, PipelineError, Plan, RGB, Stage};
use super::resume::{Journal, Resume};
use super::tiles::{Blend, Grid, Weights};
use super::upscale::{OnProgress, Picture, Progress, Report, RowSink, buffer};
use crate::backend::{Backend, Norms, Session, SessionStats};
use crate::format::Role;
use crate::tensor::Shape;
use std::ops::ControlFlow;

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

    /// The decoder's first tile comes.
    fn decode(&mut self) {
        self.at.stage = Stage::Decode;
        self.at.step = self.at.steps;
    }

    fn finish(&mut self) -> Result<(), PipelineError> {
        self.at.tile = self.at.tiles;
        self.ask()
    }
}

impl<'a> Plan<'a> {
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
        self.run_once(backend, picture, None, progress, sink)
    }

    /// As [`Plan::run`], keeping what is finished in a file: a run that ended early, in whatever way, goes
    /// on where it was when it is started again, and gives the same bits. Rows of the result are given
    /// away again from the top.
    ///
    /// The file stays when the run has succeeded, because the caller has still to put its output in place;
    /// [`Resume::remove`] is for after that.
    ///
    /// # Errors
    /// [`PipelineError`]; [`PipelineError::Resume`] where the file is of another run, damaged, or cannot be
    /// written.
    pub fn resume(
        &self,
        backend: &dyn Backend,
        picture: Picture<'_>,
        resume: &Resume,
        progress: &mut OnProgress<'_>,
        sink: &mut RowSink<'_>,
    ) -> Result<Report, PipelineError> {
        self.run_once(backend, picture, Some(resume), progress, sink)
    }

    fn run_once(
        &self,
        backend: &dyn Backend,
        picture: Picture<'_>,
        resume: Option<&Resume>,
        progress: &mut OnProgress<'_>,
        sink: &mut RowSink<'_>,
    ) -> Result<Report, PipelineError> {
        let condition = Condition::new(picture, self.size)?;
        let mut latent = self.make_latent()?;
        let mut noise = self.initial_latent(&mut latent)?;
        let mut journal = match resume {
            None => None,
            Some(resume) => Some(Journal::open(resume, self.identity(&picture), &mut latent)?),
        };
        let first = journal.as_ref().map_or(0, Journal::step);
        let mut meter = self.meter(progress, first);
        let mut unet = None;
        if first < self.schedule.steps.len() {
            let mut stage = Denoiser::new(self, backend)?;
            noise.skip(first, latent.len());
            stage.run(self, &condition, &mut latent, &mut noise, &mut meter, journal.as_mut())?;
            unet = Some(stage.session.stats());
        }
        meter.decode();
        let mut stage = Decoder::new(self, backend)?;
        stage.run(self, &mut latent, &condition, &mut meter, journal.as_mut(), sink)?;
        meter.finish()?;
        let decoder = stage.session.stats();
        let unet = unet.as_ref().unwrap_or(&decoder);
        Ok(Report {
            gmac_before: journal.map_or(0.0, |j| self.macs_of(first, j.recalled()) as f64 / 1e9),
            arena_bytes: unet.arena_bytes.max(decoder.arena_bytes),
            weight_bytes: unet.weight_bytes.max(decoder.weight_bytes),
            pipeline_bytes: self.pipeline_bytes() + resume.map_or(0, |_| self.resume_bytes()),
            ..self.report(unet, &decoder)
        })
    }

    /// Prepares both stages and every buffer, for pictures of the planned size.
    ///
    /// # Errors
    /// [`PipelineError`].
    pub fn runner<'p>(&'p self, backend: &'p dyn Backend) -> Result<Runner<'p, 'a>, PipelineError> {
        let denoiser = Denoiser::new(self, backend)?;
        let decoder = Decoder::new(self, backend)?;
        let (unet, pixels) = (denoiser.session.stats(), decoder.session.stats());
        let report = Report {
            arena_bytes: unet.arena_bytes + pixels.arena_bytes,
            weight_bytes: unet.weight_bytes + pixels.weight_bytes,
            pipeline_bytes: self.runner_bytes(),
            ..self.report(&unet, &pixels)
        };
        let latent = self.make_latent()?;
        Ok(Runner { plan: self, latent, denoiser, decoder, report, whole: true })
    }

    /// Bytes of a [`Runner`]'s own buffers: those of both stages.
    #[must_use]
    pub fn runner_bytes(&self) -> usize {
        let [denoise, decode] = self.stage_bytes(&self.grid);
        self.field_bytes(self.scratch().is_some()) + denoise + decode
    }

    fn make_latent(&self) -> Result<Field, PipelineError> {
        Field::new(self.padded, self.latent.channels as usize, self.scratch())
    }

    fn meter<'p, 'f>(&self, on_progress: &'p mut OnProgress<'f>, first: usize) -> Meter<'p, 'f> {
        let at = Progress {
            stage: Stage::Denoise,
            step: first,
            steps: self.schedule.steps.len(),
            tile: 0,
            tiles: self.grid.tiles(),
            done: self.macs_of(first, 0),
            total: self.macs(),
        };
        Meter { on_progress, at }
    }

    /// Multiply-accumulates of the first `steps` steps, and of `tiles` tiles of what comes after them.
    fn macs_of(&self, steps: usize, tiles: usize) -> u64 {
        let next =
            if steps < self.schedule.steps.len() { self.unet_macs } else { self.decoder_macs };
        let runs = self.grid.tiles() + self.gathered(&self.grid);
        let before = self.unet_macs.saturating_mul((steps * runs) as u64);
        before.saturating_add(next.saturating_mul(tiles as u64))
    }

    /// What is known of a run beforehand; memory is the caller's to say.
    fn report(&self, unet: &SessionStats, decoder: &SessionStats) -> Report {
        Report {
            isa: if unet.isa == decoder.isa {
                unet.isa.clone()
            } else {
                format!("{}, {}", unet.isa, decoder.isa)
            },
            backend: unet.backend.clone(),
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
            gmac_before: 0.0,
            arena_bytes: 0,
            weight_bytes: 0,
            pipeline_bytes: 0,
            scratch_bytes: self.scratch().map_or(0, |_| self.latent_bytes()),
        }
    }

    fn prepare(
        &self,
        backend: &dyn Backend,
        stage: Stage,
    ) -> Result<Box<dyn Session + 'a>, PipelineError> {
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

    /// Fills `latent` with what the run begins with; the noise of the steps comes after it in the same
    /// sequence. DDIM's initial deviation is 1.
    fn initial_latent(&self, latent: &mut Field) -> Result<StepNoise<'_>, PipelineError> {
        let mut generator = Generator::new(self.options.seed);
        let given = self.options.noise.as_ref();
        match given {
            None => latent.fill(Planes::Drawn(&mut generator))?,
            Some(GivenNoise { initial, .. }) => {
                // Drawn all the same, so that the noise of the steps is the seed's either way.
                generator.randn(latent.len(), |_, _| ());
                latent.fill(Planes::Given(&initial.data))?;
            }
        }
        Ok(StepNoise {
            generator,
            given: given.and_then(|g| g.eta.as_ref()).map(|t| &t.data[..]),
            draw: self.schedule.eta > 0.0,
        })
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
}

/// A plan with both its stages prepared, for picture after picture of one size.
///
/// Sessions, arenas, weights and buffers stay between pictures: after the first, a run allocates nothing,
/// provided the sink and the progress callback do not. Every picture is denoised from the same noise, the
/// seed's: of two equal frames the results are equal, and what the model adds to a still scene stands
/// still instead of flickering.
pub struct Runner<'p, 'a> {
    plan: &'p Plan<'a>,
    latent: Field,
    denoiser: Denoiser<'a>,
    decoder: Decoder<'a>,
    report: Report,
    /// Whether the last run came to its end: one that did not has left half-filled sums behind.
    whole: bool,
}

impl std::fmt::Debug for Runner<'_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runner").field("report", &self.report).finish_non_exhaustive()
    }
}

impl Runner<'_, '_> {
    /// Runs the plan on the next picture; rows of the result go to `sink` from the top. The result is that of
    /// [`Plan::run`], bit for bit.
    ///
    /// # Errors
    /// [`PipelineError`]. Rows may have been given away before it. The runner can be used again.
    pub fn run(
        &mut self,
        picture: Picture<'_>,
        progress: &mut OnProgress<'_>,
        sink: &mut RowSink<'_>,
    ) -> Result<(), PipelineError> {
        let plan = self.plan;
        let condition = Condition::new(picture, plan.size)?;
        if !self.whole {
            self.denoiser.empty(plan)?;
            self.decoder.empty(plan)?;
        }
        self.whole = false;
        let mut noise = plan.initial_latent(&mut self.latent)?;
        let mut meter = plan.meter(progress, 0);
        self.denoiser.run(plan, &condition, &mut self.latent, &mut noise, &mut meter, None)?;
        meter.decode();
        self.decoder.run(plan, &mut self.latent, &condition, &mut meter, None, sink)?;
        self.whole = true;
        meter.finish()
    }

    /// What each run does and takes.
    #[must_use]
    pub fn report(&self) -> &Report {
        &self.report
    }
}

/// The U-Net and its buffers.
struct Denoiser<'m> {
    session: Box<dyn Session + 'm>,
    time_first: bool,
    sample: Vec<f32>,
    output: Vec<f32>,
    time_proj: Vec<f32>,
    blend: Blend,
}

impl<'m> Denoiser<'m> {
    fn new(plan: &Plan<'m>, backend: &dyn Backend) -> Result<Self, PipelineError> {
        let session = plan.prepare(backend, Stage::Denoise)?;
        let channels = plan.latent.channels as usize;
        let [h, w] = plan.grid.tile();
        Ok(Self {
            time_first: matches!(session.inputs()[0].shape, Shape::Vector { .. }),
            session,
            sample: buffer(h * w * (channels + RGB), 0f32, "a tile's input")?,
            output: buffer(h * w * channels, 0f32, "a tile's output")?,
            time_proj: buffer(plan.time.dim as usize, 0f32, "the timestep")?,
            blend: predictions(plan)?,
        })
    }

    /// Forgets what a run that ended early has left.
    fn empty(&mut self, plan: &Plan<'_>) -> Result<(), PipelineError> {
        self.blend = predictions(plan)?;
        Ok(())
    }

    /// The steps from that of `meter` on. The latent has been checked to be finite after each.
    fn run(
        &mut self,
        plan: &Plan<'_>,
        condition: &Condition<'_>,
        latent: &mut Field,
        noise: &mut StepNoise<'_>,
        meter: &mut Meter<'_, '_>,
        mut journal: Option<&mut Journal<'_>>,
    ) -> Result<(), PipelineError> {
        let stage = Stage::Denoise;
        let unet = plan.model.component(Role::Unet)?;
        for (index, step) in plan.schedule.steps.iter().enumerate().skip(meter.at.step) {
            if let Some(journal) = &mut journal {
                journal.reach(index, latent, false)?;
            }
            plan.time.project(step.timestep as f32, &mut self.time_proj);
            self.session.set_timestep_group(unet.timestep_group(step.timestep as f32));
            meter.at.step = index;
            if plan.gathered(&plan.grid) > 0 {
                self.session.use_norms(Norms::Gather);
                for at in sampled(plan) {
                    meter.ask()?;
                    self.predict(plan, condition, latent, at)?;
                    meter.at.done += plan.unet_macs;
                }
                self.session.use_norms(Norms::Gathered);
            }
            for (tile, at) in starts(&plan.grid).enumerate() {
                meter.at.tile = tile;
                meter.ask()?;
                if !recall(&mut journal, tile, &mut self.output)? {
                    self.predict(plan, condition, latent, at)?;
                    if let Some(journal) = &mut journal {
                        journal.record(tile, &self.output)?;
                    }
                }
                let mut moved = Ok(());
                // A row that is complete is read by no later tile of this step, so it can move on.
                self.blend.add(&self.output, &mut |y, row| {
                    if moved.is_ok() {
                        moved = latent.update(y, |values| step.update(values, row));
                    }
                });
                moved?;
                meter.at.done += plan.unet_macs;
            }
            noise.add(index, step.sigma, latent)?;
            latent.settle()?;
            if !latent.is_finite() {
                return Err(PipelineError::NonFinite {
                    stage,
                    place: format!("step {} (timestep {})", index + 1, step.timestep),
                });
            }
        }
        Ok(())
    }

    /// The prediction for the tile that begins at (`top`, `left`), into `output`.
    fn predict(
        &mut self,
        plan: &Plan<'_>,
        condition: &Condition<'_>,
        latent: &mut Field,
        (top, left): (usize, usize),
    ) -> Result<(), PipelineError> {
        let channels = plan.latent.channels as usize;
        let (width, wide) = (plan.grid.cols.tile(), channels + RGB);
        latent.window((top, left), width, wide, &mut self.sample)?;
        for (y, row) in self.sample.chunks_exact_mut(width * wide).enumerate() {
            for (x, pixel) in row.chunks_exact_mut(wide).enumerate() {
                pixel[channels..].copy_from_slice(&condition.pixel(top + y, left + x));
            }
        }
        let inputs: [&[f32]; 2] = if self.time_first {
            [&self.time_proj, &self.sample]
        } else {
            [&self.sample, &self.time_proj]
        };
        let stage = Stage::Denoise;
        self.session
            .run(&inputs, &mut [&mut self.output])
            .map_err(|source| PipelineError::Run { stage, source })
    }
}

/// The decoder and its buffers.
struct Decoder<'m> {
    session: Box<dyn Session + 'm>,
    sample: Vec<f32>,
    output: Vec<f32>,
    blend: Blend,
    consistency: Option<Consistency>,
}

impl<'m> Decoder<'m> {
    fn new(plan: &Plan<'m>, backend: &dyn Backend) -> Result<Self, PipelineError> {
        let session = plan.prepare(backend, Stage::Decode)?;
        let (channels, factor) = (plan.latent.channels as usize, plan.latent.factor as usize);
        let [h, w] = plan.grid.tile();
        Ok(Self {
            session,
            sample: buffer(h * w * channels, 0f32, "a tile's input")?,
            output: buffer(h * w * factor * factor * RGB, 0f32, "a tile's pixels")?,
            blend: pixels(plan)?,
            consistency: plan.make_consistency()?,
        })
    }

    /// Forgets what a run that ended early has left.
    fn empty(&mut self, plan: &Plan<'_>) -> Result<(), PipelineError> {
        self.blend = pixels(plan)?;
        self.consistency = plan.make_consistency()?;
        Ok(())
    }

    /// Latent to pixels, tile by tile; complete rows are made consistent with the picture.
    fn run(
        &mut self,
        plan: &Plan<'_>,
        latent: &mut Field,
        condition: &Condition<'_>,
        meter: &mut Meter<'_, '_>,
        mut journal: Option<&mut Journal<'_>>,
        sink: &mut RowSink<'_>,
    ) -> Result<(), PipelineError> {
        let stage = Stage::Decode;
        let [height, width] = plan.output_size();
        let factor = plan.latent.factor as usize;
        if let Some(journal) = &mut journal {
            journal.reach(meter.at.steps, latent, true)?;
        }
        let mut first = None;
        let mut constant = plan.padded[0] * plan.padded[1] * factor > 1;
        if plan.gathered(&plan.grid) > 0 {
            self.session.use_norms(Norms::Gather);
            for at in sampled(plan) {
                meter.ask()?;
                self.decode(plan, latent, at)?;
                meter.at.done += plan.decoder_macs;
            }
            self.session.use_norms(Norms::Gathered);
        }
        for (tile, at) in starts(&plan.grid).enumerate() {
            meter.at.tile = tile;
            meter.ask()?;
            if !recall(&mut journal, tile, &mut self.output)? {
                self.decode(plan, latent, at)?;
                if self.output.iter().any(|v| !v.is_finite()) {
                    return Err(PipelineError::NonFinite {
                        stage,
                        place: format!("tile {} of {}", tile + 1, meter.at.tiles),
                    });
                }
                if let Some(journal) = &mut journal {
                    journal.record(tile, &self.output)?;
                }
            }
            let colour = *first.get_or_insert([self.output[0], self.output[1], self.output[2]]);
            constant = constant && self.output.chunks_exact(RGB).all(|pixel| pixel == colour);
            if constant && tile + 1 == meter.at.tiles {
                return Err(PipelineError::Constant { value: colour });
            }
            let consistency = &mut self.consistency;
            self.blend.add(&self.output, &mut |y, row| {
                if y >= height {
                    return;
                }
                let row = &row[..width * RGB];
                match consistency {
                    None => sink(y, row),
                    Some(c) => c.push(y, row, &|i, input| condition.row(i, input), sink),
                }
            });
            meter.at.done += plan.decoder_macs;
        }
        Ok(())
    }
}

impl Decoder<'_> {
    /// The pixels of the tile that begins at (`top`, `left`) of the latent, into `output`.
    fn decode(
        &mut self,
        plan: &Plan<'_>,
        latent: &mut Field,
        at: (usize, usize),
    ) -> Result<(), PipelineError> {
        let channels = plan.latent.channels as usize;
        latent.window(at, plan.grid.cols.tile(), channels, &mut self.sample)?;
        for value in &mut self.sample {
            *value = *value / plan.latent.scale + plan.latent.shift;
        }
        let stage = Stage::Decode;
        self.session
            .run(&[&self.sample], &mut [&mut self.output])
            .map_err(|source| PipelineError::Run { stage, source })
    }
}

/// The tiles from which the picture's norms are estimated, spread evenly over all of them.
fn sampled<'g>(plan: &'g Plan<'_>) -> impl Iterator<Item = (usize, usize)> + 'g {
    let (count, tiles) = (plan.gathered(&plan.grid), plan.grid.tiles());
    let (rows, cols) = (plan.grid.rows.starts(), plan.grid.cols.starts());
    (0..count).map(move |i| {
        let tile = (2 * i + 1) * tiles / (2 * count);
        (rows[tile / cols.len()], cols[tile % cols.len()])
    })
}

/// Whether `tile` was finished by an earlier run; then its output is in `output`.
fn recall(
    journal: &mut Option<&mut Journal<'_>>,
    tile: usize,
    output: &mut [f32],
) -> Result<bool, PipelineError> {
    match journal {
        Some(journal) => Ok(journal.recall(tile, output)?),
        None => Ok(false),
    }
}

/// Top left corners of the tiles, in order.
fn starts(grid: &Grid) -> impl Iterator<Item = (usize, usize)> {
    let (rows, cols) = (grid.rows.starts(), grid.cols.starts());
    rows.iter().flat_map(move |&top| cols.iter().map(move |&left| (top, left)))
}

/// Blends the U-Net's predictions.
fn predictions(plan: &Plan<'_>) -> Result<Blend, PipelineError> {
    blend(&plan.grid, plan.latent.channels as usize, Weights::BorderDistance)
}

/// Blends the decoder's pixels.
fn pixels(plan: &Plan<'_>) -> Result<Blend, PipelineError> {
    blend(&plan.grid.scaled(plan.latent.factor as usize), RGB, Weights::CrossFade)
}

fn blend(grid: &Grid, channels: usize, weights: Weights) -> Result<Blend, PipelineError> {
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
    /// Draws the noise of the first `steps` steps of a latent of `len` elements, which an earlier run has
    /// added: the generator is then where that run's was.
    fn skip(&mut self, steps: usize, len: usize) {
        if self.draw && self.given.is_none() {
            (0..steps).for_each(|_| self.generator.randn(len, |_, _| ()));
        }
    }

    /// Adds the noise of step `index` to `latent`.
    fn add(&mut self, index: usize, sigma: f32, latent: &mut Field) -> Result<(), PipelineError> {
        if !self.draw {
            return Ok(());
        }
        let len = latent.len();
        let noise = match self.given {
            Some(data) => Planes::Given(&data[index * len..][..len]),
            None => Planes::Drawn(&mut self.generator),
        };
        latent.add(sigma, noise)
    }
}
