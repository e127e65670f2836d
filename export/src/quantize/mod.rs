//! From a float model to an int8 one, by a calibration table.
//!
//! Lives here: which layers become int8 ([`eligible`]; of a mixed model, [`share`]), the graph with them in it
//! ([`rewrite`]), their weights as integers ([`weights`]), the estimate of what each layer loses ([`estimate`]), which
//! convolutions take fewer products ([`winograd`]), and which attentions multiply bytes ([`attention`]). Never here: how activations are observed (that is
//! `latile-calibration`'s), or how a weight lies in the file.

mod attention;
mod eligible;
mod estimate;
mod glob;
mod rewrite;
mod share;
mod weights;
mod winograd;

pub use attention::AttentionSummary;
pub use glob::Glob;
pub(crate) use rewrite::{Item, Planned};
pub use winograd::{MOST_NOISE_DB, MOST_SQUARE_NOISE_DB, Winograd};

use crate::ExportError;
use crate::levels::KeptLevel;
use crate::model::Component;
use crate::source::WeightSource;
use crate::tensors::Recipe;
use eligible::Matrix;
use latile_calibration::{ComponentTable, LayerTable, Method, Range, Table};
use latile_runtime::format::Role;
use latile_runtime::graph::{QuantRange, WeightSpec, Winograd as Algorithm};
use serde::Serialize;
use std::collections::BTreeMap;
use weights::Input;
pub(crate) use weights::Quantized;

/// The share of each network's multiply-accumulates that stays float in a mixed model by default.
pub const KEEP_SHARE: f64 = 0.15;

/// Which layers of a mixed model stay float, beside those that the user names.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixed {
    /// Those of these levels, which a search by pictures chose ([`crate::levels`]).
    Levels(Vec<KeptLevel>),
    /// Those that add most noise to the network's result for their work, as long as together they have at most
    /// this share of the multiply-accumulates of the network's convolutions and linear layers; none that adds
    /// less than its share of the work.
    ///
    /// What each adds is the table's [`loss`](LayerTable::loss) where that was measured, or else its estimated
    /// noise-to-signal ratio.
    Share(f64),
    /// Those whose estimated signal-to-noise ratio is below, in dB, in any group of timesteps.
    MinSqnr(f64),
}

/// How a model becomes an int8 one.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantization {
    /// What calibration found out about the model.
    pub table: Table,
    /// Which of the table's ranges are taken.
    pub method: Method,
    /// Layers that stay float.
    pub keep_f16: Vec<Glob>,
    /// Which layers stay float in a mixed model; none in an int8 one.
    pub mixed: Option<Mixed>,
    /// Which int8 convolutions are computed by Winograd's algorithms.
    pub winograd: Winograd,
    /// Convolutions that are not.
    pub keep_direct: Vec<Glob>,
}

impl Quantization {
    /// Why layer `layer` of `role` stays float, where the user or a search by pictures wants that.
    fn keeps(&self, role: Role, layer: &str) -> Option<String> {
        let asked = self.keep_f16.iter().find(|g| g.is_of(role.name(), layer));
        let levels = match &self.mixed {
            Some(Mixed::Levels(levels)) => levels.as_slice(),
            _ => &[],
        };
        let level = levels.iter().find(|l| l.glob.is_of(role.name(), layer));
        let chosen = level.map(|l| {
            let (glob, noise) = (l.glob.text(), 100.0 * l.noise);
            format!("{glob} in int8 would move pictures by {noise:.2} % of their distance to the truth, too much for its work")
        });
        asked.map(|g| format!("--keep-f16 {} asks for it", g.text())).or(chosen)
    }
}

/// A convolution, or a linear layer over a map, in the exported model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerSummary {
    /// `unet`, `decoder`, `encoder`.
    pub component: String,
    /// The layer's name.
    pub layer: String,
    /// Its weights, without biases.
    pub weights: u64,
    /// Whether it is int8.
    pub int8: bool,
    /// Why it is not.
    pub why: Option<String>,
    /// Estimated signal-to-noise ratio of its result, in dB, by group of timesteps, where it was examined.
    pub sqnr_db: Vec<f32>,
    /// That of its quantized input alone.
    pub input_sqnr_db: Vec<f32>,
    /// That of its rounded weights alone.
    pub weight_sqnr_db: Option<f32>,
    /// The algorithm of Winograd's by which it is computed, `rows` or `square`; none where directly.
    #[serde(serialize_with = "by_name")]
    pub winograd: Option<Algorithm>,
    /// What its input's noise grows by if it is, in dB, in the worst group of timesteps: estimated from the table, for
    /// int8 convolutions of 3 × 3 and stride 1; of those that are direct, what it would grow by with `rows`.
    pub winograd_noise_db: Option<f32>,
    /// Why such a convolution is not.
    pub direct: Option<String>,
}

impl LayerSummary {
    /// The least of its estimates.
    #[must_use]
    pub fn worst_db(&self) -> Option<f32> {
        self.sqnr_db.iter().copied().reduce(f32::min)
    }
}

/// A layer that is to be int8.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    /// Index of its node.
    node: usize,
    name: String,
    matrix: Matrix,
    weight: Recipe,
    spec: WeightSpec,
    input: Input,
    /// `[group]`; where there is a way, its ranges take their place.
    ranges: Vec<Range>,
    /// How it is computed by one of Winograd's algorithms.
    way: Option<winograd::Way>,
    /// Mean square of the scaled input by group, relative to that over all.
    relative_power: Vec<f64>,
    /// Mean square of the scaled input by group.
    power: Vec<f32>,
}

impl Layer {
    fn new(
        node: usize,
        table: &LayerTable,
        ranges: Vec<Range>,
        matrix: Matrix,
        (spec, weight): (&WeightSpec, &Recipe),
    ) -> Self {
        let power: Vec<f32> = table.groups.iter().map(|g| g.power).collect();
        Self {
            node,
            name: table.name.clone(),
            matrix,
            weight: weight.clone(),
            spec: spec.clone(),
            relative_power: estimate::relative_power(table),
            input: Input::new(
                table.input_scale.clone(),
                &table.channel_mean,
                &table.channel_ms,
                table.neighbour,
            ),
            ranges,
            way: None,
            power,
        }
    }

    /// The same layer by one of Winograd's algorithms.
    fn by_winograd(&self, way: winograd::Way) -> Self {
        Self { way: Some(way), ..self.clone() }
    }

    /// The algorithm.
    fn winograd(&self) -> Option<Algorithm> {
        self.way.as_ref().map(|w| w.by)
    }

    /// Its ranges, by group of timesteps.
    fn groups(&self) -> impl Iterator<Item = &[Range]> {
        match &self.way {
            Some(way) => way.ranges.chunks(winograd::kinds(way.by)),
            None => self.ranges.chunks(1),
        }
    }

    /// Its ranges as they are stored.
    fn stored_ranges(&self) -> Vec<QuantRange> {
        match &self.way {
            Some(way) => way.stored(),
            None => self.ranges.iter().map(Range::quant).collect(),
        }
    }

    /// The shape of its integers.
    fn shape(&self) -> Vec<u32> {
        let stored = &self.spec.shape;
        match self.winograd() {
            Some(by) => {
                let [h, w] = by.kernel();
                vec![by.filters(stored[0]), stored[1], h, w]
            }
            None => stored.clone(),
        }
    }

    /// What its input is multiplied by; nothing where that would be 1.
    pub(crate) fn input_scale(&self) -> impl Iterator<Item = f32> {
        self.input.scale.iter().flatten().copied()
    }

    /// Replaces `values` by the integers that stand for its weights.
    ///
    /// # Errors
    /// As [`Recipe::read`], or a weight that its input's scale makes absurd.
    pub(crate) fn quantize(
        &self,
        sources: &[Box<dyn WeightSource>],
        values: &mut Vec<f32>,
    ) -> Result<Quantized, ExportError> {
        self.weight.read(sources, &self.spec, values)?;
        let quantized = match self.winograd() {
            Some(by) => winograd::quantize(by, values, &self.input),
            None => weights::quantize(values, self.matrix.window, &self.input),
        };
        quantized.map_err(|index| ExportError::Quantize {
            layer: self.name.clone(),
            why: format!(
                "weight {index}, or what its row adds to the bias, would be absurdly large with this table; calibrate the model again"
            ),
        })
    }
}

/// Decides which layers of `component` become int8 and rewrites its graph. `progress` is told the bytes of each
/// weight that had to be examined.
///
/// # Errors
/// A table that does not fit, weights that cannot be read.
pub(crate) fn plan(
    component: Component,
    sources: &[Box<dyn WeightSource>],
    how: &Quantization,
    progress: &mut dyn FnMut(u64) -> Result<(), ExportError>,
) -> Result<Planned, ExportError> {
    let graph = &component.graph;
    let role = component.role;
    let Ok(table) = how.table.component(role) else {
        // Pictures are made without the encoder: a model may have been calibrated without it.
        if role == Role::Encoder {
            let why = "the calibration table does not have it";
            let layers = summaries(&component, |_| Some(why.to_owned()));
            return Ok(Planned::float(component, layers));
        }
        return Err(latile_calibration::TableError::NoComponent { role }.into());
    };
    how.table.covers(role, graph)?;
    if component.timestep.is_none() && !table.timestep_groups.is_empty() {
        return Err(ExportError::Quantize {
            layer: role.name().to_owned(),
            why: "the table has groups of timesteps for it, but it takes no timestep; calibrate the model again"
                .to_owned(),
        });
    }
    let refused = eligible::refused(graph);
    let multiple = component.multiple.max(1) as usize;
    let shapes = eligible::shapes(&component, winograd::NOMINAL_SIDE.next_multiple_of(multiple))?;
    let (mut chosen, mut scores) = (Vec::new(), Vec::new());
    let mut reasons = vec![None; graph.nodes.len()];
    let mut verdicts: BTreeMap<usize, (Option<Algorithm>, winograd::Verdict)> = BTreeMap::new();
    let mut values = Vec::new();
    let mut summaries = summaries(&component, |_| None);
    for (i, node) in graph.nodes.iter().enumerate() {
        let Some(matrix) = eligible::matrix(graph, node) else { continue };
        let asked = how.keeps(role, &node.name);
        // `covers` has found every layer whose result is used.
        let Some(layer) = table.layer(&node.name) else {
            reasons[i] = Some("nothing reads its result".to_owned());
            continue;
        };
        reasons[i] = if let Some(why) = refused.get(&i) {
            Some((*why).to_owned())
        } else if asked.is_some() {
            asked
        } else if let Some(ranges) = layer.ranges(how.method) {
            let weight = matrix.weight.index();
            let mut score = f64::from(layer.loss.unwrap_or(0.0));
            let pixels = shapes[node.output.index()].pixels();
            let size = ([matrix.inputs, matrix.outputs], pixels);
            let mut verdict = winograd::decide(node, role, layer, how, size);
            let direct = Layer::new(
                i,
                layer,
                ranges,
                matrix,
                (&graph.weights[weight], &component.recipes[weight]),
            );
            let ways = verdict.as_mut().map(|v| std::mem::take(&mut v.ways)).unwrap_or_default();
            let mut ways = ways.into_iter();
            let mut layer = ways.next().map_or_else(|| direct.clone(), |w| direct.by_winograd(w));
            let mut why = None;
            if examines(how, table) {
                let mut examine = |layer: &Layer| {
                    let quantized = layer.quantize(sources, &mut values)?;
                    Ok::<_, ExportError>(estimate::estimate(layer, &quantized.power))
                };
                let too_little = |found: &estimate::Estimate| match how.mixed {
                    Some(Mixed::MinSqnr(least)) if f64::from(found.worst()) < least => {
                        let worst = found.worst();
                        Some(format!("its estimated SQNR is {worst:.1} dB, less than {least} dB"))
                    }
                    _ => None,
                };
                let mut found = examine(&layer)?;
                why = too_little(&found);
                while why.is_some() && layer.way.is_some() && how.winograd != Winograd::All {
                    let lost = why.map(|why| format!("by Winograd's algorithm {why}"));
                    let next = ways.next();
                    verdict = verdict.map(|v| winograd::Verdict {
                        noise_db: next.as_ref().map_or(v.noise_db, |w| Some(w.noise_db)),
                        why: lost.filter(|_| next.is_none()),
                        ..v
                    });
                    layer = next.map_or_else(|| direct.clone(), |w| direct.by_winograd(w));
                    found = examine(&layer)?;
                    why = too_little(&found);
                }
                progress(4 * (matrix.outputs * matrix.inputs * matrix.window) as u64)?;
                score = found.noise_to_signal();
                if let Some(s) = summaries.iter_mut().find(|s| s.layer == node.name) {
                    found.put(s);
                }
            }
            if why.is_none() {
                verdicts.extend(verdict.map(|v| (i, (layer.winograd(), v))));
                chosen.push(layer);
                scores.push(score);
            }
            why
        } else {
            Some("its input was zero throughout a group of timesteps in calibration".to_owned())
        };
    }
    if let Some(Mixed::Share(share)) = how.mixed {
        let nodes: Vec<usize> = chosen.iter().map(|l: &Layer| l.node).collect();
        let kept = share::kept(&component, &nodes, &scores, share)?;
        let measured = is_measured(table);
        for k in &kept {
            let percent = 100.0 * k.work;
            reasons[k.node] = Some(if measured {
                let noise = 100.0 * k.score;
                format!(
                    "without its int8 the result has {noise:.1} % less noise; it is {percent:.1} % of the network's work"
                )
            } else {
                let db = estimate::db(1.0, k.score);
                format!(
                    "its estimated SQNR, {db:.1} dB, is among the least for its work, {percent:.1} % of the network's"
                )
            });
        }
        chosen.retain(|l| kept.iter().all(|k| k.node != l.node));
    }
    for (i, node) in graph.nodes.iter().enumerate() {
        if let Some(s) = summaries.iter_mut().find(|s| s.layer == node.name) {
            s.why = reasons[i].take();
            s.int8 = s.why.is_none();
            if let Some((by, verdict)) = verdicts.remove(&i).filter(|_| s.int8) {
                s.winograd = by;
                s.winograd_noise_db = verdict.noise_db;
                s.direct = verdict.why;
            }
        }
    }
    let groups = table.timestep_groups.clone();
    let mut planned = rewrite::rewrite(component, chosen, groups, summaries);
    planned.attentions = attention::mark(&mut planned.graph, role, &|name| how.keeps(role, name));
    Ok(planned)
}

/// A summary of each layer with a matrix; `why` gives the reason for one to stay float, by its name.
fn summaries(component: &Component, why: impl Fn(&str) -> Option<String>) -> Vec<LayerSummary> {
    let graph = &component.graph;
    let of = |node: &latile_runtime::graph::Node| {
        let m = eligible::matrix(graph, node)?;
        let why = why(&node.name);
        Some(LayerSummary {
            component: component.role.name().to_owned(),
            layer: node.name.clone(),
            weights: (m.outputs * m.inputs * m.window) as u64,
            int8: why.is_none(),
            why,
            sqnr_db: Vec::new(),
            input_sqnr_db: Vec::new(),
            weight_sqnr_db: None,
            winograd: None,
            winograd_noise_db: None,
            direct: None,
        })
    };
    graph.nodes.iter().filter_map(of).collect()
}

/// An algorithm's name.
#[expect(clippy::ref_option, reason = "serde calls it so")]
fn by_name<S: serde::Serializer>(by: &Option<Algorithm>, to: S) -> Result<S::Ok, S::Error> {
    by.map(Algorithm::name).serialize(to)
}

/// Whether `table` says what each layer does to the network's result.
fn is_measured(table: &ComponentTable) -> bool {
    table.layers.iter().any(|l| l.loss.is_some())
}

/// Whether [`plan`] must look at the weights of a network with `table` to choose its int8 layers.
fn examines(how: &Quantization, table: &ComponentTable) -> bool {
    match how.mixed {
        None | Some(Mixed::Levels(_)) => false,
        Some(Mixed::MinSqnr(_)) => true,
        Some(Mixed::Share(_)) => !is_measured(table),
    }
}

/// Bytes of the weights that [`plan`] examines for `component`, at most.
pub(crate) fn examined_bytes(component: &Component, how: &Quantization) -> u64 {
    if !how.table.component(component.role).is_ok_and(|table| examines(how, table)) {
        return 0;
    }
    summaries(component, |_| None).iter().map(|s| 4 * s.weights).sum()
}
