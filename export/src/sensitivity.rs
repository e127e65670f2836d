//! What each int8 layer adds to its network's result, measured: the network is run once more with that layer alone
//! float.
//!
//! Lives here: the trial models, made of a float and an int8 model's parts in a scratch folder, and the [`loss`]
//! that they show. Never here: what inputs the networks are run on (`latile_calibration::trajectory` records
//! those), kernels, or what becomes of a layer ([`crate::quantize`]).
//!
//! Why not the layer's own signal-to-noise ratio: what a layer's noise does to the result depends on all that comes
//! after it. The last block of a U-Net may make next to all of the result's noise with layers that look sound.
//!
//! [`loss`]: latile_calibration::LayerTable::loss

use crate::ExportError;
use latile_calibration::trajectory::Recorded;
use latile_calibration::{LayerTable, Table};
use latile_runtime::backend::{Backend, Room, Session};
use latile_runtime::format::{LoadedComponent, Manifest, Model, Role, Task, Writer};
use latile_runtime::graph::{Graph, WeightId, WeightSpec};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufWriter;
use std::ops::ControlFlow;
use std::path::Path;

/// Runs of a network that its layers are tried on, at most: spread over what was recorded.
const RUNS: usize = 3;

/// How far the measurement has come: network and layer, networks run so far, and in all.
pub type OnTrial<'p> = dyn FnMut(Role, &str, u64, u64) -> ControlFlow<()> + 'p;

/// Measures the [`loss`](LayerTable::loss) of every int8 layer of `int8` and puts it into `table`: of the mean
/// square by which the result differs from `float`'s, relative to the result's own, the part that goes where the
/// layer's weights and inputs are float. `runs` are what the networks are run on; `scratch` is a folder for trial
/// models of one network, one at a time.
///
/// # Errors
/// [`ExportError::Trial`], [`ExportError::Cancelled`].
pub fn measure(
    float: &Model,
    int8: &Model,
    backend: &dyn Backend,
    runs: &[Recorded],
    table: &mut Table,
    scratch: &Path,
    progress: &mut OnTrial<'_>,
) -> Result<(), ExportError> {
    let components = || int8.manifest().components.iter();
    let quantized = |g: &Graph| g.nodes.iter().filter(|n| n.op.quant().is_some()).count();
    let chosen = |role: Role| -> Vec<&Recorded> {
        let all: Vec<&Recorded> = runs.iter().filter(|r| r.role == role).collect();
        let count = all.len().min(RUNS);
        (0..count).map(|i| all[(2 * i + 1) * all.len() / (2 * count)]).collect()
    };
    let total = components().map(|c| (quantized(&c.graph) * chosen(c.role).len()) as u64).sum();
    let mut done = 0;
    for spec in components() {
        let (role, runs) = (spec.role, chosen(spec.role));
        let Some(list) = table.components.iter_mut().find(|c| c.role == role) else { continue };
        if runs.is_empty() {
            continue;
        }
        let failed = |layer: &str, why: Failure| ExportError::Trial {
            role,
            layer: layer.to_owned(),
            why: why.0,
        };
        let first = spec.graph.nodes.first().map_or("", |n| n.name.as_str());
        let mut network = Network { backend, role, runs: &runs, truth: Vec::new() };
        network.truth = network.results(float).map_err(|e| failed(first, e))?;
        let all = network.noise(int8).map_err(|e| failed(first, e))?;
        let parts = Parts {
            float: float.load(role).map_err(|e| failed(first, e.into()))?,
            int8: int8.load(role).map_err(|e| failed(first, e.into()))?,
            manifest: int8.manifest(),
        };
        for node in 0..spec.graph.nodes.len() {
            let name = spec.graph.nodes[node].name.as_str();
            if spec.graph.nodes[node].op.quant().is_none() {
                continue;
            }
            let Some(layer) = list.layers.iter_mut().find(|l| l.name == name) else { continue };
            if progress(role, name, done, total).is_break() {
                return Err(ExportError::Cancelled);
            }
            let path = scratch.join(format!("{role}-{node}.latile"));
            let without = parts
                .write(node, &path)
                .and_then(|()| network.noise(&Model::open(&path)?))
                .map_err(|e| failed(name, e))?;
            std::fs::remove_file(&path).map_err(|e| failed(name, e.into()))?;
            put(layer, all, without);
            done += runs.len() as u64;
        }
    }
    Ok(())
}

fn put(layer: &mut LayerTable, all: f64, without: f64) {
    let loss = if all > 0.0 { (all - without) / all } else { 0.0 };
    layer.loss = Some(loss.clamp(0.0, 1.0) as f32);
}

/// What went wrong, in words.
struct Failure(String);

impl<E: std::error::Error> From<E> for Failure {
    fn from(e: E) -> Self {
        Self(e.to_string())
    }
}

/// A network, and what the float model makes of its inputs.
struct Network<'a> {
    backend: &'a dyn Backend,
    role: Role,
    runs: &'a [&'a Recorded],
    /// By run, all outputs in a row.
    truth: Vec<Vec<f32>>,
}

impl Network<'_> {
    /// What `model` makes of each run's inputs.
    fn results(&self, model: &Model) -> Result<Vec<Vec<f32>>, Failure> {
        let spec = model.component(self.role)?;
        let mut sessions: BTreeMap<[usize; 2], Box<dyn Session + '_>> = BTreeMap::new();
        let mut results = Vec::new();
        for run in self.runs {
            let [h, w] = run.size;
            let session = match sessions.entry(run.size) {
                std::collections::btree_map::Entry::Occupied(e) => e.into_mut(),
                std::collections::btree_map::Entry::Vacant(e) => {
                    e.insert(self.backend.prepare(model, self.role, h, w, Room::default())?)
                }
            };
            let group = run.timestep.map_or(0, |t| spec.timestep_group(t as f32));
            session.set_timestep_group(group);
            // Invariant: `prepare` refused shapes whose elements cannot be counted.
            let lengths: Vec<usize> =
                session.outputs().iter().map(|p| p.shape.elements().unwrap_or(0)).collect();
            let mut all = vec![0f32; lengths.iter().sum()];
            let mut rest = &mut all[..];
            let mut outputs = Vec::new();
            for length in lengths {
                let (output, more) = rest.split_at_mut(length);
                outputs.push(output);
                rest = more;
            }
            let inputs: Vec<&[f32]> = run.inputs.iter().map(Vec::as_slice).collect();
            session.run(&inputs, &mut outputs)?;
            results.push(all);
        }
        Ok(results)
    }

    /// Noise over signal of what `model` makes, the mean of all runs.
    fn noise(&self, model: &Model) -> Result<f64, Failure> {
        let results = self.results(model)?;
        let ratio = |(truth, found): (&Vec<f32>, &Vec<f32>)| {
            let (mut signal, mut noise) = (0f64, 0f64);
            for (&x, &y) in truth.iter().zip(found) {
                let (x, y) = (f64::from(x), f64::from(y));
                signal += x * x;
                noise += (x - y) * (x - y);
            }
            if signal > 0.0 { noise / signal } else { 0.0 }
        };
        Ok(self.truth.iter().zip(&results).map(ratio).sum::<f64>() / results.len().max(1) as f64)
    }
}

/// What trial models are made of.
struct Parts<'a> {
    float: LoadedComponent<'a>,
    int8: LoadedComponent<'a>,
    manifest: &'a Manifest,
}

impl Parts<'_> {
    /// Writes a model of the one network, as the int8 model has it but for layer `node`, which is the float
    /// model's.
    fn write(&self, node: usize, path: &Path) -> Result<(), Failure> {
        let spec = self.int8.spec();
        let mut graph = spec.graph.clone();
        let name = graph.nodes[node].name.clone();
        let missing = || Failure(format!("the float model has no layer {name}"));
        let theirs = &self.float.spec().graph;
        let found = theirs.nodes.iter().find(|n| n.name == name).ok_or_else(missing)?;
        let (from, from_bias, _) = found.op.matrix().ok_or_else(missing)?;
        if found.op.name() != graph.nodes[node].op.name() {
            let (theirs, ours) = (found.op.name(), graph.nodes[node].op.name());
            return Err(Failure(format!(
                "{name} is a {theirs} in the float model and a {ours} in the int8 one; export both again"
            )));
        }
        // The layer's scales and sums stay in the file, unread.
        let mut replaced: BTreeMap<WeightId, WeightId> = BTreeMap::new();
        if let Some((weight, bias, quant)) = graph.nodes[node].op.matrix_mut() {
            *quant = None;
            replaced.insert(*weight, from);
            match (*bias, from_bias) {
                (Some(to), Some(from)) => _ = replaced.insert(to, from),
                // What quantizing added.
                _ => *bias = None,
            }
        }
        for (to, from) in &replaced {
            let spec: &WeightSpec = theirs.weight(*from);
            graph.weights[to.index()] = spec.clone();
        }
        let mut writer = Writer::new(BufWriter::with_capacity(1 << 20, File::create(path)?))?;
        let count = graph.weights.len() as u32;
        writer.begin(spec.role, spec.multiple, spec.timestep, &spec.timestep_groups, graph)?;
        for id in (0..count).map(WeightId) {
            let bytes = match replaced.get(&id) {
                Some(from) => self.float.weight(*from),
                None => self.int8.weight(id),
            };
            writer.weight(bytes)?;
        }
        let manifest = self.manifest;
        writer.finish(Manifest {
            metadata: manifest.metadata.clone(),
            precision: manifest.precision,
            task: Task::Components,
            latent: None,
            scheduler: None,
            defaults: manifest.defaults,
            components: Vec::new(),
        })?;
        Ok(())
    }
}
