//! Attention of bytes against its definition bit for bit, and against a plain softmax in f64.

use super::super::tests::{Case, columns, exact, shape};
use super::super::*;
use crate::naive::attention_int8;
use crate::steps::element::testing::{Tensor, assert_bits, random};

/// The definition, of a case's operands.
fn definition(case: &Case, q: &Tensor, kv: &Tensor) -> Vec<f32> {
    let AttentionShape { channels, heads, .. } = case.shape;
    let part = |first| columns(&kv.widened(), 2 * channels + 3, first, channels);
    attention_int8(&q.widened(), &part(1), &part(channels + 2), channels, heads, case.scale())
}

#[test]
fn same_bits_as_the_definition_everywhere() {
    let shapes = [
        shape(1, 1, 8, 1),
        shape(1, 300, 1, 1),
        shape(15, 15, 16, 2),
        shape(16, 63, 15, 1),
        shape(17, 255, 17, 1),
        shape(83, 256, 32, 1),
        shape(84, 257, 24, 3),
        shape(85, 129, 33, 3),
        shape(49, 49, 80, 2),
        shape(29, 30, 520, 1),
        shape(12, 70, 513, 1),
        shape(100, 530, 24, 3),
        shape(7, 513, 512, 1),
    ];
    for shape in shapes {
        for half in [false, true] {
            let case = Case { shape, half, sharpness: 4.0, int8: true };
            let (q, kv) = case.operands();
            let expected = Tensor::new(&definition(&case, &q, &kv), half).widened();
            for level in Level::available() {
                for threads in 1..=4 {
                    let found = case.run(level, threads, &q, &kv);
                    let what = format!("{shape:?} half {half} {} x{threads}", level.isa());
                    assert_bits(&found, &expected, &what);
                }
            }
        }
    }
}

/// One head: queries, keys and values by every level, and by the definition, which must agree.
fn by_all(q: &[f32], k: &[f32], v: &[f32], d: usize, scale: f32) -> Vec<f32> {
    let expected = attention_int8(q, k, v, d, 1, scale);
    for level in Level::available() {
        let plan =
            AttentionPlan::int8(shape(q.len() / d, k.len() / d, d, 1), scale, level, 1).unwrap();
        let mut scratch = vec![f32::NAN; plan.scratch_len()];
        let mut out = vec![f32::NAN; q.len()];
        let args = AttentionArgs {
            q: Queries::Of(Columns::whole(Source::F32(q), d)),
            k: Columns::whole(Source::F32(k), d),
            v: Columns::whole(Source::F32(v), d),
            out: Output::F32(&mut out),
        };
        attention(&plan, &Pool::new(1).unwrap(), args, &mut scratch).unwrap();
        assert_bits(&out, &expected, &format!("{}", level.isa()));
    }
    expected
}

#[test]
fn extremes_give_what_they_should() {
    let (keys, d) = (300, 20);
    let v = random(keys * d, 1);
    // Queries of zeros, and keys that are all alike: the mean of the values, as bytes of each block.
    let mean = |c: usize| v.chunks(d).map(|v| v[c]).sum::<f32>() / keys as f32;
    for (q, k) in [(vec![0.0; d], random(keys * d, 2)), (random(d, 3), random(d, 4).repeat(keys))] {
        let out = by_all(&q, &k, &v, d, 1.0);
        for (c, x) in out.iter().enumerate() {
            assert!((x - mean(c)).abs() < 1e-3, "{x}, not {}", mean(c));
        }
    }
    // One dominant key, in the second block or the first: its values, to a byte's half step.
    for dominant in [0, 77, 255, 256, 299] {
        let mut k = vec![0.0; keys * d];
        k[dominant * d..][..d].fill(40.0);
        let out = by_all(&vec![1.0; d], &k, &v, d, 1.0);
        for (x, v) in out.iter().zip(&v[dominant * d..]) {
            assert!((x - v).abs() <= 0.5001 / 127.0, "{x}, not {v}");
        }
        // Turned around, it is the only one without weight.
        let out = by_all(&vec![1.0; d], &k, &v, d, -1.0);
        for (c, x) in out.iter().enumerate() {
            let others = (mean(c) * keys as f32 - v[dominant * d + c]) / (keys - 1) as f32;
            assert!((x - others).abs() < 1e-3, "{x}, not {others}");
        }
    }
    // Values of zeros, of the largest bytes alone, and numbers whose inverse would be infinite.
    let (q, k) = (random(3 * d, 5), random(keys * d, 6));
    assert!(by_all(&q, &k, &vec![0.0; keys * d], d, 1.0).iter().all(|x| *x == 0.0));
    for extreme in [2.0_f32, -2.0] {
        let out = by_all(&q, &k, &vec![extreme; keys * d], d, 0.0);
        assert!(out.iter().all(|x| (x - extreme).abs() < 1e-6), "{out:?}");
    }
    let tiny: Vec<f32> = v.iter().map(|v| v * 1e-42).collect();
    assert!(by_all(&tiny[..d], &tiny, &tiny, d, 1.0).iter().all(|x| x.abs() < 1e-30));
    // Every product the largest that there is: sums stay exact.
    let d = 512;
    let signs: Vec<f32> = random(keys * d, 7).iter().map(|x| 1e18_f32.copysign(*x)).collect();
    assert!(by_all(&signs[..3 * d], &signs, &signs, d, 1e-20).iter().all(|x| x.is_finite()));
}

#[test]
fn damage_shows_where_it_had_a_part() {
    let (keys, d) = (300, 20);
    let (q, k, v) = (random(3 * d, 1), random(keys * d, 2), random(keys * d, 3));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let with = |x: &[f32], at: usize| {
            let mut x = x.to_vec();
            x[at] = bad;
            x
        };
        let out = by_all(&with(&q, d + 7), &k, &v, d, 1.0);
        let whole = by_all(&q, &k, &v, d, 1.0);
        assert!(out[d..2 * d].iter().all(|x| x.is_nan()));
        assert_eq!((&out[..d], &out[2 * d..]), (&whole[..d], &whole[2 * d..]));
        assert!(by_all(&q, &with(&k, 270 * d + 19), &v, d, 1.0).iter().all(|x| x.is_nan()));
        let out = by_all(&q, &k, &with(&v, 270 * d + 19), d, 1.0);
        for (c, x) in out.iter().enumerate() {
            assert_eq!(x.is_nan(), c % d == 19, "{c}");
        }
    }
}

/// Numbers of a normal distribution (Box and Muller 1958).
fn normal(n: usize, seed: u64) -> Vec<f32> {
    let uniform = |seed| random(n, seed).into_iter().map(|x| f64::from(x).mul_add(0.5, 0.5));
    let one = |(a, b): (f64, f64)| {
        (libm::sqrt(-2.0 * libm::log(a.max(1e-9))) * libm::cos(std::f64::consts::TAU * b)) as f32
    };
    uniform(seed).zip(uniform(seed + 1000)).map(one).collect()
}

/// The ratio of signal to error in dB, for queries that are `sharpness` times a normal
/// distribution, and keys with a part of size `shared` that all of them have.
fn sqnr(shape: AttentionShape, sharpness: f32, shared: f32) -> f64 {
    let AttentionShape { queries, keys, channels, .. } = shape;
    let q: Vec<f32> = normal(queries * channels, 1).iter().map(|x| x * sharpness).collect();
    let mut kv = normal(keys * (2 * channels + 3), 2);
    let offset = normal(2 * channels + 3, 3);
    for row in kv.chunks_mut(2 * channels + 3) {
        for (x, o) in row[..channels].iter_mut().zip(&offset) {
            *x += o * shared;
        }
    }
    let case = Case { shape, half: true, sharpness, int8: true };
    let (q, kv) = (Tensor::new(&q, true), Tensor::new(&kv, true));
    let expected = case.by(&q, &kv, exact);
    let found = case.run(Level::best(), 2, &q, &kv);
    let power: f64 = expected.iter().map(|x| x * x).sum();
    let error: f64 =
        found.iter().zip(&expected).map(|(f, e)| (f64::from(*f) - e) * (f64::from(*f) - e)).sum();
    10.0 * libm::log10(power / error)
}

#[test]
fn close_to_a_softmax_in_f64() {
    // Scores of variance `sharpness` squared. Flat softmaxes lose by rounding small averages of
    // values, peaked ones by the scores' errors, which grow with the scores.
    for (shape, sharpness, shared, least) in [
        (shape(20, 64, 256, 8), 1.0, 0.0, 35.0),
        (shape(20, 1024, 512, 1), 0.1, 0.0, 35.0),
        (shape(20, 1024, 512, 1), 1.0, 0.0, 35.0),
        (shape(20, 1024, 512, 1), 1.0, 4.0, 35.0),
        (shape(20, 1024, 512, 1), 3.0, 0.0, 29.0),
        (shape(20, 1024, 512, 1), 3.0, 4.0, 29.0),
        (shape(8, 4096, 512, 1), 1.0, 1.0, 35.0),
        (shape(8, 4096, 512, 1), 2.0, 0.0, 31.0),
        (shape(8, 4096, 512, 1), 5.0, 0.0, 25.0),
        (shape(40, 1024, 64, 2), 2.0, 1.0, 30.0),
    ] {
        let found = sqnr(shape, sharpness, shared);
        println!("{shape:?} scores {sharpness} keys' shared part {shared}: {found:.1} dB");
        assert!(found >= least, "{shape:?} x{sharpness}: {found:.1} dB");
    }
}

#[test]
fn wrong_shapes_are_refused_and_scratch_is_checked() {
    let level = Level::best();
    for bad in [shape(0, 1, 8, 1), shape(1, 1, 8, 3), shape(1, 1, 1 << 17, 1)] {
        let error = AttentionPlan::int8(bad, 1.0, level, 1).unwrap_err();
        assert!(matches!(error, StepError::Shape { .. }), "{error}");
    }
    let plan = AttentionPlan::int8(shape(4, 4, 8, 2), 1.0, level, 1).unwrap();
    assert!(plan.is_int8());
    let x = [0.0; 32];
    let mut out = [0.0; 32];
    let whole = Columns::whole(Source::F32(&x), 8);
    let args =
        AttentionArgs { q: Queries::Of(whole), k: whole, v: whole, out: Output::F32(&mut out) };
    let mut scratch = vec![0.0; plan.scratch_len() - 1];
    let error = attention(&plan, &Pool::new(1).unwrap(), args, &mut scratch).unwrap_err();
    assert!(error.to_string().contains("scratch"), "{error}");
}

/// Not a test of results: prints the rate on one thread next to that of the float one, by
/// processor time, in turns. `LATILE_TOKENS=16384` and the like measure one size alone.
#[test]
#[ignore = "a measurement: cargo test --release -p latile-cpu --lib -- --ignored --nocapture"]
fn rate() {
    use crate::peak::processor_time;
    let pool = Pool::new(1).unwrap();
    let sizes = match std::env::var("LATILE_TOKENS") {
        Ok(tokens) => {
            let tokens = tokens.parse().unwrap();
            vec![shape(tokens, tokens, 512, 1)]
        }
        Err(_) => vec![
            shape(336, 4096, 512, 1),
            shape(1024, 1024, 512, 1),
            shape(1024, 1024, 64, 1),
            shape(1024, 1024, 320, 10),
            shape(256, 256, 640, 20),
            shape(64, 64, 640, 20),
            shape(64, 64, 128, 4),
            shape(64, 64, 128, 1),
        ],
    };
    for level in Level::available().into_iter().rev() {
        if level.isa() == Isa::Scalar {
            continue;
        }
        for &shape in &sizes {
            let AttentionShape { queries, keys, channels, .. } = shape;
            let q = Tensor::new(&random(queries * channels, 1), true);
            let kv = Tensor::new(&random(keys * channels, 2), true);
            let mut out = Tensor::new(&vec![0.0; queries * channels], true);
            let mut best = [f64::INFINITY; 2];
            let plans = [AttentionPlan::new, AttentionPlan::int8]
                .map(|plan| plan(shape, 1.0, level, 1).unwrap());
            let runs = (2_000_000_000 / plans[0].macs()).clamp(1, 20);
            for _ in 0..runs {
                for (best, plan) in best.iter_mut().zip(&plans) {
                    let mut scratch = vec![0.0; plan.scratch_len()];
                    let args = AttentionArgs {
                        q: Queries::Of(Columns::whole(q.source(), channels)),
                        k: Columns::whole(kv.source(), channels),
                        v: Columns::whole(kv.source(), channels),
                        out: out.output(),
                    };
                    let start = processor_time().unwrap();
                    attention(plan, &pool, args, &mut scratch).unwrap();
                    *best = best.min((processor_time().unwrap() - start).as_secs_f64());
                }
            }
            let [float, int8] = best.map(|t| plans[0].macs() as f64 / t / 1e9);
            println!(
                "{} {shape:?}: float {float:.1}, int8 {int8:.1} GMAC/s, x{:.2}, {:.1} ms",
                level.isa(),
                int8 / float,
                best[1] * 1e3
            );
        }
    }
}

/// Not a test of results: to be run alone where executed instructions are counted.
#[test]
#[ignore = "a measurement: cargo test --release -p latile-cpu --lib -- --ignored --nocapture"]
fn work() {
    let case = Case { shape: shape(192, 512, 512, 1), half: false, sharpness: 1.0, int8: true };
    let (q, kv) = case.operands();
    case.run(Level::best(), 1, &q, &kv);
    println!("{} multiply-adds", 2 * 192 * 512 * 512);
}
