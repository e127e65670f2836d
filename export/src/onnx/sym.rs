//! What is known of an ONNX tensor while its graph is being recognised.

use super::tensor::Tensor;
use super::view::View;
use crate::tensors::Part;
use latile_runtime::graph::ValueId;
use std::rc::Rc;

/// A constant: computed, or a stored tensor that need not be loaded.
#[derive(Debug)]
pub(super) struct Constant {
    pub(super) dims: Vec<usize>,
    /// The stored tensor with the same elements in the same order, or with its two axes exchanged.
    pub(super) source: Option<(String, bool)>,
    pub(super) value: Option<Rc<Tensor>>,
}

impl Constant {
    /// The stored tensor's name.
    pub(super) fn name(&self) -> Option<&str> {
        self.source.as_ref().map(|(name, _)| name.as_str())
    }
}

/// What is known of an ONNX tensor.
#[derive(Clone, Debug)]
pub(super) enum Sym {
    Const(Rc<Constant>),
    /// Its value at each of [`PROBES`].
    Time(Rc<Vec<Tensor>>),
    View(View),
    Sigmoid(View),
    /// A product with a matrix whose bias may follow.
    Product {
        x: View,
        weight: Rc<Constant>,
        part: Part,
    },
    /// Normalised in groups; scale and shift follow. The view is of the input, regrouped as the result is.
    Normed {
        x: View,
        groups: usize,
        eps: f32,
        scale: Option<Rc<Constant>>,
    },
    /// A map times `1 + v[..c]`; the shift by `v[c..]` follows.
    Scaled {
        x: View,
        v: ValueId,
    },
    Difference {
        of: View,
        less: View,
    },
    Scores {
        q: ValueId,
        k: ValueId,
        heads: usize,
        width: usize,
        scale: f32,
        dims: Vec<usize>,
    },
    Probabilities {
        q: ValueId,
        k: ValueId,
        heads: usize,
        width: usize,
        scale: f32,
        dims: Vec<usize>,
    },
    /// Zeros around a map: top, left, bottom, right.
    Padded {
        x: View,
        pads: [u32; 4],
    },
    /// Not understood yet: the node that made it.
    Opaque {
        dims: Vec<usize>,
        node: usize,
    },
}

/// A constant that was computed.
pub(super) fn computed(t: Tensor) -> Sym {
    Sym::Const(Rc::new(Constant { dims: t.dims.clone(), source: None, value: Some(Rc::new(t)) }))
}

/// A tensor's dimensions.
pub(super) fn dims(sym: &Sym) -> Vec<usize> {
    match sym {
        Sym::Const(c) => c.dims.clone(),
        Sym::Time(values) => values[0].dims.clone(),
        Sym::View(v) | Sym::Sigmoid(v) => v.dims(),
        Sym::Normed { x, .. } | Sym::Scaled { x, .. } => x.dims(),
        Sym::Difference { of, .. } => of.dims(),
        Sym::Product { x, weight, part } => {
            let mut dims = x.dims();
            let n =
                if *part == Part::Transposed { weight.dims.get(1) } else { weight.dims.first() };
            if let (Some(last), Some(&n)) = (dims.last_mut(), n) {
                *last = n;
            }
            dims
        }
        Sym::Scores { dims, .. } | Sym::Probabilities { dims, .. } | Sym::Opaque { dims, .. } => {
            dims.clone()
        }
        Sym::Padded { x, pads } => {
            let mut dims = x.dims();
            if let [_, _, h, w] = &mut dims[..] {
                *h += (pads[0] + pads[2]) as usize;
                *w += (pads[1] + pads[3]) as usize;
            }
            dims
        }
    }
}
