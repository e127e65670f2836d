//! Opens a model: the outline and manifest at once, each component's weights when they are asked for.

use super::header::{Header, HeaderError, PAGE};
use super::map::{BLOCK, Bytes, blocks, zeros};
use super::{ComponentSpec, Manifest, Role};
use crate::graph::{GraphError, ValueKind, WeightId, WeightSpec};
use crate::tensor::ALIGN;
use memmap2::{Mmap, MmapMut};
use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

/// Why a model is refused.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The file could not be opened, mapped or read.
    #[error("cannot read model {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is no memory to read weights into.
    #[error(
        "could not reserve {bytes} bytes for weights of model {model}: {source}; free memory, or let the model be mapped"
    )]
    Memory {
        /// The model.
        model: String,
        /// Bytes asked for.
        bytes: usize,
        /// What the system said.
        source: io::Error,
    },
    /// The outline is wrong.
    #[error("model {model} is refused: {source}")]
    Header {
        /// The model.
        model: String,
        /// What is wrong.
        source: HeaderError,
    },
    /// The manifest is damaged or not understood.
    #[error("model {model} is refused: its manifest {why}")]
    Manifest {
        /// The model.
        model: String,
        /// What is wrong.
        why: String,
    },
    /// A component's graph is not sound.
    #[error("model {model} is refused: {role}: {source}")]
    Graph {
        /// The model.
        model: String,
        /// The component.
        role: Role,
        /// What is wrong.
        source: GraphError,
    },
    /// A weight's bytes do not have their checksum.
    #[error(
        "model {model} is damaged: {role} weight {weight} has checksum {found:08x}, expected {expected:08x}; copy or export the file again"
    )]
    Damaged {
        /// The model.
        model: String,
        /// The component.
        role: Role,
        /// The weight's name.
        weight: String,
        /// Checksum in the manifest.
        expected: u32,
        /// Checksum of the bytes.
        found: u32,
    },
    /// The model lacks a component.
    #[error("model {model} has no {role}; it has: {present}")]
    NoComponent {
        /// The model.
        model: String,
        /// What was asked for.
        role: Role,
        /// What there is.
        present: String,
    },
}

/// How a model's file is held while it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Held {
    /// Mapped: weights are used where they lie, and the system can take their memory back at any time.
    #[default]
    Mapped,
    /// Open, for storage that should not be mapped: a component's weights are read into memory when it is
    /// [loaded](Model::load), and freed with the last [`LoadedComponent`] of it.
    Read,
}

/// An opened model. Its outline, manifest and graphs have been checked; weights are checked when a
/// component is [loaded](Model::load).
#[derive(Debug)]
pub struct Model {
    name: String,
    bytes: Bytes,
    manifest: Manifest,
    state: Vec<State>,
}

/// What is known of a component's weights.
#[derive(Debug, Default)]
struct State {
    /// Set once they have been checked where they lie.
    verified: OnceLock<()>,
    /// Those that were read, while somebody uses them.
    read: Mutex<Weak<Mmap>>,
}

/// A component whose weights have been checked, and what holds them in memory.
#[derive(Clone, Debug)]
pub struct LoadedComponent<'m> {
    spec: &'m ComponentSpec,
    weights: Weights<'m>,
}

/// A component's weights.
#[derive(Clone, Debug)]
enum Weights<'m> {
    /// Part of the model's bytes.
    InPlace { part: &'m [u8], bytes: &'m Bytes, at: usize },
    /// Its own.
    Read(Arc<Mmap>),
}

impl<'m> LoadedComponent<'m> {
    /// Its description.
    #[must_use]
    pub const fn spec(&self) -> &'m ComponentSpec {
        self.spec
    }

    fn weights(&self) -> &[u8] {
        match &self.weights {
            Weights::InPlace { part, .. } => part,
            Weights::Read(own) => own,
        }
    }

    /// The bytes of a weight as stored, 64-byte aligned, without padding behind it.
    #[must_use]
    pub fn weight(&self, id: WeightId) -> &[u8] {
        let start = (self.spec.places[id.index()].offset - self.spec.extent().start) as usize;
        // Invariant: the reader has checked that `stored_bytes` exists and lies within the extent.
        let len = self.spec.graph.weight(id).stored_bytes().unwrap_or(0);
        &self.weights()[start..start + len]
    }

    /// Bytes of all its weights, their padding included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.spec.extent_len()
    }

    /// Where `part` of a weight, as [`LoadedComponent::weight`] gives it, lies among the component's
    /// [bytes](LoadedComponent::bytes); `None` where it is no part of one.
    #[must_use]
    pub fn place_of(&self, part: &[u8]) -> Option<Range<usize>> {
        let start = (part.as_ptr() as usize).checked_sub(self.weights().as_ptr() as usize)?;
        let end = start.checked_add(part.len())?;
        (end <= self.bytes()).then_some(start..end)
    }

    /// Asks the system to read a range of the component's bytes ahead of use, without waiting for it; the
    /// resident set does not grow. Nothing where the model is not a mapped file.
    pub fn prefetch(&self, range: Range<usize>) {
        if let Weights::InPlace { bytes, at, .. } = self.weights {
            bytes.prefetch(at + range.start..at + range.end);
        }
    }

    /// Gives the memory of a range of the component's bytes back to the system, [outwards to whole
    /// blocks](LoadedComponent::block_of); they are read again when they are next used. Nothing where
    /// [`LoadedComponent::can_release`] says no.
    pub fn release(&self, range: Range<usize>) {
        if let Weights::InPlace { bytes, at, .. } = self.weights {
            bytes.release(at + range.start..at + range.end);
        }
    }

    /// What may be resident once a range of the component's bytes has been touched, as a range of them:
    /// systems map more than the page that is asked for, and give it back as they mapped it.
    #[must_use]
    pub fn block_of(&self, range: Range<usize>) -> Range<usize> {
        let Weights::InPlace { at, .. } = self.weights else {
            return 0..self.bytes();
        };
        let outer = blocks(at + range.start..at + range.end, at + self.bytes());
        outer.start.saturating_sub(at)..outer.end - at
    }

    /// Whether memory can be given back while the component is loaded: where the model is a mapped file
    /// and the system is Linux or Android. Weights that were read stay until the component is dropped;
    /// those that are part of the program are the system's to keep or drop.
    #[must_use]
    pub const fn can_release(&self) -> bool {
        match self.weights {
            Weights::InPlace { bytes, .. } => bytes.can_release(),
            Weights::Read(_) => false,
        }
    }
}

impl Model {
    /// Opens and maps the model at `path`.
    ///
    /// # Errors
    /// [`ModelError`], the first thing that is wrong.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        Self::open_held(path, Held::Mapped)
    }

    /// Opens the model at `path`.
    ///
    /// # Errors
    /// [`ModelError`], the first thing that is wrong.
    pub fn open_held(path: &Path, held: Held) -> Result<Self, ModelError> {
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let meta = file.metadata().map_err(io)?;
        if !meta.is_file() {
            return Err(io(io::Error::other("it is not a regular file")));
        }
        let name = path.display().to_string();
        if meta.len() == 0 {
            let source = HeaderError::TooShort { len: 0 };
            return Err(ModelError::Header { model: name, source });
        }
        let bytes = match held {
            Held::Mapped => Bytes::map(&file).map_err(io)?,
            Held::Read => Bytes::File(Mutex::new(file), meta.len()),
        };
        Self::from_bytes(name, bytes)
    }

    /// Opens a model that is part of the program. `bytes` must be 64-byte aligned.
    ///
    /// # Errors
    /// [`ModelError`], the first thing that is wrong.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Self, ModelError> {
        Self::from_bytes(name.to_owned(), Bytes::Static(bytes))
    }

    fn from_bytes(name: String, bytes: Bytes) -> Result<Self, ModelError> {
        let refuse = |why: String| ModelError::Manifest { model: name.clone(), why };
        let start = piece(&bytes, &name, 0, bytes.len().min(PAGE))?;
        let header = Header::parse(&start, bytes.len())
            .map_err(|source| ModelError::Header { model: name.clone(), source })?;
        if bytes.as_slice().is_some_and(|b| !(b.as_ptr() as usize).is_multiple_of(ALIGN)) {
            return Err(refuse("lies at an unaligned address".to_owned()));
        }
        let text = piece(&bytes, &name, header.manifest_offset(), header.manifest_len)?;
        let found = crc32c::crc32c(&text);
        if found != header.manifest_crc {
            return Err(refuse(format!(
                "is damaged (checksum {found:08x}, expected {:08x}); copy the file again",
                header.manifest_crc
            )));
        }
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|e| refuse(format!("is not understood: {e}; export the model again")))?;
        if manifest.version() > header.version {
            return Err(refuse(format!(
                "has operators of format version {}, the file says version {}; export the model again",
                manifest.version(),
                header.version
            )));
        }
        check(&manifest, header.weights_len, &name)?;
        drop((start, text));
        bytes.release(0..bytes.len() as usize);
        let state = manifest.components.iter().map(|_| State::default()).collect();
        Ok(Self { name, bytes, manifest, state })
    }

    /// The path or name it was opened by.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its description.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Length of the file in bytes.
    #[must_use]
    pub fn file_len(&self) -> usize {
        self.bytes.len() as usize
    }

    /// The description of component `role`; weights are not touched.
    ///
    /// # Errors
    /// [`ModelError::NoComponent`].
    pub fn component(&self, role: Role) -> Result<&ComponentSpec, ModelError> {
        self.index(role).map(|i| &self.manifest.components[i])
    }

    fn index(&self, role: Role) -> Result<usize, ModelError> {
        self.manifest.components.iter().position(|c| c.role == role).ok_or_else(|| {
            let present: Vec<_> = self.manifest.components.iter().map(|c| c.role.name()).collect();
            ModelError::NoComponent { model: self.name.clone(), role, present: present.join(", ") }
        })
    }

    /// Component `role`, every byte of its weights compared with its checksum: the first time where they
    /// lie in memory, each time where they are [read](Held::Read). Checked weights are not left resident.
    ///
    /// # Errors
    /// [`ModelError::NoComponent`], [`ModelError::Damaged`]; where weights are read, also
    /// [`ModelError::Io`] and [`ModelError::Memory`].
    pub fn load(&self, role: Role) -> Result<LoadedComponent<'_>, ModelError> {
        let index = self.index(role)?;
        let (spec, state) = (&self.manifest.components[index], &self.state[index]);
        let Some(weights) = self.in_place(spec) else {
            let weights = Weights::Read(self.read(spec, &state.read)?);
            return Ok(LoadedComponent { spec, weights });
        };
        if state.verified.get().is_none() {
            self.verify_in_place(spec)?;
            let _ = state.verified.set(());
        }
        Ok(LoadedComponent { spec, weights })
    }

    /// Whether the model is part of the program: then weights that have been used stay in memory until the
    /// system takes them back, whatever becomes of their sessions.
    #[must_use]
    pub fn is_part_of_program(&self) -> bool {
        matches!(self.bytes, Bytes::Static(_))
    }

    /// Component `role` for pricing, which looks at where weights lie and never at what they are: they
    /// are not checked and, where they would have to be [read](Held::Read), zeros that take no memory.
    ///
    /// # Errors
    /// [`ModelError::NoComponent`], [`ModelError::Memory`].
    pub fn unchecked(&self, role: Role) -> Result<LoadedComponent<'_>, ModelError> {
        let spec = self.component(role)?;
        let weights = match self.in_place(spec) {
            Some(weights) => weights,
            None => {
                let memory = |e| self.no_memory(spec, e);
                let zeros = zeros(spec.extent_len()).and_then(MmapMut::make_read_only);
                Weights::Read(Arc::new(zeros.map_err(memory)?))
            }
        };
        Ok(LoadedComponent { spec, weights })
    }

    fn in_place<'m>(&'m self, spec: &'m ComponentSpec) -> Option<Weights<'m>> {
        let at = (PAGE + spec.extent().start) as usize;
        let part = &self.bytes.as_slice()?[at..at + spec.extent_len()];
        Some(Weights::InPlace { part, bytes: &self.bytes, at })
    }

    fn verify_in_place(&self, spec: &ComponentSpec) -> Result<(), ModelError> {
        // Invariant: only called where the bytes are in memory.
        let all = self.bytes.as_slice().unwrap_or_default();
        let all_end = (PAGE + spec.extent().end) as usize;
        for (weight, place) in spec.graph.weights.iter().zip(&spec.places) {
            let mut at = (PAGE + place.offset) as usize;
            let end = at + place.extent as usize;
            let mut found = 0;
            while at < end {
                let next = (at + 1).next_multiple_of(CHUNK).min(end);
                found = crc32c::crc32c_append(found, &all[at..next]);
                // A component that is checked whole must not be resident whole: at most one block of it,
                // while the next one is on its way.
                if next.is_multiple_of(BLOCK) {
                    self.bytes.release(at..next);
                    self.bytes.prefetch(next..(next + BLOCK).min(all_end));
                }
                at = next;
            }
            self.compare(spec, weight, place.crc32c, found)?;
        }
        self.bytes.release((PAGE + spec.extent().start) as usize..all_end);
        Ok(())
    }

    /// Reads a component's weights, or shares those that somebody else uses.
    fn read(
        &self,
        spec: &ComponentSpec,
        known: &Mutex<Weak<Mmap>>,
    ) -> Result<Arc<Mmap>, ModelError> {
        // A reader that panicked has left what was there before.
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(weights) = known.upgrade() {
            return Ok(weights);
        }
        let mut own = zeros(spec.extent_len()).map_err(|e| self.no_memory(spec, e))?;
        let first = spec.extent().start;
        for (weight, place) in spec.graph.weights.iter().zip(&spec.places) {
            let start = (place.offset - first) as usize;
            let part = &mut own[start..start + place.extent as usize];
            let mut found = 0;
            for (i, chunk) in part.chunks_mut(CHUNK).enumerate() {
                let at = PAGE + place.offset + (i * CHUNK) as u64;
                self.bytes.read(at, chunk).map_err(|e| cannot_read(&self.name, e))?;
                found = crc32c::crc32c_append(found, chunk);
            }
            self.compare(spec, weight, place.crc32c, found)?;
        }
        let own = Arc::new(own.make_read_only().map_err(|e| self.no_memory(spec, e))?);
        *known = Arc::downgrade(&own);
        Ok(own)
    }

    fn compare(
        &self,
        spec: &ComponentSpec,
        weight: &WeightSpec,
        expected: u32,
        found: u32,
    ) -> Result<(), ModelError> {
        if found == expected {
            return Ok(());
        }
        let (model, weight) = (self.name.clone(), weight.name.clone());
        Err(ModelError::Damaged { model, role: spec.role, weight, expected, found })
    }

    fn no_memory(&self, spec: &ComponentSpec, source: io::Error) -> ModelError {
        ModelError::Memory { model: self.name.clone(), bytes: spec.extent_len(), source }
    }

    /// Checks every component's weights.
    ///
    /// # Errors
    /// [`ModelError::Damaged`].
    pub fn verify(&self) -> Result<(), ModelError> {
        self.manifest.components.iter().try_for_each(|c| self.load(c.role).map(drop))
    }
}

/// How much is read and checked at a time: what the processor's caches hold, and a part of a [`BLOCK`].
const CHUNK: usize = 256 << 10;

fn cannot_read(name: &str, source: io::Error) -> ModelError {
    ModelError::Io { path: PathBuf::from(name), source }
}

/// `len` bytes from `at` on, in place or read.
fn piece<'b>(bytes: &'b Bytes, name: &str, at: u64, len: u64) -> Result<Cow<'b, [u8]>, ModelError> {
    if let Some(all) = bytes.as_slice() {
        return Ok(Cow::Borrowed(&all[at as usize..(at + len) as usize]));
    }
    let mut own = vec![0; len as usize];
    bytes.read(at, &mut own).map_err(|e| cannot_read(name, e))?;
    Ok(Cow::Owned(own))
}

/// Checks what the types of the manifest cannot say.
fn check(manifest: &Manifest, weights_len: u64, name: &str) -> Result<(), ModelError> {
    let refuse = |why: String| Err(ModelError::Manifest { model: name.to_owned(), why });
    let mut next = 0u64;
    let mut seen: Vec<Role> = Vec::new();
    if manifest.components.is_empty() {
        return refuse("lists no component".to_owned());
    }
    for c in &manifest.components {
        let role = c.role;
        if seen.contains(&role) {
            return refuse(format!("lists {role} twice"));
        }
        seen.push(role);
        c.graph.validate().map_err(|source| ModelError::Graph {
            model: name.to_owned(),
            role,
            source,
        })?;
        if c.multiple == 0 || c.multiple > 4096 {
            return refuse(format!("says {role} needs multiples of {}", c.multiple));
        }
        if c.places.len() != c.graph.weights.len() {
            return refuse(format!(
                "places {} weights of {role}, its graph has {}",
                c.places.len(),
                c.graph.weights.len()
            ));
        }
        if !c.timestep_groups.is_sorted_by(|a, b| a < b)
            || c.timestep_groups.first() == Some(&0)
            || (c.timestep.is_none() && !c.timestep_groups.is_empty())
        {
            return refuse(format!(
                "lists timestep groups {:?} for {role}; bounds must rise from above 0, and only a component with a timestep has any",
                c.timestep_groups
            ));
        }
        let groups = c.timestep_groups.len().max(1);
        if let Some(layer) = c.graph.layer_without_groups(groups) {
            return refuse(format!(
                "gives layer {layer} of {role} another number of activation ranges than its {groups} timestep groups"
            ));
        }
        for (w, p) in c.graph.weights.iter().zip(&c.places) {
            let bytes = w.stored_bytes().unwrap_or(usize::MAX) as u64;
            let fits = bytes <= p.extent
                && p.offset.checked_add(p.extent).is_some_and(|e| e <= weights_len);
            let aligned = p.offset.is_multiple_of(64) && p.extent.is_multiple_of(64);
            let paged = bytes < PAGE || p.offset.is_multiple_of(PAGE);
            if p.offset != next || !fits || !aligned || !paged || p.extent - bytes > 2 * PAGE {
                return refuse(format!("places weight {} of {role} wrongly", w.name));
            }
            next = p.offset + p.extent;
        }
        if let Some(t) = c.timestep {
            let port = c.graph.inputs.iter().find(|p| p.name == "time_proj");
            let kind = port.map(|p| c.graph.kind(p.value));
            if t.dim % 2 != 0 || kind != Some(ValueKind::Vector(t.dim)) || !t.freq_shift.is_finite()
            {
                return refuse(format!("describes a timestep projection that {role} cannot take"));
            }
        }
    }
    if next != weights_len {
        return refuse(format!("accounts for {next} of {weights_len} bytes of weights"));
    }
    check_numbers(manifest).map_or(Ok(()), |why| refuse(why.to_owned()))
}

/// Numbers that would make sampling meaningless.
fn check_numbers(m: &Manifest) -> Option<&'static str> {
    if let Some(l) = m.latent
        && (l.channels == 0
            || l.channels > 4096
            || !l.factor.is_power_of_two()
            || l.factor > 64
            || !l.scale.is_finite()
            || l.scale == 0.0
            || !l.shift.is_finite())
    {
        return Some("describes an impossible latent space");
    }
    if let Some(s) = m.scheduler {
        let (super::BetaSchedule::Linear { start, end }
        | super::BetaSchedule::ScaledLinear { start, end }) = s.betas;
        let sane = |b: f64| b > 0.0 && b < 1.0;
        if s.train_timesteps == 0
            || s.train_timesteps > 1_000_000
            || !sane(start)
            || !sane(end)
            || s.clip_sample.is_some_and(|c| !c.is_finite() || c <= 0.0)
        {
            return Some("describes an impossible scheduler");
        }
    }
    let d = m.defaults;
    let unit = 0.0..=1.0;
    if d.steps == 0
        || d.steps > 1_000_000
        || !unit.contains(&d.eta)
        || !unit.contains(&d.consistency)
    {
        return Some("has impossible sampling defaults");
    }
    if m.task == super::Task::SuperResolution && (m.latent.is_none() || m.scheduler.is_none()) {
        return Some("lacks a latent space or a scheduler, which super-resolution needs");
    }
    None
}
