//! Runs lowered steps on an arena.
//!
//! `unsafe` is here because the arena is one block and a step reads some of its buffers while it writes
//! others: [`Views`] cuts it into slices that the plan keeps apart.

use super::program::{
    Action, Addend, Bound, BufferId, Coefficients, ConvStep, Hold, Holds, Inputs, NormStep,
    PointwiseStep, Program, Step,
};
use crate::pool::Pool;
use crate::steps::attention::{AttentionArgs, Columns, Queries, attention};
use crate::steps::codebook::{self, CodebookArgs, codebook};
use crate::steps::conv::{
    ConvArgs, MAX_SEGMENTS, Residual, Rows, Segment, Window, conv2d, conv2d_rows, observe,
};
use crate::steps::elementwise::{ElementwiseArgs, Input, elementwise};
use crate::steps::norm::{
    ChannelSums, GroupNormArgs, SumsLayout, channel_sums, fold_moments, group_norm_moments,
};
use crate::steps::pool2x::pool2x;
use crate::steps::vector::{self, LinearArgs};
use crate::steps::{Output, Source, StepError, ports};
use half::f16;
use latile_runtime::backend::Norms;
use latile_runtime::tensor::{Arena, DType};
use std::marker::PhantomData;
use std::ops::Range;

/// Cuts an exclusively borrowed arena into the buffers of a program.
///
/// Every slice must be of a buffer that is alive in the step at hand, and a buffer is handed out mutably
/// at most once a step and then not shared. The plan gives buffers that live at the same step disjoint
/// bytes, so such slices never overlap. In a streamed pass a map may lie over one that it replaces line
/// by line: there only those rows of stored maps are handed out that the strip reads or writes, and the
/// schedule keeps them apart.
struct Views<'a> {
    base: *mut u8,
    bytes: usize,
    program: &'a Program<'a>,
    arena: PhantomData<&'a mut [u8]>,
}

impl<'a> Views<'a> {
    fn new(program: &'a Program<'a>, arena: &'a mut Arena) -> Self {
        let block = arena.as_mut_slice();
        assert!(block.len() >= program.arena_bytes, "the arena is as large as the plan");
        Self { base: block.as_mut_ptr(), bytes: block.len(), program, arena: PhantomData }
    }

    /// Address and elements of a part of a buffer of `T`s.
    fn range<T>(&self, id: BufferId, elements: Range<usize>) -> (*mut T, usize) {
        let place = self.program.places[id.0];
        assert!(place.offset + place.bytes <= self.bytes);
        assert!(elements.start <= elements.end && elements.end * size_of::<T>() <= place.bytes);
        // SAFETY: the offset lies within the block or one past it, as just checked.
        let start = unsafe { self.base.add(place.offset + elements.start * size_of::<T>()) };
        debug_assert!((start as usize).is_multiple_of(align_of::<T>()));
        (start.cast(), elements.len())
    }

    fn read<T: Number>(&self, id: BufferId) -> &'a [T] {
        self.read_range(id, 0..self.program.places[id.0].bytes / size_of::<T>())
    }

    fn read_range<T: Number>(&self, id: BufferId, elements: Range<usize>) -> &'a [T] {
        let (start, len) = self.range(id, elements);
        // SAFETY: in bounds and aligned (offsets are multiples of 64), initialised (the arena is born
        // zeroed) and valid for any bytes; not written in this step: see `Views`.
        unsafe { std::slice::from_raw_parts(start, len) }
    }

    fn write<T: Number>(&self, id: BufferId) -> &'a mut [T] {
        self.write_range(id, 0..self.program.places[id.0].bytes / size_of::<T>())
    }

    fn write_range<T: Number>(&self, id: BufferId, elements: Range<usize>) -> &'a mut [T] {
        let (start, len) = self.range(id, elements);
        // SAFETY: as in `read`, and handed out once: see `Views`.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }

    /// Elements of a value's buffer.
    fn elements(&self, id: BufferId) -> Range<usize> {
        let place = self.program.places[id.0];
        0..place.bytes / place.dtype.size()
    }

    /// Some elements of a value.
    fn part(&self, id: BufferId, elements: Range<usize>) -> Source<'a> {
        match self.program.places[id.0].dtype {
            DType::F32 => Source::F32(self.read_range(id, elements)),
            DType::F16 => Source::F16(self.read_range(id, elements)),
            DType::I8 | DType::I32 => unreachable!("values are stored as floats"),
        }
    }

    /// As [`Views::part`], to write.
    fn part_mut(&self, id: BufferId, elements: Range<usize>) -> Output<'a> {
        match self.program.places[id.0].dtype {
            DType::F32 => Output::F32(self.write_range(id, elements)),
            DType::F16 => Output::F16(self.write_range(id, elements)),
            DType::I8 | DType::I32 => unreachable!("values are stored as floats"),
        }
    }

    fn source(&self, id: BufferId) -> Source<'a> {
        self.part(id, self.elements(id))
    }

    fn output(&self, id: BufferId) -> Output<'a> {
        self.part_mut(id, self.elements(id))
    }

    /// What a strip uses of a map: rows `y` of it, each of `row` elements, or its ring of lines.
    fn held(&self, id: BufferId, hold: Hold, y: [usize; 2], row: usize) -> (Range<usize>, Window) {
        match hold {
            Hold::Ring(lines) => (self.elements(id), Window::ring(lines)),
            Hold::Whole => (y[0] * row..y[1] * row, Window::from(y[0])),
        }
    }

    fn sums(&self, id: Option<BufferId>) -> Option<&'a mut [f64]> {
        id.map(|id| self.write(id))
    }

    fn residual(&self, addend: Addend) -> Residual<'a> {
        match addend {
            Addend::None => Residual::None,
            Addend::InPlace => Residual::InPlace,
            Addend::Of(id) => Residual::Of(self.source(id)),
        }
    }

    /// Scale and shift of every channel.
    fn norm(&self, inputs: &Inputs) -> Option<(&'a [f32], &'a [f32])> {
        let all: &[f32] = self.read(inputs.coefficients?);
        Some(all.split_at(inputs.channels()))
    }

    /// Calls `then` with the segments, which live on the stack.
    fn segments<R>(&self, inputs: &Inputs, then: impl FnOnce(&[Segment<'_>]) -> R) -> R {
        self.segments_of(inputs, &|_, id, _| self.source(id), then)
    }

    /// As [`Views::segments`], the data of each (its number, buffer and channels) as `data` gives it.
    fn segments_of<R>(
        &self,
        inputs: &Inputs,
        data: &dyn Fn(usize, BufferId, usize) -> Source<'a>,
        then: impl FnOnce(&[Segment<'_>]) -> R,
    ) -> R {
        let empty = Segment { data: Source::F32(&[]), channels: 0, norm: None };
        let mut all = [empty; MAX_SEGMENTS];
        let mut first = 0;
        for (i, (slot, &(id, channels))) in all.iter_mut().zip(&inputs.segments).enumerate() {
            let own = first..first + channels;
            first += channels;
            *slot = Segment {
                data: data(i, id, channels),
                channels,
                norm: self.norm(inputs).map(|(scale, shift)| (&scale[own.clone()], &shift[own])),
            };
        }
        then(&all[..inputs.segments.len().min(MAX_SEGMENTS)])
    }
}

/// Types for which any bytes are a value.
trait Number: Copy {}
impl Number for f32 {}
impl Number for f64 {}
impl Number for f16 {}

impl<'m> Program<'m> {
    /// Arranges the codebooks; once, before the first run.
    ///
    /// # Errors
    /// [`StepError`] where a table has no rows, which a checked graph excludes.
    pub(crate) fn fill_tables(&self, arena: &mut Arena) -> Result<(), StepError> {
        let views = Views::new(self, arena);
        self.tables
            .iter()
            .try_for_each(|t| codebook::pack(t.table, t.channels, views.write(t.packed)))
    }

    /// Chooses what GroupNorms use in the runs to come.
    pub(crate) fn use_norms(&mut self, norms: Norms, arena: &mut Arena) {
        self.norms = norms;
        if norms == Norms::Gather {
            let views = Views::new(self, arena);
            for step in &self.steps {
                if let Action::GroupNorm(norm) = &step.action {
                    views.write::<f64>(norm.gathered).fill(0.0);
                }
            }
        }
    }

    /// Takes a port's tensor in.
    pub(crate) fn take_in(
        &self,
        port: Bound,
        tensor: &[f32],
        arena: &mut Arena,
        pool: &Pool,
    ) -> Result<(), StepError> {
        let views = Views::new(self, arena);
        ports::store(self.level, pool, tensor, views.output(port.buffer))
    }

    /// Hands a port's tensor out; false where it holds NaN or infinity.
    pub(crate) fn hand_out(
        &self,
        port: Bound,
        tensor: &mut [f32],
        arena: &mut Arena,
        pool: &Pool,
    ) -> Result<bool, StepError> {
        let views = Views::new(self, arena);
        ports::load(self.level, pool, views.source(port.buffer), tensor)
    }

    /// Shows `see` the input of a convolution step, as [`observe`] does; other steps show nothing.
    pub(crate) fn observe_step(
        &self,
        step: &Step<'m>,
        arena: &mut Arena,
        see: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), StepError> {
        let Action::Conv(conv) = &step.action else {
            return Ok(());
        };
        let channels = conv.inputs.channels();
        Views::new(self, arena).segments(&conv.inputs, |segments| {
            observe(&conv.plan, segments, conv.inputs.activation, &mut |row| see(channels, row))
        })
    }

    /// Runs a strip, rows `y`, of a convolution of a streamed pass. Allocates nothing.
    pub(crate) fn run_strip(
        &self,
        step: &Step<'m>,
        y: [usize; 2],
        arena: &mut Arena,
        pool: &Pool,
    ) -> Result<(), StepError> {
        let v = &Views::new(self, arena);
        match &step.action {
            Action::Conv(step) if let Some(holds) = &step.holds => {
                conv_strip(v, step, holds, y, pool)
            }
            _ => unreachable!("streamed passes consist of convolutions in strips"),
        }
    }

    /// Runs one step. Allocates nothing.
    pub(crate) fn run_step(
        &self,
        step: &Step<'m>,
        arena: &mut Arena,
        pool: &Pool,
    ) -> Result<(), StepError> {
        let v = &Views::new(self, arena);
        match &step.action {
            Action::Conv(step) => conv(v, step, pool),
            Action::Pointwise(step) => pointwise(v, step, pool),
            Action::Sums { input, channels, sums } => {
                channel_sums(self.level, pool, v.source(*input), *channels, v.write(*sums))
            }
            Action::GroupNorm(step) => group_norm(v, step),
            Action::Coefficients { from, out } => {
                coefficients(v, *from, v.write(*out));
                Ok(())
            }
            Action::Attention(step) => {
                let columns = |id| Columns::whole(v.source(id), step.channels);
                let q = if step.in_place {
                    Queries::InPlace
                } else {
                    Queries::Of(columns(step.inputs[0]))
                };
                let args = AttentionArgs {
                    q,
                    k: columns(step.inputs[1]),
                    v: columns(step.inputs[2]),
                    out: v.output(step.out),
                };
                attention(&step.plan, pool, args, v.write(step.scratch))
            }
            Action::Pool { shape, input, out } => {
                pool2x(self.level, pool, *shape, v.source(*input), v.output(*out))
            }
            Action::Codebook { table, packed, channels, input, out } => codebook(
                self.level,
                pool,
                CodebookArgs {
                    table,
                    packed: v.read(*packed),
                    channels: *channels,
                    x: v.source(*input),
                    out: v.output(*out),
                    indices: None,
                },
            ),
            Action::VectorLinear(step) => vector::linear(
                self.level,
                pool,
                LinearArgs {
                    weights: step.weights,
                    bias: step.bias,
                    activation: step.activation,
                    x: v.read(step.input),
                    out: v.write(step.out),
                },
                v.write(step.scratch),
            ),
            Action::VectorSilu { input, out } => {
                vector::silu(self.level, v.read(*input), v.write(*out))
            }
            Action::VectorAffine { input, mul, add, out } => {
                vector::affine(self.level, v.read(*input), *mul, *add, v.write(*out))
            }
        }
    }
}

fn conv(v: &Views<'_>, step: &ConvStep<'_>, pool: &Pool) -> Result<(), StepError> {
    v.segments(&step.inputs, |segments| {
        let args = ConvArgs {
            segments,
            activation: step.inputs.activation,
            weights: step.weights,
            bias: step.bias,
            add: step.add.map(|id| v.read(id)),
            residual: v.residual(step.residual),
            output_scale: step.scale,
            out: v.output(step.out),
            sums: v.sums(step.sums),
        };
        conv2d(&step.plan, pool, args, v.write(step.scratch))
    })
}

fn conv_strip(
    v: &Views<'_>,
    step: &ConvStep<'_>,
    holds: &Holds,
    y: [usize; 2],
    pool: &Pool,
) -> Result<(), StepError> {
    let shape = step.plan.shape();
    let needed = shape.input_rows(y);
    let row = shape.out()[1] * shape.n;
    let mut rows = Rows { y, ..Rows::all(&step.plan) };
    let (own, window) = v.held(step.out, holds.out, y, row);
    rows.out = window;
    let out = v.part_mut(step.out, own);
    let residual = match step.residual {
        Addend::None => Residual::None,
        Addend::InPlace => Residual::InPlace,
        Addend::Of(id) => {
            let (own, window) = v.held(id, holds.residual, y, row);
            rows.residual = window;
            Residual::Of(v.part(id, own))
        }
    };
    let held = |i: usize, id, channels| v.held(id, holds.inputs[i], needed, shape.w * channels);
    for (i, &(id, channels)) in step.inputs.segments.iter().enumerate() {
        rows.inputs[i] = held(i, id, channels).1;
    }
    let part = |i, id, channels| v.part(id, held(i, id, channels).0);
    v.segments_of(&step.inputs, &part, |segments| {
        let args = ConvArgs {
            segments,
            activation: step.inputs.activation,
            weights: step.weights,
            bias: step.bias,
            add: step.add.map(|id| v.read(id)),
            residual,
            output_scale: step.scale,
            out,
            sums: v.sums(step.sums),
        };
        conv2d_rows(&step.plan, pool, args, &rows, v.write(step.scratch))
    })
}

fn pointwise(v: &Views<'_>, step: &PointwiseStep, pool: &Pool) -> Result<(), StepError> {
    let level = v.program.level;
    let run = |input: Input<'_>| {
        let args = ElementwiseArgs {
            input,
            activation: step.inputs.activation,
            residual: v.residual(step.residual),
            out: v.output(step.out),
            sums: v.sums(step.sums),
        };
        elementwise(level, pool, &step.shape, args)
    };
    if step.in_place {
        return run(Input::InPlace { norm: v.norm(&step.inputs) });
    }
    v.segments(&step.inputs, |segments| run(Input::Segments(segments)))
}

fn group_norm(v: &Views<'_>, step: &NormStep<'_>) -> Result<(), StepError> {
    let empty = ChannelSums { layout: SumsLayout::of_tensor(0, 0), sums: &[] };
    let mut segments = [empty; MAX_SEGMENTS];
    for (slot, &(id, layout)) in segments.iter_mut().zip(&step.segments) {
        *slot = ChannelSums { layout, sums: v.read(id) };
    }
    let args = GroupNormArgs {
        segments: &segments[..step.segments.len().min(MAX_SEGMENTS)],
        groups: step.groups,
        eps: f64::from(step.eps),
        gamma: step.gamma,
        beta: step.beta,
        modulation: step.modulation.map(|id| {
            let all: &[f32] = v.read(id);
            all.split_at(all.len() / 2)
        }),
    };
    let out: &mut [f32] = v.write(step.out);
    let (scale, shift) = out.split_at_mut(out.len() / 2);
    let moments: &mut [f64] = v.write(step.scratch);
    let gathered: &mut [f64] = v.write(step.gathered);
    let (all, count) = gathered.split_at_mut(2 * step.groups);
    if v.program.norms == Norms::Gathered {
        let moments = &mut moments[..all.len()];
        for (moment, sum) in moments.iter_mut().zip(all) {
            *moment = *sum / count[0];
        }
        return fold_moments(&args, moments, scale, shift);
    }
    group_norm_moments(&args, moments)?;
    let moments = &moments[..all.len()];
    if v.program.norms == Norms::Gather {
        for (sum, moment) in all.iter_mut().zip(moments) {
            *sum += moment;
        }
        count[0] += 1.0;
    }
    fold_moments(&args, moments, scale, shift)
}

fn coefficients(v: &Views<'_>, from: Coefficients, out: &mut [f32]) {
    let (scale, shift) = out.split_at_mut(out.len() / 2);
    match from {
        Coefficients::Modulate(id) => {
            let all: &[f32] = v.read(id);
            let (by, to) = all.split_at(all.len() / 2);
            for (scale, by) in scale.iter_mut().zip(by) {
                *scale = 1.0 + by;
            }
            shift.copy_from_slice(to);
        }
        Coefficients::AddChannel(id) => {
            scale.fill(1.0);
            shift.copy_from_slice(v.read(id));
        }
        Coefficients::Affine { mul, add } => {
            scale.fill(mul);
            shift.fill(add);
        }
    }
}
