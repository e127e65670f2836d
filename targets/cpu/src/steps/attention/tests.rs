//! Attention against its definition bit for bit, and against a plain softmax in f64.

use super::super::element::testing::{Tensor, assert_bits, random};
use super::*;
use crate::simd::Scalar;

fn exp(x: f32) -> f32 {
    math::exp(Scalar::new(), [x; LANES])[0]
}

/// The module's definition, for one query; `k` and `v` are rows of `d`.
fn definition(q: &[f32], k: &[f32], v: &[f32], scale: f32) -> Vec<f32> {
    let d = q.len();
    let q: Vec<f32> = q.iter().map(|x| x * scale).collect();
    let (mut m, mut l, mut o) = (f32::NEG_INFINITY, 0.0_f32, vec![0.0_f32; d]);
    for (k, v) in k.chunks(64 * d).zip(v.chunks(64 * d)) {
        let t: Vec<f32> = k
            .chunks(d)
            .map(|k| k.iter().zip(&q).fold(0.0, |sum, (k, q)| k.mul_add(*q, sum)))
            .collect();
        let before = m;
        for &t in &t {
            m = if t > m { t } else { m };
        }
        let a = exp(before - m);
        let p: Vec<f32> = t.iter().map(|t| exp(t - m)).collect();
        l = l.mul_add(a, p.iter().sum());
        for (c, o) in o.iter_mut().enumerate() {
            let sum = p.iter().zip(v.chunks(d)).fold(0.0, |sum, (p, v)| p.mul_add(v[c], sum));
            *o = o.mul_add(a, sum);
        }
    }
    o.iter().map(|o| o / l).collect()
}

/// Softmax as it is written, in f64.
pub(super) fn exact(q: &[f32], k: &[f32], v: &[f32], scale: f32) -> Vec<f64> {
    let d = q.len();
    let t: Vec<f64> = k
        .chunks(d)
        .map(|k| {
            k.iter().zip(q).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum::<f64>()
                * f64::from(scale)
        })
        .collect();
    let m = t.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let p: Vec<f64> = t.iter().map(|t| libm::exp(t - m)).collect();
    let l: f64 = p.iter().sum();
    (0..d)
        .map(|c| p.iter().zip(v.chunks(d)).map(|(p, v)| p * f64::from(v[c])).sum::<f64>() / l)
        .collect()
}

/// Columns `first..first + d` of rows of `stride`.
pub(super) fn columns(x: &[f32], stride: usize, first: usize, d: usize) -> Vec<f32> {
    x.chunks(stride).flat_map(|row| &row[first..first + d]).copied().collect()
}

pub(super) struct Case {
    pub(super) shape: AttentionShape,
    pub(super) half: bool,
    /// Multiplies random queries, to make the softmax sharper.
    pub(super) sharpness: f32,
    pub(super) int8: bool,
}

impl Case {
    pub(super) fn scale(&self) -> f32 {
        1.0 / ((self.shape.channels / self.shape.heads) as f32).sqrt()
    }

    /// Queries, and the keys and values as parts of one buffer.
    pub(super) fn operands(&self) -> (Tensor, Tensor) {
        let AttentionShape { queries, keys, channels, .. } = self.shape;
        let q: Vec<f32> =
            random(queries * channels, 1).iter().map(|x| x * self.sharpness).collect();
        (Tensor::new(&q, self.half), Tensor::new(&random(keys * (2 * channels + 3), 2), self.half))
    }

    pub(super) fn run(&self, level: Level, threads: usize, q: &Tensor, kv: &Tensor) -> Vec<f32> {
        let AttentionShape { queries, channels, .. } = self.shape;
        let plan = if self.int8 { AttentionPlan::int8 } else { AttentionPlan::new };
        let plan = plan(self.shape, self.scale(), level, threads).unwrap();
        let pool = Pool::new(threads).unwrap();
        // What the scratch and the output held before must not matter.
        let mut scratch = vec![f32::NAN; plan.scratch_len()];
        let mut out = Tensor::new(&vec![f32::NAN; queries * channels], self.half);
        let part = |first| Columns { data: kv.source(), stride: 2 * channels + 3, first };
        let args = AttentionArgs {
            q: Queries::Of(Columns::whole(q.source(), channels)),
            k: part(1),
            v: part(channels + 2),
            out: out.output(),
        };
        attention(&plan, &pool, args, &mut scratch).unwrap();
        let mut replaced = Tensor::new(&q.widened(), self.half);
        let args = AttentionArgs {
            q: Queries::InPlace,
            k: part(1),
            v: part(channels + 2),
            out: replaced.output(),
        };
        attention(&plan, &pool, args, &mut scratch).unwrap();
        assert_bits(&replaced.widened(), &out.widened(), "in place");
        out.widened()
    }

    /// Every head and query by `f`.
    pub(super) fn by<T: Copy + Default>(
        &self,
        q: &Tensor,
        kv: &Tensor,
        f: impl Fn(&[f32], &[f32], &[f32], f32) -> Vec<T>,
    ) -> Vec<T> {
        let AttentionShape { queries, channels, heads, .. } = self.shape;
        let d = channels / heads;
        let (q, kv) = (q.widened(), kv.widened());
        let mut out = vec![T::default(); queries * channels];
        for head in 0..heads {
            let k = columns(&kv, 2 * channels + 3, 1 + head * d, d);
            let v = columns(&kv, 2 * channels + 3, channels + 2 + head * d, d);
            for query in 0..queries {
                let at = query * channels + head * d;
                out[at..at + d].copy_from_slice(&f(&q[at..at + d], &k, &v, self.scale()));
            }
        }
        out
    }
}

pub(super) fn shape(queries: usize, keys: usize, channels: usize, heads: usize) -> AttentionShape {
    AttentionShape { queries, keys, channels, heads }
}

#[test]
fn same_bits_as_the_definition_everywhere() {
    let shapes = [
        shape(1, 1, 8, 1),
        shape(1, 200, 1, 1),
        shape(15, 15, 16, 2),
        shape(16, 63, 15, 1),
        shape(17, 64, 17, 1),
        shape(95, 65, 32, 1),
        shape(96, 127, 96, 3),
        shape(97, 129, 33, 3),
        shape(49, 49, 80, 2),
        shape(111, 30, 520, 1),
        shape(12, 70, 513, 1),
        shape(200, 200, 24, 3),
    ];
    for shape in shapes {
        for half in [false, true] {
            let case = Case { shape, half, sharpness: 4.0, int8: false };
            let (q, kv) = case.operands();
            let expected = case.by(&q, &kv, definition);
            let expected = Tensor::new(&expected, half).widened();
            for level in Level::float_levels() {
                for threads in 1..=4 {
                    let found = case.run(level, threads, &q, &kv);
                    let what = format!("{shape:?} half {half} {} x{threads}", level.isa());
                    assert_bits(&found, &expected, &what);
                }
            }
        }
    }
}

#[test]
fn close_to_a_softmax_in_f64() {
    // Relative to the result's range. Scores carry rounding errors of their own size, so the
    // sharper softmaxes, whose largest scores are near 10 and 50, are allowed more.
    for (shape, sharpness, tolerance) in [
        (shape(33, 1024, 64, 2), 1.0, 2e-6),
        (shape(20, 700, 512, 1), 1.0, 2e-6),
        (shape(3, 4096, 512, 1), 3.0, 2e-6),
        (shape(3, 16384, 40, 1), 3.0, 2e-6),
        (shape(20, 700, 512, 1), 8.0, 1e-5),
        (shape(40, 3000, 8, 1), 40.0, 1e-5),
    ] {
        let case = Case { shape, half: false, sharpness, int8: false };
        let (q, kv) = case.operands();
        let expected = case.by(&q, &kv, exact);
        let range = expected.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
        let found = case.run(Level::best(), 2, &q, &kv);
        let worst =
            found.iter().zip(&expected).fold(0.0_f64, |m, (f, e)| m.max((f64::from(*f) - e).abs()));
        println!("{shape:?} x{sharpness}: {:.2e} of the range", worst / range);
        assert!(worst <= tolerance * range, "{shape:?}: {worst:e} of {range:e}");
    }
}

#[test]
fn extreme_scores_stay_finite_and_damage_shows() {
    // Scores of ±2·10^4 in rising order: every block rescales, most weights vanish.
    let keys = 200;
    let k: Vec<f32> = (0..keys).map(|i| i as f32 * 200.0 - 20_000.0).collect();
    let v: Vec<f32> = (0..keys).map(|i| i as f32).collect();
    let run = |q: &[f32], k: &[f32]| {
        let plan = AttentionPlan::new(shape(q.len(), keys, 1, 1), 1.0, Level::best(), 1).unwrap();
        let mut scratch = vec![0.0; plan.scratch_len()];
        let mut out = vec![0.0; q.len()];
        let args = AttentionArgs {
            q: Queries::Of(Columns::whole(Source::F32(q), 1)),
            k: Columns::whole(Source::F32(k), 1),
            v: Columns::whole(Source::F32(&v), 1),
            out: Output::F32(&mut out),
        };
        attention(&plan, &Pool::new(1).unwrap(), args, &mut scratch).unwrap();
        out
    };
    assert_eq!(run(&[1.0, -1.0, 3e30], &k), [199.0, 0.0, 199.0]);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let out = run(&[1.0, bad, 1.0], &k);
        assert!(!out[1].is_finite(), "{bad}");
        assert_eq!([out[0], out[2]], [199.0, 199.0]);
        let mut k = k.clone();
        k[77] = bad;
        if bad != f32::NEG_INFINITY {
            assert!(run(&[1.0], &k).iter().all(|x| x.is_nan()), "{bad}");
        }
    }
}

#[test]
fn wrong_operands_are_refused() {
    let level = Level::best();
    for bad in [
        shape(0, 1, 8, 1),
        shape(1, 0, 8, 1),
        shape(1, 1, 0, 1),
        shape(1, 1, 8, 0),
        shape(1, 1, 8, 3),
        shape(usize::MAX / 8, 1, 64, 1),
    ] {
        let error = AttentionPlan::new(bad, 1.0, level, 1).unwrap_err();
        assert!(matches!(error, StepError::Shape { .. }), "{error}");
    }
    let plan = AttentionPlan::new(shape(4, 4, 8, 2), 1.0, level, 1).unwrap();
    let run = |q: usize, k: usize, first: usize, out: usize, scratch: usize, threads: usize| {
        let (q, k) = (vec![0.0; q], vec![0.0; k]);
        let mut out = vec![0.0; out];
        let args = AttentionArgs {
            q: Queries::Of(Columns::whole(Source::F32(&q), 8)),
            k: Columns { data: Source::F32(&k), stride: 8, first },
            v: Columns::whole(Source::F32(&k), 8),
            out: Output::F32(&mut out),
        };
        let pool = Pool::new(threads).unwrap();
        attention(&plan, &pool, args, &mut vec![0.0; scratch])
    };
    let scratch = plan.scratch_len();
    run(32, 32, 0, 32, scratch, 1).unwrap();
    assert!(run(31, 32, 0, 32, scratch, 1).unwrap_err().to_string().contains("queries"));
    assert!(run(32, 40, 0, 32, scratch, 1).unwrap_err().to_string().contains("keys"));
    assert!(run(32, 32, 1, 32, scratch, 1).unwrap_err().to_string().contains("column 1"));
    assert!(run(32, 32, 0, 40, scratch, 1).unwrap_err().to_string().contains("output"));
    assert!(run(32, 32, 0, 32, scratch - 1, 1).unwrap_err().to_string().contains("scratch"));
    assert!(run(32, 32, 0, 32, scratch, 2).unwrap_err().to_string().contains("threads"));
}

#[test]
fn few_tasks_divide_among_the_threads() {
    for threads in 1..=4 {
        for queries in [1, 16, 64, 100, 256, 300, 1024, 4096] {
            for heads in [1, 2, 3, 8] {
                let s = shape(queries, queries, 64 * heads, heads);
                let plan = AttentionPlan::new(s, 1.0, Level::best(), threads).unwrap();
                assert!(plan.units <= MAX_VECTORS);
                assert!(plan.blocks * plan.units * LANES >= queries);
                assert!((plan.blocks - 1) * plan.units * LANES < queries);
            }
        }
    }
    let plan = AttentionPlan::new(shape(256, 256, 512, 1), 1.0, Level::best(), 2).unwrap();
    assert_eq!(plan.tasks(), 4);
}

/// Not a test of results: prints the best rate of short runs on one thread next to that of a
/// convolution.
#[test]
#[ignore = "a measurement: cargo test --release -p latile-cpu --lib -- --ignored --nocapture"]
fn rate() {
    use super::super::conv::{
        Activation, ConvArgs, ConvPlan, ConvShape, Residual, Segment, Weights, conv2d,
    };
    let pool = Pool::new(1).unwrap();
    let best = |runs: usize, macs: u64, run: &mut dyn FnMut()| {
        let seconds = (0..runs)
            .map(|_| {
                let start = std::time::Instant::now();
                run();
                start.elapsed().as_secs_f64()
            })
            .fold(f64::INFINITY, f64::min);
        macs as f64 / seconds / 1e9
    };
    for level in Level::float_levels().into_iter().rev() {
        if level.isa() == Isa::Scalar {
            continue;
        }
        let conv = ConvShape::same(8, 16, 512, 512, 3);
        let plan = ConvPlan::new(conv, WeightType::F32, level).unwrap();
        let x = random(conv.out_len(), 1);
        let mut out = vec![0.0; x.len()];
        let weights = random(conv.packed_len(), 2);
        let mut scratch = vec![0.0; plan.scratch_len(1)];
        let rate = best(50, conv.macs(), &mut || {
            let args = ConvArgs {
                segments: &[Segment { data: Source::F32(&x), channels: 512, norm: None }],
                activation: Activation::None,
                weights: Weights::F32(&weights),
                bias: None,
                add: None,
                residual: Residual::None,
                output_scale: 1.0,
                out: Output::F32(&mut out),
                sums: None,
            };
            conv2d(&plan, &pool, args, &mut scratch).unwrap();
        });
        println!("{} convolution: {rate:.1} GMAC/s", level.isa());
        for (queries, keys, channels, heads) in
            [(192, 4096, 512, 1), (192, 1024, 512, 1), (192, 1024, 256, 4), (192, 1024, 640, 20)]
        {
            for half in [false, true] {
                let shape = shape(queries, keys, channels, heads);
                let q = Tensor::new(&random(queries * channels, 1), half);
                let kv = Tensor::new(&random(keys * channels, 2), half);
                let mut out = Tensor::new(&vec![0.0; queries * channels], half);
                let plan = AttentionPlan::new(shape, 1.0, level, 1).unwrap();
                let mut scratch = vec![0.0; plan.scratch_len()];
                let rate = best(50, plan.macs(), &mut || {
                    let args = AttentionArgs {
                        q: Queries::Of(Columns::whole(q.source(), channels)),
                        k: Columns::whole(kv.source(), channels),
                        v: Columns::whole(kv.source(), channels),
                        out: out.output(),
                    };
                    attention(&plan, &pool, args, &mut scratch).unwrap();
                });
                println!("{} {shape:?} half {half}: {rate:.1} GMAC/s", level.isa());
            }
        }
    }
}

/// Not a test of results: to be run alone where executed instructions are counted.
#[test]
#[ignore = "a measurement: cargo test --release -p latile-cpu --lib -- --ignored --nocapture"]
fn work() {
    let case = Case { shape: shape(192, 512, 512, 1), half: false, sharpness: 1.0, int8: false };
    let (q, kv) = case.operands();
    case.run(Level::best(), 1, &q, &kv);
    println!("{} multiply-adds", 2 * 192 * 512 * 512);
}
