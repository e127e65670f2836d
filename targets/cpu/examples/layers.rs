//! Where a component's time goes: its steps, slowest first, by the least of several runs on made-up input.
//!
//!     cargo run --release -p latile-cpu --example layers -- MODEL unet|decoder|encoder HxW [THREADS [RUNS]]
//!
//! A line a step: milliseconds, share of the whole, GMAC/s, what it does, the layer's name; first the same by kind.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use latile_cpu::session::{CpuBackend, LayerTime};
use latile_runtime::backend::{Room, Session};
use latile_runtime::format::{Model, Role};
use std::collections::BTreeMap;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default: usize| args.get(i).map_or(default, |n| n.parse().unwrap());
    let size = args.get(2).and_then(|s| s.split_once('x'));
    let role = [Role::Unet, Role::Decoder, Role::Encoder]
        .into_iter()
        .find(|r| args.get(1).is_some_and(|a| r.name() == a));
    let (Some((h, w)), Some(role)) = (size, role) else {
        println!("MODEL unet|decoder|encoder HxW [THREADS [RUNS]]");
        std::process::exit(2);
    };
    let model = Model::open(args[0].as_ref()).unwrap();
    let backend = CpuBackend::from_env(number(3, 2)).unwrap();
    let (h, w) = (h.parse().unwrap(), w.parse().unwrap());
    let mut session = backend.session_in(&model, role, h, w, Room::default()).unwrap();
    let filled = |ports: &[latile_runtime::backend::PortSpec]| -> Vec<Vec<f32>> {
        let one = |len: usize| (0..len).map(|i| (i % 97) as f32 / 48.0 - 1.0).collect();
        ports.iter().map(|p| one(p.shape.elements().unwrap())).collect()
    };
    let (ins, mut outs) = (filled(session.inputs()), filled(session.outputs()));
    session.time_layers(true);
    let mut best: Vec<LayerTime> = Vec::new();
    for _ in 0..number(4, 9).max(1) {
        let ins: Vec<&[f32]> = ins.iter().map(Vec::as_slice).collect();
        let mut outs: Vec<&mut [f32]> = outs.iter_mut().map(Vec::as_mut_slice).collect();
        session.run(&ins, &mut outs).unwrap();
        let now = session.layers();
        if best.is_empty() {
            best = now;
        } else {
            best.iter_mut().zip(now).for_each(|(b, n)| b.seconds = b.seconds.min(n.seconds));
        }
    }
    let all: f64 = best.iter().map(|l| l.seconds).sum();
    let line = |seconds: f64, macs: u64, kind: &str, name: &str| {
        println!(
            "{:9.3} ms {:5.1} % {:7.1} GMAC/s  {kind:16} {name}",
            seconds * 1e3,
            100.0 * seconds / all,
            macs as f64 / seconds / 1e9
        );
    };
    line(all, best.iter().map(|l| l.macs).sum(), "", "all");
    let mut kinds: BTreeMap<&str, (f64, u64)> = BTreeMap::new();
    for l in &best {
        let kind = kinds.entry(l.kind).or_default();
        *kind = (kind.0 + l.seconds, kind.1 + l.macs);
    }
    kinds.iter().for_each(|(kind, &(seconds, macs))| line(seconds, macs, kind, ""));
    best.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    best.iter().for_each(|l| line(l.seconds, l.macs, l.kind, &l.name));
}
