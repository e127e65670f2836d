//! What a run has finished, kept in a file, so that a run cut short by a power cut, a signal or a full disk
//! goes on where it was and gives the same bits.
//!
//! Lives here: [`Resume`], the file's layout, and the check that a file is of this very run. Never here: what
//! is computed.
//!
//! The file holds a *base*, the latent at the beginning of a step (or after the last, for the decoder), and
//! behind it, as they are finished, the *tiles* of what comes next: the U-Net's predictions, or the decoder's
//! pixels. A run that goes on begins at the base and takes each tile from the file instead of the network;
//! blending, DDIM, noise and consistency are computed again, so nothing that they hold needs keeping and the
//! bits are the same by construction. Noise is drawn again from the seed. The decoder's pixels are kept
//! before blending, not the rows after it: rows have been rounded by whoever took them, and a row of tiles
//! that is not complete would be lost, which on a small board is a quarter of an hour.
//!
//! A base replaces the file through [`crate::persist`], so that a power cut leaves the old or the new one.
//! Tiles are appended, each with a checksum; the first that is not whole ends the file, and is computed again.
//! While decoding the file grows to 12 bytes for each pixel of the decoded tiles.
//!
//! | bytes | type | what |
//! |---|---|---|
//! | 0..8 | bytes | magic |
//! | 8..12 | u32 | version |
//! | 12..16 | u32 | the step of the base; the number of steps where all are done |
//! | 16..24 | u64 | elements of the latent |
//! | 24..28 | u32 | length of the identity |
//! | 28.. | JSON | the identity: pairs of a name and a value |
//! | | u32 | CRC-32C of all before |
//! | | f32 … | the latent, NHWC |
//! | | u32 | CRC-32C of the latent |
//! | then, for each tile | u32, u32 | its number, CRC-32C of that and of the values |
//! | | f32 … | the network's output, NHWC |
//!
//! Numbers are little-endian.

use super::field::Field;
use super::plan::{PipelineError, Plan, RGB};
use super::tiles::Grid;
use super::upscale::{Picture, Pixels};
use crate::persist::{Output, PersistError, sweep};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// First eight bytes.
const MAGIC: [u8; 8] = *b"\x89LATRUN\n";
/// The version this build reads and writes.
const VERSION: u32 = 1;
/// Bytes before the identity.
const HEAD: usize = 28;
/// The longest identity.
const MAX_IDENTITY: usize = 1 << 20;
/// Bytes before a tile's values.
const TILE_HEAD: usize = 8;
/// Least time between two writes that wait for the disk.
const EVERY: Duration = Duration::from_secs(3);
/// A write that waits is followed by at least this many times its duration without one.
const REST: u32 = 9;

/// Why a run cannot be resumed or kept.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// The file cannot be read or added to.
    #[error("cannot {action} resume file {}: {source}", path.display())]
    Io {
        /// `read`, `write`, `remove`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file cannot be replaced.
    #[error("the run cannot be kept: {0}")]
    Persist(#[from] PersistError),
    /// Another kind of file, which is left as it is.
    #[error("{} is not a resume file; name another one", path.display())]
    NotOne {
        /// The file.
        path: PathBuf,
    },
    /// Written by another version.
    #[error(
        "resume file {} is of version {found}, this build reads version {VERSION}; go on with the program that wrote it, or delete the file to begin anew",
        path.display()
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Version found.
        found: u32,
    },
    /// Its base is not whole.
    #[error("resume file {} is damaged: {why}; delete it to begin anew", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// It is of a run with another result.
    #[error(
        "resume file {} is of another run: {}; start that run again, or name another file, or delete this one to begin anew",
        path.display(),
        differs.join("; ")
    )]
    Other {
        /// The file.
        path: PathBuf,
        /// What differs, with its value there and here.
        differs: Vec<String>,
    },
}

/// Where a run is kept, and how often.
#[derive(Clone, Debug)]
pub struct Resume {
    path: PathBuf,
    every: Duration,
}

impl Resume {
    /// Keeps a run in `path`, which is absent, or the file of the same run.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), every: EVERY }
    }

    /// Waits for the disk no more often than once in `every` (3 s unless said), and for a tenth of the time at
    /// most: that is about as much work as a power cut can cost beside the tile under way. Zero keeps
    /// every step and every tile at once.
    #[must_use]
    pub fn every(self, every: Duration) -> Self {
        Self { every, ..self }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the file, once what it was for is in place. A file that is none of ours stays.
    ///
    /// # Errors
    /// [`ResumeError::Io`], [`ResumeError::NotOne`].
    pub fn remove(&self) -> Result<(), ResumeError> {
        let mut magic = [0; MAGIC.len()];
        match File::open(&self.path).and_then(|mut f| f.read_exact(&mut magic)) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Ok(()) if magic == MAGIC => {}
            _ => return Err(ResumeError::NotOne { path: self.path.clone() }),
        }
        sweep(&self.path);
        std::fs::remove_file(&self.path).map_err(|e| self.io("remove", e))
    }

    fn io(&self, action: &'static str, source: io::Error) -> ResumeError {
        ResumeError::Io { action, path: self.path.clone(), source }
    }

    fn damaged(&self, why: impl Into<String>) -> ResumeError {
        ResumeError::Damaged { path: self.path.clone(), why: why.into() }
    }

    /// The tiles of the run that is kept in the file, as its identity says it; none where there is no such
    /// file, or nothing to be had from it.
    pub(super) fn tiling(&self) -> Option<String> {
        // A FIFO would wait for its writer.
        let regular = self.path.metadata().is_ok_and(|m| m.is_file());
        let mut file = BufReader::new(File::open(regular.then_some(&self.path)?).ok()?);
        let identity = self.head(&mut file).ok()?.identity;
        identity.into_iter().find(|(name, _)| name == TILING).map(|(_, tiling)| tiling)
    }

    /// What comes before the latent.
    fn head(&self, file: &mut impl Read) -> Result<Head, ResumeError> {
        let mut head = vec![0; HEAD];
        let begins = file.read_exact(&mut head[..MAGIC.len()]);
        if begins.is_err() || head[..MAGIC.len()] != MAGIC {
            return Err(ResumeError::NotOne { path: self.path.clone() });
        }
        self.read(file, &mut head[MAGIC.len()..])?;
        let word = |head: &[u8], at: usize| {
            u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]])
        };
        let found = word(&head, 8);
        if found != VERSION {
            return Err(ResumeError::Version { path: self.path.clone(), found });
        }
        let (step, len) = (word(&head, 12) as usize, word(&head, 24) as usize);
        let elements = u64::from(word(&head, 16)) | u64::from(word(&head, 20)) << 32;
        if len > MAX_IDENTITY {
            return Err(self.damaged("its header makes no sense"));
        }
        head.resize(HEAD + len, 0);
        self.read(file, &mut head[HEAD..])?;
        let mut sum = [0; 4];
        self.read(file, &mut sum)?;
        if crc32c::crc32c(&head) != u32::from_le_bytes(sum) {
            return Err(self.damaged("its header does not have its checksum"));
        }
        let identity = serde_json::from_slice(&head[HEAD..])
            .map_err(|e| self.damaged(format!("its header is not understood ({e})")))?;
        Ok(Head { step, elements, identity, len: head.len() + sum.len() })
    }

    fn read(&self, file: &mut impl Read, bytes: &mut [u8]) -> Result<(), ResumeError> {
        file.read_exact(bytes).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => self.damaged("it was cut off"),
            _ => self.io("read", e),
        })
    }
}

/// Everything that determines a run's result, by name.
pub(super) type Identity = Vec<(String, String)>;

/// The name under which an identity has the tiles.
const TILING: &str = "tiling";

/// The tiles of `grid`, as an identity says it: with the picture's size, that determines them.
pub(super) fn tiling(grid: &Grid) -> String {
    let ([h, w], rows, cols) = (grid.tile(), grid.rows.starts().len(), grid.cols.starts().len());
    format!("{rows}x{cols} tiles of {h}x{w}")
}

/// What a file says before its latent.
struct Head {
    step: usize,
    elements: u64,
    identity: Identity,
    /// Bytes of all of it.
    len: usize,
}

/// FNV-1a, 64 bits: tells inputs apart, and is no defence against anyone.
struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn floats(values: &[f32]) -> u64 {
        let mut hash = Self::new();
        values.iter().for_each(|v| hash.add(&v.to_le_bytes()));
        hash.0
    }

    fn add(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.0 = (self.0 ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

impl Write for Fnv {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.add(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Plan<'_> {
    /// Bytes that [`Plan::resume`] takes beyond [`Plan::pipeline_bytes`]: the tile on its way to the file.
    #[must_use]
    pub fn resume_bytes(&self) -> usize {
        let [denoise, decode] = self.record_bytes(&self.grid);
        denoise.max(decode)
    }

    /// The same for either stage, where the tiles are those of `grid`.
    pub(super) fn record_bytes(&self, grid: &Grid) -> [usize; 2] {
        let [h, w] = grid.tile();
        let factor = self.latent.factor as usize;
        let values = [self.latent.channels as usize, factor * factor * RGB];
        values.map(|c| TILE_HEAD + h * w * c * size_of::<f32>())
    }

    /// What this run on `picture` is told by. Threads, instruction sets and ways of running are not part of
    /// it, because they do not change a bit.
    pub(super) fn identity(&self, picture: &Picture<'_>) -> Identity {
        let manifest = self.model.manifest();
        // The manifest lists the checksum of every weight.
        let mut model = Fnv::new();
        if serde_json::to_writer(&mut model, manifest).is_err() {
            model.add(self.model.name().as_bytes());
        }
        let pixels = match picture.pixels {
            Pixels::Rgb8(v) => {
                let mut hash = Fnv::new();
                hash.add(v);
                format!("8 bits, {:016x}", hash.0)
            }
            Pixels::Rgb16(v) => {
                let mut hash = Fnv::new();
                v.iter().for_each(|v| hash.add(&v.to_le_bytes()));
                format!("16 bits, {:016x}", hash.0)
            }
            Pixels::Unit(v) => format!("floats, {:016x}", Fnv::floats(v)),
        };
        let noise = match &self.options.noise {
            None => "drawn".to_owned(),
            Some(given) => {
                let steps = given.eta.as_ref().filter(|_| self.schedule.eta > 0.0);
                let steps = steps
                    .map_or("drawn".to_owned(), |t| format!("given {:016x}", Fnv::floats(&t.data)));
                format!("given {:016x}, of the steps {steps}", Fnv::floats(&given.initial.data))
            }
        };
        let name = &manifest.metadata.name;
        let of = |name: &str, value: String| (name.to_owned(), value);
        vec![
            of("program", format!("latile {}", env!("CARGO_PKG_VERSION"))),
            of("model", format!("{name} ({} bytes, {:016x})", self.model.file_len(), model.0)),
            of("picture", format!("{}x{} ({pixels})", picture.width, picture.height)),
            of("steps", self.schedule.steps.len().to_string()),
            of("eta", self.schedule.eta.to_string()),
            of("seed", self.options.seed.to_string()),
            of("spacing", format!("{:?}", self.schedule.spacing).to_lowercase()),
            of("consistency", self.consistency.to_string()),
            of("norms", format!("{:?}", self.options.norms).to_lowercase()),
            of("noise", noise),
            of(TILING, tiling(&self.grid)),
        ]
    }
}

/// What differs between a file's run and this one.
fn differences(there: &Identity, here: &Identity) -> Vec<String> {
    let find = |all: &Identity, name: &str| {
        all.iter().find(|(n, _)| n == name).map_or("nothing".to_owned(), |(_, v)| v.clone())
    };
    let names = here.iter().chain(there.iter().filter(|t| here.iter().all(|h| h.0 != t.0)));
    names
        .map(|(name, _)| (name, find(there, name), find(here, name)))
        .filter(|(_, there, here)| there != here)
        .map(|(name, there, here)| format!("its {name} is {there}, here it is {here}"))
        .collect()
}

/// What becomes of the tiles of the step under way.
enum Mode {
    /// They are in the file, as far as it goes; whole ones end at the offset.
    Recall(BufReader<File>, u64),
    /// They are added to the file.
    Append(File),
    /// The file's base is an earlier step's: they are not kept.
    Pass,
}

/// A run's file while it runs.
pub(super) struct Journal<'r> {
    resume: &'r Resume,
    /// The identity as it is stored.
    identity: Vec<u8>,
    /// The step of the base.
    step: usize,
    mode: Mode,
    recalled: usize,
    /// The next tile's bytes.
    bytes: Vec<u8>,
    /// When the disk may be waited for again.
    due: Instant,
}

impl<'r> Journal<'r> {
    /// Opens the file of this run, whose base then fills `latent`; or begins one with `latent` as its base.
    pub(super) fn open(
        resume: &'r Resume,
        identity: Identity,
        latent: &mut Field,
    ) -> Result<Self, PipelineError> {
        let mut journal = Self {
            resume,
            identity: serde_json::to_vec(&identity)
                .map_err(|e| resume.io("write", io::Error::other(e)))?,
            step: 0,
            mode: Mode::Pass,
            recalled: 0,
            bytes: Vec::new(),
            due: Instant::now() + resume.every,
        };
        sweep(&resume.path);
        match File::options().read(true).write(true).open(&resume.path) {
            Ok(file) => {
                journal.load(file, &identity, latent)?;
                log::info!(
                    "resume file {}: going on at step {}",
                    resume.path.display(),
                    journal.step + 1
                );
            }
            Err(e) if e.kind() == ErrorKind::NotFound => journal.save(0, latent)?,
            Err(e) => return Err(resume.io("read", e).into()),
        }
        Ok(journal)
    }

    /// The step of the base.
    pub(super) fn step(&self) -> usize {
        self.step
    }

    /// Tiles that came from the file.
    pub(super) fn recalled(&self) -> usize {
        self.recalled
    }

    fn load(
        &mut self,
        file: File,
        here: &Identity,
        latent: &mut Field,
    ) -> Result<(), PipelineError> {
        let resume = self.resume;
        let meta = file.metadata().map_err(|e| resume.io("read", e))?;
        if !meta.is_file() {
            return Err(resume.io("read", io::Error::other("it is not a regular file")).into());
        }
        let mut file = BufReader::new(file);
        let Head { step, elements, identity: there, len } = resume.head(&mut file)?;
        let differs = differences(&there, here);
        if !differs.is_empty() {
            return Err(ResumeError::Other { path: resume.path.clone(), differs }.into());
        }
        let steps = here.iter().find(|(name, _)| name == "steps").and_then(|(_, v)| v.parse().ok());
        if elements != latent.len() as u64 || steps.is_none_or(|steps: usize| step > steps) {
            return Err(resume.damaged("its header makes no sense").into());
        }
        let (mut crc, mut sum) = (0, [0; 4]);
        let mut chunk = [0u8; 1 << 12];
        for y in 0..latent.height() {
            latent.replace(y, |row| {
                for values in row.chunks_mut(chunk.len() / 4) {
                    let bytes = &mut chunk[..values.len() * 4];
                    resume.read(&mut file, bytes)?;
                    crc = crc32c::crc32c_append(crc, bytes);
                    for (v, b) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
                        *v = f32::from_le_bytes(*b);
                    }
                }
                Ok(())
            })?;
        }
        resume.read(&mut file, &mut sum)?;
        if crc != u32::from_le_bytes(sum) {
            return Err(resume.damaged("its latent does not have its checksum").into());
        }
        self.step = step;
        let base = (len + latent.len() * 4 + 4) as u64;
        self.mode = Mode::Recall(file, base);
        Ok(())
    }

    /// The run has come to the beginning of `step`, with `latent`: makes that the base, where it is not
    /// already, and the last one is long enough ago or it `must` be.
    pub(super) fn reach(
        &mut self,
        step: usize,
        latent: &mut Field,
        must: bool,
    ) -> Result<(), PipelineError> {
        if step == self.step {
            return Ok(());
        }
        if must || Instant::now() >= self.due {
            return self.save(step, latent);
        }
        self.mode = Mode::Pass;
        Ok(())
    }

    fn save(&mut self, step: usize, latent: &mut Field) -> Result<(), PipelineError> {
        let begun = Instant::now();
        // What was open is replaced.
        self.mode = Mode::Pass;
        let path = &self.resume.path;
        let mut output = Output::create(path, true).map_err(ResumeError::from)?;
        self.write_base(output.file(), step, latent)?;
        output.commit().map_err(ResumeError::from)?;
        let file = File::options().append(true).open(path);
        self.mode = Mode::Append(file.map_err(|e| self.resume.io("write", e))?);
        self.step = step;
        self.rest(begun);
        Ok(())
    }

    fn write_base(
        &self,
        file: &mut File,
        step: usize,
        latent: &mut Field,
    ) -> Result<(), PipelineError> {
        let failed = |e| self.resume.io("write", e);
        let mut file = BufWriter::new(file);
        let mut head = MAGIC.to_vec();
        head.extend(VERSION.to_le_bytes());
        head.extend((step as u32).to_le_bytes());
        head.extend((latent.len() as u64).to_le_bytes());
        head.extend((self.identity.len() as u32).to_le_bytes());
        head.extend(&self.identity);
        file.write_all(&head).map_err(failed)?;
        file.write_all(&crc32c::crc32c(&head).to_le_bytes()).map_err(failed)?;
        let mut crc = 0;
        for y in 0..latent.height() {
            for v in latent.row(y)? {
                let bytes = v.to_le_bytes();
                crc = crc32c::crc32c_append(crc, &bytes);
                file.write_all(&bytes).map_err(failed)?;
            }
        }
        file.write_all(&crc.to_le_bytes()).map_err(failed)?;
        Ok(file.flush().map_err(failed)?)
    }

    /// The disk has been waited for since `begun`.
    fn rest(&mut self, begun: Instant) {
        let rest = self.resume.every.max(begun.elapsed() * REST);
        self.due = Instant::now() + if self.resume.every.is_zero() { Duration::ZERO } else { rest };
    }

    /// Whether the file has `tile`, the next of the step under way; then its values are in `output`.
    pub(super) fn recall(&mut self, tile: usize, output: &mut [f32]) -> Result<bool, ResumeError> {
        let (mut file, end) = match std::mem::replace(&mut self.mode, Mode::Pass) {
            Mode::Recall(file, end) => (file, end),
            other => {
                self.mode = other;
                return Ok(false);
            }
        };
        let read = read_tile(&mut file, tile, output, &mut self.bytes);
        if let Some(len) = read.map_err(|e| self.resume.io("read", e))? {
            self.mode = Mode::Recall(file, end + len);
            self.recalled += 1;
            return Ok(true);
        }
        let file = self.cut(file.into_inner(), end).map_err(|e| self.resume.io("write", e))?;
        self.mode = Mode::Append(file);
        Ok(false)
    }

    /// Takes away what lies behind the last whole tile.
    fn cut(&self, mut file: File, end: u64) -> io::Result<File> {
        let len = file.metadata()?.len();
        if len > end {
            log::warn!(
                "resume file {}: the last {} bytes are not whole; that tile is computed again",
                self.resume.path.display(),
                len - end
            );
            file.set_len(end)?;
            file.sync_all()?;
        }
        file.seek(SeekFrom::Start(end))?;
        Ok(file)
    }

    /// Keeps `tile`, the next of the step under way, where its step is the base.
    pub(super) fn record(&mut self, tile: usize, output: &[f32]) -> Result<(), ResumeError> {
        let Mode::Append(file) = &mut self.mode else {
            return Ok(());
        };
        let bytes = &mut self.bytes;
        bytes.clear();
        bytes.reserve_exact(TILE_HEAD + size_of_val(output));
        bytes.extend((tile as u32).to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(output.iter().flat_map(|v| v.to_le_bytes()));
        let crc = tile_crc(&bytes[..4], &bytes[TILE_HEAD..]);
        bytes[4..TILE_HEAD].copy_from_slice(&crc.to_le_bytes());
        let written = file.write_all(bytes);
        let begun = Instant::now();
        let synced = written.and_then(|()| {
            if begun >= self.due { file.sync_data().map(|()| true) } else { Ok(false) }
        });
        if synced.map_err(|e| self.resume.io("write", e))? {
            self.rest(begun);
        }
        Ok(())
    }
}

fn tile_crc(number: &[u8], values: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(number), values)
}

/// Reads `tile`, which is the next in `file`, and returns its bytes; `None` where it is not there or not
/// whole.
fn read_tile(
    file: &mut impl Read,
    tile: usize,
    output: &mut [f32],
    bytes: &mut Vec<u8>,
) -> io::Result<Option<u64>> {
    bytes.clear();
    file.take(TILE_HEAD as u64).read_to_end(bytes)?;
    let Ok(head) = <[u8; TILE_HEAD]>::try_from(&bytes[..]) else {
        return Ok(None);
    };
    let ([number, sum], _) = head.as_chunks::<4>() else {
        return Ok(None);
    };
    if u32::from_le_bytes(*number) as usize != tile {
        return Ok(None);
    }
    let len = size_of_val(output);
    bytes.clear();
    bytes.reserve_exact(len);
    file.take(len as u64).read_to_end(bytes)?;
    if bytes.len() != len || tile_crc(number, bytes) != u32::from_le_bytes(*sum) {
        return Ok(None);
    }
    for (v, b) in output.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *v = f32::from_le_bytes(*b);
    }
    Ok(Some((TILE_HEAD + len) as u64))
}
