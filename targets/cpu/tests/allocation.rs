//! A run allocates nothing. Alone in its program, so that no other test's allocations are counted.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/compare.rs"]
mod compare;
#[path = "common/counting.rs"]
mod counting;

use common::one_of_everything;
use compare::inputs;
use counting::allocations;
use latile_cpu::isa::Level;
use latile_cpu::session::CpuBackend;
use latile_runtime::backend::{Residency, Room, Session};
use latile_runtime::format::Role;
use latile_runtime::tensor::DType;

#[test]
fn a_run_does_not_allocate() {
    assert!(allocations(|| drop(std::hint::black_box(vec![1u8; 9]))) > 0, "the counter counts");
    let nets = [
        one_of_everything(DType::F32, None),
        one_of_everything(DType::F16, None),
        one_of_everything(DType::F16, Some(true)),
    ];
    for (number, net) in nets.iter().enumerate() {
        let model = net.model();
        let given = inputs(&model, 6, 8, 1);
        for level in Level::available() {
            for (timed, weights) in [(false, Residency::Keep), (true, Residency::Drop)] {
                let backend = CpuBackend::new(3, level).unwrap();
                let room = Room { weights, ..Room::default() };
                let mut session = backend.session_in(&model, Role::Decoder, 6, 8, room).unwrap();
                session.time_layers(timed);
                let mut outputs: Vec<Vec<f32>> = session
                    .outputs()
                    .iter()
                    .map(|p| vec![0.0; p.shape.elements().unwrap()])
                    .collect();
                let ins: Vec<&[f32]> = given.iter().map(Vec::as_slice).collect();
                let mut outs: Vec<&mut [f32]> = outputs.iter_mut().map(Vec::as_mut_slice).collect();
                let found = allocations(|| session.run(&ins, &mut outs).unwrap());
                assert_eq!(found, 0, "network {number} {level:?}");
                assert_eq!(session.layers().is_empty(), !timed);
            }
        }
    }
}
