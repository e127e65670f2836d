//! What is known of every layer while a model is run.
//!
//! Lives here: the [`Collector`], which looks on while the CPU's sessions run and is shown every layer's input,
//! and its two passes. Never here: what is run, and in which order.

use crate::CalibrationError;
use crate::choose::{self, Histogram};
use crate::equalise::{self, WeightNorms};
use crate::observe::pairs::{Extremes, KINDS, Pairs, SQUARE_KINDS, Squares};
use crate::observe::{Counts, Moments, Spread};
use crate::table::{
    ComponentTable, GroupTable, LayerTable, Range, Ranges, SquareRanges, WinogradRanges,
    int8_layers,
};
use crate::watch::{Place, Watch};
use latile_cpu::session::CpuSession;
use latile_runtime::backend::RunError;
use latile_runtime::format::{ComponentSpec, Model, Role};
use latile_runtime::graph::{Graph, Node, Op, Pad, WeightId};
use std::collections::HashMap;

/// A layer under observation.
#[derive(Debug)]
struct Layer {
    name: String,
    weight: WeightId,
    segments: Vec<u32>,
    /// How Winograd's algorithms would find it padded; none where the layer cannot be computed so.
    winograd: Option<Pad>,
    /// The map that is coming by, where they could.
    squares: Squares,
    /// The first pass, by group of timesteps.
    moments: Vec<Moments>,
    /// That of `winograd`; empty without.
    bounds: Vec<Tiles<Extremes>>,
    /// The second pass.
    candidates: Vec<Candidate>,
}

/// An equaliser, and inputs scaled by it.
#[derive(Debug)]
struct Candidate {
    scale: Option<Vec<f32>>,
    /// By group of timesteps.
    spreads: Vec<Spread>,
    /// Those of `winograd`.
    tiles: Vec<Tiles<Spread>>,
}

/// Something of each quantity that Winograd's algorithms quantize.
#[derive(Debug)]
struct Tiles<T> {
    pairs: [T; KINDS],
    squares: [T; SQUARE_KINDS],
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
    /// Room for a row's pairs, and to count it.
    pairs: Pairs,
    counts: Counts,
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
            pairs: Pairs::default(),
            counts: Counts::default(),
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
                    return;
                }
            }
            Pass::Spreads => {
                for candidate in &mut layer.candidates {
                    candidate.spreads[group].add(row, &mut self.counts);
                }
            }
        }
        let Some(pad) = layer.winograd else { return };
        let found = self.pairs.of(row, channels, [pad.left as usize, pad.right as usize]);
        if !layer.squares.has_rows() {
            layer.squares.begin(pad.top as usize);
        }
        let Layer { squares, bounds, candidates, .. } = layer;
        match self.pass {
            Pass::Moments => {
                let bounds = &mut bounds[group];
                bounds.pairs.iter_mut().zip(found).for_each(|(b, f)| b.add(f));
                squares.add(found, &mut |kind, row| bounds.squares[kind].add(row));
            }
            Pass::Spreads => {
                for candidate in candidates.iter_mut() {
                    let spreads = candidate.tiles[group].pairs.iter_mut();
                    spreads.zip(found).for_each(|(s, f)| s.add(f, &mut self.counts));
                }
                squares.add(found, &mut |kind, row| {
                    for candidate in candidates.iter_mut() {
                        candidate.tiles[group].squares[kind].add(row, &mut self.counts);
                    }
                });
            }
        }
    }

    /// Ends the maps that came by while network `role` ran.
    fn end(&mut self, role: Role) {
        let Some(component) = self.components.iter_mut().find(|c| c.role == role) else { return };
        let group = self.timestep.map_or(0, |t| group_of(&component.bounds, t));
        for layer in &mut component.layers {
            let Some(pad) = layer.winograd.filter(|_| layer.squares.has_rows()) else { continue };
            let Layer { squares, bounds, candidates, .. } = layer;
            match self.pass {
                Pass::Moments => {
                    let bounds = &mut bounds[group].squares;
                    squares.end(pad.bottom as usize, &mut |kind, row| bounds[kind].add(row));
                }
                Pass::Spreads => squares.end(pad.bottom as usize, &mut |kind, row| {
                    for candidate in candidates.iter_mut() {
                        candidate.tiles[group].squares[kind].add(row, &mut self.counts);
                    }
                }),
            }
            // The next map may be of another width.
            layer.squares.begin(0);
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
                        .map(|scale| Candidate::new(scale, &layer.moments, &layer.bounds))
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
            let channels = channels as usize;
            let winograd = winograd_pad(&spec.graph, node);
            let bounds = || Tiles {
                pairs: [(); KINDS].map(|()| Extremes::new(channels)),
                squares: [(); SQUARE_KINDS].map(|()| Extremes::new(channels)),
            };
            layers.push(Layer {
                name: node.name.clone(),
                weight,
                segments: equalise::segments(&spec.graph, node.inputs[0]),
                bounds: winograd.iter().flat_map(|_| (0..groups).map(|_| bounds())).collect(),
                winograd,
                squares: Squares::default(),
                moments: vec![Moments::new(channels); groups],
                candidates: Vec::new(),
            });
        }
        Ok(Self { role: spec.role, bounds, layers, index })
    }
}

/// The zeros around a convolution that Winograd's algorithms could compute, whose rows are
/// observed as it reads them; those of an enlarged map are not, and have an operator of their own.
fn winograd_pad(graph: &Graph, node: &Node) -> Option<Pad> {
    let Op::Conv2d { kernel: [3, 3], stride: [1, 1], pad, .. } = node.op else { return None };
    let mut at = node.inputs[0];
    while let Some(before) = graph.nodes.iter().find(|n| n.output == at) {
        match before.op {
            Op::Upsample2x => return None,
            Op::GroupNorm { .. }
            | Op::Silu
            | Op::AddChannel
            | Op::ScaleShift
            | Op::Affine { .. } => at = before.inputs[0],
            _ => break,
        }
    }
    Some(pad)
}

impl Candidate {
    fn new(scale: Option<Vec<f32>>, moments: &[Moments], bounds: &[Tiles<Extremes>]) -> Self {
        let e = scale.as_deref();
        let spreads = moments.iter().map(|m| Spread::new(m, e)).collect();
        let over = |b: &Extremes| Spread::over(&b.min, &b.max, e);
        let tiles = |b: &Tiles<Extremes>| Tiles {
            pairs: b.pairs.each_ref().map(over),
            squares: b.squares.each_ref().map(over),
        };
        let tiles = bounds.iter().map(tiles).collect();
        Self { scale, spreads, tiles }
    }
}

impl Layer {
    fn table(self, norms: &WeightNorms, percentile: f32) -> LayerTable {
        let all = merged(&self.moments);
        let channels = all.channels();
        let mut best: Option<Best> = None;
        for Candidate { scale, spreads, tiles } in self.candidates {
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
            if best.as_ref().is_none_or(|b| noise < b.noise) {
                best = Some(Best { noise, scale, found, tiles });
            }
        }
        // Invariant: the candidates begin with no equaliser.
        let Best { scale: input_scale, found, tiles, .. } = best.unwrap_or_default();
        let mut tiles = tiles.into_iter();
        let groups = found
            .iter()
            .zip(&self.moments)
            .map(|(f, m)| {
                let mut group = group(f, m, input_scale.as_deref(), percentile);
                if let Some(Tiles { pairs, squares }) = tiles.next() {
                    let [apart, sum, difference] = ranges(pairs, percentile);
                    group.winograd = (|| {
                        Some(WinogradRanges { apart: apart?, sum: sum?, difference: difference? })
                    })();
                    let squares: Option<Vec<Ranges>> =
                        ranges(squares, percentile).into_iter().collect();
                    group.squares = squares.and_then(|s| s.try_into().ok()).map(SquareRanges);
                }
                group
            })
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

/// The equaliser that costs least, and the inputs scaled by it.
#[derive(Default)]
struct Best {
    noise: f64,
    scale: Option<Vec<f32>>,
    found: Vec<Found>,
    tiles: Vec<Tiles<Spread>>,
}

/// Ranges of what an algorithm reads; `None` where it was 0 throughout.
fn ranges<const N: usize>(spreads: [Spread; N], percentile: f32) -> [Option<Ranges>; N] {
    spreads.map(|spread| {
        let histogram = spread.finish();
        choose::ranges(&histogram, percentile, choose::least_error(&histogram))
    })
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
        winograd: None,
        squares: None,
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
        self.end(place.role);
        match &self.failure {
            // The caller takes the whole failure from the collector.
            Some(CalibrationError::Activation { layer, .. }) => {
                Err(RunError::NonFinite { port: layer.clone() })
            }
            _ => Ok(()),
        }
    }
}
