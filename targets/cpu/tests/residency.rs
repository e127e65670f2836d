//! However weights are held, the same bits; and as much of them resident as the session says.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/compare.rs"]
mod compare;

use common::{Net, one_of_everything};
use compare::{bits, inputs, run};
use latile_cpu::isa::Level;
use latile_cpu::session::CpuBackend;
use latile_runtime::backend::{Backend, PrepareError, Residency, Room, Session};
use latile_runtime::format::{Held, Model, ModelError, Role};
use latile_runtime::tensor::DType;
use std::io::{Seek, SeekFrom, Write};

const EVERY: [(Held, Residency); 4] = [
    (Held::Mapped, Residency::Keep),
    (Held::Mapped, Residency::Drop),
    (Held::Read, Residency::Keep),
    (Held::Read, Residency::Drop),
];

/// More weights than everything else takes: 24 layers of 1.2 MB.
fn heavy() -> Net {
    let mut net = Net::new(DType::F16, 4);
    let mut x = net.map("x", 256);
    for _ in 0..24 {
        x = net.conv3(x, 256);
        x = net.affine(x, 0.05, 0.0);
    }
    net.output("y", x);
    net
}

#[test]
fn the_same_bits_however_weights_are_held() {
    for net in [
        one_of_everything(DType::F32, None),
        one_of_everything(DType::F16, None),
        one_of_everything(DType::F16, Some(true)),
    ] {
        let file = net.file();
        let mut first = None;
        for (held, weights) in EVERY {
            let model = Model::open_held(file.path(), held).unwrap();
            let given = inputs(&model, 6, 8, 1);
            for threads in 1..=3 {
                let backend = CpuBackend::new(threads, Level::best()).unwrap();
                let room = Room { weights, ..Room::default() };
                let mut session = backend.prepare(&model, Role::Decoder, 6, 8, room).unwrap();
                // A second run finds what the first has dropped.
                for _ in 0..2 {
                    let found = bits(&run(session.as_mut(), &given));
                    let expected = first.get_or_insert_with(|| found.clone());
                    assert_eq!(&found, expected, "{held:?} {weights:?} {threads}");
                }
            }
        }
    }
}

#[test]
fn sessions_of_one_component_do_not_disturb_each_other() {
    let file = heavy().file();
    for (held, weights) in EVERY {
        let model = Model::open_held(file.path(), held).unwrap();
        let given = [inputs(&model, 2, 3, 1), inputs(&model, 3, 2, 1)];
        let backend = CpuBackend::new(2, Level::best()).unwrap();
        let room = Room { weights, ..Room::default() };
        let mut wide = backend.session_in(&model, Role::Decoder, 2, 3, room).unwrap();
        let before = run(&mut wide, &given[0]);
        let mut high = backend.session_in(&model, Role::Decoder, 3, 2, room).unwrap();
        run(&mut high, &given[1]);
        drop(high);
        assert_eq!(bits(&run(&mut wide, &given[0])), bits(&before));
        // Sessions go where they are moved to.
        let mut moved = Box::new(wide);
        assert_eq!(bits(&run(moved.as_mut(), &given[0])), bits(&before));
    }
}

#[test]
fn offers_and_sessions_say_what_is_resident() {
    let file = heavy().file();
    let backend = CpuBackend::new(1, Level::best()).unwrap();
    for (held, weights) in EVERY {
        let model = Model::open_held(file.path(), held).unwrap();
        let all = model.load(Role::Decoder).unwrap().bytes();
        let offer = &backend.offers(&model, Role::Decoder, 2, 2).unwrap()[0];
        assert_eq!(offer.weights_kept, all);
        if held == Held::Mapped && cfg!(target_os = "linux") {
            // A layer of 1.1 MiB lies in one or two blocks of 2 MiB.
            assert_eq!(offer.weights_dropped, 4 << 20, "{offer:?}");
        } else {
            assert_eq!(offer.weights_dropped, all);
        }
        let room = Room { weights, ..Room::default() };
        let stats = backend.prepare(&model, Role::Decoder, 2, 2, room).unwrap().stats();
        let promised = match weights {
            Residency::Keep => offer.weights_kept,
            Residency::Drop => offer.weights_dropped,
        };
        assert_eq!(stats.weight_bytes, promised);
    }
}

#[test]
fn damage_is_found_however_weights_are_held() {
    let net = heavy();
    let mut file = net.file();
    let backend = CpuBackend::new(1, Level::best()).unwrap();
    let place = {
        let model = Model::open(file.path()).unwrap();
        model.component(Role::Decoder).unwrap().places[6]
    };
    // Opened before the damage is done: the manifest is whole, and nothing has been checked.
    let models = [Held::Mapped, Held::Read].map(|h| Model::open_held(file.path(), h).unwrap());
    let at = 4096 + place.offset + place.extent / 2;
    file.as_file_mut().seek(SeekFrom::Start(at)).unwrap();
    file.write_all(&[0x5a; 3]).unwrap();
    file.flush().unwrap();
    for model in &models {
        // Pricing looks at no weight.
        backend.offers(model, Role::Decoder, 2, 2).unwrap();
        let error = backend.prepare(model, Role::Decoder, 2, 2, Room::default()).err().unwrap();
        assert!(matches!(&error, PrepareError::Model(ModelError::Damaged { .. })), "{error}");
    }
    // A file that is cut while it is open can only be read; mapped, it would end the process.
    file.as_file().set_len(at).unwrap();
    let error = backend.prepare(&models[1], Role::Decoder, 2, 2, Room::default()).err().unwrap();
    assert!(matches!(&error, PrepareError::Model(ModelError::Io { .. })), "{error}");
    let said = error.to_string();
    assert!(said.contains("became shorter") && said.contains(models[1].name()), "{said}");
}

/// What the process of each way of holding weights has had resident at most, by its own account.
#[cfg(target_os = "linux")]
mod peaks {
    use super::*;

    const MODEL: &str = "LATILE_TEST_MODEL";
    const WAY: &str = "LATILE_TEST_WAY";
    /// Room for stacks, and for what the system's own counting leaves out for a while.
    const SLACK: i64 = 2 << 20;
    /// What is resident while weights are checked.
    const BLOCK: i64 = 2 << 20;

    fn peak() -> i64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
        let kib: i64 = line.trim().strip_suffix("kB").unwrap().trim().parse().unwrap();
        kib << 10
    }

    /// What a child tells: bytes.
    #[derive(Debug)]
    struct Told {
        /// By which `prepare` raised the peak.
        prepared: i64,
        /// By which two runs raised it further.
        ran: i64,
        arena: i64,
        /// Of weights, as the session says.
        weights: i64,
        /// Of weights, in all.
        all: i64,
    }

    fn child(model: &std::path::Path, way: usize) -> Told {
        let out = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "peaks::of_one_way", "--ignored", "--nocapture"])
            .env(MODEL, model)
            .env(WAY, way.to_string())
            .output()
            .unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        // The harness writes the test's name before what the test writes.
        let (_, told) = text.split_once("told: ").unwrap_or_else(|| panic!("{text}"));
        let told: Vec<i64> =
            told.lines().next().unwrap().split(' ').map(|n| n.parse().unwrap()).collect();
        let [prepared, ran, arena, weights, all] = told[..] else { panic!("{told:?}") };
        Told { prepared, ran, arena, weights, all }
    }

    #[test]
    #[ignore = "run by the test below, in a process of its own"]
    fn of_one_way() {
        let way: usize = std::env::var(WAY).unwrap().parse().unwrap();
        let (held, weights) = EVERY[way];
        let path = std::env::var_os(MODEL).unwrap();
        let backend = CpuBackend::new(2, Level::best()).unwrap();
        let start = peak();
        let model = Model::open_held(path.as_ref(), held).unwrap();
        let given = inputs(&model, 4, 4, 1);
        let room = Room { weights, ..Room::default() };
        let mut session = backend.session_in(&model, Role::Decoder, 4, 4, room).unwrap();
        let prepared = peak();
        run(&mut session, &given);
        run(&mut session, &given);
        let ran = peak();
        let stats = session.stats();
        let all = model.load(Role::Decoder).unwrap().bytes();
        println!(
            "told: {} {} {} {} {all}",
            prepared - start,
            ran - prepared,
            stats.arena_bytes,
            stats.weight_bytes
        );
    }

    #[test]
    fn are_what_sessions_say() {
        let file = heavy().file();
        for (way, (held, weights)) in EVERY.into_iter().enumerate() {
            let told = child(file.path(), way);
            let why = format!("{held:?} {weights:?}: {told:?}");
            assert!(told.all > 24 << 20, "{why}");
            match (held, weights) {
                (Held::Mapped, Residency::Keep) => {
                    // Checking the weights leaves them where they are.
                    assert!(told.prepared < told.arena + BLOCK + SLACK, "{why}");
                    let peak = told.prepared + told.ran;
                    assert!((peak - told.all - told.arena).abs() < SLACK, "{why}");
                }
                (Held::Mapped, Residency::Drop) => {
                    assert!(told.prepared < told.arena + BLOCK + SLACK, "{why}");
                    let peak = told.prepared + told.ran;
                    assert!(peak < told.arena + told.weights + SLACK, "{why}");
                    assert!(told.weights < told.all / 6, "{why}");
                }
                (Held::Read, _) => {
                    assert!((told.prepared - told.all - told.arena).abs() < SLACK, "{why}");
                    assert!(told.ran < SLACK, "{why}");
                }
            }
        }
    }
}
