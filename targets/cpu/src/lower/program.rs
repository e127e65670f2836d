//! Lowered steps: what runs, on which buffers, with which weights.

use super::schedule::Strip;
use crate::isa::Level;
use crate::steps::attention::AttentionPlan;
use crate::steps::conv::{Activation, ConvPlan, MAX_SEGMENTS, Weights};
use crate::steps::elementwise::ElementwiseShape;
use crate::steps::norm::SumsLayout;
use latile_runtime::backend::Norms;
use latile_runtime::graph::{QuantRange, ValueId};
use latile_runtime::tensor::DType;
use std::ops::Range;

/// A buffer of a [`Program`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BufferId(pub(super) usize);

/// A buffer's place in the arena.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Bytes from the arena's start, a multiple of 64.
    pub(super) offset: usize,
    /// Its size.
    pub(super) bytes: usize,
    /// How it stores its value, where it holds one of the graph's.
    pub(super) dtype: DType,
}

/// A component at one size, ready to run.
#[derive(Debug)]
pub(crate) struct Program<'m> {
    /// In execution order, but for those of one pass, which run side by side.
    pub(crate) steps: Vec<Step<'m>>,
    /// In execution order.
    pub(crate) passes: Vec<Pass>,
    /// One a buffer.
    pub(super) places: Vec<Place>,
    /// What the arena must hold, no more and no less.
    pub(crate) arena_bytes: usize,
    /// One a port.
    pub(crate) inputs: Vec<Bound>,
    /// One a port.
    pub(crate) outputs: Vec<Bound>,
    /// Codebooks in the order their search wants, filled once.
    pub(super) tables: Vec<Table<'m>>,
    /// The instruction set.
    pub(super) level: Level,
    /// What GroupNorms use.
    pub(super) norms: Norms,
    /// Graph values that are stored whole when most of the arena is in use.
    pub(super) crowd: Vec<ValueId>,
    /// Graph values that are stored in the model's precision, for the reference's rounding.
    pub(crate) stored: Vec<ValueId>,
}

impl Program<'_> {
    /// Multiply-accumulates of one run.
    pub(crate) fn macs(&self) -> u64 {
        self.steps.iter().map(|s| s.macs).fold(0, u64::saturating_add)
    }

    /// Whether every step runs alone and stores its result whole.
    pub(crate) fn is_whole(&self) -> bool {
        self.passes.iter().all(|p| matches!(p, Pass::One(_)))
    }
}

/// Steps that run together.
#[derive(Clone, Debug)]
pub(crate) enum Pass {
    /// One step, all of it.
    One(usize),
    /// Convolutions that run strip by strip, so that what passes between them is never whole.
    Streamed {
        /// The first step.
        first: usize,
        /// How many there are.
        steps: usize,
        /// Their strips, by their number in the pass.
        order: Vec<Strip>,
    },
}

impl Pass {
    /// Its steps, by their number in the program.
    pub(crate) const fn steps(&self) -> Range<usize> {
        match *self {
            Self::One(step) => step..step + 1,
            Self::Streamed { first, steps, .. } => first..first + steps,
        }
    }
}

/// How much of a map its buffer holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Hold {
    /// All of it.
    #[default]
    Whole,
    /// So many lines, in a ring.
    Ring(usize),
}

/// How the operands of a convolution in a streamed pass are held.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Holds {
    pub(super) inputs: [Hold; MAX_SEGMENTS],
    pub(super) residual: Hold,
    pub(super) out: Hold,
}

/// A port's buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bound {
    pub(super) buffer: BufferId,
}

/// A codebook to arrange before the first run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table<'m> {
    pub(super) table: &'m [f32],
    pub(super) channels: usize,
    pub(super) packed: BufferId,
}

/// One fused step.
#[derive(Debug)]
pub(crate) struct Step<'m> {
    /// The layer's name, of the operator that does the work.
    pub(crate) name: String,
    /// Multiply-accumulates.
    pub(crate) macs: u64,
    pub(super) action: Action<'m>,
}

impl Step<'_> {
    /// Makes an int8 layer read its input by the range of a group of timesteps, the last one where there
    /// are fewer groups.
    pub(crate) fn set_timestep_group(&mut self, group: usize) {
        if let Action::Conv(conv) = &mut self.action
            && let Weights::I8(weights) = &mut conv.weights
        {
            let mut groups = conv.ranges.chunks_exact(weights.ranges.len());
            let last = groups.len().saturating_sub(1);
            if let Some(ranges) = groups.nth(group.min(last)) {
                weights.ranges = ranges;
            }
        }
    }

    /// What it does, for reports.
    pub(crate) const fn kind(&self) -> &'static str {
        match self.action {
            Action::Conv(ref conv) if conv.plan.is_int8() => "conv2d int8",
            Action::Conv(_) => "conv2d",
            Action::Pointwise(_) => "elementwise",
            Action::Sums { .. } => "channel_sums",
            Action::GroupNorm(_) => "group_norm",
            Action::Coefficients { .. } => "coefficients",
            Action::Attention(ref step) if step.plan.is_int8() => "attention int8",
            Action::Attention(_) => "attention",
            Action::Pool { .. } => "avg_pool2x",
            Action::Codebook { .. } => "codebook",
            Action::VectorLinear(_) => "linear",
            Action::VectorSilu { .. } => "silu",
            Action::VectorAffine { .. } => "affine",
        }
    }
}

/// The tensors that a step reads side by side.
#[derive(Clone, Debug)]
pub(super) struct Inputs {
    /// Buffers with their channels, one to four.
    pub(super) segments: Vec<(BufferId, usize)>,
    /// Scale of every channel, then shift of every channel.
    pub(super) coefficients: Option<BufferId>,
    pub(super) activation: Activation,
}

impl Inputs {
    pub(super) fn channels(&self) -> usize {
        self.segments.iter().map(|s| s.1).sum()
    }
}

/// What is added to a step's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Addend {
    None,
    /// What the output's buffer holds.
    InPlace,
    Of(BufferId),
}

#[derive(Debug)]
pub(super) enum Action<'m> {
    /// Boxed: several times as large as the others.
    Conv(Box<ConvStep<'m>>),
    Pointwise(PointwiseStep),
    /// Sums of a tensor whose producer leaves none.
    Sums {
        input: BufferId,
        channels: usize,
        sums: BufferId,
    },
    GroupNorm(NormStep<'m>),
    /// Scale and shift of a stage that is no norm.
    Coefficients {
        from: Coefficients,
        out: BufferId,
    },
    Attention(AttentionStep),
    Pool {
        shape: [usize; 3],
        input: BufferId,
        out: BufferId,
    },
    Codebook {
        table: &'m [f32],
        packed: BufferId,
        channels: usize,
        input: BufferId,
        out: BufferId,
    },
    VectorLinear(LinearStep<'m>),
    VectorSilu {
        input: BufferId,
        out: BufferId,
    },
    VectorAffine {
        input: BufferId,
        mul: f32,
        add: f32,
        out: BufferId,
    },
}

#[derive(Debug)]
pub(super) struct ConvStep<'m> {
    pub(super) plan: ConvPlan,
    pub(super) inputs: Inputs,
    pub(super) weights: Weights<'m>,
    /// Of an int8 layer, its input's ranges in each group of timesteps; else empty.
    pub(super) ranges: &'m [QuantRange],
    pub(super) bias: Option<&'m [f32]>,
    pub(super) add: Option<BufferId>,
    pub(super) residual: Addend,
    pub(super) scale: f32,
    pub(super) out: BufferId,
    pub(super) sums: Option<BufferId>,
    pub(super) scratch: BufferId,
    /// Given where it runs strip by strip.
    pub(super) holds: Option<Holds>,
}

#[derive(Debug)]
pub(super) struct PointwiseStep {
    pub(super) shape: ElementwiseShape,
    pub(super) inputs: Inputs,
    /// The first segment is the output's buffer.
    pub(super) in_place: bool,
    pub(super) residual: Addend,
    pub(super) out: BufferId,
    pub(super) sums: Option<BufferId>,
}

#[derive(Debug)]
pub(super) struct NormStep<'m> {
    pub(super) segments: Vec<(BufferId, SumsLayout)>,
    pub(super) groups: usize,
    pub(super) eps: f32,
    pub(super) gamma: &'m [f32],
    pub(super) beta: &'m [f32],
    /// A vector: scales, then shifts.
    pub(super) modulation: Option<BufferId>,
    pub(super) out: BufferId,
    pub(super) scratch: BufferId,
    /// Sums of the groups' moments over the runs that were gathered, then the number of those; kept from
    /// run to run.
    pub(super) gathered: BufferId,
}

/// Where coefficients come from, when not from a norm.
#[derive(Clone, Copy, Debug)]
pub(super) enum Coefficients {
    /// `1 + v[..c]`, `v[c..]`.
    Modulate(BufferId),
    /// `1`, `v`.
    AddChannel(BufferId),
    /// The same for every channel.
    Affine { mul: f32, add: f32 },
}

#[derive(Debug)]
pub(super) struct AttentionStep {
    pub(super) plan: AttentionPlan,
    pub(super) channels: usize,
    /// Queries, keys, values.
    pub(super) inputs: [BufferId; 3],
    /// Whether the output's buffer is that of the queries.
    pub(super) in_place: bool,
    pub(super) out: BufferId,
    pub(super) scratch: BufferId,
}

#[derive(Debug)]
pub(super) struct LinearStep<'m> {
    pub(super) weights: Weights<'m>,
    pub(super) bias: Option<&'m [f32]>,
    pub(super) activation: Activation,
    pub(super) input: BufferId,
    pub(super) out: BufferId,
    pub(super) scratch: BufferId,
}
