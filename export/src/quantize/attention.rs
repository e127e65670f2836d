//! Which attentions of an int8 model multiply bytes.

use super::Glob;
use latile_runtime::format::Role;
use latile_runtime::graph::{Graph, Op, ValueKind};

/// Channels of a head from which products of bytes are worth it. Below, and so in U-Nets whose heads have 32
/// channels, turning queries, keys and weights into bytes takes as long as the products save at the few
/// tokens that such attentions see; the one head of an autoencoder's has hundreds of channels.
const MIN_HEAD: u32 = 64;

/// Makes the attentions of a component int8 that have at least [`MIN_HEAD`] channels a head and that the user
/// does not keep. They need no calibration: their ranges are found as they are computed.
pub(super) fn mark(graph: &mut Graph, role: Role, keep: &[Glob]) {
    for i in 0..graph.nodes.len() {
        let node = &graph.nodes[i];
        let ValueKind::Map(channels) = graph.kind(node.output) else { continue };
        let kept = keep.iter().any(|g| g.is_of(role.name(), &node.name));
        if let Op::Attention { heads, int8, .. } = &mut graph.nodes[i].op {
            *int8 = !kept && channels / *heads >= MIN_HEAD;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use latile_runtime::graph::{Node, Port, ValueId};

    /// Whether an attention over 128 channels becomes int8.
    fn marked(heads: u32, keep: &str) -> bool {
        let mut graph = Graph {
            inputs: vec![Port { name: "x".into(), value: ValueId(0) }],
            outputs: vec![Port { name: "y".into(), value: ValueId(1) }],
            values: vec![ValueKind::Map(128); 2],
            weights: Vec::new(),
            nodes: vec![Node {
                name: "mid.attention".into(),
                op: Op::Attention { heads, scale: 0.1, int8: false },
                inputs: vec![ValueId(0); 3],
                output: ValueId(1),
            }],
        };
        mark(&mut graph, Role::Decoder, &[Glob::new("conv_in"), Glob::new(keep)]);
        graph.validate().unwrap();
        matches!(graph.nodes[0].op, Op::Attention { int8: true, .. })
    }

    #[test]
    fn wide_heads_become_int8_unless_kept() {
        assert!(marked(1, "none"));
        assert!(marked(2, "none"));
        assert!(!marked(4, "none"), "heads of 32 channels");
        assert!(!marked(1, "*.attention"));
        assert!(!marked(1, "decoder.mid.attention"));
        assert!(marked(1, "unet.*"));
    }
}
