//! What is fused with what, and which buffers are shared; the numbers are checked in the crate's own tests.
#![allow(unreachable_pub)]

#[path = "../../tests/common/mod.rs"]
mod common;

use super::build::lower;
use super::fuse::{Chain, Job, Kind, Stage, fuse};
use super::program::{Action, Addend, Program};
use crate::isa::Level;
use common::Net;
use latile_runtime::format::{Model, Role};
use latile_runtime::graph::{Graph, ValueId};
use latile_runtime::tensor::DType;

fn kinds(graph: &Graph) -> Vec<&'static str> {
    fuse(graph)
        .iter()
        .map(|j| match j.kind {
            Kind::Conv { .. } => "conv",
            Kind::Pointwise { .. } => "pointwise",
            Kind::VectorLinear { .. } => "linear",
            Kind::Alone => graph.nodes[j.node].op.name(),
        })
        .collect()
}

fn chain_of(job: &Job) -> &Chain {
    match &job.kind {
        Kind::Conv { chain, .. } | Kind::Pointwise { chain, .. } => chain,
        other => panic!("{other:?}"),
    }
}

/// Lowers for one thread and calls `look`.
fn lowered(net: &Net, h: usize, w: usize, look: impl FnOnce(&Program<'_>)) {
    let model: Model = net.model();
    let component = model.load(Role::Decoder).unwrap();
    let shapes = net.graph.infer(&[(h, w)]).unwrap();
    let program = lower(&component, &shapes, DType::F32, Level::best(), 1).unwrap();
    look(&program);
}

#[test]
fn a_resnet_block_is_three_convolutions_and_its_time_vector() {
    let mut net = Net::new(DType::F32, 1);
    let x = net.map("x", 8);
    let t = net.vector("t", 4);
    let y = net.resnet(x, 16, 4, Some(t));
    net.output("y", y);
    let jobs = fuse(&net.graph);
    assert_eq!(kinds(&net.graph), ["linear", "conv", "conv", "conv"]);
    let Kind::Conv { add, residual, .. } = &jobs[1].kind else {
        panic!("{:?}", jobs[1]);
    };
    assert!(add.is_some() && residual.is_none());
    assert!(matches!(
        chain_of(&jobs[1]),
        Chain { silu: true, upsample: false, stage: Some(Stage::GroupNorm { modulation: None, .. }), segments }
            if segments[..] == [x]
    ));
    // The shortcut runs before the second convolution, which adds to it.
    let plain = |job: &Job| chain_of(job).stage.is_none() && !chain_of(job).silu;
    assert!(plain(&jobs[2]) && !plain(&jobs[3]));
    let Kind::Conv { residual, .. } = &jobs[3].kind else {
        panic!("{:?}", jobs[3]);
    };
    assert_eq!(*residual, Some(net.graph.nodes[jobs[2].node].output));
    assert!(matches!(
        jobs[0].kind,
        Kind::VectorLinear { input, silu: true } if input == t
    ));
}

#[test]
fn an_attention_block_normalises_once_and_stores_no_norm() {
    let mut net = Net::new(DType::F32, 1);
    let x = net.map("x", 8);
    let x = net.conv3(x, 8);
    let y = net.attention_block(x, 4, 2);
    let y = net.affine(y, 0.5, 0.0);
    net.output("y", y);
    assert_eq!(kinds(&net.graph), ["conv", "conv", "conv", "conv", "attention", "conv"]);
    let last = fuse(&net.graph).pop().unwrap();
    assert!(matches!(
        last.kind,
        Kind::Conv { residual: Some(r), scale: 0.5, .. } if r == x
    ));
    lowered(&net, 4, 4, |program| {
        let norms = program.steps.iter().filter(|s| s.kind() == "group_norm");
        assert_eq!(norms.count(), 1);
        // The first convolution leaves the sums: no step makes them.
        assert!(program.steps.iter().all(|s| s.kind() != "channel_sums"));
        let Action::Conv(conv) = &program.steps.last().unwrap().action else {
            panic!();
        };
        assert_eq!(conv.residual, Addend::InPlace);
    });
}

#[test]
fn a_concatenation_and_doubling_stay_unwritten() {
    let mut net = Net::new(DType::F32, 1);
    let x = net.map("x", 8);
    let a = net.conv3(x, 4);
    let c = net.concat(&[x, a, x]);
    let n = net.group_norm(c, 2);
    let s = net.silu(n);
    let u = net.upsample(s);
    let y = net.conv3(u, 3);
    net.output("y", y);
    assert_eq!(kinds(&net.graph), ["conv", "conv"]);
    let last = fuse(&net.graph).pop().unwrap();
    let chain = chain_of(&last);
    assert!(chain.silu && chain.upsample);
    assert_eq!(chain.segments, [x, a, x]);
    lowered(&net, 3, 5, |program| {
        // Only the graph's input, which no step makes, is summed by a pass of its own; once.
        let sums = program.steps.iter().filter(|s| s.kind() == "channel_sums");
        assert_eq!(sums.count(), 1);
    });
}

#[test]
fn what_is_stored_anyway_is_read_and_what_is_dead_is_dropped() {
    let mut net = Net::new(DType::F32, 1);
    let x = net.map("x", 8);
    let s = net.silu(x);
    let y = net.conv3(s, 8);
    let unused = net.conv3(y, 8);
    net.silu(unused);
    net.output("s", s);
    net.output("y", y);
    let jobs = fuse(&net.graph);
    assert_eq!(kinds(&net.graph), ["pointwise", "conv"]);
    assert_eq!(chain_of(&jobs[1]).segments, [s]);
    assert!(!chain_of(&jobs[1]).silu);
}

#[test]
fn order_limits_what_is_taken_in() {
    let chain = |build: &dyn Fn(&mut Net, ValueId) -> ValueId| {
        let mut net = Net::new(DType::F32, 1);
        let x = net.map("x", 8);
        let h = build(&mut net, x);
        let y = net.conv3(h, 8);
        net.output("y", y);
        kinds(&net.graph)
    };
    // A norm after SiLU, a second norm, a second SiLU, pooling: each needs its operand stored.
    let norm_of_silu = chain(&|net, x| {
        let s = net.silu(x);
        net.group_norm(s, 2)
    });
    assert_eq!(norm_of_silu, ["pointwise", "conv"]);
    let norms = chain(&|net, x| {
        let n = net.group_norm(x, 2);
        net.group_norm(n, 2)
    });
    assert_eq!(norms, ["pointwise", "conv"]);
    let silus = chain(&|net, x| {
        let s = net.silu(x);
        net.silu(s)
    });
    assert_eq!(silus, ["pointwise", "conv"]);
    let pooled = chain(&|net, x| {
        let n = net.group_norm(x, 2);
        let s = net.silu(n);
        net.avg_pool(s)
    });
    assert_eq!(pooled, ["pointwise", "avg_pool2x", "conv"]);
    let doubled_twice = chain(&|net, x| {
        let u = net.upsample(x);
        net.upsample(u)
    });
    assert_eq!(doubled_twice, ["pointwise", "conv"]);
    // A norm commutes with doubling, a scaled input is a stage.
    let norm_of_doubled = chain(&|net, x| {
        let u = net.upsample(x);
        net.group_norm(u, 2)
    });
    assert_eq!(norm_of_doubled, ["conv"]);
    assert_eq!(chain(&|net, x| net.affine(x, 2.0, 1.0)), ["conv"]);
}

#[test]
fn a_sum_is_in_place_only_where_its_operand_dies_unread() {
    let addends = |build: &dyn Fn(&mut Net, ValueId) -> ValueId| {
        let mut net = Net::new(DType::F32, 1);
        let x = net.map("x", 8);
        let y = build(&mut net, x);
        net.output("y", y);
        let mut found = Vec::new();
        lowered(&net, 4, 4, |program| {
            for step in &program.steps {
                match &step.action {
                    Action::Conv(c) => found.push(match c.residual {
                        Addend::None => "none",
                        Addend::InPlace => "in place",
                        Addend::Of(_) => "apart",
                    }),
                    Action::Pointwise(p) if p.in_place => found.push("over its input"),
                    Action::Pointwise(_) => found.push("pointwise"),
                    _ => {}
                }
            }
        });
        found
    };
    let dies = addends(&|net, x| {
        let h = net.conv3(x, 8);
        let h = net.conv3(h, 8);
        net.add(x, h)
    });
    assert_eq!(dies, ["none", "in place"]);
    let halo = addends(&|net, x| {
        let h = net.conv3(x, 8);
        net.add(x, h)
    });
    assert_eq!(halo, ["apart"]);
    let read_later = addends(&|net, x| {
        let h = net.conv3(x, 8);
        let h = net.conv3(h, 8);
        let s = net.add(x, h);
        let s = net.silu(s);
        let s = net.silu(s);
        net.add(s, x)
    });
    assert_eq!(read_later, ["none", "apart", "over its input", "over its input"]);
}
