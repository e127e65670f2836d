//! A convolution to be timed, with operands of its own: as in a network, GroupNorm and SiLU on
//! half-precision input, bias, half-precision output with the sums for the next GroupNorm.

use half::f16;
use latile_cpu::isa::Level;
use latile_cpu::pool::Pool;
use latile_cpu::registry::WeightType;
use latile_cpu::steps::conv::{
    Activation, ConvArgs, ConvPlan, ConvShape, Int8Weights, Residual, Segment, Weights, conv2d,
};
use latile_cpu::steps::{Output, Source, StepError};
use latile_runtime::graph::QuantRange;

/// What a convolution's weights are, and with it what it computes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbers {
    /// Single precision.
    F32,
    /// Half-precision weights, single-precision arithmetic.
    F16,
    /// Integers.
    Int8,
}

impl Numbers {
    /// All of them.
    pub const ALL: [Numbers; 3] = [Numbers::F32, Numbers::F16, Numbers::Int8];

    /// Whether `level` has kernels for them that are not those of another level.
    pub fn has_own_kernels(self, level: Level) -> bool {
        self == Numbers::Int8 || level.isa() == level.isa().float_base()
    }
}

enum Stored {
    F32(Vec<f32>),
    F16(Vec<f16>),
    I8 { packed: Vec<i8>, scale: Vec<f32>, sum: Vec<i32> },
}

/// One convolution and its operands.
pub struct ConvCase {
    plan: ConvPlan,
    x: Vec<f16>,
    norm: [Vec<f32>; 2],
    bias: Vec<f32>,
    weights: Stored,
    out: Vec<f16>,
    sums: Vec<f64>,
    scratch: Vec<f32>,
}

impl ConvCase {
    /// A convolution of `shape` for a pool of `threads`.
    ///
    /// # Errors
    /// [`StepError`] where the shape is none.
    pub fn new(
        shape: ConvShape,
        numbers: Numbers,
        level: Level,
        threads: usize,
    ) -> Result<Self, StepError> {
        let plan = match numbers {
            Numbers::F32 => ConvPlan::new(shape, WeightType::F32, level)?,
            Numbers::F16 => ConvPlan::new(shape, WeightType::F16, level)?,
            Numbers::Int8 => ConvPlan::int8(shape, level)?,
        };
        let wave = |i: usize| (i % 241) as f32 / 120.0 - 1.0;
        let weights = match numbers {
            Numbers::F32 => Stored::F32((0..shape.packed_len()).map(wave).collect()),
            Numbers::F16 => {
                Stored::F16((0..shape.packed_len()).map(|i| f16::from_f32(wave(i))).collect())
            }
            Numbers::Int8 => {
                let deep = ConvShape { c: shape.c.next_multiple_of(4), ..shape };
                let packed: Vec<i8> =
                    (0..deep.packed_len()).map(|i| ((i % 255) as i16 - 127) as i8).collect();
                let depth = packed.len() / (16 * shape.filters().div_ceil(16));
                let sum = |n: usize| {
                    let panel = &packed[n / 16 * depth * 16..][..depth * 16];
                    let own = panel.chunks(4).skip(n % 16).step_by(16);
                    own.flatten().map(|&w| i32::from(w)).sum()
                };
                let sum = (0..shape.filters()).map(sum).collect();
                Stored::I8 { scale: vec![1.0 / 127.0; shape.filters()], sum, packed }
            }
        };
        Ok(ConvCase {
            x: (0..shape.h * shape.w * shape.c)
                .map(|i| f16::from_f32((i % 251) as f32 / 125.0 - 1.0))
                .collect(),
            norm: [vec![0.5; shape.c], vec![0.1; shape.c]],
            bias: vec![0.25; shape.filters()],
            weights,
            out: vec![f16::ZERO; shape.out_len()],
            sums: vec![0.0; plan.sums().len()],
            scratch: vec![0.0; plan.scratch_len(threads)],
            plan,
        })
    }

    /// The micro-kernel's name.
    pub fn kernel_name(&self) -> &'static str {
        self.plan.kernel_name()
    }

    /// Multiply-accumulates of a run.
    pub fn macs(&self) -> u64 {
        self.plan.shape().macs()
    }

    /// Runs it once, on the pool that it was made for.
    ///
    /// # Errors
    /// [`StepError`] where a worker panicked.
    pub fn run(&mut self, pool: &Pool) -> Result<(), StepError> {
        let weights = match &self.weights {
            Stored::F32(w) => Weights::F32(w),
            Stored::F16(w) => Weights::F16(w),
            Stored::I8 { packed, scale, sum } => Weights::I8(Int8Weights {
                packed,
                scale,
                sum,
                input_scale: None,
                // SiLU of these inputs lies in -0.27..=0.6.
                ranges: &[QuantRange { scale: 0.87 / 255.0, zero_point: 79 }],
            }),
        };
        let [scale, shift] = &self.norm;
        let args = ConvArgs {
            segments: &[Segment {
                data: Source::F16(&self.x),
                channels: self.plan.shape().c,
                norm: Some((scale, shift)),
            }],
            activation: Activation::Silu,
            weights,
            bias: Some(&self.bias),
            add: None,
            residual: Residual::None,
            output_scale: 1.0,
            out: Output::F16(&mut self.out),
            sums: Some(&mut self.sums),
        };
        conv2d(&self.plan, pool, args, &mut self.scratch)
    }
}
