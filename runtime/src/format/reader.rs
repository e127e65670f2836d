//! Opens a model: the outline and manifest at once, each component's weights when they are asked for.

use super::header::{Header, HeaderError, PAGE};
use super::map::Bytes;
use super::{ComponentSpec, Manifest, Role};
use crate::graph::{GraphError, ValueKind, WeightId};
use crate::tensor::ALIGN;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Why a model is refused.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The file could not be opened or mapped.
    #[error("cannot open model {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
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

/// An opened model. Its outline, manifest and graphs have been checked; weights are checked when a
/// component is [loaded](Model::load).
#[derive(Debug)]
pub struct Model {
    name: String,
    bytes: Bytes,
    manifest: Manifest,
    /// Length of the weights, which begin at [`PAGE`].
    weights_len: usize,
    verified: Vec<OnceLock<()>>,
}

/// A component whose weights have been checked.
#[derive(Clone, Copy, Debug)]
pub struct LoadedComponent<'m> {
    spec: &'m ComponentSpec,
    weights: &'m [u8],
}

impl<'m> LoadedComponent<'m> {
    /// Its description.
    #[must_use]
    pub fn spec(&self) -> &'m ComponentSpec {
        self.spec
    }

    /// The bytes of a weight as stored, 64-byte aligned, without padding behind it.
    #[must_use]
    pub fn weight(&self, id: WeightId) -> &'m [u8] {
        let start = self.spec.places[id.index()].offset as usize;
        // Invariant: the reader has checked that `stored_bytes` exists and lies within the extent.
        let len = self.spec.graph.weight(id).stored_bytes().unwrap_or(0);
        &self.weights[start..start + len]
    }
}

impl Model {
    /// Opens and maps the model at `path`.
    ///
    /// # Errors
    /// [`ModelError`], the first thing that is wrong.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let io = |source| ModelError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let meta = file.metadata().map_err(io)?;
        if !meta.is_file() {
            return Err(io(std::io::Error::other("it is not a regular file")));
        }
        let name = path.display().to_string();
        if meta.len() == 0 {
            let source = HeaderError::TooShort { len: 0 };
            return Err(ModelError::Header { model: name, source });
        }
        Self::from_bytes(name, Bytes::map(&file).map_err(io)?)
    }

    /// Opens a model that is part of the program. `bytes` must be 64-byte aligned.
    ///
    /// # Errors
    /// [`ModelError`], the first thing that is wrong.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Self, ModelError> {
        Self::from_bytes(name.to_owned(), Bytes::Static(bytes))
    }

    fn from_bytes(name: String, bytes: Bytes) -> Result<Self, ModelError> {
        let file = bytes.as_slice();
        let refuse = |why: String| ModelError::Manifest { model: name.clone(), why };
        let header = Header::parse(file)
            .map_err(|source| ModelError::Header { model: name.clone(), source })?;
        if !(file.as_ptr() as usize).is_multiple_of(ALIGN) {
            return Err(refuse("lies at an unaligned address".to_owned()));
        }
        let text = &file[header.manifest_offset() as usize..];
        let found = crc32c::crc32c(text);
        if found != header.manifest_crc {
            return Err(refuse(format!(
                "is damaged (checksum {found:08x}, expected {:08x}); copy the file again",
                header.manifest_crc
            )));
        }
        let manifest: Manifest = serde_json::from_slice(text)
            .map_err(|e| refuse(format!("is not understood: {e}; export the model again")))?;
        check(&manifest, header.weights_len, &name)?;
        let verified = manifest.components.iter().map(|_| OnceLock::new()).collect();
        let weights_len = header.weights_len as usize;
        Ok(Self { name, bytes, manifest, weights_len, verified })
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
        self.bytes.as_slice().len()
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

    /// Component `role`, every byte of its weights compared with its checksum (the first time only).
    ///
    /// # Errors
    /// [`ModelError::NoComponent`], [`ModelError::Damaged`].
    pub fn load(&self, role: Role) -> Result<LoadedComponent<'_>, ModelError> {
        let index = self.index(role)?;
        let spec = &self.manifest.components[index];
        let weights = &self.bytes.as_slice()[PAGE as usize..][..self.weights_len];
        if self.verified[index].get().is_none() {
            for (weight, place) in spec.graph.weights.iter().zip(&spec.places) {
                let start = place.offset as usize;
                let found = crc32c::crc32c(&weights[start..start + place.extent as usize]);
                if found != place.crc32c {
                    return Err(ModelError::Damaged {
                        model: self.name.clone(),
                        role,
                        weight: weight.name.clone(),
                        expected: place.crc32c,
                        found,
                    });
                }
            }
            let _ = self.verified[index].set(());
        }
        Ok(LoadedComponent { spec, weights })
    }

    /// Whether the model is part of the program: then weights that have been used stay in memory until the
    /// system takes them back, whatever becomes of their sessions.
    #[must_use]
    pub fn is_part_of_program(&self) -> bool {
        matches!(self.bytes, Bytes::Static(_))
    }

    /// Checks every component's weights.
    ///
    /// # Errors
    /// [`ModelError::Damaged`].
    pub fn verify(&self) -> Result<(), ModelError> {
        self.manifest.components.iter().try_for_each(|c| self.load(c.role).map(drop))
    }
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
