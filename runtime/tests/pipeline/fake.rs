//! A model file without sense and a backend whose networks are closures.

use latile_runtime::backend::{
    Backend, DeviceInfo, Norms, Offer, PortSpec, PrepareError, Residency, Room, RunError, Session,
    SessionStats,
};
use latile_runtime::format::{
    BetaSchedule, Defaults, LatentSpec, Manifest, Metadata, Model, Precision, Prediction, Role,
    SchedulerSpec, Spacing, Task, TimestepProjection, Writer,
};
use latile_runtime::graph::{
    Graph, Layout, Node, Op, Pad, Port, ValueId, ValueKind, WeightId, WeightSpec,
};
use latile_runtime::pipeline::{Options, Picture, PipelineError, Pixels, Upscaled, upscale};
use latile_runtime::tensor::DType;
use std::cell::{Cell, RefCell};
use std::io::Cursor;
use std::ops::{ControlFlow, Deref};
use std::rc::Rc;

pub(crate) const TIME: u32 = 4;

/// LDM-SR's schedule.
pub(crate) fn scheduler() -> SchedulerSpec {
    SchedulerSpec {
        train_timesteps: 1000,
        betas: BetaSchedule::ScaledLinear { start: 0.0015, end: 0.0155 },
        prediction: Prediction::Epsilon,
        spacing: Spacing::Leading,
        steps_offset: 0,
        set_alpha_to_one: true,
        clip_sample: None,
        zero_terminal_snr: false,
    }
}

/// What a test may vary in a model.
#[derive(Clone)]
pub(crate) struct Shaped {
    pub(crate) multiple: u32,
    pub(crate) latent: LatentSpec,
    pub(crate) scheduler: Option<SchedulerSpec>,
    pub(crate) task: Task,
    pub(crate) timestep: Option<TimestepProjection>,
    pub(crate) unet: [u32; 2],
    pub(crate) decoder: [u32; 2],
    pub(crate) doublings: u32,
    pub(crate) roles: Vec<Role>,
    pub(crate) timestep_groups: Vec<u32>,
    pub(crate) consistency: f32,
}

impl Default for Shaped {
    fn default() -> Self {
        Self {
            multiple: 4,
            latent: LatentSpec { channels: 3, factor: 4, scale: 1.0, shift: 0.0 },
            scheduler: Some(scheduler()),
            task: Task::SuperResolution,
            timestep: Some(TimestepProjection {
                dim: TIME,
                flip_sin_to_cos: true,
                freq_shift: 0.0,
            }),
            unet: [6, 3],
            decoder: [3, 3],
            doublings: 2,
            roles: vec![Role::Unet, Role::Decoder],
            timestep_groups: Vec::new(),
            consistency: 0.0,
        }
    }
}

fn weight(name: &str, shape: &[u32]) -> WeightSpec {
    WeightSpec {
        name: name.into(),
        shape: shape.to_vec(),
        dtype: DType::F32,
        layout: Layout::Packed16,
    }
}

fn port(name: &str, value: u32) -> Port {
    Port { name: name.into(), value: ValueId(value) }
}

fn node(name: &str, op: Op, inputs: &[u32], output: u32) -> Node {
    Node {
        name: name.into(),
        op,
        inputs: inputs.iter().map(|&i| ValueId(i)).collect(),
        output: ValueId(output),
    }
}

fn conv1x1() -> Op {
    Op::Conv2d {
        weight: WeightId(0),
        bias: None,
        kernel: [1, 1],
        stride: [1, 1],
        pad: Pad::default(),
        quant: None,
    }
}

impl Shaped {
    fn unet_graph(&self) -> Graph {
        let [from, to] = self.unet;
        Graph {
            inputs: vec![port("sample", 0), port("time_proj", 1)],
            outputs: vec![port("sample", 4)],
            values: vec![
                ValueKind::Map(from),
                ValueKind::Vector(TIME),
                ValueKind::Map(to),
                ValueKind::Vector(to),
                ValueKind::Map(to),
            ],
            weights: vec![weight("conv", &[to, from, 1, 1]), weight("time", &[to, TIME])],
            nodes: vec![
                node("conv", conv1x1(), &[0], 2),
                node("time", Op::Linear { weight: WeightId(1), bias: None, quant: None }, &[1], 3),
                node("add", Op::AddChannel, &[2, 3], 4),
            ],
        }
    }

    fn decoder_graph(&self) -> Graph {
        let [from, to] = self.decoder;
        let last = 1 + self.doublings;
        let mut values = vec![ValueKind::Map(from)];
        values.extend((0..=self.doublings).map(|_| ValueKind::Map(to)));
        let mut nodes = vec![node("conv", conv1x1(), &[0], 1)];
        nodes.extend((1..last).map(|v| node(&format!("up{v}"), Op::Upsample2x, &[v], v + 1)));
        Graph {
            inputs: vec![port("latents", 0)],
            outputs: vec![port("sample", last)],
            values,
            weights: vec![weight("conv", &[to, from, 1, 1])],
            nodes,
        }
    }

    pub(crate) fn build(&self) -> Model {
        let mut writer = Writer::new(Cursor::new(Vec::new())).unwrap();
        for &role in &self.roles {
            let graph = match role {
                Role::Unet => self.unet_graph(),
                _ => self.decoder_graph(),
            };
            let timestep = self.timestep.filter(|_| role == Role::Unet);
            let weights = graph.weights.clone();
            let groups = if role == Role::Unet { &self.timestep_groups[..] } else { &[] };
            writer.begin(role, self.multiple, timestep, groups, graph).unwrap();
            for w in &weights {
                writer.weight(&vec![0; w.stored_bytes().unwrap()]).unwrap();
            }
        }
        let manifest = Manifest {
            metadata: Metadata { name: "fake".into(), ..Metadata::default() },
            precision: Precision::F32,
            task: self.task,
            latent: Some(self.latent),
            scheduler: self.scheduler,
            defaults: Defaults { steps: 4, eta: 0.0, consistency: self.consistency },
            components: Vec::new(),
        };
        let bytes = writer.finish(manifest).unwrap().into_inner();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fake.latile");
        std::fs::write(&path, bytes).unwrap();
        // The map outlives the folder.
        Model::open(&path).unwrap()
    }
}

/// What a network is given: the number of its run, the group of timesteps, its size, its inputs and its
/// output.
pub(crate) struct Call<'a> {
    pub(crate) run: usize,
    pub(crate) timestep_group: usize,
    pub(crate) norms: Norms,
    pub(crate) size: [usize; 2],
    pub(crate) sample: &'a [f32],
    pub(crate) time_proj: &'a [f32],
    pub(crate) out: &'a mut [f32],
}

type Network = Box<dyn Fn(Call<'_>)>;

/// Runs closures, and remembers what it was asked to do.
pub(crate) struct Fake(Rc<Inner>);

/// Shared by the backend and its sessions.
pub(crate) struct Inner {
    unet: Network,
    decoder: Network,
    /// Sessions alive, and how many may be.
    live: Cell<usize>,
    pub(crate) most: Cell<usize>,
    /// Roles prepared with their sizes, in order.
    pub(crate) prepared: RefCell<Vec<(Role, [usize; 2])>>,
    /// Runs of the U-Net and the decoder.
    pub(crate) runs: [Cell<usize>; 2],
    /// Ways of running that it offers; with one, whatever the size, it takes a fixed number of bytes.
    pub(crate) ways: Cell<usize>,
    /// What sessions were made of: their arena's bytes and what became of their weights.
    pub(crate) rooms: RefCell<Vec<(Role, usize, Residency)>>,
}

impl Inner {
    /// The fastest way first: each takes half the arena of the one before and twice the work. The U-Net's
    /// weights may be dropped.
    fn price(&self, role: Role, [height, width]: [usize; 2], macs: u64) -> Vec<Offer> {
        let (kept, dropped) = if role == Role::Unet { (50_000, 9_000) } else { (4_000, 4_000) };
        let ways = self.ways.get();
        if ways == 1 {
            let arena_bytes = if role == Role::Unet { 1000 } else { 2000 };
            let way = "fake".to_owned();
            return vec![Offer { way, arena_bytes, macs, weights_kept: 10, weights_dropped: 10 }];
        }
        let a_pixel = if role == Role::Unet { 1024 } else { 3072 };
        let offer = |i: usize| Offer {
            way: format!("fake {i}"),
            arena_bytes: 640 + ((height * width * a_pixel) >> i) - i,
            macs: macs << i,
            weights_kept: kept,
            weights_dropped: dropped,
        };
        (0..ways).map(offer).collect()
    }
}

impl Fake {
    pub(crate) fn new(
        unet: impl Fn(Call<'_>) + 'static,
        decoder: impl Fn(Call<'_>) + 'static,
    ) -> Self {
        Self(Rc::new(Inner {
            unet: Box::new(unet),
            decoder: Box::new(decoder),
            live: Cell::new(0),
            most: Cell::new(1),
            prepared: RefCell::default(),
            runs: Default::default(),
            ways: Cell::new(1),
            rooms: RefCell::default(),
        }))
    }

    /// As [`Fake::pointwise`], with several ways of running whose arenas grow with the size.
    pub(crate) fn with_ways(ways: usize) -> Self {
        let fake = Self::pointwise();
        fake.ways.set(ways.max(2));
        fake
    }

    /// Networks that look at one latent pixel at a time, but at all its channels and the timestep.
    pub(crate) fn pointwise() -> Self {
        Self::new(pointwise_unet, pointwise_decoder)
    }

    pub(crate) fn upscale(
        &self,
        model: &Model,
        picture: &[u8],
        [height, width]: [usize; 2],
        options: &Options,
    ) -> Result<Upscaled, PipelineError> {
        let picture = Picture { width, height, pixels: Pixels::Rgb8(picture) };
        upscale(self, model, picture, options, &mut |_| ControlFlow::Continue(()))
    }
}

pub(crate) fn pointwise_unet(call: Call<'_>) {
    let t = call.time_proj[0];
    for (pixel, out) in call.sample.chunks(6).zip(call.out.chunks_mut(3)) {
        for c in 0..3 {
            out[c] = 0.4 * pixel[c] + 0.2 * t * pixel[(c + 1) % 3] - 0.3 * pixel[3 + c];
        }
    }
}

/// Nearest neighbour, with a pattern inside each latent pixel.
pub(crate) fn pointwise_decoder(call: Call<'_>) {
    let width = call.size[1] * 4;
    for (i, out) in call.out.chunks_mut(3).enumerate() {
        let (y, x) = (i / width, i % width);
        let from = (y / 4 * call.size[1] + x / 4) * 3;
        for (c, v) in out.iter_mut().enumerate() {
            *v = 0.6 * call.sample[from + c] + 0.05 * ((y % 4) * 4 + x % 4) as f32 - 0.4;
        }
    }
}

impl Backend for Fake {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            backend: "fake".into(),
            device: "closures".into(),
            usable: Ok(()),
            details: Vec::new(),
        }
    }

    fn offers(
        &self,
        model: &Model,
        role: Role,
        height: usize,
        width: usize,
    ) -> Result<Vec<Offer>, PrepareError> {
        let graph = &model.load(role)?.spec().graph;
        let shapes = graph.infer(&[(height, width)])?;
        Ok(self.price(role, [height, width], graph.macs(&shapes)))
    }

    fn prepare<'m>(
        &self,
        model: &'m Model,
        role: Role,
        height: usize,
        width: usize,
        room: Room,
    ) -> Result<Box<dyn Session + 'm>, PrepareError> {
        let graph = &model.load(role)?.spec().graph;
        let shapes = graph.infer(&[(height, width)])?;
        let ports = |ports: &[Port]| {
            let spec = |p: &Port| PortSpec { name: p.name.clone(), shape: shapes[p.value.index()] };
            ports.iter().map(spec).collect::<Vec<_>>()
        };
        assert!(self.live.get() < self.most.get(), "{} sessions at once", self.live.get() + 1);
        self.prepared.borrow_mut().push((role, [height, width]));
        let offers = self.price(role, [height, width], graph.macs(&shapes));
        let smallest = offers.last().unwrap().arena_bytes;
        let limit = room.arena.unwrap_or(usize::MAX);
        let Some(offer) = offers.into_iter().find(|o| o.arena_bytes <= limit) else {
            return Err(PrepareError::NoRoom { role, height, width, limit, smallest });
        };
        self.live.set(self.live.get() + 1);
        self.rooms.borrow_mut().push((role, offer.arena_bytes, room.weights));
        Ok(Box::new(FakeSession {
            fake: Rc::clone(&self.0),
            role,
            timestep_group: 0,
            norms: Norms::Own,
            size: [height, width],
            inputs: ports(&graph.inputs),
            outputs: ports(&graph.outputs),
            offer,
        }))
    }
}

impl Deref for Fake {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

struct FakeSession {
    fake: Rc<Inner>,
    role: Role,
    timestep_group: usize,
    norms: Norms,
    size: [usize; 2],
    inputs: Vec<PortSpec>,
    outputs: Vec<PortSpec>,
    offer: Offer,
}

impl Drop for FakeSession {
    fn drop(&mut self) {
        self.fake.live.set(self.fake.live.get() - 1);
    }
}

impl Session for FakeSession {
    fn use_norms(&mut self, norms: Norms) {
        self.norms = norms;
    }

    fn set_timestep_group(&mut self, group: usize) {
        self.timestep_group = group;
    }

    fn inputs(&self) -> &[PortSpec] {
        &self.inputs
    }

    fn outputs(&self) -> &[PortSpec] {
        &self.outputs
    }

    fn run(&mut self, inputs: &[&[f32]], outputs: &mut [&mut [f32]]) -> Result<(), RunError> {
        let elements = |p: &PortSpec| p.shape.elements().unwrap();
        let found: Vec<usize> = inputs.iter().map(|i| i.len()).collect();
        assert_eq!(found, self.inputs.iter().map(elements).collect::<Vec<_>>());
        let found: Vec<usize> = outputs.iter().map(|o| o.len()).collect();
        assert_eq!(found, self.outputs.iter().map(elements).collect::<Vec<_>>());
        let (index, network) = match self.role {
            Role::Unet => (0, &self.fake.unet),
            _ => (1, &self.fake.decoder),
        };
        let runs = &self.fake.runs[index];
        network(Call {
            run: runs.get(),
            timestep_group: self.timestep_group,
            norms: self.norms,
            size: self.size,
            sample: inputs[0],
            time_proj: inputs.get(1).copied().unwrap_or_default(),
            out: &mut *outputs[0],
        });
        runs.set(runs.get() + 1);
        Ok(())
    }

    fn stats(&self) -> SessionStats {
        SessionStats {
            backend: "fake".into(),
            isa: "none".into(),
            way: self.offer.way.clone(),
            threads: 1,
            arena_bytes: self.offer.arena_bytes,
            weight_bytes: self.offer.weights_kept,
            macs: self.offer.macs,
        }
    }
}
