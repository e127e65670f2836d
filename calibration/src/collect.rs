//! What is known of every layer while a model is run.
//!
//! Lives here: the [`Collector`], which looks on while the CPU's sessions run and is shown every layer's input,
//! and its two passes. Never here: what is run, and in which order.

use crate::CalibrationError;
use crate::choose::{self, Histogram};
use crate::equalise::{self, WeightNorms};
use crate::observe::{Moments, Spread};
use crate::table::{ComponentTable, GroupTable, LayerTable, Range, int8_layers};
use crate::watch::{Place, Watch};
use latile_cpu::session::CpuSession;
use latile_runtime::backend::RunError;
use latile_runtime::format::{ComponentSpec, Model, Role};
use latile_runtime::graph::WeightId;
use std::collections::HashMap;

/// A layer under observation.
#[derive(Debug)]
struct Layer {
    name: String,
    weight: WeightId,
    segments: Vec<u32>,
    /// The first pass, by group of timesteps.
    moments: Vec<Moments>,
    /// The second pass: equalisers, each with the scaled inputs of every group.
    candidates: Vec<(Option<Vec<f32>>, Vec<Spread>)>,
}

/// A network under observation.
#[derive(Debug)]
struct Component {
    role: Role,
    bounds: Vec<u32>,
    layers: Vec<Layer>,
    index: HashMap<String, usize>,
}

/// Which of the two passes is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    Moments,
    Spreads,
}

/// Everything seen so far.
#[derive(Debug)]
pub(crate) struct Collector {
    pass: Pass,
    components: Vec<Component>,
    /// What is being run: for messages, and to find the group.
    picture: String,
    timestep: Option<u32>,
    /// What stopped the run.
    failure: Option<CalibrationError>,
}

impl Collector {
    /// Awaits the networks of `model`; `bounds` are the groups of timesteps of the one that takes any.
    ///
    /// # Errors
    /// [`CalibrationError::Unsuited`] where two layers of a network have one name.
    pub(crate) fn new(model: &Model, bounds: &[u32]) -> Result<Self, CalibrationError> {
        let mut components = Vec::new();
        for spec in &model.manifest().components {
            let bounds = if spec.timestep.is_some() { bounds.to_vec() } else { Vec::new() };
            components.push(Component::new(spec, bounds).map_err(|why| {
                CalibrationError::Unsuited { model: model.name().to_owned(), why }
            })?);
        }
        Ok(Self {
            pass: Pass::Moments,
            components,
            picture: String::new(),
            timestep: None,
            failure: None,
        })
    }

    /// Says what is run next.
    pub(crate) fn at(&mut self, picture: &str, timestep: Option<u32>) {
        self.timestep = timestep;
        if self.picture != picture {
            picture.clone_into(&mut self.picture);
        }
    }

    /// What stopped the run, if anything seen did.
    pub(crate) fn take_failure(&mut self) -> Option<CalibrationError> {
        self.failure.take()
    }

    fn see(&mut self, role: Role, name: &str, channels: usize, row: &[f32]) {
        if self.failure.is_some() {
            return;
        }
        // Invariant: the session is of one of the model's components.
        let Some(component) = self.components.iter_mut().find(|c| c.role == role) else { return };
        let group = self.timestep.map_or(0, |t| group_of(&component.bounds, t));
        let Some(&i) = component.index.get(name) else { return };
        let layer = &mut component.layers[i];
        debug_assert_eq!(channels, layer.moments[group].channels());
        match self.pass {
            Pass::Moments => {
                if let Err(value) = layer.moments[group].add(row) {
                    self.failure = Some(CalibrationError::Activation {
                        role,
                        layer: name.to_owned(),
                        place: self.timestep.map_or(String::new(), |t| format!(" at timestep {t}")),
                        picture: self.picture.clone(),
                        value,
                    });
                }
            }
            Pass::Spreads => {
                for (_, spreads) in &mut layer.candidates {
                    spreads[group].add(row);
                }
            }
        }
    }

    /// Ends the first pass: chooses the equalisers that the second one measures.
    ///
    /// # Errors
    /// [`CalibrationError::Model`], [`CalibrationError::Unsuited`] where a weight is not a float one.
    pub(crate) fn turn(&mut self, model: &Model) -> Result<(), CalibrationError> {
        self.pass = Pass::Spreads;
        for component in &mut self.components {
            let loaded = model.load(component.role)?;
            for layer in &mut component.layers {
                let norms = norms(model, layer, || WeightNorms::read(&loaded, layer.weight))?;
                let all = merged(&layer.moments);
                layer.candidates =
                    equalise::candidates(&norms, &all, &layer.moments, &layer.segments)
                        .into_iter()
                        .map(|scale| {
                            let spread = |m: &Moments| Spread::new(m, scale.as_deref());
                            let spreads = layer.moments.iter().map(spread).collect();
                            (scale, spreads)
                        })
                        .collect();
            }
        }
        Ok(())
    }

    /// Ends the second pass: of each layer's equalisers the one that costs its output least, and the ranges
    /// under it.
    ///
    /// # Errors
    /// As [`Collector::turn`].
    pub(crate) fn finish(
        self,
        model: &Model,
        percentile: f32,
    ) -> Result<Vec<ComponentTable>, CalibrationError> {
        let mut tables = Vec::new();
        for component in self.components {
            let loaded = model.load(component.role)?;
            let mut layers = Vec::new();
            for layer in component.layers {
                let norms = norms(model, &layer, || WeightNorms::read(&loaded, layer.weight))?;
                let table = layer.table(&norms, percentile);
                if let Some(g) = table.groups.iter().position(|g| g.ranges.is_none()) {
                    log::warn!(
                        "{} layer {}: its input is 0 throughout timestep group {g}; no range can be made of that, and the layer stays in f16",
                        component.role,
                        table.name
                    );
                }
                layers.push(table);
            }
            tables.push(ComponentTable {
                role: component.role,
                timestep_groups: component.bounds,
                layers,
            });
        }
        Ok(tables)
    }
}

fn norms(
    model: &Model,
    layer: &Layer,
    read: impl Fn() -> Option<WeightNorms>,
) -> Result<WeightNorms, CalibrationError> {
    read().ok_or_else(|| CalibrationError::Unsuited {
        model: model.name().to_owned(),
        why: format!("the weight of layer {} is not stored in f32 or f16", layer.name),
    })
}

fn merged(groups: &[Moments]) -> Moments {
    let mut all = Moments::new(groups[0].channels());
    groups.iter().for_each(|g| all.merge(g));
    all
}

/// As [`ComponentSpec::timestep_group`].
fn group_of(bounds: &[u32], timestep: u32) -> usize {
    let last = bounds.len().saturating_sub(1);
    bounds.iter().position(|&bound| timestep < bound).unwrap_or(last)
}

impl Component {
    fn new(spec: &ComponentSpec, bounds: Vec<u32>) -> Result<Self, String> {
        let groups = bounds.len().max(1);
        let (mut layers, mut index) = (Vec::new(), HashMap::new());
        for (node, channels) in int8_layers(&spec.graph) {
            let Some((weight, ..)) = node.op.matrix() else { continue };
            if index.insert(node.name.clone(), layers.len()).is_some() {
                return Err(format!("two layers of its {} are called {}", spec.role, node.name));
            }
            layers.push(Layer {
                name: node.name.clone(),
                weight,
                segments: equalise::segments(&spec.graph, node.inputs[0]),
                moments: vec![Moments::new(channels as usize); groups],
                candidates: Vec::new(),
            });
        }
        Ok(Self { role: spec.role, bounds, layers, index })
    }
}

impl Layer {
    fn table(self, norms: &WeightNorms, percentile: f32) -> LayerTable {
        let all = merged(&self.moments);
        let channels = all.channels();
        let mut best: Option<(f64, Option<Vec<f32>>, Vec<Found>)> = None;
        for (scale, spreads) in self.candidates {
            let found = |spread: Spread| {
                let histogram = spread.finish();
                let mse = choose::least_error(&histogram);
                Found { histogram, mse }
            };
            let found: Vec<Found> = spreads.into_iter().map(found).collect();
            let errors = found.iter().map(|f| f.mse.map_or(0.0, |r| f64::from(r.error)));
            let error = errors.sum::<f64>() / found.len() as f64;
            let noise = norms.input_noise(error, scale.as_deref())
                + norms.weight_noise(&all, scale.as_deref());
            // The first, none, stays where nothing is better.
            if best.as_ref().is_none_or(|(least, ..)| noise < *least) {
                best = Some((noise, scale, found));
            }
        }
        let (input_scale, found) = best.map(|(_, s, f)| (s, f)).unwrap_or_default();
        let groups = found
            .iter()
            .zip(&self.moments)
            .map(|(f, m)| group(f, m, input_scale.as_deref(), percentile))
            .collect();
        let by_channel = |f: &dyn Fn(usize) -> f64| (0..channels).map(|c| f(c) as f32).collect();
        LayerTable {
            name: self.name,
            channels: channels as u32,
            segments: self.segments,
            neighbour: all.neighbour() as f32,
            channel_max: (0..channels).map(|c| all.largest(c)).collect(),
            channel_mean: by_channel(&|c| all.mean(c)),
            channel_ms: by_channel(&|c| all.mean_square(c)),
            input_scale,
            loss: None,
            groups,
        }
    }
}

/// A layer's scaled input in one group of timesteps, and the range of least error for it.
struct Found {
    histogram: Histogram,
    mse: Option<Range>,
}

fn group(found: &Found, moments: &Moments, scale: Option<&[f32]>, percentile: f32) -> GroupTable {
    let e = |c: usize| scale.map_or(1.0, |s| s[c]);
    let channels = moments.channels();
    let power: f64 =
        (0..channels).map(|c| moments.mean_square(c) * f64::from(e(c)) * f64::from(e(c))).sum();
    let least = (0..channels).map(|c| moments.min[c] * e(c)).fold(f32::INFINITY, f32::min);
    let most = (0..channels).map(|c| moments.max[c] * e(c)).fold(f32::NEG_INFINITY, f32::max);
    GroupTable {
        samples: moments.pixels * channels as u64,
        min: least,
        max: most,
        power: (power / channels as f64) as f32,
        ranges: choose::ranges(&found.histogram, percentile, found.mse),
    }
}

impl Watch for Collector {
    fn run(
        &mut self,
        session: &mut CpuSession<'_>,
        place: Place,
        inputs: &[&[f32]],
        outputs: &mut [&mut [f32]],
    ) -> Result<(), RunError> {
        session.run_observed(inputs, outputs, &mut |layer, channels, row| {
            self.see(place.role, layer, channels, row);
        })?;
        match &self.failure {
            // The caller takes the whole failure from the collector.
            Some(CalibrationError::Activation { layer, .. }) => {
                Err(RunError::NonFinite { port: layer.clone() })
            }
            _ => Ok(()),
        }
    }
}
