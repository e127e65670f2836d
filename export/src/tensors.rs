//! Where each weight of a graph comes from.
//!
//! Lives here: [`Recipe`], which names a source's tensor and the part of it that is wanted, and the check that a
//! source has it in the right shape. All recipes of a model are made before its first byte is written. Never
//! here: what a layout calls its tensors.

use crate::source::WeightSource;
use crate::{ExportError, phases};
use latile_runtime::graph::WeightSpec;
use std::path::PathBuf;

/// Which part of a stored tensor makes the weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// All of it, in its order.
    Whole,
    /// One of query (0), key (1) and value (2) of a fused projection whose rows stand head by head: each head's
    /// queries, then its keys, then its values (CompVis' `QKVAttentionLegacy`).
    Fused { which: usize, heads: usize },
    /// All of it with its two axes exchanged (ONNX keeps linear weights as `[c, n]`).
    #[cfg_attr(not(feature = "onnx"), allow(dead_code))]
    Transposed,
    /// All of a 3 × 3 convolution's weight, as that of the four phases in which it reads an upsampled map
    /// ([`crate::phases`]).
    Folded,
    /// The bias of such a convolution, once for each phase.
    Repeated,
}

/// How a weight is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Recipe {
    /// Index into the model's sources.
    pub(crate) source: usize,
    /// The tensor's name there.
    pub(crate) tensor: String,
    /// The part of it.
    pub(crate) part: Part,
}

/// A shape without its ones: `[n, c]`, `[n, c, 1, 1]` and `[1, n, c]` hold the same elements in the same order, and
/// checkpoints keep linear layers, 1 × 1 convolutions and norms in any of these forms.
fn squeezed(shape: &[usize]) -> impl Iterator<Item = usize> + '_ {
    shape.iter().copied().filter(|&d| d != 1)
}

impl Recipe {
    /// Finds the first of `names` that the source has and checks its shape.
    pub(crate) fn find(
        sources: &[Box<dyn WeightSource>],
        source: usize,
        names: &[String],
        part: Part,
        spec: &WeightSpec,
        component: &str,
    ) -> Result<Self, ExportError> {
        let from = &sources[source];
        let mut expected: Vec<usize> = spec.shape.iter().map(|&d| d as usize).collect();
        match part {
            Part::Fused { .. } => expected[0] = expected[0].saturating_mul(3),
            Part::Transposed => expected.reverse(),
            Part::Whole | Part::Folded | Part::Repeated => {}
        }
        let wanted_for = format!("the {component}");
        let Some((name, info)) = names.iter().find_map(|n| Some((n, from.info(n)?))) else {
            return Err(ExportError::MissingTensor {
                path: from.path().to_owned(),
                name: names.first().cloned().unwrap_or_default(),
                wanted_for,
                shape: expected,
            });
        };
        if !squeezed(&info.shape).eq(squeezed(&expected)) {
            return Err(ExportError::WrongShape {
                path: from.path().to_owned(),
                name: name.clone(),
                wanted_for,
                found: info.shape.clone(),
                expected,
            });
        }
        Ok(Self { source, tensor: name.clone(), part })
    }

    /// Replaces `out` by the weight's elements in the logical shape of `spec`, all of them finite.
    pub(crate) fn read(
        &self,
        sources: &[Box<dyn WeightSource>],
        spec: &WeightSpec,
        out: &mut Vec<f32>,
    ) -> Result<(), ExportError> {
        let from = &sources[self.source];
        match self.part {
            Part::Whole | Part::Folded | Part::Repeated => from.read_f32(&self.tensor, out)?,
            Part::Fused { which, heads } => {
                from.read_f32(&self.tensor, out)?;
                keep_fused(out, which, heads);
            }
            Part::Transposed => {
                let mut stored = Vec::new();
                from.read_f32(&self.tensor, &mut stored)?;
                let (n, c) =
                    (spec.shape[0] as usize, stored.len() / (spec.shape[0] as usize).max(1));
                out.clear();
                out.extend((0..n * c).map(|i| stored[i % c * n + i / c]));
            }
        }
        self.check_finite(sources, out)?;
        match self.part {
            Part::Folded => phases::weights(out, spec.shape[1] as usize),
            Part::Repeated => phases::biases(out),
            Part::Whole | Part::Fused { .. } | Part::Transposed => return Ok(()),
        }
        self.check_finite(sources, out)
    }

    fn check_finite(
        &self,
        sources: &[Box<dyn WeightSource>],
        values: &[f32],
    ) -> Result<(), ExportError> {
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(()),
            Some(index) => Err(ExportError::NotFinite {
                path: self.path(sources),
                name: self.described(),
                value: values[index],
                index,
            }),
        }
    }

    /// The tensor's name, and what was made of it where its elements are not those of the checkpoint.
    pub(crate) fn described(&self) -> String {
        match self.part {
            Part::Folded => format!("{} (summed for upsampling)", self.tensor),
            _ => self.tensor.clone(),
        }
    }

    pub(crate) fn path(&self, sources: &[Box<dyn WeightSource>]) -> PathBuf {
        sources[self.source].path().to_owned()
    }
}

/// Keeps one third of each head of a fused projection.
fn keep_fused(values: &mut Vec<f32>, which: usize, heads: usize) {
    let part = values.len() / (3 * heads.max(1));
    for head in 0..heads {
        let from = (3 * head + which) * part;
        values.copy_within(from..from + part, head * part);
    }
    values.truncate(heads * part);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fused_projections_are_split_head_by_head() {
        // Two heads of two rows of one element: q0 q0 k0 k0 v0 v0 q1 q1 k1 k1 v1 v1.
        let fused: Vec<f32> = (0..12).map(|v| v as f32).collect();
        for (which, expected) in
            [[0.0, 1.0, 6.0, 7.0], [2.0, 3.0, 8.0, 9.0], [4.0, 5.0, 10.0, 11.0]]
                .into_iter()
                .enumerate()
        {
            let mut out = fused.clone();
            keep_fused(&mut out, which, 2);
            assert_eq!(out, expected);
        }
    }

    #[test]
    fn ones_in_a_shape_do_not_matter() {
        let same = |a: &[usize], b: &[usize]| squeezed(a).eq(squeezed(b));
        assert!(same(&[4, 3, 1, 1], &[4, 3]));
        assert!(!same(&[4, 3, 3, 3], &[4, 3]));
        assert!(!same(&[4, 3], &[3, 4]));
        assert!(same(&[1, 1], &[1]));
        assert!(!same(&[], &[2]));
    }
}
