//! Which attentions of an int8 model multiply bytes.

use latile_runtime::format::Role;
use latile_runtime::graph::{Graph, Op, ValueKind};
use serde::Serialize;

/// Channels of a head from which products of bytes are worth it. Below, and so in U-Nets whose heads have 32
/// channels, turning queries, keys and weights into bytes takes as long as the products save at the few
/// tokens that such attentions see; the one head of an autoencoder's has hundreds of channels.
const MIN_HEAD: u32 = 64;

/// An attention's two products, queries with keys and weights with values, in an int8 or mixed model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AttentionSummary {
    /// `unet`, `decoder`, `encoder`.
    pub component: String,
    /// The attention's name.
    pub attention: String,
    /// Its heads.
    pub heads: u32,
    /// Channels of each.
    pub head_channels: u32,
    /// Whether its products are of bytes.
    pub int8: bool,
    /// Why they are not.
    pub why: Option<String>,
    /// The layer that reads its result.
    pub reader: Option<String>,
}

/// Makes the attentions of a component int8 that have at least [`MIN_HEAD`] channels a head and that nothing
/// `keeps`, and lists them all. They need no calibration: their ranges are found as they are computed.
pub(super) fn mark(
    graph: &mut Graph,
    role: Role,
    keeps: &dyn Fn(&str) -> Option<String>,
) -> Vec<AttentionSummary> {
    let mut all = Vec::new();
    for i in 0..graph.nodes.len() {
        let node = &graph.nodes[i];
        let ValueKind::Map(channels) = graph.kind(node.output) else { continue };
        let kept = keeps(&node.name);
        let reader = graph.nodes.iter().find(|n| n.inputs.contains(&node.output));
        let reader = reader.map(|n| n.name.clone());
        let attention = node.name.clone();
        if let Op::Attention { heads, int8, .. } = &mut graph.nodes[i].op {
            let head_channels = channels / *heads;
            let why = match kept {
                Some(why) => Some(why),
                None if head_channels < MIN_HEAD => {
                    Some(format!("heads of less than {MIN_HEAD} channels take as long in bytes"))
                }
                None => None,
            };
            *int8 = why.is_none();
            let component = role.name().to_owned();
            let (heads, int8) = (*heads, *int8);
            all.push(AttentionSummary {
                component,
                attention,
                heads,
                head_channels,
                int8,
                why,
                reader,
            });
        }
    }
    all
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
        let keep = crate::Glob::new(keep);
        let keeps = |name: &str| keep.is_of("decoder", name).then(|| "asked".to_owned());
        let all = mark(&mut graph, Role::Decoder, &keeps);
        graph.validate().unwrap();
        let int8 = matches!(graph.nodes[0].op, Op::Attention { int8: true, .. });
        assert_eq!((all[0].int8, all[0].why.is_none()), (int8, int8), "{all:?}");
        assert_eq!((all[0].heads, all[0].head_channels), (heads, 128 / heads));
        int8
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
