//! What a session promises: the arena as planned, layers timed, errors for what does not fit.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/compare.rs"]
mod compare;

use common::{Net, one_of_everything};
use compare::{inputs, run};
use latile_cpu::isa::Level;
use latile_cpu::reference;
use latile_cpu::session::CpuBackend;
use latile_runtime::backend::{Backend, PrepareError, Room, RunError, Session};
use latile_runtime::format::{ModelError, Role};
use latile_runtime::graph::ShapeError;
use latile_runtime::tensor::DType;

#[test]
fn layers_are_timed_and_add_up() {
    let model = one_of_everything(DType::F32, None).model();
    let backend = CpuBackend::new(2, Level::best()).unwrap();
    let mut session = backend.session(&model, Role::Decoder, 6, 8).unwrap();
    session.time_layers(true);
    run(&mut session, &inputs(&model, 6, 8, 1));
    let layers = session.layers();
    let macs: u64 = layers.iter().map(|l| l.macs).sum();
    assert_eq!(macs, session.stats().macs);
    assert!(layers.iter().map(|l| l.seconds).sum::<f64>() > 0.0);
    for kind in ["conv2d", "attention", "codebook", "elementwise", "linear"] {
        assert!(layers.iter().any(|l| l.kind == kind), "{kind}");
    }
}

#[test]
fn what_is_planned_is_what_is_used() {
    // The last level of a VQ-f4 decoder, 256 then 128 channels, at 512 x 512: where its memory peaks. Only
    // prepared, not run: an arena's pages cost nothing before they are touched.
    let mut net = Net::new(DType::F16, 5);
    let x = net.map("x", 256);
    let h = net.upsample(x);
    let h = net.conv3(h, 256);
    let h = net.resnet(h, 128, 32, None);
    let h = net.resnet(h, 128, 32, None);
    let h = net.resnet(h, 128, 32, None);
    let h = net.group_norm(h, 32);
    let h = net.silu(h);
    let y = net.conv3(h, 3);
    net.output("y", y);
    let model = net.model();
    let backend = CpuBackend::new(2, Level::best()).unwrap();
    let session = backend.prepare(&model, Role::Decoder, 256, 256, Room::default()).unwrap();
    let stats = session.stats();
    let map = |c: usize| 512 * 512 * c * 2;
    // The 256-channel input, the first convolution's output and the shortcut live together; the second
    // convolution adds in place. Bands and sums take the rest.
    let least = map(256) + map(128) + map(128);
    assert!(stats.arena_bytes >= least, "{}", stats.arena_bytes);
    assert!(
        stats.arena_bytes <= least + (12 << 20),
        "{} is {} over",
        stats.arena_bytes,
        stats.arena_bytes - least
    );
    let weights: usize = net.graph.weights.iter().map(|w| w.stored_bytes().unwrap()).sum();
    // With what lies between them so that they begin at pages or lines.
    assert!((weights..weights + (64 << 10)).contains(&stats.weight_bytes));
    assert_eq!(stats.weight_bytes, model.load(Role::Decoder).unwrap().bytes());
    assert_eq!(
        (stats.backend.as_str(), stats.threads, stats.isa.as_str()),
        ("cpu", 2, Level::best().isa().name())
    );
}

#[test]
fn damage_in_a_result_is_an_error() {
    let mut net = Net::new(DType::F16, 1);
    let x = net.map("x", 1);
    let y = net.affine(x, 3e38, 0.0);
    net.output("y", y);
    let model = net.model();
    let backend = CpuBackend::new(2, Level::best()).unwrap();
    let mut session = backend.session(&model, Role::Decoder, 1, 2).unwrap();
    let mut y = [0.0; 2];
    // Beyond f32's range, which is what ports are stored in.
    let error = session.run(&[&[1.0, 2.0]], &mut [&mut y]).unwrap_err();
    assert!(matches!(&error, RunError::NonFinite { port } if port == "y"), "{error}");
    let error = session.run(&[&[f32::NAN, 0.0]], &mut [&mut y]).unwrap_err();
    assert!(matches!(error, RunError::NonFinite { .. }), "{error}");
    // The session itself is whole.
    session.run(&[&[1.0, 0.5]], &mut [&mut y]).unwrap();
    assert_eq!(y, [3e38, 1.5e38]);
}

#[test]
fn buffers_of_another_size_are_refused() {
    let mut net = Net::new(DType::F32, 1);
    let x = net.map("x", 2);
    let y = net.conv3(x, 3);
    net.output("y", y);
    let model = net.model();
    let backend = CpuBackend::new(1, Level::best()).unwrap();
    let mut session = backend.session(&model, Role::Decoder, 2, 2).unwrap();
    let mut y = vec![0.0; 12];
    let short = session.run(&[&[0.0; 7]], &mut [&mut y]).unwrap_err();
    assert_eq!(short.to_string(), "x: 7 elements given, the session expects 8");
    let error = session.run(&[&[0.0; 8]], &mut [&mut y[..11]]).unwrap_err();
    assert!(matches!(error, RunError::WrongSize { expected: 12, found: 11, .. }));
    let none = session.run(&[], &mut [&mut y]).unwrap_err();
    assert!(matches!(none, RunError::WrongPorts { direction: "inputs", expected: 1, found: 0 }));
    let error = session.run(&[&[0.0; 8]], &mut []).unwrap_err();
    assert!(matches!(error, RunError::WrongPorts { direction: "outputs", .. }));
}

#[test]
fn sizes_that_do_not_suit_are_refused() {
    let mut net = Net::new(DType::F32, 1);
    let x = net.map("x", 2);
    let d = net.avg_pool(x);
    let u = net.upsample(d);
    let y = net.add(u, x);
    net.output("y", y);
    let model = net.model();
    let backend = CpuBackend::new(1, Level::best()).unwrap();
    let prepare = |h, w| backend.session(&model, Role::Decoder, h, w).map(drop);
    prepare(4, 6).unwrap();
    let shape = |r: Result<(), PrepareError>| match r.unwrap_err() {
        PrepareError::Shape(e) => e,
        other => panic!("{other}"),
    };
    assert!(matches!(shape(prepare(5, 6)), ShapeError::Mismatch { .. }));
    assert!(matches!(shape(prepare(1, 1)), ShapeError::TooSmall { .. }));
    assert!(matches!(shape(prepare(0, 4)), ShapeError::TooSmall { .. }));
    assert!(matches!(shape(prepare(usize::MAX / 2, 4)), ShapeError::TooLarge { .. }));
    // Addressable, but no machine has it.
    assert!(matches!(
        prepare(1 << 26, 1 << 26).unwrap_err(),
        PrepareError::Arena(_) | PrepareError::Unsupported { .. }
    ));
    let missing = backend.session(&model, Role::Unet, 4, 4).map(drop);
    assert!(matches!(missing.unwrap_err(), PrepareError::Model(ModelError::NoComponent { .. })));
}

#[test]
fn an_observer_sees_what_each_layer_reads() {
    let mut net = Net::new(DType::F16, 9);
    let a = net.map("a", 3);
    let b = net.map("b", 5);
    let x = net.concat(&[a, b]);
    let n = net.group_norm(x, 2);
    let s = net.silu(n);
    let u = net.upsample(s);
    net.int8 = Some(true);
    let first = net.conv3(u, 20);
    net.int8 = None;
    let second = net.linear(first, 7, true);
    net.output("y", second);
    let model = net.model();
    let given = inputs(&model, 4, 6, 1);
    let ins: Vec<&[f32]> = given.iter().map(Vec::as_slice).collect();
    let component = model.load(Role::Decoder).unwrap();
    for threads in [1, 2] {
        let backend = CpuBackend::new(threads, Level::best()).unwrap();
        let mut session = backend.session(&model, Role::Decoder, 4, 6).unwrap();
        let plain = run(&mut session, &given);
        let mut y = vec![0.0; plain[0].len()];
        let mut seen: Vec<(String, Vec<f32>, usize)> = Vec::new();
        session
            .run_observed(&ins, &mut [&mut y], &mut |layer, channels, row| {
                assert_eq!(channels, if layer.starts_with("conv2d") { 8 } else { 20 });
                match seen.last_mut() {
                    Some((name, all, rows)) if name == layer => {
                        all.extend(row);
                        *rows += 1;
                    }
                    _ => seen.push((layer.to_owned(), row.to_vec(), 1)),
                }
            })
            .unwrap();
        assert_eq!(y, plain[0], "observing changes nothing");
        let stored: Vec<_> = session.stored_values().to_vec();
        let values =
            reference::run(&component, &[(4, 6); 2], &ins, |v| stored.contains(&v)).unwrap();
        let names: Vec<_> = seen.iter().map(|s| (s.0.as_str(), s.2)).collect();
        assert_eq!(names, [("conv2d.4", 4), ("linear.5", 8)]);
        assert!(compare::distance(&seen[0].1, &values[s.index()]) < 1e-5);
        // A last bit of the norm may turn an integer over.
        assert!(compare::distance(&seen[1].1, &values[first.index()]) < 2e-2);
    }
}

#[test]
fn the_backend_describes_itself() {
    let backend = CpuBackend::new(2, Level::best()).unwrap();
    let info = backend.info();
    assert_eq!(info.backend, "cpu");
    assert!(info.usable.is_ok());
    assert!(info.device.contains(Level::best().isa().name()));
    assert!(CpuBackend::new(0, Level::best()).is_err());
}
