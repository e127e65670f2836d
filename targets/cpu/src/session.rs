//! The CPU's [`Backend`] and [`Session`].
//!
//! `prepare` checks the component's weights, lowers its graph, plans and reserves the arena; `run` only
//! computes: it allocates nothing and starts no thread. Weights are used where the model is mapped, or
//! where they were read to. Lowering, kernels and what is resident when live elsewhere in this crate.
//!
//! `unsafe` is here because a session holds its component's weights and the steps that borrow them.

use crate::isa::{Isa, IsaError, Level};
use crate::lower::{Pass, Program, Search, Setup, Strip, Way, fastest_within};
use crate::pool::{Pool, PoolError};
use crate::residency::{Resident, Schedule};
use crate::steps::StepError;
use latile_runtime::backend::{
    Backend, DeviceInfo, Norms, Offer, PortSpec, PrepareError, Residency, Room, RunError, Session,
    SessionStats,
};
use latile_runtime::format::{LoadedComponent, Model, Role};
use latile_runtime::graph::{Graph, Port, ShapeError, ValueId, ValueKind};
use latile_runtime::tensor::{Arena, Shape};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The backend's name.
const NAME: &str = "cpu";

/// Why the CPU backend could not be set up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuError {
    /// `LATILE_ISA` names what this machine cannot do.
    #[error(transparent)]
    Isa(#[from] IsaError),
    /// The threads could not be had.
    #[error(transparent)]
    Pool(#[from] PoolError),
}

/// The CPU as a backend: one instruction set and one pool of threads, shared by its sessions.
#[derive(Clone, Debug)]
pub struct CpuBackend {
    level: Level,
    pool: Arc<Pool>,
}

impl CpuBackend {
    /// A backend with `threads` threads, the caller's included, and the given instruction set.
    ///
    /// # Errors
    /// [`CpuError::Pool`] where that number of threads cannot be had.
    pub fn new(threads: usize, level: Level) -> Result<Self, CpuError> {
        let pool = Arc::new(Pool::new(threads)?);
        // Every thread takes part, so all are up (and done with what starting allocates) before any run.
        pool.run(threads, &|_, _| {})?;
        log::info!("backend {NAME}: {}, {threads} threads", level.isa());
        Ok(Self { level, pool })
    }

    /// As [`CpuBackend::new`], with the instruction set that `LATILE_ISA` names, else the fastest.
    ///
    /// # Errors
    /// [`CpuError`].
    pub fn from_env(threads: usize) -> Result<Self, CpuError> {
        Self::new(threads, Level::from_env()?)
    }

    /// Threads that this machine offers the process, 1 where that is not known.
    #[must_use]
    pub fn available_threads() -> usize {
        std::thread::available_parallelism().map_or(1, usize::from)
    }

    /// The instruction set.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.level.isa()
    }

    /// As [`Backend::prepare`] with all the room it wants, by its own type, which also times layers.
    ///
    /// # Errors
    /// [`PrepareError`]; nothing is left behind.
    pub fn session<'m>(
        &self,
        model: &'m Model,
        role: Role,
        height: usize,
        width: usize,
    ) -> Result<CpuSession<'m>, PrepareError> {
        self.session_in(model, role, height, width, Room::default())
    }

    /// As [`Backend::prepare`], by its own type, which also times layers.
    ///
    /// # Errors
    /// [`PrepareError`]; nothing is left behind.
    pub fn session_in<'m>(
        &self,
        model: &'m Model,
        role: Role,
        height: usize,
        width: usize,
        room: Room,
    ) -> Result<CpuSession<'m>, PrepareError> {
        let component = Arc::new(model.load(role)?);
        // SAFETY: the component lies in an `Arc`, so that it stays where it is until the last holder of it
        // goes. What borrows from it for longer than that, by its type, is the program alone, which does
        // not leave the session and is dropped before `Resident`, the holder: see `CpuSession`.
        let borrowed: &'m LoadedComponent<'m> = unsafe { &*Arc::as_ptr(&component) };
        let graph = &borrowed.spec().graph;
        let shapes = shapes(graph, height, width)?;
        let threads = self.pool.threads();
        let setup = self.setup(model, borrowed, &shapes);
        let (way, program) = fastest_within(setup, room.arena)?.map_err(|smallest| {
            let limit = room.arena.unwrap_or(usize::MAX);
            PrepareError::NoRoom { role, height, width, limit, smallest }
        })?;
        let mut arena = Arena::new(program.arena_bytes)?;
        program.fill_tables(&mut arena).map_err(|e| PrepareError::Unsupported {
            backend: NAME.to_owned(),
            layer: "codebook".to_owned(),
            why: e.to_string(),
        })?;
        let schedule = Schedule::new(&program, &component, room.weights);
        let stats = SessionStats {
            backend: NAME.to_owned(),
            isa: self.level.isa().name().to_owned(),
            threads,
            arena_bytes: arena.bytes(),
            way: way.name(),
            weight_bytes: schedule.peak(),
            macs: program.macs(),
        };
        log::info!(
            "{role} at {height}x{width}: {} steps, arena {} bytes, weights {} bytes, {NAME} {}, {threads} threads",
            program.steps.len(),
            stats.arena_bytes,
            stats.weight_bytes,
            stats.isa,
        );
        Ok(CpuSession {
            inputs: ports(graph, &graph.inputs, &shapes)?,
            outputs: ports(graph, &graph.outputs, &shapes)?,
            program,
            weights: Resident::new(component, schedule),
            arena,
            pool: Arc::clone(&self.pool),
            stats,
            seconds: None,
            broken: None,
        })
    }
}

impl CpuBackend {
    fn setup<'m, 'a>(
        &self,
        model: &Model,
        component: &'m LoadedComponent<'m>,
        shapes: &'a [Shape],
    ) -> Setup<'m, 'a> {
        let dtype = model.manifest().precision.dtype();
        let threads = self.pool.threads();
        Setup { component, shapes, dtype, level: self.level, threads }
    }
}

/// The shapes of a graph's values with all its map inputs at `height × width`.
fn shapes(graph: &Graph, height: usize, width: usize) -> Result<Vec<Shape>, ShapeError> {
    let is_map = |p: &&Port| matches!(graph.kind(p.value), ValueKind::Map(_));
    let maps = graph.inputs.iter().filter(is_map).count();
    graph.infer(&vec![(height, width); maps])
}

/// A port's description; its elements are known to be countable.
fn ports(graph: &Graph, ports: &[Port], shapes: &[Shape]) -> Result<Vec<PortSpec>, PrepareError> {
    ports
        .iter()
        .map(|port| {
            let shape = shapes[port.value.index()];
            if shape.elements().is_none() {
                let node = port.name.clone();
                return Err(ShapeError::TooLarge { node }.into());
            }
            debug_assert_eq!(shape.channels(), graph.kind(port.value).channels() as usize);
            Ok(PortSpec { name: port.name.clone(), shape })
        })
        .collect()
}

impl Backend for CpuBackend {
    fn info(&self) -> DeviceInfo {
        let names = |levels: &[Level]| {
            let names: Vec<_> = levels.iter().map(|l| l.isa().name()).collect();
            names.join(", ")
        };
        DeviceInfo {
            backend: NAME.to_owned(),
            device: format!("{} ({})", std::env::consts::ARCH, self.level.isa()),
            usable: Ok(()),
            details: vec![
                format!("instruction sets: {}", names(&Level::available())),
                format!("threads: {} of {}", self.pool.threads(), Self::available_threads()),
            ],
        }
    }

    fn offers(
        &self,
        model: &Model,
        role: Role,
        height: usize,
        width: usize,
    ) -> Result<Vec<Offer>, PrepareError> {
        let component = model.unchecked(role)?;
        let graph = &component.spec().graph;
        let shapes = shapes(graph, height, width)?;
        let mut search = Search::new(self.setup(model, &component, &shapes));
        let ways = search.ways()?;
        let offer = |way: &Way| {
            let program = search.lower(way)?;
            let weights = |residency| Schedule::new(&program, &component, residency).peak();
            Ok(Offer {
                way: way.name(),
                arena_bytes: way.arena_bytes,
                macs: way.macs,
                weights_kept: weights(Residency::Keep),
                weights_dropped: weights(Residency::Drop),
            })
        };
        ways.iter().map(offer).collect()
    }

    fn prepare<'m>(
        &self,
        model: &'m Model,
        role: Role,
        height: usize,
        width: usize,
        room: Room,
    ) -> Result<Box<dyn Session + 'm>, PrepareError> {
        Ok(Box::new(self.session_in(model, role, height, width, room)?))
    }
}

/// A component prepared for the CPU at one size.
#[derive(Debug)]
pub struct CpuSession<'m> {
    inputs: Vec<PortSpec>,
    outputs: Vec<PortSpec>,
    /// Borrows from `weights`, and so stands before it: fields are dropped in order.
    program: Program<'m>,
    weights: Resident<'m>,
    arena: Arena,
    pool: Arc<Pool>,
    stats: SessionStats,
    /// Time of each step in the last run, where asked for.
    seconds: Option<Vec<Duration>>,
    /// The layer at which a run failed: the arena's contents are not whole.
    broken: Option<String>,
}

/// See [`CpuSession::run_observed`].
type Observer<'o> = dyn FnMut(&str, usize, &[f32]) + 'o;

/// What one step of the last run took.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerTime {
    /// The layer's name.
    pub name: String,
    /// What the step does.
    pub kind: &'static str,
    /// Seconds.
    pub seconds: f64,
    /// Multiply-accumulates.
    pub macs: u64,
}

impl CpuSession<'_> {
    /// Times each step of the runs to come, or stops doing so.
    pub fn time_layers(&mut self, on: bool) {
        self.seconds = on.then(|| vec![Duration::ZERO; self.program.steps.len()]);
    }

    /// The steps of the last run, in order; empty where they were not timed.
    #[must_use]
    pub fn layers(&self) -> Vec<LayerTime> {
        self.seconds
            .iter()
            .flatten()
            .zip(&self.program.steps)
            .map(|(time, step)| LayerTime {
                name: step.name.clone(),
                kind: step.kind(),
                seconds: time.as_secs_f64(),
                macs: step.macs,
            })
            .collect()
    }

    /// The graph's values that are stored between steps, in the model's precision; all others exist only
    /// in registers and bands. A reference that rounds where this session does needs them.
    #[must_use]
    pub fn stored_values(&self) -> &[ValueId] {
        &self.program.stored
    }

    /// Runs as [`Session::run`] does, and shows `observer` the input of each convolution and of each
    /// linear layer over a map before that layer runs: the layer's name (its node's), its channels, and
    /// one row of the map, `[w, channels]` in f32; the rows come from the top down.
    ///
    /// The input is shown as the kernel reads it: concatenated, normalised and activated, rounded where
    /// it was stored, but before upsampling, quantization and padding. A layer of several rows has as many calls.
    /// May allocate.
    ///
    /// # Errors
    /// As [`Session::run`], and [`RunError::Unobservable`] where values are streamed: they are never whole.
    pub fn run_observed(
        &mut self,
        inputs: &[&[f32]],
        outputs: &mut [&mut [f32]],
        observer: &mut dyn FnMut(&str, usize, &[f32]),
    ) -> Result<(), RunError> {
        if !self.program.is_whole() {
            return Err(RunError::Unobservable { way: self.stats.way.clone() });
        }
        self.checked_run(inputs, outputs, Some(observer))
    }

    fn checked_run(
        &mut self,
        inputs: &[&[f32]],
        outputs: &mut [&mut [f32]],
        observer: Option<&mut Observer<'_>>,
    ) -> Result<(), RunError> {
        if let Some(layer) = &self.broken {
            let layer = layer.clone();
            return Err(RunError::Worker { layer });
        }
        let given = inputs.iter().map(|t| t.len());
        check_ports("inputs", &self.inputs, inputs.len(), given)?;
        let wanted = outputs.iter().map(|t| t.len());
        check_ports("outputs", &self.outputs, outputs.len(), wanted)?;
        let result = self.compute(inputs, outputs, observer);
        if let Err(RunError::Worker { layer }) = &result {
            self.broken = Some(layer.clone());
        }
        result
    }

    fn compute(
        &mut self,
        inputs: &[&[f32]],
        outputs: &mut [&mut [f32]],
        mut observer: Option<&mut Observer<'_>>,
    ) -> Result<(), RunError> {
        let program = &self.program;
        for ((tensor, port), spec) in inputs.iter().zip(&program.inputs).zip(&self.inputs) {
            program
                .take_in(*port, tensor, &mut self.arena, &self.pool)
                .map_err(|e| bug(&spec.name, &e))?;
        }
        if let Some(seconds) = &mut self.seconds {
            seconds.fill(Duration::ZERO);
        }
        for (turn, pass) in program.passes.iter().enumerate() {
            let one = [Strip { step: 0, y: [0, 0] }];
            let order = match pass {
                Pass::One(_) => &one[..],
                Pass::Streamed { order, .. } => &order[..],
            };
            self.weights.before(turn);
            for strip in order {
                let i = pass.steps().start + strip.step;
                let step = &program.steps[i];
                if let Some(observer) = &mut observer {
                    program
                        .observe_step(step, &mut self.arena, &mut |c, row| {
                            observer(&step.name, c, row);
                        })
                        .map_err(|e| bug(&step.name, &e))?;
                }
                let start = self.seconds.is_some().then(Instant::now);
                let (arena, pool) = (&mut self.arena, &self.pool);
                match pass {
                    Pass::One(_) => program.run_step(step, arena, pool),
                    Pass::Streamed { .. } => program.run_strip(step, strip.y, arena, pool),
                }
                .map_err(|e| bug(&step.name, &e))?;
                if let (Some(start), Some(seconds)) = (start, &mut self.seconds) {
                    seconds[i] += start.elapsed();
                }
            }
            self.weights.after(turn);
        }
        self.weights.ran();
        for ((tensor, port), spec) in outputs.iter_mut().zip(&program.outputs).zip(&self.outputs) {
            let finite = program
                .hand_out(*port, tensor, &mut self.arena, &self.pool)
                .map_err(|e| bug(&spec.name, &e))?;
            if !finite {
                return Err(RunError::NonFinite { port: spec.name.clone() });
            }
        }
        Ok(())
    }
}

/// A step that failed: the graph was checked, so this is a bug here and not in the model.
fn bug(layer: &str, error: &StepError) -> RunError {
    log::error!("{layer}: {error}");
    RunError::Worker { layer: layer.to_owned() }
}

/// Compares the caller's buffers, by their lengths, with the ports.
fn check_ports(
    direction: &'static str,
    ports: &[PortSpec],
    found: usize,
    lengths: impl Iterator<Item = usize>,
) -> Result<(), RunError> {
    if found != ports.len() {
        return Err(RunError::WrongPorts { direction, expected: ports.len(), found });
    }
    for (port, found) in ports.iter().zip(lengths) {
        // Invariant: `prepare` refused shapes whose elements cannot be counted.
        let expected = port.shape.elements().unwrap_or(usize::MAX);
        if found != expected {
            return Err(RunError::WrongSize { port: port.name.clone(), expected, found });
        }
    }
    Ok(())
}

impl Session for CpuSession<'_> {
    fn inputs(&self) -> &[PortSpec] {
        &self.inputs
    }

    fn outputs(&self) -> &[PortSpec] {
        &self.outputs
    }

    fn run(&mut self, inputs: &[&[f32]], outputs: &mut [&mut [f32]]) -> Result<(), RunError> {
        self.checked_run(inputs, outputs, None)
    }

    fn set_timestep_group(&mut self, group: usize) {
        for step in &mut self.program.steps {
            step.set_timestep_group(group);
        }
    }

    fn use_norms(&mut self, norms: Norms) {
        self.program.use_norms(norms, &mut self.arena);
    }

    fn stats(&self) -> SessionStats {
        self.stats.clone()
    }
}
