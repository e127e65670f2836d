//! The calibration table: what the int8 export needs to know about a float model's activations.
//!
//! Lives here: the types, reading and writing as JSON with one array or range a line (docs/calibration.md),
//! and the checks that a table is sound and is the table of a given model. Never here: how the numbers
//! were found.

mod text;

use latile_runtime::format::{Manifest, Role, Spacing};
use latile_runtime::graph::{Graph, Node, QuantRange, ValueKind};
use latile_runtime::persist::{Output, PersistError};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The version that is written. Version 1 has no [`GroupTable::winograd`], 2 no [`GroupTable::squares`]; they are read too.
pub const VERSION: u32 = 3;
/// The oldest version that is read.
const OLDEST: u32 = 1;
/// The largest table that is read.
const MAX_BYTES: u64 = 256 << 20;
/// The signal-to-noise ratio that stands for "no error at all".
pub const EXACT_DB: f32 = 150.0;

/// Activation ranges of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// [`VERSION`], or an older one that is read.
    pub version: u32,
    /// The model that was run.
    pub model: ModelId,
    /// The pictures it was run on, in order.
    pub data: Vec<Datum>,
    /// Pictures that could not be used.
    pub skipped: Vec<Skipped>,
    /// How it was run.
    pub sampling: Sampling,
    /// The networks.
    pub components: Vec<ComponentTable>,
}

/// Which model a table is of. Precision does not matter: f32 and f16 exports of one checkpoint agree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelId {
    /// The model's name.
    pub name: String,
    /// BLAKE3 of the checkpoint's weights, as in the model's metadata.
    pub source_hash: String,
}

/// A picture that was used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Datum {
    /// The file's name in its folder.
    pub name: String,
    /// BLAKE3 of the file, hexadecimal.
    pub blake3: String,
    /// Width and height of the picture.
    pub size: [u32; 2],
}

/// A picture that was not used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Skipped {
    /// The file's name in its folder.
    pub name: String,
    /// What is wrong with it.
    pub why: String,
}

/// How the model was run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    /// What the U-Net was told at each step, noisiest first; empty for a model without one.
    pub timesteps: Vec<u32>,
    /// How they were chosen.
    pub spacing: Option<Spacing>,
    /// DDIM's eta.
    pub eta: f32,
    /// The noise's seed; picture `i` has `seed + i`.
    pub seed: u64,
    /// Side of the latent.
    pub size: u32,
    /// The percentage of values that [`Method::Percentile`] keeps inside the range.
    pub percentile: f32,
}

/// A network's layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ComponentTable {
    /// Which network.
    pub role: Role,
    /// As `ComponentSpec::timestep_groups`: rising bounds; empty where there is one group for all.
    pub timestep_groups: Vec<u32>,
    /// Every convolution, and every linear layer over a map, in execution order.
    pub layers: Vec<LayerTable>,
}

/// What a layer reads: after normalisation, activation, concatenation and upsampling, before padding.
///
/// Statistics by channel are of the real input `x[c]`; ranges are of the scaled input
/// `x[c] · input_scale[c]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerTable {
    /// The name of the graph's node.
    pub name: String,
    /// Channels of the input.
    pub channels: u32,
    /// Channels of each map that a concatenation joined to the input; one number where none did.
    pub segments: Vec<u32>,
    /// Correlation of a pixel with its right neighbour in the same channel, over all channels, 0 to 1; 0
    /// where the map is one pixel wide.
    pub neighbour: f32,
    /// Largest |x|.
    pub channel_max: Vec<f32>,
    /// Mean of x.
    pub channel_mean: Vec<f32>,
    /// Mean of x².
    pub channel_ms: Vec<f32>,
    /// What inputs are multiplied by before they are quantized; none where all would be 1.
    pub input_scale: Option<Vec<f32>>,
    /// How much of what int8 adds to the network's result as noise goes where this layer alone is float,
    /// 0 to 1; none where that was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f32>,
    /// By group of timesteps.
    pub groups: Vec<GroupTable>,
}

/// The scaled input in one group of timesteps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupTable {
    /// Values seen.
    pub samples: u64,
    /// Least value.
    pub min: f32,
    /// Largest value.
    pub max: f32,
    /// Mean square.
    pub power: f32,
    /// A range by each method; none where every value was 0, which leaves nothing to make a range of.
    pub ranges: Option<Ranges>,
    /// What Winograd's F(2, 3) quantizes in place of the input; none where the layer is not a 3 × 3 convolution of stride
    /// 1, or where some of it was always 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub winograd: Option<WinogradRanges>,
    /// Likewise of F(2 × 2, 3 × 3).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub squares: Option<SquareRanges>,
}

/// Ranges of what Winograd's F(2 × 2, 3 × 3) makes of the scaled input: along columns, and then along rows, what
/// [`WinogradRanges`] names; number 3 i + j is kind i down and j across, in the order of its fields.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SquareRanges(pub [Ranges; 9]);

impl SquareRanges {
    /// The ranges of `method`.
    #[must_use]
    pub fn by(&self, method: Method) -> [Range; 9] {
        self.0.map(|r| r.by(method))
    }
}

/// Ranges of what Winograd's F(2, 3) along rows makes of the scaled input (Lavin & Gray 2016, section 4.1), the padded
/// row being x, and x\[2t\] the first pixel that output 2t sees.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WinogradRanges {
    /// Of x\[2t\] − x\[2t + 2\] and x\[2t + 1\] − x\[2t + 3\].
    pub apart: Ranges,
    /// Of x\[2t + 1\] + x\[2t + 2\].
    pub sum: Ranges,
    /// Of x\[2t + 2\] − x\[2t + 1\].
    pub difference: Ranges,
}

impl WinogradRanges {
    /// The ranges of `method`, in the order of the fields.
    #[must_use]
    pub const fn by(&self, method: Method) -> [Range; 3] {
        [self.apart.by(method), self.sum.by(method), self.difference.by(method)]
    }
}

/// A range by each method.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ranges {
    /// [`Method::MinMax`].
    pub minmax: Range,
    /// [`Method::Percentile`].
    pub percentile: Range,
    /// [`Method::Mse`].
    pub mse: Range,
    /// [`Method::Entropy`].
    pub entropy: Range,
}

/// A range and what it costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    /// What one step is worth, finite, positive and normal.
    pub scale: f32,
    /// The integer that stands for 0.
    pub zero_point: u8,
    /// Mean squared error of the scaled input, rounding and clipping together.
    pub error: f32,
}

impl Range {
    /// The range as the graph has it.
    #[must_use]
    pub const fn quant(&self) -> QuantRange {
        QuantRange { scale: self.scale, zero_point: self.zero_point }
    }

    /// Signal-to-noise ratio in dB of an input of mean square `power`; at most [`EXACT_DB`].
    #[must_use]
    pub fn sqnr_db(&self, power: f32) -> f32 {
        if self.error <= 0.0 {
            return EXACT_DB;
        }
        ((f64::from(power) / f64::from(self.error)).log10() * 10.0).min(f64::from(EXACT_DB)) as f32
    }
}

/// How a range is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// From the least value to the largest.
    MinMax,
    /// What holds [`Sampling::percentile`] of the values.
    Percentile,
    /// The range with the least mean squared error.
    #[default]
    Mse,
    /// The range whose quantized distribution has the least Kullback-Leibler divergence from the real one.
    Entropy,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::MinMax, Self::Percentile, Self::Mse, Self::Entropy];

    /// The name in tables and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::MinMax => "minmax",
            Self::Percentile => "percentile",
            Self::Mse => "mse",
            Self::Entropy => "entropy",
        }
    }
}

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl Ranges {
    /// The range of `method`.
    #[must_use]
    pub const fn by(&self, method: Method) -> Range {
        match method {
            Method::MinMax => self.minmax,
            Method::Percentile => self.percentile,
            Method::Mse => self.mse,
            Method::Entropy => self.entropy,
        }
    }
}

impl LayerTable {
    /// The layer's ranges by `method`, one for each group of timesteps; `None` where the input was 0
    /// throughout some group: such a layer stays in float.
    #[must_use]
    pub fn ranges(&self, method: Method) -> Option<Vec<Range>> {
        self.groups.iter().map(|g| g.ranges.map(|r| r.by(method))).collect()
    }

    /// What the layer needs to be computed by Winograd's F(2, 3), three ranges for each group of timesteps; `None`
    /// where some group lacks them.
    #[must_use]
    pub fn winograd(&self, method: Method) -> Option<Vec<[Range; 3]>> {
        self.groups.iter().map(|g| g.winograd.map(|w| w.by(method))).collect()
    }
}

impl LayerTable {
    /// As [`LayerTable::winograd`], for F(2 × 2, 3 × 3).
    #[must_use]
    pub fn squares(&self, method: Method) -> Option<Vec<[Range; 9]>> {
        self.groups.iter().map(|g| g.squares.map(|s| s.by(method))).collect()
    }
}

impl ComponentTable {
    /// Layer `name`.
    #[must_use]
    pub fn layer(&self, name: &str) -> Option<&LayerTable> {
        self.layers.iter().find(|l| l.name == name)
    }
}

/// Why a table is refused, or could not be written.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The file cannot be read.
    #[error("cannot read calibration table {}: {source}", path.display())]
    Io {
        /// The table.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is no table, or a damaged one.
    #[error("calibration table {table} is refused: {why}; calibrate the model again")]
    Refused {
        /// The table.
        table: String,
        /// What is wrong and where.
        why: String,
    },
    /// It is another model's.
    #[error(
        "the calibration table is of model {of} (weights {of_hash}), not of {wanted} (weights {wanted_hash}); calibrate this model, or name its own table"
    )]
    OtherModel {
        /// The model it is of.
        of: String,
        /// That model's source hash.
        of_hash: String,
        /// The model it was to be used for.
        wanted: String,
        /// That model's source hash.
        wanted_hash: String,
    },
    /// It lacks a layer of the model, or describes it as it is not.
    #[error("the calibration table does not fit {role}: {layer}: {why}; calibrate the model again")]
    Layer {
        /// The network.
        role: Role,
        /// The layer.
        layer: String,
        /// What does not fit.
        why: String,
    },
    /// It lacks a network of the model.
    #[error(
        "the calibration table has no {role}; calibrate the model with it, or export it without"
    )]
    NoComponent {
        /// The network.
        role: Role,
    },
    /// It cannot be written.
    #[error(transparent)]
    Persist(#[from] PersistError),
}

impl Table {
    /// Reads the table at `path` and checks that it is sound.
    ///
    /// # Errors
    /// [`TableError::Io`], [`TableError::Refused`].
    pub fn read(path: &Path) -> Result<Self, TableError> {
        let io = |source| TableError::Io { path: path.to_owned(), source };
        let meta = std::fs::metadata(path).map_err(io)?;
        if !meta.is_file() {
            return Err(io(std::io::Error::other("it is not a regular file")));
        }
        if meta.len() > MAX_BYTES {
            return Err(TableError::Refused {
                table: path.display().to_string(),
                why: format!(
                    "it has {} bytes, more than the {MAX_BYTES} that are read",
                    meta.len()
                ),
            });
        }
        Self::parse(&path.display().to_string(), &std::fs::read(path).map_err(io)?)
    }

    /// Reads a table from its JSON; `name` is for messages.
    ///
    /// # Errors
    /// [`TableError::Refused`].
    pub fn parse(name: &str, json: &[u8]) -> Result<Self, TableError> {
        let refuse = |why: String| TableError::Refused { table: name.to_owned(), why };
        let table: Self = serde_json::from_slice(json)
            .map_err(|e| refuse(format!("it is not understood: {e}")))?;
        table.check().map_err(refuse)?;
        Ok(table)
    }

    /// The table as JSON: an object's key, an array of numbers or a range takes a line.
    #[must_use]
    pub fn to_json(&self) -> String {
        text::write(self)
    }

    /// Writes the table to `path`, whole or not at all.
    ///
    /// # Errors
    /// [`TableError::Persist`].
    pub fn write(&self, path: &Path, overwrite: bool) -> Result<(), TableError> {
        let mut output = Output::create(path, overwrite)?;
        output
            .file()
            .write_all(self.to_json().as_bytes())
            .map_err(|source| PersistError::Io { path: path.to_owned(), source })?;
        Ok(output.commit()?)
    }

    /// Layers that have no range because their input was 0 throughout a group of timesteps: they stay in f16.
    pub fn silent(&self) -> impl Iterator<Item = (Role, &str)> {
        self.components.iter().flat_map(|c| {
            let silent = |l: &&LayerTable| l.groups.iter().any(|g| g.ranges.is_none());
            c.layers.iter().filter(silent).map(|l| (c.role, l.name.as_str()))
        })
    }

    /// The table of network `role`.
    ///
    /// # Errors
    /// [`TableError::NoComponent`].
    pub fn component(&self, role: Role) -> Result<&ComponentTable, TableError> {
        self.components.iter().find(|c| c.role == role).ok_or(TableError::NoComponent { role })
    }

    /// Checks that the table is of the model with `manifest`, whatever its precision, and has every layer
    /// of each of its networks.
    ///
    /// # Errors
    /// [`TableError::OtherModel`], [`TableError::NoComponent`], [`TableError::Layer`].
    pub fn fits(&self, manifest: &Manifest) -> Result<(), TableError> {
        self.is_of(&manifest.metadata.name, &manifest.metadata.source_hash)?;
        manifest.components.iter().try_for_each(|c| self.covers(c.role, &c.graph))
    }

    /// Checks that the table is of the model with these weights.
    ///
    /// # Errors
    /// [`TableError::OtherModel`].
    pub fn is_of(&self, name: &str, source_hash: &str) -> Result<(), TableError> {
        if self.model.source_hash == source_hash && !source_hash.is_empty() {
            return Ok(());
        }
        Err(TableError::OtherModel {
            of: self.model.name.clone(),
            of_hash: self.model.source_hash.clone(),
            wanted: name.to_owned(),
            wanted_hash: source_hash.to_owned(),
        })
    }

    /// Checks that the table has every layer of `graph` that int8 is possible for, as that graph has it.
    ///
    /// # Errors
    /// [`TableError::NoComponent`], [`TableError::Layer`].
    pub fn covers(&self, role: Role, graph: &Graph) -> Result<(), TableError> {
        let table = self.component(role)?;
        for (node, channels) in int8_layers(graph) {
            let name = node.name.as_str();
            let wrong = |why: String| Err(TableError::Layer { role, layer: name.to_owned(), why });
            match table.layer(name) {
                None => return wrong("the table does not have it".to_owned()),
                Some(l) if l.channels != channels => {
                    return wrong(format!(
                        "it has {channels} input channels, the table says {}",
                        l.channels
                    ));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// What the types cannot say.
    fn check(&self) -> Result<(), String> {
        if !(OLDEST..=VERSION).contains(&self.version) {
            return Err(format!(
                "it has version {}, this program reads versions {OLDEST} to {VERSION}",
                self.version
            ));
        }
        if self.model.source_hash.is_empty() {
            return Err("it does not say which model's weights it is of".to_owned());
        }
        if self.data.is_empty() {
            return Err("it names no data".to_owned());
        }
        if self.components.is_empty() {
            return Err("it has no component".to_owned());
        }
        for (i, c) in self.components.iter().enumerate() {
            if self.components[..i].iter().any(|o| o.role == c.role) {
                return Err(format!("it has {} twice", c.role));
            }
            if !c.timestep_groups.is_sorted_by(|a, b| a < b)
                || c.timestep_groups.first() == Some(&0)
            {
                return Err(format!(
                    "the timestep groups of {} are {:?}, which do not rise from above 0",
                    c.role, c.timestep_groups
                ));
            }
            let mut names: Vec<&str> = c.layers.iter().map(|l| l.name.as_str()).collect();
            names.sort_unstable();
            if let Some(twice) = names.windows(2).find(|w| w[0] == w[1]) {
                return Err(format!("it has layer {} of {} twice", twice[0], c.role));
            }
            for l in &c.layers {
                l.check(c.timestep_groups.len().max(1))
                    .map_err(|why| format!("layer {} of {}: {why}", l.name, c.role))?;
            }
        }
        Ok(())
    }
}

impl LayerTable {
    fn check(&self, groups: usize) -> Result<(), String> {
        if self.loss.is_some_and(|l| !(0.0..=1.0).contains(&l)) {
            return Err("its loss is not from 0 to 1".to_owned());
        }
        let channels = self.channels as usize;
        if channels == 0 {
            return Err("it has no channels".to_owned());
        }
        let sum = self.segments.iter().try_fold(0u32, |sum, &s| sum.checked_add(s));
        if sum != Some(self.channels) {
            return Err(format!(
                "its segments {:?} do not add up to {channels} channels",
                self.segments
            ));
        }
        let scale = self.input_scale.as_deref();
        for (what, values) in [
            ("channel_max", Some(&self.channel_max[..])),
            ("channel_mean", Some(&self.channel_mean[..])),
            ("channel_ms", Some(&self.channel_ms[..])),
            ("input_scale", scale),
        ] {
            let Some(values) = values else { continue };
            if values.len() != channels {
                return Err(format!("{what} has {} numbers for {channels} channels", values.len()));
            }
            if let Some(i) = values.iter().position(|v| !v.is_finite()) {
                return Err(format!("{what} of channel {i} is not finite"));
            }
        }
        if let Some(i) = scale.and_then(|s| s.iter().position(|v| !(v.is_normal() && *v > 0.0))) {
            return Err(format!("input_scale of channel {i} is not positive"));
        }
        if !(0.0..=1.0).contains(&self.neighbour) {
            return Err(format!("its neighbour correlation {} is not 0 to 1", self.neighbour));
        }
        if self.groups.len() != groups {
            return Err(format!("it has {} groups, the component {groups}", self.groups.len()));
        }
        self.groups
            .iter()
            .enumerate()
            .try_for_each(|(i, g)| g.check().map_err(|why| format!("group {i}: {why}")))
    }
}

impl GroupTable {
    fn check(&self) -> Result<(), String> {
        if self.samples == 0 {
            return Err("it was made of no samples".to_owned());
        }
        let extent = self.min.is_finite() && self.max.is_finite() && self.min <= self.max;
        if !extent || !self.power.is_finite() || self.power < 0.0 {
            return Err(format!(
                "its values lie from {} to {} with mean square {}, which cannot be",
                self.min, self.max, self.power
            ));
        }
        self.ranges.map_or(Ok(()), |r| r.check("its"))?;
        if let Some(w) = self.winograd {
            w.apart.check("of pixels two apart, its")?;
            w.sum.check("of sums, its")?;
            w.difference.check("of differences, its")?;
        }
        self.squares.map_or(Ok(()), |s| s.0.iter().try_for_each(|r| r.check("of squares, its")))
    }
}

impl Ranges {
    fn check(&self, whose: &str) -> Result<(), String> {
        for method in Method::ALL {
            let r = self.by(method);
            let sound = r.scale.is_normal() && r.scale > 0.0 && (0.0..=f32::MAX).contains(&r.error);
            if !sound {
                return Err(format!(
                    "{whose} {method} range has scale {} and error {}, which cannot be",
                    r.scale, r.error
                ));
            }
        }
        Ok(())
    }
}

/// The nodes of `graph` that int8 is possible for, with their input channels, in execution order:
/// convolutions, and linear layers over a map, that an output depends on.
pub fn int8_layers(graph: &Graph) -> impl Iterator<Item = (&Node, u32)> {
    let mut needed = vec![false; graph.values.len()];
    for port in &graph.outputs {
        needed[port.value.index()] = true;
    }
    for node in graph.nodes.iter().rev() {
        if needed[node.output.index()] {
            node.inputs.iter().for_each(|v| needed[v.index()] = true);
        }
    }
    graph.nodes.iter().filter(move |n| needed[n.output.index()]).filter_map(|node| {
        match (node.op.matrix(), graph.kind(node.inputs[0])) {
            (Some(_), ValueKind::Map(c)) => Some((node, c)),
            _ => None,
        }
    })
}
