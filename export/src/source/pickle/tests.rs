//! Pickles assembled by hand, honest and hostile.

use super::*;

/// `(storage, FloatStorage, "0", "cpu", count)` as a persistent id.
fn storage(out: &mut Vec<u8>, class: &str, count: u8) {
    out.extend(b"(X\x07\0\0\0storagec");
    out.extend(class.as_bytes());
    out.extend(b"\nX\x01\0\0\x000X\x03\0\0\0cpuK");
    out.push(count);
    out.extend(b"tQ");
}

/// A dict with one tensor `w` of shape [2, 3], as torch.save writes it, with `extra` before the end.
fn checkpoint(extra: &[u8]) -> Vec<u8> {
    let mut p = b"\x80\x02}q\0(X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(".to_vec();
    storage(&mut p, "torch\nFloatStorage", 6);
    p.extend(b"K\0K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n)RtR");
    p.extend(extra);
    p.extend(b"u.");
    p
}

fn global_of(pickle: &[u8]) -> Option<String> {
    match read_tensors(pickle) {
        Err(PickleError { kind: PickleErrorKind::Global(g), .. }) => Some(g),
        _ => None,
    }
}

#[test]
fn a_tensor_record_is_read() {
    let tensors = read_tensors(&checkpoint(b"")).unwrap();
    assert_eq!(tensors.len(), 1);
    let (name, t) = &tensors[0];
    assert_eq!(name, "w");
    assert_eq!(t.dtype, SourceDtype::F32);
    assert_eq!((t.storage.as_str(), t.storage_elements, t.offset), ("0", 6, 0));
    assert_eq!((t.shape.as_slice(), t.stride.as_slice()), (&[2, 3][..], &[3, 1][..]));
}

#[test]
fn frameworks_objects_stay_opaque_and_the_tensors_are_still_found() {
    // A Lightning callback's class as a dict key, and a numpy scalar rebuilt by a call.
    let extra = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n}\
        X\x04\0\0\0bestcnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\0\0\0f8K\0K\x01tRtR";
    assert_eq!(read_tensors(&checkpoint(extra)).unwrap().len(), 1);
}

#[test]
fn every_way_to_name_a_hostile_global_is_refused() {
    let call = b"X\x01\0\0\0xcposix\nsystem\n(X\x02\0\0\0idtR";
    assert_eq!(global_of(&checkpoint(call)).as_deref(), Some("posix.system"));
    let inst = b"X\x01\0\0\0x(X\x02\0\0\0idios\nsystem\n";
    assert_eq!(global_of(&checkpoint(inst)).as_deref(), Some("os.system"));
    let stack = b"X\x01\0\0\0xX\x08\0\0\0builtinsX\x04\0\0\0eval\x93";
    assert_eq!(global_of(&checkpoint(stack)).as_deref(), Some("builtins.eval"));
    for (module, name) in [
        ("torch.hub", "load"),
        ("torch", "load"),
        ("numpy.testing._private.utils", "runstring"),
        ("numpy", "load"),
        ("runpy", "_run_code"),
        ("builtins", "getattr"),
        ("pytorch_lightning", "os.system"),
        ("torch.storage", "_load_from_bytes"),
        ("functools", "partial"),
        ("ldmx", "thing"),
    ] {
        let extra = format!("X\x01\0\0\0xc{module}\n{name}\n");
        assert_eq!(global_of(&checkpoint(extra.as_bytes())), Some(format!("{module}.{name}")));
    }
}

#[test]
fn an_unknown_global_is_shown_escaped_and_short() {
    let name = format!("a\u{1b}[31m{}", "x".repeat(500));
    let extra = format!("X\x01\0\0\0xcevil\n{name}\n");
    let shown = global_of(&checkpoint(extra.as_bytes())).unwrap();
    assert!(!shown.contains('\u{1b}') && shown.len() < 200);
}

#[test]
fn lightning_checkpoints_hold_their_tensors_one_level_down() {
    let mut p = b"\x80\x02}(X\x05\0\0\0epochK\x03X\x0a\0\0\0state_dict".to_vec();
    let inner = checkpoint(b"");
    p.extend(&inner[2..inner.len() - 1]);
    p.extend(b"u.");
    assert_eq!(read_tensors(&p).unwrap()[0].0, "w");
}

#[test]
fn a_pickle_cut_at_any_length_is_an_error() {
    let whole = checkpoint(b"");
    for n in 0..whole.len() {
        let e = read_tensors(&whole[..n]).unwrap_err();
        assert!(
            matches!(e.kind, PickleErrorKind::Malformed(_) | PickleErrorKind::Global(_)),
            "{n}: {e:?}"
        );
    }
}

#[test]
fn changing_any_byte_never_panics() {
    let whole = checkpoint(b"X\x01\0\0\0x(lp0\nX\x01\0\0\0y\x8a\x02\xff\0");
    for at in 0..whole.len() {
        for byte in 0..=255u8 {
            let mut p = whole.clone();
            p[at] = byte;
            let _ = read_tensors(&p);
        }
    }
}

#[test]
fn copies_of_one_container_are_bounded() {
    // A dict of 64 Ki entries, then OrderedDict(that dict) over and over.
    let mut p = b"\x80\x02}(".to_vec();
    for _ in 0..65_536 {
        p.extend(b"NN");
    }
    p.extend(b"uq\0");
    for _ in 0..1000 {
        p.extend(b"ccollections\nOrderedDict\nh\0\x85R0");
    }
    p.push(b'.');
    let e = read_tensors(&p).unwrap_err();
    assert!(
        matches!(&e.kind, PickleErrorKind::Malformed(why) if why.contains("over and over")),
        "{e:?}"
    );
}

#[test]
fn tensors_that_are_nonsense_are_refused() {
    let cases: [&[u8]; 4] = [
        // Rebuilt from an integer instead of a storage.
        b"X\x01\0\0\0vctorch._utils\n_rebuild_tensor_v2\n(K\x01K\0)K\0tR",
        // A persistent id that is not a storage.
        b"X\x01\0\0\0v(X\x06\0\0\0modultcos\npath\ntQ",
        b"X\x01\0\0\0vK\x05Q",
        // A negative size.
        b"X\x01\0\0\0vctorch._utils\n_rebuild_tensor_v2\n(h\x63K\0tR",
    ];
    for extra in cases {
        assert!(read_tensors(&checkpoint(extra)).is_err());
    }
}
