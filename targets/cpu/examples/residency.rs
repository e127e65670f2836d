//! What holding weights costs: peak memory and time of one component with its weights kept, dropped
//! behind each layer, and read instead of mapped.
//!
//!     cargo run --release -p latile-cpu --example residency -- MODEL COMPONENT HxW [THREADS [RUNS]]
//!
//! Each way runs in a process of its own and tells its peak resident set (VmHWM; Linux), of which the
//! arena and the weights are said apart. Times are of kept and dropped in turn, in one process, so that
//! both meet the same machine.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

use latile_cpu::session::{CpuBackend, CpuSession};
use latile_runtime::backend::{Residency, Room, Session};
use latile_runtime::format::{Held, Model, Role};
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

const WAYS: [(&str, Held, Residency); 3] = [
    ("keep", Held::Mapped, Residency::Keep),
    ("drop", Held::Mapped, Residency::Drop),
    ("read", Held::Read, Residency::Keep),
];

struct Task {
    model: PathBuf,
    role: Role,
    size: [usize; 2],
    threads: usize,
    runs: usize,
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let way = args.last().and_then(|last| WAYS.iter().find(|w| w.0 == last));
    let given = &args[..args.len() - usize::from(way.is_some())];
    let Some(task) = parse(given) else {
        println!("MODEL unet|decoder|encoder HxW [THREADS [RUNS]]");
        std::process::exit(2);
    };
    match way {
        Some(way) => alone(&task, way),
        None => {
            for (name, ..) in WAYS {
                let this = std::env::current_exe().unwrap();
                let all = [
                    given[0].clone(),
                    given[1].clone(),
                    given[2].clone(),
                    task.threads.to_string(),
                    task.runs.to_string(),
                ];
                assert!(Command::new(this).args(all).arg(name).status().unwrap().success());
            }
            pair(&task);
        }
    }
}

fn parse(args: &[String]) -> Option<Task> {
    let (h, w) = args.get(2)?.split_once('x')?;
    let number = |i: usize, default: usize| args.get(i).map_or(Some(default), |n| n.parse().ok());
    Some(Task {
        model: args.first()?.into(),
        role: [Role::Unet, Role::Decoder, Role::Encoder]
            .into_iter()
            .find(|r| r.name() == args[1])?,
        size: [h.parse().ok()?, w.parse().ok()?],
        threads: number(3, 2)?,
        runs: number(4, 9)?.max(1),
    })
}

fn prepare<'m>(
    backend: &CpuBackend,
    model: &'m Model,
    task: &Task,
    weights: Residency,
) -> CpuSession<'m> {
    let room = Room { weights, ..Room::default() };
    backend.session_in(model, task.role, task.size[0], task.size[1], room).unwrap()
}

/// Ports' buffers, filled with what is no special value.
fn buffers(session: &CpuSession<'_>) -> (Vec<Vec<f32>>, Vec<Vec<f32>>) {
    let filled = |ports: &[latile_runtime::backend::PortSpec]| {
        let one = |len: usize| (0..len).map(|i| (i % 97) as f32 / 48.0 - 1.0).collect();
        ports.iter().map(|p| one(p.shape.elements().unwrap())).collect()
    };
    (filled(session.inputs()), filled(session.outputs()))
}

/// Seconds of one run.
fn run(session: &mut CpuSession<'_>, ins: &[Vec<f32>], outs: &mut [Vec<f32>]) -> f64 {
    let ins: Vec<&[f32]> = ins.iter().map(Vec::as_slice).collect();
    let mut outs: Vec<&mut [f32]> = outs.iter_mut().map(Vec::as_mut_slice).collect();
    let start = Instant::now();
    session.run(&ins, &mut outs).unwrap();
    start.elapsed().as_secs_f64()
}

/// MiB that the process has had resident at most; 0 where the system does not tell.
fn peak() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or("0 kB");
    line.trim().trim_end_matches("kB").trim().parse::<f64>().unwrap() / 1024.0
}

fn alone(task: &Task, &(name, held, residency): &(&str, Held, Residency)) {
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    let backend = CpuBackend::from_env(task.threads).unwrap();
    let start = Instant::now();
    let model = Model::open_held(&task.model, held).unwrap();
    let opened = peak();
    let mut session = prepare(&backend, &model, task, residency);
    let (seconds, prepared) = (start.elapsed().as_secs_f64(), peak());
    let (ins, mut outs) = buffers(&session);
    let first = run(&mut session, &ins, &mut outs);
    let second = run(&mut session, &ins, &mut outs);
    let stats = session.stats();
    println!(
        "{name}: peak {:.1} MiB (opened {opened:.1}, prepared {prepared:.1}); arena {:.1}, weights {:.1} by its own account; prepared in {seconds:.3} s, first run {first:.3} s, second {second:.3} s",
        peak(),
        mib(stats.arena_bytes),
        mib(stats.weight_bytes),
    );
}

fn pair(task: &Task) {
    let backend = CpuBackend::from_env(task.threads).unwrap();
    // A map each: what one drops must not leave the other.
    let models = [0, 1].map(|_| Model::open(&task.model).unwrap());
    let mut kept = prepare(&backend, &models[0], task, Residency::Keep);
    let mut dropped = prepare(&backend, &models[1], task, Residency::Drop);
    let (ins, mut outs) = buffers(&kept);
    run(&mut kept, &ins, &mut outs);
    run(&mut dropped, &ins, &mut outs);
    let times: Vec<[f64; 2]> = (0..task.runs)
        .map(|_| [run(&mut kept, &ins, &mut outs), run(&mut dropped, &ins, &mut outs)])
        .collect();
    let median = |of: &mut [f64]| {
        of.sort_by(f64::total_cmp);
        of[of.len() / 2]
    };
    let by = |f: &dyn Fn(&[f64; 2]) -> f64| median(&mut times.iter().map(f).collect::<Vec<_>>());
    println!(
        "{} pairs of runs: kept {:.4} s, dropped {:.4} s, dropped by kept {:.3} (medians; by pairs)",
        task.runs,
        by(&|t| t[0]),
        by(&|t| t[1]),
        by(&|t| t[1] / t[0]),
    );
}
