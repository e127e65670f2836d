//! Any valid graph runs: random networks, lowered, against the reference executor.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/compare.rs"]
mod compare;
#[path = "common/effort.rs"]
mod effort;

use common::Net;
use compare::check;
use effort::cases;
use latile_runtime::graph::{Pad, ValueId};
use latile_runtime::tensor::DType;
use proptest::prelude::*;

/// A map with its size.
#[derive(Clone, Copy)]
struct Map {
    id: ValueId,
    h: usize,
    w: usize,
}

const SIDES: std::ops::RangeInclusive<usize> = 2..=12;

/// Grows a network by `ops.len()` operators chosen by the numbers; choices that do not fit become others.
fn grow(net: &mut Net, h: usize, w: usize, ops: &[(u8, u8, u8)]) {
    let mut maps = Vec::new();
    for (name, c) in [("a", 8), ("b", 4)] {
        let id = net.map(name, c);
        maps.push(Map { id, h, w });
    }
    let t = net.vector("time_proj", 6);
    // Only of an input: both sides then search for the very same numbers.
    let book = net.codebook(maps[1].id, 9);
    maps.push(Map { id: book, h, w });
    for &(op, which, extra) in ops {
        // Recent values more often, so that chains arise.
        let back = (which as usize % 7).min(maps.len() - 1);
        let x = maps[maps.len() - 1 - back];
        let c = net.channels(x.id);
        let n = [4, 8, 12, 20][extra as usize % 4];
        let groups = [1, 2, 4][extra as usize % 3];
        let other = maps
            .iter()
            .rev()
            .skip(extra as usize % 3)
            .find(|m| (m.h, m.w) == (x.h, x.w) && m.id != x.id)
            .copied();
        let twin = maps
            .iter()
            .rev()
            .skip(extra as usize % 2)
            .find(|m| (m.h, m.w) == (x.h, x.w) && net.channels(m.id) == c)
            .copied();
        let mut y = x;
        y.id = match op % 16 {
            0 | 1 => net.conv3(x.id, n),
            2 => net.conv1(x.id, n),
            3 => net.linear(x.id, n, extra % 2 == 0),
            4 | 5 => net.group_norm(x.id, groups),
            6 => net.silu(x.id),
            7 | 8 => match twin {
                Some(m) => net.add(x.id, m.id),
                None => net.silu(x.id),
            },
            9 => {
                let v = net.silu(t);
                let v = net.linear(v, c, true);
                net.add_channel(x.id, v)
            }
            10 => {
                let v = net.linear(t, 2 * c, true);
                net.scale_shift(x.id, v)
            }
            11 => match other {
                Some(m) if c + net.channels(m.id) <= 40 => net.concat(&[x.id, m.id]),
                _ => net.conv3(x.id, 8),
            },
            12 if SIDES.contains(&(2 * x.h)) && SIDES.contains(&(2 * x.w)) => {
                (y.h, y.w) = (2 * x.h, 2 * x.w);
                if extra % 3 == 0 { net.upsample(x.id) } else { net.up_conv(x.id, n) }
            }
            12 | 13 if SIDES.contains(&(x.h / 2)) && SIDES.contains(&(x.w / 2)) => {
                if extra % 2 == 0 {
                    (y.h, y.w) = (x.h / 2, x.w / 2);
                    net.avg_pool(x.id)
                } else {
                    (y.h, y.w) = ((x.h - 1) / 2 + 1, (x.w - 1) / 2 + 1);
                    net.conv(x.id, 8, 3, 2, Pad::all(1))
                }
            }
            14 => match twin {
                Some(m) => net.attention(x.id, m.id, x.id, groups),
                None => net.affine(x.id, 0.5, 0.0),
            },
            _ => {
                let add = if extra % 2 == 0 { 0.0 } else { 0.25 };
                net.affine(x.id, 0.8, add)
            }
        };
        maps.push(y);
    }
    let last = maps[maps.len() - 1];
    net.output("last", last.id);
    let mut middle = maps[maps.len() / 2];
    if middle.id == last.id {
        middle = maps[0];
    }
    net.output("middle", middle.id);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(48, 4) as u32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_networks_in_f32(
        (h, w) in (SIDES, SIDES),
        ops in prop::collection::vec(any::<(u8, u8, u8)>(), 1..12),
        seed in any::<u64>(),
    ) {
        let mut net = Net::new(DType::F32, seed);
        grow(&mut net, h, w, &ops);
        check(&net, h, w, 1e-4);
    }

    #[test]
    fn random_networks_in_f16(
        (h, w) in (SIDES, SIDES),
        ops in prop::collection::vec(any::<(u8, u8, u8)>(), 1..12),
        seed in any::<u64>(),
    ) {
        let mut net = Net::new(DType::F16, seed);
        grow(&mut net, h, w, &ops);
        check(&net, h, w, 1e-2);
    }

    #[test]
    fn random_networks_in_int8(
        (h, w) in (SIDES, SIDES),
        ops in prop::collection::vec(any::<(u8, u8, u8)>(), 1..12),
        seed in any::<u64>(),
    ) {
        // Stored in f16 or in f32; every fourth in three groups of timesteps.
        let dtype = if seed.is_multiple_of(2) { DType::F16 } else { DType::F32 };
        let mut net = Net::new(dtype, seed);
        net.int8 = Some(seed.is_multiple_of(3));
        if seed.is_multiple_of(4) {
            net.timestep_groups = vec![100, 500, 1000];
        }
        grow(&mut net, h, w, &ops);
        check(&net, h, w, 3e-2);
    }
}
