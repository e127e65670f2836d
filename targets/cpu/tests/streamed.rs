//! Streamed sessions against whole ones: the same bits in a smaller arena, on every way the target offers,
//! every instruction set, and any number of threads.
#![allow(clippy::unwrap_used)]

mod common;

use common::Net;
use latile_cpu::isa::Level;
use latile_cpu::session::CpuBackend;
use latile_runtime::backend::{Backend, PrepareError, Residency, Room, Session};
use latile_runtime::format::{Model, Role};
use latile_runtime::tensor::DType;

/// A decoder as LDM's: residual blocks over one map, enlarged twice (by either form of it), with norms and shortcuts.
fn decoder(dtype: DType, int8: bool) -> Net {
    let mut net = Net::new(dtype, 5);
    net.int8 = int8.then_some(true);
    let x = net.map("x", 3);
    let x = net.conv3(x, 24);
    let x = net.resnet(x, 24, 4, None);
    let x = net.up_conv(x, 24);
    let x = net.resnet(x, 16, 4, None);
    let x = net.resnet(x, 16, 4, None);
    let x = net.upsample(x);
    let x = net.conv3(x, 16);
    let x = net.resnet(x, 8, 4, None);
    let x = net.resnet(x, 8, 4, None);
    let x = net.group_norm(x, 4);
    let x = net.silu(x);
    let y = net.conv3(x, 3);
    net.output("y", y);
    net
}

fn run(session: &mut dyn Session, input: &[f32]) -> Vec<u32> {
    let elements = session.outputs()[0].shape.elements().unwrap();
    let mut out = vec![f32::NAN; elements];
    session.run(&[input], &mut [&mut out]).unwrap();
    out.iter().map(|v| v.to_bits()).collect()
}

fn every_way(model: &Model, [h, w]: [usize; 2], levels: &[Level], threads: &[usize]) {
    let mut random = common::Random(3);
    let input = random.vector(h * w * 3, 1.0);
    let mut wanted = None;
    for &level in levels {
        for &threads in threads {
            let backend = CpuBackend::new(threads, level).unwrap();
            let offers = backend.offers(model, Role::Decoder, h, w).unwrap();
            assert!(offers.len() >= 2, "{offers:?}");
            for (i, offer) in offers.iter().enumerate() {
                let room = Room { arena: Some(offer.arena_bytes), weights: Residency::Keep };
                let mut session = backend.prepare(model, Role::Decoder, h, w, room).unwrap();
                let stats = session.stats();
                assert_eq!((stats.arena_bytes, stats.macs), (offer.arena_bytes, offer.macs));
                assert_eq!(stats.way, offer.way);
                if i > 0 {
                    assert!(offer.arena_bytes < offers[i - 1].arena_bytes);
                }
                // Twice: nothing is left over from a run before.
                for _ in 0..2 {
                    let got = run(&mut *session, &input);
                    let wanted = wanted.get_or_insert_with(|| got.clone());
                    assert!(*wanted == got, "{level:?} {threads} {offer:?}");
                }
            }
            let smallest = offers.last().unwrap().arena_bytes;
            let room = Room { arena: Some(smallest - 1), weights: Residency::Keep };
            match backend.prepare(model, Role::Decoder, h, w, room).map(drop) {
                Err(PrepareError::NoRoom { smallest: found, .. }) => assert_eq!(found, smallest),
                other => panic!("{other:?}"),
            }
        }
    }
}

fn with_threads(dtype: DType, int8: bool) {
    every_way(&decoder(dtype, int8).model(), [37, 11], &[Level::best()], &[1, 3]);
}

#[test]
fn every_way_gives_the_same_bits_in_f32() {
    with_threads(DType::F32, false);
}

#[test]
fn every_way_gives_the_same_bits_in_f16() {
    with_threads(DType::F16, false);
}

#[test]
fn every_way_gives_the_same_bits_in_int8() {
    with_threads(DType::F16, true);
}

#[test]
fn every_way_gives_the_same_bits_at_every_level() {
    let model = decoder(DType::F16, true).model();
    every_way(&model, [40, 12], &Level::available(), &[2]);
}

#[test]
fn a_streamed_session_takes_much_less() {
    let model = decoder(DType::F16, false).model();
    let backend = CpuBackend::new(1, Level::best()).unwrap();
    let offers = backend.offers(&model, Role::Decoder, 200, 32).unwrap();
    let (first, last) = (&offers[0], offers.last().unwrap());
    assert!(5 * last.arena_bytes < 3 * first.arena_bytes, "{offers:#?}");
    assert!(last.macs < 5 * first.macs, "{offers:#?}");
}
