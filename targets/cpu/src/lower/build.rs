//! Jobs to steps: sizes, buffers, lifetimes, weights.

use super::fuse::{Chain, Job, Kind, Stage};
use super::passes::{Part, passes};
use super::program::{
    Action, Addend, AttentionStep, Bound, BufferId, Coefficients, ConvStep, Hold, Holds, Inputs,
    LinearStep, NormStep, Pass, Place, PointwiseStep, Program, Step, Table,
};
use super::schedule::{Read, Worker, distance, schedule};
use crate::isa::Level;
use crate::registry::WeightType;
use crate::steps::StepError;
use crate::steps::attention::{AttentionPlan, AttentionShape};
use crate::steps::codebook;
use crate::steps::conv::{Activation, ConvPlan, ConvShape, Int8Weights, Weights};
use crate::steps::elementwise::ElementwiseShape;
use crate::steps::norm::SumsLayout;
use crate::steps::vector;
use half::slice::HalfBitsSliceExt;
use latile_runtime::backend::{Norms, PrepareError};
use latile_runtime::format::LoadedComponent;
use latile_runtime::graph::{
    ArenaPlan, Graph, Lifetime, Matrix, Op, Overlay, Quant, QuantRange, ValueId, ValueKind,
    WeightId, plan_arena,
};
use latile_runtime::tensor::{ALIGN, ArenaError, DType, Shape};

mod convs;
use convs::ConvPlace;

// Weights are little-endian in the file and used where they lie.
const _: () = assert!(cfg!(target_endian = "little"));

/// Lowers `component`, whose values have the given shapes, for `threads` workers. `jobs` are those of its
/// graph; values marked in `streamed` are not stored.
///
/// # Errors
/// [`PrepareError::Unsupported`] where a layer cannot be computed, [`PrepareError::Arena`] where the
/// buffers exceed the address space.
pub(crate) fn lower<'m>(
    component: &'m LoadedComponent<'m>,
    jobs: &[Job],
    streamed: &[bool],
    (shapes, dtype): (&[Shape], DType),
    level: Level,
    threads: usize,
) -> Result<Program<'m>, PrepareError> {
    let graph = &component.spec().graph;
    let passes = passes(graph, jobs, streamed);
    let mut last_read = vec![None; graph.values.len()];
    for (i, pass) in passes.iter().enumerate() {
        for part in pass {
            for v in jobs[part.job].reads(graph) {
                last_read[v.index()] = Some(i);
            }
        }
    }
    for port in &graph.outputs {
        last_read[port.value.index()] = Some(usize::MAX);
    }
    let mut builder = Builder {
        component,
        graph,
        shapes,
        dtype,
        level,
        threads,
        last_read,
        is_port: is_port(graph),
        values: vec![None; graph.values.len()],
        sums: vec![None; graph.values.len()],
        coefficients: Vec::new(),
        lifetimes: Vec::new(),
        dtypes: Vec::new(),
        rings: vec![None; graph.values.len()],
        overlays: Vec::new(),
        moment: 0,
        steps: Vec::new(),
        passes: Vec::new(),
        tables: Vec::new(),
        lasting: Vec::new(),
        stored: Vec::new(),
        whole: Vec::new(),
    };
    // Moment 0 is when inputs arrive, each step or pass has the next one, the last is when outputs leave.
    let mut inputs = Vec::new();
    for port in &graph.inputs {
        inputs.push(builder.store(port.value, 0));
    }
    for (i, pass) in passes.iter().enumerate() {
        match &pass[..] {
            [only] if only.stored => builder.job(i, &jobs[only.job], only.sums)?,
            _ => builder.pass(i, pass, jobs)?,
        }
    }
    let end = builder.now();
    let outputs = graph.outputs.iter().map(|p| builder.bound(p.value, end)).collect();
    builder.finish(inputs, outputs)
}

/// For each value, whether it is one of the graph's inputs or outputs.
fn is_port(graph: &Graph) -> Vec<bool> {
    let mut is_port = vec![false; graph.values.len()];
    for port in graph.inputs.iter().chain(&graph.outputs) {
        is_port[port.value.index()] = true;
    }
    is_port
}

struct Builder<'m, 'a> {
    component: &'m LoadedComponent<'m>,
    graph: &'m Graph,
    shapes: &'a [Shape],
    dtype: DType,
    level: Level,
    threads: usize,
    /// The last pass that reads each value.
    last_read: Vec<Option<usize>>,
    /// Values that enter or leave, which are stored in f32 whatever the precision: a codebook's search
    /// and the caller see what was given and computed, not what f16 makes of it, and ports are small.
    is_port: Vec<bool>,
    /// Each stored value's buffer.
    values: Vec<Option<BufferId>>,
    /// Partial sums of a value, once there are some.
    sums: Vec<Option<(BufferId, SumsLayout)>>,
    /// Coefficients that exist, by what they are of.
    coefficients: Vec<(Stage, Vec<ValueId>, BufferId)>,
    lifetimes: Vec<Lifetime>,
    /// How each buffer that holds a value stores it.
    dtypes: Vec<DType>,
    /// Lines of the ring that a value passes through, where it is not stored whole.
    rings: Vec<Option<usize>>,
    /// Stored maps of one pass of which one may take the other's memory.
    overlays: Vec<Overlay>,
    /// Steps and passes so far.
    moment: usize,
    steps: Vec<Step<'m>>,
    passes: Vec<Pass>,
    tables: Vec<Table<'m>>,
    /// Buffers that keep what they hold from run to run.
    lasting: Vec<BufferId>,
    stored: Vec<ValueId>,
    /// Which buffer stores which value whole.
    whole: Vec<(BufferId, ValueId)>,
}

/// What an output lies in, and what is added to it.
struct Written {
    out: BufferId,
    sums: Option<BufferId>,
}

impl<'m> Builder<'m, '_> {
    /// The moment at which the next step runs.
    fn now(&self) -> usize {
        self.moment + 1
    }

    fn buffer(&mut self, bytes: usize, moment: usize) -> BufferId {
        self.lifetimes.push(Lifetime { bytes, first: moment, last: moment });
        self.dtypes.push(DType::F32);
        BufferId(self.lifetimes.len() - 1)
    }

    /// A buffer of `n` elements of `size` bytes that the next step writes.
    fn fresh(&mut self, n: usize, size: usize) -> BufferId {
        // A size that overflows becomes one that the planner refuses.
        self.buffer(n.saturating_mul(size), self.now())
    }

    /// Marks `buffer` as in use by the next step.
    fn touch(&mut self, buffer: BufferId) -> BufferId {
        let now = self.now();
        let life = &mut self.lifetimes[buffer.0];
        life.last = life.last.max(now);
        buffer
    }

    /// How `value` is stored.
    fn dtype_of(&self, value: ValueId) -> DType {
        match self.graph.kind(value) {
            ValueKind::Map(_) if !self.is_port[value.index()] => self.dtype,
            ValueKind::Map(_) | ValueKind::Vector(_) => DType::F32,
        }
    }

    /// Gives `value` a buffer of its own, written at `moment`.
    fn store(&mut self, value: ValueId, moment: usize) -> Bound {
        // Invariant: shape inference refuses shapes whose elements overflow.
        let elements = self.shapes[value.index()].elements().unwrap_or(usize::MAX);
        let bytes = elements.saturating_mul(self.dtype_of(value).size());
        let buffer = self.buffer(bytes, moment);
        self.dtypes[buffer.0] = self.dtype_of(value);
        self.keep(value, buffer)
    }

    fn keep(&mut self, value: ValueId, buffer: BufferId) -> Bound {
        self.values[value.index()] = Some(buffer);
        if self.rings[value.index()].is_none() {
            self.whole.push((buffer, value));
        }
        if self.dtype_of(value) == self.dtype && !self.stored.contains(&value) {
            self.stored.push(value);
        }
        Bound { buffer }
    }

    /// The buffer of a stored value, in use at `moment`.
    fn bound(&mut self, value: ValueId, moment: usize) -> Bound {
        // Invariant: `fuse` makes a job for every value that a job or an output reads, before it.
        let buffer = self.values[value.index()].expect("a value is stored before it is read");
        let life = &mut self.lifetimes[buffer.0];
        life.last = life.last.max(moment);
        Bound { buffer }
    }

    fn read(&mut self, value: ValueId) -> BufferId {
        self.bound(value, self.now()).buffer
    }

    fn shape(&self, value: ValueId) -> [usize; 3] {
        match self.shapes[value.index()] {
            Shape::Map { h, w, c } => [h, w, c],
            Shape::Vector { len } => [1, 1, len],
        }
    }

    /// Adds a step that is a pass of its own.
    fn push(&mut self, node: usize, macs: u64, action: Action<'m>) {
        self.passes.push(Pass::One(self.steps.len()));
        self.push_part(node, macs, action);
        self.moment += 1;
    }

    /// Adds a step of a pass.
    fn push_part(&mut self, node: usize, macs: u64, action: Action<'m>) {
        self.steps.push(Step { name: self.graph.nodes[node].name.clone(), macs, action });
    }

    fn unsupported(&self, node: usize, why: &impl std::fmt::Display) -> PrepareError {
        PrepareError::Unsupported {
            backend: "cpu".to_owned(),
            layer: self.graph.nodes[node].name.clone(),
            why: why.to_string(),
        }
    }

    fn plain(&self, node: usize, id: WeightId) -> Result<&'m [f32], PrepareError> {
        bytemuck::try_cast_slice(self.component.weight(id)).map_err(|e| self.unsupported(node, &e))
    }

    fn bias(&self, node: usize, id: Option<WeightId>) -> Result<Option<&'m [f32]>, PrepareError> {
        id.map(|id| self.plain(node, id)).transpose()
    }

    fn packed(&self, node: usize, id: WeightId) -> Result<Weights<'m>, PrepareError> {
        let bytes = self.component.weight(id);
        Ok(match self.graph.weight(id).dtype {
            DType::F32 => Weights::F32(self.plain(node, id)?),
            DType::F16 => {
                let bits: &[u16] =
                    bytemuck::try_cast_slice(bytes).map_err(|e| self.unsupported(node, &e))?;
                Weights::F16(bits.reinterpret_cast())
            }
            other @ (DType::I8 | DType::I32) => {
                return Err(self.unsupported(node, &format!("its weight is {other}")));
            }
        })
    }

    /// The weights of an int8 layer, with the ranges of the first group of timesteps.
    fn int8(
        &self,
        node: usize,
        id: WeightId,
        quant: &'m Quant,
    ) -> Result<Int8Weights<'m>, PrepareError> {
        let ranges = quant.ranges.get(..quant.ranges_per_group());
        let ranges = ranges.ok_or_else(|| self.unsupported(node, &"it has no activation range"))?;
        Ok(Int8Weights {
            packed: bytemuck::cast_slice(self.component.weight(id)),
            scale: self.plain(node, quant.weight_scale)?,
            sum: bytemuck::try_cast_slice(self.component.weight(quant.weight_sum))
                .map_err(|e| self.unsupported(node, &e))?,
            input_scale: quant.input_scale.map(|id| self.plain(node, id)).transpose()?,
            ranges,
        })
    }

    /// Adds a job that runs alone, in pass `index`.
    fn job(&mut self, index: usize, job: &Job, sums: bool) -> Result<(), PrepareError> {
        match &job.kind {
            Kind::Conv { chain, residual, .. } => {
                self.chain_coefficients(job)?;
                let plan = self.conv_plan(job)?;
                let output = self.graph.nodes[job.node].output;
                let in_place = residual.is_some_and(|v| self.replaceable(index, v, output))
                    && residual.is_none_or(|v| !chain.segments.contains(&v));
                let scratch = self.fresh(plan.scratch_len(self.threads), 4);
                let place = ConvPlace { in_place, lines: None, sums, scratch, holds: false };
                let (macs, action) = self.conv(job, plan, place)?;
                self.push(job.core(), macs, action);
                Ok(())
            }
            Kind::Pointwise { chain, residual } => {
                self.pointwise(index, job.node, chain, *residual, sums)
            }
            Kind::VectorLinear { input, silu } => self.vector_linear(job.node, *input, *silu),
            Kind::Alone => self.alone(index, job.node),
        }
    }

    /// Whether pass `index` is the last to read `value`.
    fn dies(&self, value: ValueId, index: usize) -> bool {
        self.last_read[value.index()] == Some(index)
    }

    /// The chain's inputs, after the steps that make its coefficients where there are none yet.
    fn inputs(&mut self, node: usize, chain: &Chain) -> Result<Inputs, PrepareError> {
        let coefficients = match chain.stage {
            None => None,
            Some(stage) => Some(self.coefficients(node, stage, &chain.segments)?),
        };
        let segments = chain.segments.iter().map(|&v| (self.read(v), self.shape(v)[2])).collect();
        Ok(Inputs {
            segments,
            coefficients: coefficients.map(|b| self.touch(b)),
            activation: if chain.silu { Activation::Silu } else { Activation::None },
        })
    }

    fn coefficients(
        &mut self,
        node: usize,
        stage: Stage,
        segments: &[ValueId],
    ) -> Result<BufferId, PrepareError> {
        let known = self.coefficients.iter().find(|(s, of, _)| *s == stage && of == segments);
        if let Some(&(_, _, buffer)) = known {
            return Ok(buffer);
        }
        let channels = segments.iter().map(|&v| self.shape(v)[2]).sum::<usize>();
        let from = match stage {
            Stage::GroupNorm { node, modulation } => {
                let out = self.group_norm(node, modulation, segments, channels)?;
                self.coefficients.push((stage, segments.to_vec(), out));
                return Ok(out);
            }
            Stage::Modulate(v) => Coefficients::Modulate(self.read(v)),
            Stage::AddChannel(v) => Coefficients::AddChannel(self.read(v)),
            Stage::Affine { mul, add } => Coefficients::Affine { mul, add },
        };
        let out = self.fresh(2 * channels, 4);
        self.push(node, 0, Action::Coefficients { from, out });
        self.coefficients.push((stage, segments.to_vec(), out));
        Ok(out)
    }

    fn group_norm(
        &mut self,
        node: usize,
        modulation: Option<ValueId>,
        values: &[ValueId],
        channels: usize,
    ) -> Result<BufferId, PrepareError> {
        for &v in values {
            if self.sums[v.index()].is_none() {
                let [h, w, c] = self.shape(v);
                let layout = SumsLayout::of_tensor(h * w, c);
                let input = self.read(v);
                let sums = self.fresh(layout.len(), 8);
                let action = Action::Sums { input, channels: c, sums };
                self.push(node, 0, action);
                self.sums[v.index()] = Some((sums, layout));
            }
        }
        let Op::GroupNorm { groups, eps, weight, bias } = self.graph.nodes[node].op else {
            unreachable!("the stage names a GroupNorm");
        };
        // Invariant: every entry was filled above or by the value's producer.
        let segments: Vec<_> = values.iter().filter_map(|v| self.sums[v.index()]).collect();
        for &(sums, _) in &segments {
            self.touch(sums);
        }
        let step = NormStep {
            segments,
            groups: groups as usize,
            eps,
            gamma: self.plain(node, weight)?,
            beta: self.plain(node, bias)?,
            modulation: modulation.map(|v| self.read(v)),
            out: self.fresh(2 * channels, 4),
            scratch: self.fresh(2 * channels, 8),
            gathered: self.fresh(2 * groups as usize + 1, 8),
        };
        self.lasting.push(step.gathered);
        let out = step.out;
        self.push(node, 0, Action::GroupNorm(step));
        Ok(out)
    }

    /// The output of `node`, in `place` where that is given, with room for its sums where they are wanted.
    fn written(
        &mut self,
        node: usize,
        place: Option<BufferId>,
        layout: Option<SumsLayout>,
    ) -> Written {
        let value = self.graph.nodes[node].output;
        let now = self.now();
        let out = match place {
            Some(buffer) => {
                self.touch(buffer);
                self.keep(value, buffer).buffer
            }
            None => self.store(value, now).buffer,
        };
        Written { out, sums: layout.map(|layout| self.sums_of(value, layout)) }
    }

    /// Room for the sums that the next step leaves of `value`.
    fn sums_of(&mut self, value: ValueId, layout: SumsLayout) -> BufferId {
        let sums = self.fresh(layout.len(), 8);
        self.sums[value.index()] = Some((sums, layout));
        sums
    }

    /// Whether `output` may take the place of `value` in pass `index`, as far as these two are concerned.
    fn replaceable(&self, index: usize, value: ValueId, output: ValueId) -> bool {
        self.dtype_of(value) == self.dtype_of(output)
            && self.dies(value, index)
            && self.rings[value.index()].is_none()
    }

    /// The addend, and the buffer of the output where that is the addend's.
    fn addend(&mut self, residual: Option<ValueId>, in_place: bool) -> (Addend, Option<BufferId>) {
        let Some(value) = residual else {
            return (Addend::None, None);
        };
        let buffer = self.read(value);
        if in_place { (Addend::InPlace, Some(buffer)) } else { (Addend::Of(buffer), None) }
    }

    fn pointwise(
        &mut self,
        index: usize,
        node: usize,
        chain: &Chain,
        residual: Option<ValueId>,
        sums: bool,
    ) -> Result<(), PrepareError> {
        let inputs = self.inputs(node, chain)?;
        let [h, w, _] = self.shape(chain.segments[0]);
        let shape = ElementwiseShape { h, w, c: inputs.channels(), upsample: chain.upsample };
        let output = self.graph.nodes[node].output;
        let in_place = match chain.segments[..] {
            [only] => {
                !chain.upsample
                    && residual != Some(only)
                    && self.dies(only, index)
                    && self.dtype_of(only) == self.dtype_of(output)
            }
            _ => false,
        };
        let (residual, place) = if in_place {
            let of = residual.map_or(Addend::None, |v| Addend::Of(self.read(v)));
            (of, Some(inputs.segments[0].0))
        } else {
            // A window reads pixels that another task may already have replaced: never over an input.
            let free = |v| self.replaceable(index, v, output) && !chain.segments.contains(&v);
            self.addend(residual, residual.is_some_and(free))
        };
        let Written { out, sums } = self.written(node, place, sums.then(|| shape.sums()));
        let step = PointwiseStep { shape, inputs, in_place, residual, out, sums };
        self.push(node, 0, Action::Pointwise(step));
        Ok(())
    }

    fn vector_linear(
        &mut self,
        node: usize,
        input: ValueId,
        silu: bool,
    ) -> Result<(), PrepareError> {
        let Op::Linear { weight, bias, .. } = self.graph.nodes[node].op else {
            unreachable!("a linear job is of a linear layer");
        };
        let activation = if silu { Activation::Silu } else { Activation::None };
        let scratch = vector::linear_scratch_len(self.shape(input)[2], activation);
        let now = self.now();
        let step = LinearStep {
            weights: self.packed(node, weight)?,
            bias: self.bias(node, bias)?,
            activation,
            input: self.read(input),
            out: self.store(self.graph.nodes[node].output, now).buffer,
            scratch: self.fresh(scratch, 4),
        };
        let macs = self.graph.node_macs(&self.graph.nodes[node], self.shapes);
        self.push(node, macs, Action::VectorLinear(step));
        Ok(())
    }

    fn alone(&mut self, index: usize, node: usize) -> Result<(), PrepareError> {
        let n = &self.graph.nodes[node];
        let now = self.now();
        let mut macs = 0;
        let first = self.read(n.inputs[0]);
        let action = match n.op {
            Op::AvgPool2x => Action::Pool {
                shape: self.shape(n.inputs[0]),
                input: first,
                out: self.store(n.output, now).buffer,
            },
            Op::Attention { scale, heads, int8 } => {
                let [h, w, channels] = self.shape(n.inputs[0]);
                let [kh, kw, _] = self.shape(n.inputs[1]);
                let shape = AttentionShape {
                    queries: h * w,
                    keys: kh * kw,
                    channels,
                    heads: heads as usize,
                };
                let plan = if int8 { AttentionPlan::int8 } else { AttentionPlan::new };
                let plan = plan(shape, scale, self.level, self.threads)
                    .map_err(|e| self.unsupported(node, &e))?;
                macs = self.graph.node_macs(n, self.shapes);
                let inputs = [first, self.read(n.inputs[1]), self.read(n.inputs[2])];
                let q = n.inputs[0];
                let in_place = !n.inputs[1..].contains(&q) && self.replaceable(index, q, n.output);
                let place = in_place.then_some(first);
                Action::Attention(AttentionStep {
                    channels,
                    inputs,
                    in_place,
                    out: self.written(node, place, None).out,
                    scratch: self.fresh(plan.scratch_len(), 4),
                    plan,
                })
            }
            Op::Codebook { table } => {
                let channels = self.shape(n.inputs[0])[2];
                let table = self.plain(node, table)?;
                let packed = self.codebook(table, channels);
                Action::Codebook {
                    table,
                    packed,
                    channels,
                    input: first,
                    out: self.store(n.output, now).buffer,
                }
            }
            Op::Silu => Action::VectorSilu { input: first, out: self.store(n.output, now).buffer },
            Op::Affine { mul, add } => Action::VectorAffine {
                input: first,
                mul,
                add,
                out: self.store(n.output, now).buffer,
            },
            _ => unreachable!("`fuse` gives {} a job of another kind", n.op.name()),
        };
        self.push(node, macs, action);
        Ok(())
    }

    /// The packed form of a codebook, kept from before the first run; one for equal tables.
    fn codebook(&mut self, table: &'m [f32], channels: usize) -> BufferId {
        let same = |t: &&Table<'_>| std::ptr::eq(t.table, table) && t.channels == channels;
        if let Some(known) = self.tables.iter().find(same) {
            return known.packed;
        }
        let packed = self.fresh(codebook::packed_len(table.len() / channels, channels), 4);
        self.lasting.push(packed);
        self.tables.push(Table { table, channels, packed });
        packed
    }

    fn finish(
        mut self,
        inputs: Vec<Bound>,
        outputs: Vec<Bound>,
    ) -> Result<Program<'m>, PrepareError> {
        let end = self.now();
        for buffer in &self.lasting {
            let life = &mut self.lifetimes[buffer.0];
            (life.first, life.last) = (0, end);
        }
        let plan = plan_arena(&self.lifetimes, &self.overlays)
            .ok_or(ArenaError::OutOfMemory { bytes: usize::MAX })?;
        let crowd = self.crowd(&plan);
        let places = self
            .lifetimes
            .iter()
            .zip(&plan.offsets)
            .zip(&self.dtypes)
            .map(|((life, &offset), &dtype)| Place { offset, bytes: life.bytes, dtype })
            .collect();
        Ok(Program {
            steps: self.steps,
            passes: self.passes,
            crowd,
            places,
            arena_bytes: plan.bytes,
            inputs,
            outputs,
            tables: self.tables,
            norms: Norms::Own,
            level: self.level,
            stored: self.stored,
        })
    }

    /// The values that are stored when the arena's end is in use, and most of it with it.
    fn crowd(&self, plan: &ArenaPlan) -> Vec<ValueId> {
        let ends = |i: &usize| plan.offsets[*i] + self.lifetimes[*i].bytes + ALIGN > plan.bytes;
        let live = |moment: usize| {
            let lives = self.lifetimes.iter().filter(|l| l.first <= moment && moment <= l.last);
            lives.fold(0_usize, |sum, l| sum.saturating_add(l.bytes))
        };
        let last = (0..self.lifetimes.len()).filter(ends).map(|i| self.lifetimes[i]);
        let peak = last.flat_map(|l| l.first..=l.last).max_by_key(|&m| (live(m), m)).unwrap_or(0);
        let alive =
            |b: BufferId| self.lifetimes[b.0].first <= peak && peak <= self.lifetimes[b.0].last;
        self.whole.iter().filter(|w| alive(w.0)).map(|w| w.1).collect()
    }
}
