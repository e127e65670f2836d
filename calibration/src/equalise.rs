//! The equaliser of a layer: what its inputs are multiplied by, and its weights divided by, before both are
//! quantized.
//!
//! Lives here: the candidates, and the noise that int8 would add to a layer's output under one of them.
//! Never here: histograms, or the choice among measured candidates.
//!
//! A tensor has one scale for all channels, so a channel of small inputs keeps few levels, and so does the
//! whole of a skip connection beside a louder map. Multiplying channel c by e\[c\] and dividing its weights by
//! it leaves the product as it was and moves the loss from the inputs to the weights, whose rounding then
//! weighs e\[c\] times as much (Xiao et al. 2023, "SmoothQuant", eq. 4: with strength α,
//! `e[c] = max|w[c]|^(1−α) / max|x[c]|^α`).

use crate::observe::Moments;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use latile_runtime::format::LoadedComponent;
use latile_runtime::graph::{Graph, Node, Op, ValueId, WeightId};
use latile_runtime::tensor::DType;

/// The strengths that are tried.
const STRENGTHS: [f64; 4] = [0.25, 0.5, 0.75, 1.0];
/// No channel is multiplied by more, or divided by more, than this.
const MOST: f64 = 4096.0;

/// What the noise of a layer depends on in its weights.
#[derive(Clone, Debug)]
pub(crate) struct WeightNorms {
    /// `[n][c]`, n filters: the largest |w| over the kernel's window.
    largest: Vec<f32>,
    /// `[c]`: Σ w² over output channels and window.
    squares: Vec<f64>,
    outputs: usize,
    taps: usize,
}

impl WeightNorms {
    /// Of the float weight `id` of `component`, `[n, c, kh, kw]` or `[n, c]`, as it lies packed; `None`
    /// where it is not stored so, which a float model's are.
    pub(crate) fn read(component: &LoadedComponent<'_>, id: WeightId) -> Option<Self> {
        let spec = component.spec().graph.weight(id);
        let n = *spec.shape.first()? as usize;
        let c = *spec.shape.get(1)? as usize;
        let taps: usize = spec.shape[2..].iter().map(|&d| d as usize).product();
        let bytes = component.weight(id);
        let mut values = Vec::new();
        match spec.dtype {
            DType::F32 => values.extend_from_slice(bytemuck::try_cast_slice(bytes).ok()?),
            DType::F16 => {
                let bits: &[u16] = bytemuck::try_cast_slice(bytes).ok()?;
                values.resize(bits.len(), 0f32);
                bits.reinterpret_cast::<half::f16>().convert_to_f32_slice(&mut values);
            }
            DType::I8 | DType::I32 => return None,
        }
        let mut norms = Self { largest: vec![0.0; n * c], squares: vec![0.0; c], outputs: n, taps };
        // [ceil(n / 16)][taps][c][16]
        for (panel, window) in values.chunks_exact(taps * c * 16).enumerate() {
            for (at, row) in window.chunks_exact(16).enumerate() {
                let channel = at % c;
                for (output, &w) in (panel * 16..n).zip(row) {
                    let slot = &mut norms.largest[output * c + channel];
                    *slot = slot.max(w.abs());
                    norms.squares[channel] += f64::from(w) * f64::from(w);
                }
            }
        }
        Some(norms)
    }

    fn channels(&self) -> usize {
        self.squares.len()
    }

    /// Noise power of the layer's output, summed over output channels, that rounding the weights adds under
    /// `scale`: each of n's weights is off by δ/√12 with `δ[n] = max_c |w[n, c] / e[c]| / 127`.
    pub(crate) fn weight_noise(&self, inputs: &Moments, scale: Option<&[f32]>) -> f64 {
        let e = |c: usize| scale.map_or(1.0, |s| f64::from(s[c]));
        let inverse: Vec<f32> = (0..self.channels()).map(|c| (1.0 / e(c)) as f32).collect();
        let steps: f64 = (0..self.outputs)
            .map(|n| {
                let row = &self.largest[n * self.channels()..][..self.channels()];
                let most = row.iter().zip(&inverse).fold(0f32, |m, (w, i)| m.max(w * i));
                (f64::from(most) / 127.0).powi(2) / 12.0
            })
            .sum();
        let power: f64 = (0..self.channels()).map(|c| inputs.mean_square(c) * e(c) * e(c)).sum();
        steps * power * self.taps as f64
    }

    /// Noise power of the layer's output, summed over output channels, where each scaled input is off by a
    /// mean square of `error`.
    pub(crate) fn input_noise(&self, error: f64, scale: Option<&[f32]>) -> f64 {
        let weights: f64 = (0..self.channels())
            .map(|c| self.squares[c] / scale.map_or(1.0, |s| f64::from(s[c]) * f64::from(s[c])))
            .sum();
        error * weights
    }
}

/// The equalisers worth measuring for a layer with inputs `all` (in each group of timesteps: `groups`):
/// none at all first, then, where they promise less noise than none, the best that gives each segment one
/// factor, and the best that gives each channel its own.
pub(crate) fn candidates(
    norms: &WeightNorms,
    all: &Moments,
    groups: &[Moments],
    segments: &[u32],
) -> Vec<Option<Vec<f32>>> {
    let promise = |scale: Option<&[f32]>| {
        let error: f64 = groups.iter().map(|g| rounding(g, scale)).sum();
        norms.input_noise(error / groups.len().max(1) as f64, scale)
            + norms.weight_noise(all, scale)
    };
    let plain = promise(None);
    let each: Vec<u32> = vec![1; norms.channels()];
    let mut found = vec![None];
    for parts in [segments, &each[..]] {
        if parts.len() < 2 {
            continue;
        }
        let best = STRENGTHS
            .iter()
            .map(|&strength| {
                let scale = smooth(norms, all, parts, strength);
                (promise(Some(&scale)), scale)
            })
            .min_by(|a, b| a.0.total_cmp(&b.0));
        if let Some((noise, scale)) = best
            && noise < plain
            && !found.contains(&Some(scale.clone()))
        {
            found.push(Some(scale));
        }
    }
    found
}

/// The mean squared error that rounding to 255 steps between the scaled extremes makes.
fn rounding(inputs: &Moments, scale: Option<&[f32]>) -> f64 {
    let (mut lo, mut hi) = (0f64, 0f64);
    for c in 0..inputs.channels() {
        let e = scale.map_or(1.0, |s| f64::from(s[c]));
        lo = lo.min(f64::from(inputs.min[c]) * e);
        hi = hi.max(f64::from(inputs.max[c]) * e);
    }
    ((hi - lo) / 255.0).powi(2) / 12.0
}

/// The equaliser of strength α, one factor for each of `parts` (channels in a row), the geometric mean of
/// all channels' factors being 1. Parts whose inputs or weights are all 0 have 1.
fn smooth(norms: &WeightNorms, inputs: &Moments, parts: &[u32], strength: f64) -> Vec<f32> {
    let channels = norms.channels();
    let mut weights = vec![0f32; channels];
    for row in norms.largest.chunks_exact(channels) {
        weights.iter_mut().zip(row).for_each(|(m, w)| *m = m.max(*w));
    }
    let mut logs: Vec<Option<f64>> = Vec::with_capacity(channels);
    for &len in parts {
        let part = logs.len()..(logs.len() + len as usize).min(channels);
        let most = |f: &dyn Fn(usize) -> f32| part.clone().map(f).fold(0f32, f32::max);
        let (x, w) = (most(&|c| inputs.largest(c)), most(&|c| weights[c]));
        let log = (x > 0.0 && w > 0.0).then(|| {
            (1.0 - strength) * libm::log(f64::from(w)) - strength * libm::log(f64::from(x))
        });
        logs.resize(part.end, log);
    }
    let known: Vec<f64> = logs.iter().copied().flatten().collect();
    let mean = known.iter().sum::<f64>() / known.len().max(1) as f64;
    logs.iter()
        .map(|log| log.map_or(1.0, |l| libm::exp(l - mean).clamp(1.0 / MOST, MOST) as f32))
        .collect()
}

/// The channels of each map that is joined into `value`, through whatever keeps channels apart.
pub(crate) fn segments(graph: &Graph, value: ValueId) -> Vec<u32> {
    let mut at = value;
    loop {
        let producer: Option<&Node> = graph.nodes.iter().find(|n| n.output == at);
        match producer.map(|n| (&n.op, &n.inputs)) {
            Some((Op::Concat, inputs)) => {
                return inputs.iter().map(|&v| graph.kind(v).channels()).collect();
            }
            Some((
                Op::GroupNorm { .. }
                | Op::Silu
                | Op::AddChannel
                | Op::ScaleShift
                | Op::Upsample2x
                | Op::AvgPool2x
                | Op::Affine { .. },
                inputs,
            )) => at = inputs[0],
            _ => return vec![graph.kind(value).channels()],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use latile_runtime::graph::{Port, ValueKind};

    fn norms(w: &[[f32; 3]]) -> WeightNorms {
        let largest: Vec<f32> = w.iter().flatten().map(|v| v.abs()).collect();
        let squares = (0..3).map(|c| w.iter().map(|row| f64::from(row[c]).powi(2)).sum()).collect();
        WeightNorms { largest, squares, outputs: w.len(), taps: 1 }
    }

    fn inputs(rows: &[[f32; 3]]) -> Moments {
        let mut m = Moments::new(3);
        m.add(&rows.concat()).unwrap();
        m
    }

    /// Rounds inputs and weights as int8 does and measures the mean squared error of the output.
    fn measured(w: &[[f32; 3]], x: &[[f32; 3]], e: Option<&[f32]>) -> f64 {
        let e = |c: usize| e.map_or(1.0, |e| f64::from(e[c]));
        let scaled = |r: &[f32; 3], c: usize| f64::from(r[c]) * e(c);
        let all = || x.iter().flat_map(|r| (0..3).map(move |c| scaled(r, c)));
        let hi = all().fold(0f64, f64::max);
        let lo = all().fold(0f64, f64::min);
        let (s, z) = crate::choose::cover(lo, hi).unwrap();
        let s = f64::from(s);
        let q = |v: f64| ((v / s).round_ties_even().clamp(-f64::from(z), 255.0 - f64::from(z))) * s;
        let mut error = 0.0;
        for row in w {
            let step = (0..3).map(|c| (f64::from(row[c]) / e(c)).abs()).fold(0.0, f64::max) / 127.0;
            for r in x {
                let (mut exact, mut rounded) = (0.0, 0.0);
                for c in 0..3 {
                    exact += f64::from(row[c]) * f64::from(r[c]);
                    let wq = (f64::from(row[c]) / e(c) / step).round() * step;
                    rounded += wq * q(scaled(r, c));
                }
                error += (exact - rounded).powi(2);
            }
        }
        error / x.len() as f64
    }

    fn example() -> (Vec<[f32; 3]>, Vec<[f32; 3]>) {
        let mut state = 7u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 * 2.0 - 1.0
        };
        let w = (0..40).map(|_| [next() * 0.01, next(), next() * 0.5]).collect();
        let x = (0..500).map(|_| [next() * 100.0, next(), next() * 0.2]).collect();
        (w, x)
    }

    #[test]
    fn the_predicted_noise_is_the_measured_one() {
        let (w, x) = example();
        let (n, m) = (norms(&w), inputs(&x));
        let e = [0.02, 2.0, 5.0];
        for e in [None, Some(&e[..])] {
            let predicted = n.input_noise(rounding(&m, e), e) + n.weight_noise(&m, e);
            let found = measured(&w, &x, e);
            assert!((0.6..1.6).contains(&(predicted / found)), "{predicted} {found}");
        }
    }

    #[test]
    fn equalised_channels_lose_less() {
        let (w, x) = example();
        let (n, m) = (norms(&w), inputs(&x));
        let found = candidates(&n, &m, std::slice::from_ref(&m), &[1, 2]);
        assert_eq!(found.len(), 3, "none, by segment, by channel: {found:?}");
        assert_eq!(found[0], None);
        let losses: Vec<f64> = found.iter().map(|e| measured(&w, &x, e.as_deref())).collect();
        assert!(losses[1] < losses[0] / 10.0 && losses[2] < losses[0] / 10.0, "{losses:?}");
        let segment = found[1].as_ref().unwrap();
        assert_eq!(segment[1], segment[2], "one factor for the second segment");
        assert_ne!(segment[0], segment[1]);
    }

    #[test]
    fn equal_channels_need_no_equaliser() {
        let w: Vec<[f32; 3]> = (0..8).map(|i| [0.5 - i as f32 / 16.0; 3]).collect();
        let x: Vec<[f32; 3]> = (0..64).map(|i| [i as f32 / 64.0; 3]).collect();
        let (n, m) = (norms(&w), inputs(&x));
        assert_eq!(candidates(&n, &m, std::slice::from_ref(&m), &[3]), [None]);
    }

    #[test]
    fn a_dead_channel_keeps_its_factor() {
        let x: Vec<[f32; 3]> = (0..9).map(|i| [0.0, i as f32, 90.0]).collect();
        let e = smooth(&norms(&[[1.0, 1.0, 1.0]]), &inputs(&x), &[1, 1, 1], 1.0);
        assert_eq!(e[0], 1.0);
        assert!(e.iter().all(|v| v.is_normal() && *v > 0.0), "{e:?}");
        assert!((f64::from(e[1]) * f64::from(e[2]) - 1.0).abs() < 1e-6);
        let silent = smooth(&norms(&[[0.0; 3]]), &inputs(&[[0.0; 3]]), &[1, 1, 1], 0.5);
        assert_eq!(silent, [1.0; 3]);
    }

    #[test]
    fn segments_are_found_behind_norm_and_activation() {
        let map = |c| ValueKind::Map(c);
        let node = |name: &str, op: Op, inputs: &[u32], output: u32| Node {
            name: name.to_owned(),
            op,
            inputs: inputs.iter().map(|&v| ValueId(v)).collect(),
            output: ValueId(output),
        };
        let port = |name: &str, v| Port { name: name.to_owned(), value: ValueId(v) };
        let graph = Graph {
            inputs: vec![port("a", 0), port("b", 1)],
            outputs: vec![port("y", 4)],
            values: vec![map(6), map(2), map(8), map(8), map(8)],
            weights: Vec::new(),
            nodes: vec![
                node("cat", Op::Concat, &[0, 1], 2),
                node("act", Op::Silu, &[2], 3),
                node("up", Op::Upsample2x, &[3], 4),
            ],
        };
        graph.validate().unwrap();
        assert_eq!(segments(&graph, ValueId(4)), [6, 2]);
        assert_eq!(segments(&graph, ValueId(0)), [6]);
    }
}
