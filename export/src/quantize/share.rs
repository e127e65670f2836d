//! Which layers of a mixed model stay float, so that a share of the work removes as much noise as it can.
//!
//! Lives here: the choice. Never here: what a layer's noise is, which is estimated or measured elsewhere.

use super::eligible;
use crate::ExportError;
use crate::model::Component;

/// Side of the input that shares of the work are counted at, in multiples of what the network takes. Those of
/// convolutions and linear layers are next to the same at any size.
const SIDE: usize = 8;

/// A layer that stays float.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Kept {
    /// Index of its node.
    pub(super) node: usize,
    /// Its score.
    pub(super) score: f64,
    /// Its share of the network's multiply-accumulates, convolutions and linear layers over maps.
    pub(super) work: f64,
}

/// Of the layers `nodes`, those with most of `scores` for their work that together have at most `share` of it.
/// A layer whose share of all scores is not above its share of the work is none of them: any other would do as
/// well.
///
/// # Errors
/// A graph whose shapes cannot be told.
pub(super) fn kept(
    component: &Component,
    nodes: &[usize],
    scores: &[f64],
    share: f64,
) -> Result<Vec<Kept>, ExportError> {
    let graph = &component.graph;
    let shapes = eligible::shapes(component, SIDE * component.multiple.max(1) as usize)?;
    let macs = |node: usize| graph.node_macs(&graph.nodes[node], &shapes);
    let layers =
        (0..graph.nodes.len()).filter(|&i| eligible::matrix(graph, &graph.nodes[i]).is_some());
    let total = layers.map(macs).sum::<u64>().max(1) as f64;
    let scored: f64 = scores.iter().sum();
    let layer =
        |(&node, &score): (&usize, &f64)| Kept { node, score, work: macs(node) as f64 / total };
    let mut ranked: Vec<Kept> = nodes
        .iter()
        .zip(scores)
        .map(layer)
        .filter(|k| k.score > scored * k.work && k.work > 0.0)
        .collect();
    // Stable: of equals the first in execution order.
    ranked.sort_by(|a, b| (b.score / b.work).total_cmp(&(a.score / a.work)));
    let mut left = share;
    ranked.retain(|k| {
        let fits = k.work <= left;
        left -= if fits { k.work } else { 0.0 };
        fits
    });
    Ok(ranked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusers::DiffusersFolder;
    use latile_runtime::format::Role;
    use latile_runtime::tensor::DType;
    use std::path::Path;

    fn unet() -> Component {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models/sr");
        let folder = DiffusersFolder::open(&path).unwrap();
        Component {
            role: Role::Unet,
            multiple: 4,
            timestep: None,
            graph: crate::build::unet(&folder.unet.0, DType::F16),
            recipes: Vec::new(),
        }
    }

    #[test]
    fn noise_for_work_decides_within_the_share() {
        let unet = unet();
        let nodes: Vec<usize> = (0..unet.graph.nodes.len())
            .filter(|&i| eligible::matrix(&unet.graph, &unet.graph.nodes[i]).is_some())
            .collect();
        let all = |scores: &[f64], share| kept(&unet, &nodes, scores, share).unwrap();
        // Scores by rank of execution: the work decides between neighbours.
        let scores: Vec<f64> = (0..nodes.len()).map(|i| 1.0 + i as f64).collect();
        for share in [0.0, 0.05, 0.2, 1.0] {
            let kept = all(&scores, share);
            assert!(kept.iter().map(|k| k.work).sum::<f64>() <= share + 1e-12);
            assert!(kept.is_sorted_by(|a, b| a.score / a.work >= b.score / b.work));
            assert_eq!(kept.is_empty(), share == 0.0);
        }
        // All of the noise in one layer: that one, if there is room for it, and nothing to fill the room.
        let mut one = vec![0.0; nodes.len()];
        one[7] = 0.5;
        let found = all(&one, 0.9);
        assert_eq!(found.iter().map(|k| k.node).collect::<Vec<_>>(), [nodes[7]]);
        assert!(all(&one, found[0].work * 0.99).is_empty());
    }
}
