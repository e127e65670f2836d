//! What the command's tests share: running it, and files to run it on.
#![allow(clippy::unwrap_used, dead_code)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The built command, in `dir`, deaf to the environment's own settings.
pub(crate) fn latile(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_latile"));
    command.current_dir(dir).env_remove("LATILE_ISA").env_remove("LATILE_LOG");
    command
}

/// As [`latile`], started by a shell after `prelude`, such as `ulimit -f 8`.
#[cfg(unix)]
pub(crate) fn latile_after(prelude: &str, dir: &Path) -> Command {
    let mut command = Command::new("sh");
    command
        .current_dir(dir)
        .env_remove("LATILE_ISA")
        .env_remove("LATILE_LOG")
        .arg("-c")
        .arg(format!("{prelude}; exec \"$0\" \"$@\""))
        .arg(env!("CARGO_BIN_EXE_latile"));
    command
}

/// What a run came to.
#[derive(Debug)]
pub(crate) struct Ran {
    /// The exit code; none where a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

pub(crate) fn run(command: &mut Command) -> Ran {
    let Output { status, stdout, stderr } = command.output().unwrap();
    Ran {
        code: status.code(),
        stdout: String::from_utf8(stdout).unwrap(),
        stderr: String::from_utf8(stderr).unwrap(),
    }
}

/// Runs `latile args` in `dir`.
pub(crate) fn run_in(dir: &Path, args: &[&str]) -> Ran {
    run(latile(dir).args(args))
}

impl Ran {
    /// The run failed with `code` and one message that says all of `words`.
    #[track_caller]
    pub(crate) fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert_eq!(self.stdout, "", "a failure has no result: {self:?}");
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} in {self:?}");
        }
    }

    /// The run succeeded; its result.
    #[track_caller]
    pub(crate) fn done(&self) -> &str {
        assert_eq!(self.code, Some(0), "{self:?}");
        &self.stdout
    }

    /// The run succeeded; its result as one JSON object.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        let value: serde_json::Value = serde_json::from_str(self.done()).unwrap();
        assert!(value.is_object(), "{value}");
        value
    }
}

/// A folder of the tests' fixtures.
pub(crate) fn fixture(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let path = root.join(name);
    assert!(path.exists(), "{} is missing", path.display());
    path
}

/// The small super-resolution model, exported to `dir/sr.latile`.
pub(crate) fn sr_model(dir: &Path) -> PathBuf {
    let source = fixture("models/sr");
    let path = dir.join("sr.latile");
    run(latile(dir).arg("export").arg(source).args(["-o", "sr.latile", "--with-encoder"])).done();
    path
}

/// A picture of `w × h` with some structure, as `dir/name`.
pub(crate) fn picture(dir: &Path, name: &str, w: u32, h: u32) -> PathBuf {
    let image = image::RgbImage::from_fn(w, h, |x, y| {
        image::Rgb([(x * 9 % 256) as u8, (y * 13 % 256) as u8, ((x * y) % 251) as u8])
    });
    let path = dir.join(name);
    image.save(&path).unwrap();
    path
}

/// Names in `dir`, sorted.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Copies the folder `from` to `to`, which must not exist.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// A PNG of `side × side` black pixels as deflate makes it at best: 13 bits for each 258 bytes.
pub(crate) fn png_bomb(side: u32) -> Vec<u8> {
    let bytes = (u64::from(side) * (u64::from(side) * 3 + 1)).max(1);
    let mut bits = Bits::default();
    // A last block with fixed codes (RFC 1951, 3.2.6): one literal 0, then copies of the byte before.
    bits.put(1, 1);
    bits.put(1, 2);
    bits.code(0x30, 8);
    let mut left = bytes - 1;
    while left >= 258 {
        bits.code(0b1100_0101, 8);
        bits.code(0, 5);
        left -= 258;
    }
    for _ in 0..left {
        bits.code(0x30, 8);
    }
    bits.code(0, 7);
    let mut zlib = vec![0x78, 0x9c];
    zlib.extend(bits.finish());
    // Adler-32 of zeros: the first sum stays 1, the second counts the bytes.
    zlib.extend((((bytes % 65521) as u32) << 16 | 1).to_be_bytes());

    let mut header = Vec::new();
    header.extend(side.to_be_bytes());
    header.extend(side.to_be_bytes());
    header.extend([8, 2, 0, 0, 0]);
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    for (name, data) in [(b"IHDR", &header), (b"IDAT", &zlib), (b"IEND", &Vec::new())] {
        png.extend((data.len() as u32).to_be_bytes());
        let start = png.len();
        png.extend(name);
        png.extend(data);
        let crc = crc32(&png[start..]);
        png.extend(crc.to_be_bytes());
    }
    png
}

#[derive(Default)]
struct Bits {
    out: Vec<u8>,
    held: u32,
    count: u32,
}

impl Bits {
    /// The low `n` bits of `value`, lowest first.
    fn put(&mut self, value: u32, n: u32) {
        self.held |= value << self.count;
        self.count += n;
        while self.count >= 8 {
            self.out.push(self.held as u8);
            self.held >>= 8;
            self.count -= 8;
        }
    }

    /// A Huffman code of `n` bits, highest first.
    fn code(&mut self, value: u32, n: u32) {
        self.put(value.reverse_bits() >> (32 - n), n);
    }

    fn finish(mut self) -> Vec<u8> {
        if self.count > 0 {
            self.put(0, 8 - self.count);
        }
        self.out
    }
}

fn crc32(data: &[u8]) -> u32 {
    let table: Vec<u32> = (0..256u32)
        .map(|i| (0..8).fold(i, |c, _| if c & 1 == 1 { 0xedb8_8320 ^ (c >> 1) } else { c >> 1 }))
        .collect();
    !data.iter().fold(!0u32, |c, &b| table[((c ^ u32::from(b)) & 255) as usize] ^ (c >> 8))
}

/// Writes `bytes` to `dir/name`.
pub(crate) fn put(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    std::fs::File::create(&path).unwrap().write_all(bytes).unwrap();
    path
}
