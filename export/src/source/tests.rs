//! Weight files written by hand: safetensors and zip-format torch files, whole, cut and changed.

use super::*;
use std::io::Write;

fn temp(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut f = tempfile::NamedTempFile::new().unwrap();
    f.write_all(bytes).unwrap();
    f
}

fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.extend(data);
    out
}

fn open_bytes(bytes: &[u8]) -> Result<Box<dyn WeightSource>, SourceError> {
    open(temp(bytes).path())
}

/// A minimal stored-only zip, as torch writes it (entry data aligned by an extra field).
pub(crate) fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut central = Vec::new();
    for (name, data) in entries {
        let at = out.len() as u32;
        let (len, n) = (data.len() as u32, name.len() as u16);
        out.extend(0x0403_4b50u32.to_le_bytes());
        out.extend([0; 14]);
        out.extend(len.to_le_bytes());
        out.extend(len.to_le_bytes());
        out.extend(n.to_le_bytes());
        out.extend(4u16.to_le_bytes());
        out.extend(name.as_bytes());
        out.extend(b"FB\0\0");
        out.extend(*data);
        central.extend(0x0201_4b50u32.to_le_bytes());
        central.extend([0; 16]);
        central.extend(len.to_le_bytes());
        central.extend(len.to_le_bytes());
        central.extend(n.to_le_bytes());
        central.extend([0; 12]);
        central.extend(at.to_le_bytes());
        central.extend(name.as_bytes());
    }
    let at = out.len() as u32;
    out.extend(&central);
    out.extend(0x0605_4b50u32.to_le_bytes());
    out.extend([0; 4]);
    out.extend((entries.len() as u16).to_le_bytes());
    out.extend((entries.len() as u16).to_le_bytes());
    out.extend((central.len() as u32).to_le_bytes());
    out.extend(at.to_le_bytes());
    out.extend([0; 2]);
    out
}

fn torch_file() -> Vec<u8> {
    // w is the transpose of a 3x2 storage: shape [2, 3], strides [1, 2].
    let pickle =
        b"\x80\x02}(X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n\
        HalfStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x06tQK\0K\x02K\x03\x86K\x01K\x02\x86\x89NtRu.";
    let data: Vec<u8> = (0..6).flat_map(|v| half::f16::from_f32(v as f32).to_le_bytes()).collect();
    zip(&[
        ("archive/data.pkl", pickle),
        ("archive/byteorder", b"little"),
        ("archive/data/0", &data),
    ])
}

#[test]
fn safetensors_of_every_float_type_read_the_same() {
    let values = [1.0f32, -2.5, 0.125];
    let mut data = Vec::new();
    values.iter().for_each(|v| data.extend(v.to_le_bytes()));
    values.iter().for_each(|v| data.extend(half::f16::from_f32(*v).to_le_bytes()));
    values.iter().for_each(|v| data.extend(half::bf16::from_f32(*v).to_le_bytes()));
    values.iter().for_each(|v| data.extend(f64::from(*v).to_le_bytes()));
    let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},
        "b":{"dtype":"F16","shape":[3],"data_offsets":[12,18]},"c":{"dtype":"BF16","shape":[1,3],"data_offsets":[18,24]},
        "d":{"dtype":"F64","shape":[3,1],"data_offsets":[24,48]}}"#;
    let source = open_bytes(&safetensors(header, &data)).unwrap();
    assert_eq!(source.names(), ["a", "b", "c", "d"]);
    let mut out = vec![9.0; 100];
    for name in ["a", "b", "c", "d"] {
        source.read_f32(name, &mut out).unwrap();
        assert_eq!(out, values, "{name}");
    }
    assert_eq!(source.info("c").unwrap().shape, [1, 3]);
    let missing = source.read_f32("e", &mut out).unwrap_err();
    assert!(matches!(missing.kind, SourceErrorKind::NoSuchTensor { .. }));
}

#[test]
fn conversion_crosses_chunk_borders() {
    let n = 100_003usize;
    let data: Vec<u8> =
        (0..n).flat_map(|i| half::bf16::from_f32((i % 251) as f32).to_le_bytes()).collect();
    let header =
        format!(r#"{{"a":{{"dtype":"BF16","shape":[{n}],"data_offsets":[0,{}]}}}}"#, 2 * n);
    let source = open_bytes(&safetensors(&header, &data)).unwrap();
    let mut out = Vec::new();
    source.read_f32("a", &mut out).unwrap();
    assert_eq!(out.len(), n);
    assert!(out.iter().enumerate().all(|(i, &v)| v == (i % 251) as f32));
}

#[test]
fn cut_safetensors_say_truncated() {
    let whole = safetensors(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, &[0; 8]);
    for n in 0..whole.len() {
        let e = open_bytes(&whole[..n]).err().unwrap();
        let fine = matches!(e.kind, SourceErrorKind::Truncated { .. })
            // Nothing after the length: cannot be told from another kind of file.
            || (n == 8 && matches!(e.kind, SourceErrorKind::NotSafetensors { .. }));
        assert!(fine, "{n}: {e}");
    }
}

#[test]
fn damaged_safetensors_headers_are_refused() {
    let cases = [
        r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#,
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#,
        r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}"#,
        r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,8]}}"#,
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#,
        r#"{"a":[1]}"#,
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#,
        r#"{"a":{"dtype":"I8","shape":[1],"data_offsets":[18446744073709551614,18446744073709551615]}}"#,
    ];
    for header in cases {
        let e = open_bytes(&safetensors(header, &[0; 8])).err().unwrap();
        assert!(matches!(e.kind, SourceErrorKind::Header { .. }), "{header}: {e}");
    }
}

#[test]
fn other_files_are_told_apart() {
    let text = open_bytes(b"This is a text file, not weights.\n").err().unwrap();
    assert!(matches!(text.kind, SourceErrorKind::NotSafetensors { .. }), "{text}");
    let legacy = open_bytes(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M").err().unwrap();
    assert!(matches!(legacy.kind, SourceErrorKind::LegacyTorch), "{legacy}");
    let folder = tempfile::tempdir().unwrap();
    let e = open(folder.path()).err().unwrap();
    assert!(matches!(e.kind, SourceErrorKind::Io { .. }), "{e}");
    let zip = open_bytes(&zip(&[("a.txt", b"hello")])).err().unwrap();
    assert!(matches!(zip.kind, SourceErrorKind::Zip { .. }), "{zip}");
}

#[test]
fn a_torch_file_is_read_with_its_strides() {
    let source = open_bytes(&torch_file()).unwrap();
    assert_eq!(source.names(), ["w"]);
    assert_eq!(source.info("w").unwrap().dtype, SourceDtype::F16);
    let mut out = Vec::new();
    source.read_f32("w", &mut out).unwrap();
    assert_eq!(out, [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]);
}

#[test]
fn a_torch_file_cut_or_changed_anywhere_never_panics() {
    let whole = torch_file();
    for n in 0..whole.len() {
        assert!(open_bytes(&whole[..n]).is_err(), "{n}");
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut out = Vec::new();
    for at in 0..whole.len() {
        for flip in [0x01u8, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] ^= flip;
            std::fs::write(file.path(), &bytes).unwrap();
            if let Ok(source) = open(file.path()) {
                for name in source.names() {
                    let _ = source.read_f32(name, &mut out);
                }
            }
        }
    }
}

#[test]
fn shards_act_as_one_file_and_cannot_leave_their_folder() {
    let folder = tempfile::tempdir().unwrap();
    let shard = |name: &str, tensor: &str, v: f32| {
        let header =
            format!(r#"{{"{tensor}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
        std::fs::write(folder.path().join(name), safetensors(&header, &v.to_le_bytes())).unwrap();
    };
    shard("1.safetensors", "a", 1.0);
    shard("2.safetensors", "b", 2.0);
    let index = folder.path().join("i.json");
    std::fs::write(&index, r#"{"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}"#).unwrap();
    let source = ShardedSource::open(&index).unwrap();
    let mut out = Vec::new();
    source.read_f32("b", &mut out).unwrap();
    assert_eq!((source.names(), out), (vec!["a", "b"], vec![2.0]));
    for map in [r#"{"a":"../1.safetensors"}"#, r#"{"a":"/etc/passwd"}"#, r#"{"b":"1.safetensors"}"#]
    {
        std::fs::write(&index, format!(r#"{{"weight_map":{map}}}"#)).unwrap();
        assert!(matches!(
            ShardedSource::open(&index).err().unwrap().kind,
            SourceErrorKind::Index { .. }
        ));
    }
}
