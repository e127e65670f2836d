//! GroupNorms that take their moments from runs that were gathered.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Net, Random};
use latile_cpu::isa::Level;
use latile_cpu::session::CpuBackend;
use latile_runtime::backend::{Backend, Norms, Room, Session};
use latile_runtime::format::Role;
use latile_runtime::tensor::DType;

fn net() -> Net {
    let mut net = Net::new(DType::F32, 9);
    let x = net.map("x", 4);
    let x = net.group_norm(x, 2);
    let x = net.conv3(x, 12);
    let y = net.resnet(x, 8, 4, None);
    net.output("y", y);
    net
}

fn run(session: &mut dyn Session, input: &[f32]) -> Vec<f32> {
    let mut out = vec![f32::NAN; session.outputs()[0].shape.elements().unwrap()];
    session.run(&[input], &mut [&mut out]).unwrap();
    out
}

#[test]
fn one_gathered_run_is_its_own_norm() {
    let model = net().model();
    let mut random = Random(1);
    let (a, b) = (random.vector(9 * 7 * 4, 1.0), random.vector(9 * 7 * 4, 3.0));
    for level in Level::available() {
        let backend = CpuBackend::new(2, level).unwrap();
        // Whole, and as small as can be.
        let offers = backend.offers(&model, Role::Decoder, 9, 7).unwrap();
        for offer in offers {
            let room = Room { arena: Some(offer.arena_bytes), ..Room::default() };
            let mut session = backend.prepare(&model, Role::Decoder, 9, 7, room).unwrap();
            let [own_a, own_b] = [&a, &b].map(|x| run(&mut *session, x));
            session.use_norms(Norms::Gather);
            assert_eq!(run(&mut *session, &a), own_a);
            session.use_norms(Norms::Gathered);
            assert_eq!(run(&mut *session, &a), own_a);
            let as_a = run(&mut *session, &b);
            assert_ne!(as_a, own_b);
            // Gathering anew forgets; twice the same is the same.
            session.use_norms(Norms::Gather);
            for _ in 0..2 {
                assert_eq!(run(&mut *session, &b), own_b);
            }
            session.use_norms(Norms::Gathered);
            assert_eq!(run(&mut *session, &b), own_b);
            assert_ne!(run(&mut *session, &a), own_a);
            session.use_norms(Norms::Own);
            assert_eq!(run(&mut *session, &a), own_a);
        }
    }
}

#[test]
fn gathered_halves_are_normalised_as_their_whole() {
    // A norm alone: its moments over two halves of a map are those of the map.
    let mut net = Net::new(DType::F32, 2);
    let x = net.map("x", 6);
    let y = net.group_norm(x, 3);
    net.output("y", y);
    let model = net.model();
    let backend = CpuBackend::new(1, Level::best()).unwrap();
    let whole = Random(4).vector(8 * 5 * 6, 2.0);
    let shifted: Vec<f32> = whole
        .iter()
        .enumerate()
        .map(|(i, v)| if i < whole.len() / 2 { v + 3.0 } else { *v })
        .collect();
    let mut session = backend.session(&model, Role::Decoder, 8, 5).unwrap();
    let expected = run(&mut session, &shifted);
    let mut session = backend.session(&model, Role::Decoder, 4, 5).unwrap();
    session.use_norms(Norms::Gather);
    for half in shifted.chunks(shifted.len() / 2) {
        run(&mut session, half);
    }
    session.use_norms(Norms::Gathered);
    let found: Vec<f32> =
        shifted.chunks(shifted.len() / 2).flat_map(|half| run(&mut session, half)).collect();
    for (a, b) in found.iter().zip(&expected) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
}
