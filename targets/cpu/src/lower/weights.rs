//! Which weights a step reads, for whoever holds them in memory.

use super::program::{Action, Step};
use crate::steps::conv::Weights;
use bytemuck::cast_slice;
use half::slice::HalfFloatSliceExt;

impl<'m> Step<'m> {
    /// Shows `see` every weight that a run of this step reads, as bytes where they lie.
    pub(crate) fn weights(&self, see: &mut dyn FnMut(&'m [u8])) {
        match &self.action {
            Action::Conv(step) => layer(&step.weights, step.bias, see),
            Action::VectorLinear(step) => layer(&step.weights, step.bias, see),
            Action::GroupNorm(step) => {
                see(cast_slice(step.gamma));
                see(cast_slice(step.beta));
            }
            Action::Codebook { table, .. } => see(cast_slice(table)),
            Action::Pointwise(_)
            | Action::Sums { .. }
            | Action::Coefficients { .. }
            | Action::Attention(_)
            | Action::Pool { .. }
            | Action::VectorSilu { .. }
            | Action::VectorAffine { .. } => {}
        }
    }
}

fn layer<'m>(weights: &Weights<'m>, bias: Option<&'m [f32]>, see: &mut dyn FnMut(&'m [u8])) {
    match *weights {
        Weights::F32(w) => see(cast_slice(w)),
        Weights::F16(w) => see(cast_slice(w.reinterpret_cast())),
        Weights::I8(w) => {
            see(cast_slice(w.packed));
            see(cast_slice(w.scale));
            see(cast_slice(w.sum));
            if let Some(scale) = w.input_scale {
                see(cast_slice(scale));
            }
        }
    }
    if let Some(bias) = bias {
        see(cast_slice(bias));
    }
}
