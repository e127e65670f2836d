//! Runs a network by session and by reference and compares.
#![allow(dead_code, clippy::unwrap_used)]

use super::common::{Net, Random};
use latile_cpu::isa::Level;
use latile_cpu::reference;
use latile_cpu::session::CpuBackend;
use latile_runtime::backend::Session;
use latile_runtime::format::{Model, Role};
use latile_runtime::tensor::{DType, Shape};

/// Random inputs for the network's ports.
pub(crate) fn inputs(model: &Model, h: usize, w: usize, seed: u64) -> Vec<Vec<f32>> {
    let graph = &model.component(Role::Decoder).unwrap().graph;
    let mut random = Random(seed);
    graph
        .inputs
        .iter()
        .map(|p| {
            let shape = match graph.kind(p.value) {
                latile_runtime::graph::ValueKind::Map(c) => Shape::Map { h, w, c: c as usize },
                latile_runtime::graph::ValueKind::Vector(len) => {
                    Shape::Vector { len: len as usize }
                }
            };
            random.vector(shape.elements().unwrap(), 1.5)
        })
        .collect()
}

/// Runs the session once.
pub(crate) fn run(session: &mut dyn Session, inputs: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let mut outputs: Vec<Vec<f32>> =
        session.outputs().iter().map(|p| vec![f32::NAN; p.shape.elements().unwrap()]).collect();
    let ins: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
    let mut outs: Vec<&mut [f32]> = outputs.iter_mut().map(Vec::as_mut_slice).collect();
    session.run(&ins, &mut outs).unwrap();
    outputs
}

pub(crate) fn bits(x: &[Vec<f32>]) -> Vec<Vec<u32>> {
    x.iter().map(|v| v.iter().map(|f| f.to_bits()).collect()).collect()
}

/// The largest difference, relative to the largest magnitude of `b`.
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let top = b.iter().fold(1e-3f32, |m, v| m.max(v.abs()));
    a.iter().zip(b).fold(0.0f32, |m, (x, y)| m.max((x - y).abs())) / top
}

/// Checks a network at one size: every instruction set and 1 to 4 threads give the same bits, twice over,
/// and those are within `tolerance` of the reference (0: the same numbers).
pub(crate) fn check(net: &Net, h: usize, w: usize, tolerance: f32) {
    for group in 0..net.timestep_groups.len().max(1) {
        check_group(net, group, h, w, tolerance);
    }
}

/// As [`check`], for one group of timesteps.
fn check_group(net: &Net, group: usize, h: usize, w: usize, tolerance: f32) {
    let model = net.model();
    let given = inputs(&model, h, w, 7);
    let mut first: Option<Vec<Vec<f32>>> = None;
    for level in Level::available() {
        for threads in 1..=4 {
            let backend = CpuBackend::new(threads, level).unwrap();
            let mut session = backend.session(&model, Role::Decoder, h, w).unwrap();
            if group > 0 {
                session.set_timestep_group(group);
            }
            let out = run(&mut session, &given);
            let again = run(&mut session, &given);
            assert_eq!(bits(&out), bits(&again), "a second run differs");
            if let Some(first) = &first {
                let what = format!("{} with {threads} threads differs", level.isa());
                assert_eq!(bits(first), bits(&out), "{what}");
                continue;
            }
            let stored: Vec<_> = session.stored_values().to_vec();
            let f16 = model.manifest().precision.dtype() == DType::F16;
            let component = model.load(Role::Decoder).unwrap();
            let graph = &component.spec().graph;
            let ins: Vec<&[f32]> = given.iter().map(Vec::as_slice).collect();
            let maps = graph
                .inputs
                .iter()
                .filter(|p| matches!(graph.kind(p.value), latile_runtime::graph::ValueKind::Map(_)))
                .count();
            let sizes = vec![(h, w); maps];
            let values = reference::run_group(&component, group, &sizes, &ins, |v| {
                f16 && stored.contains(&v)
            })
            .unwrap();
            for (port, got) in graph.outputs.iter().zip(&out) {
                let want = &values[port.value.index()];
                let d = distance(got, want);
                assert!(
                    d <= tolerance,
                    "{}: {d:e} from the reference, at most {tolerance:e} expected; {:#?}",
                    port.name,
                    graph.nodes
                );
            }
            first = Some(out);
        }
    }
}
