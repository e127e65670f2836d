//! The sinusoidal projection, recognised by its values.

use super::recognise::PROBES;
use super::tensor::Tensor;
use latile_runtime::format::TimestepProjection;

/// How far a projection may lie from the recognised one: exporters compute sines of large angles in f32.
const TOLERANCE: f32 = 2e-3;

/// The projection whose values at [`PROBES`] these are.
pub(super) fn fit(values: &[Tensor]) -> Result<TimestepProjection, String> {
    let dims = &values[0].dims;
    let &[1, len] = &dims[..] else {
        return Err(format!("a timestep embedding of shape {dims:?}"));
    };
    let unknown = || "what it computes from the timestep is not a sinusoidal projection".to_owned();
    if len < 2 || !len.is_multiple_of(2) {
        return Err(unknown());
    }
    let half = len / 2;
    let one = values.get(1).ok_or_else(unknown)?.as_floats();
    for flip_sin_to_cos in [true, false] {
        let (cos, sin) = if flip_sin_to_cos {
            one.split_at(half)
        } else {
            let (s, c) = one.split_at(half);
            (c, s)
        };
        // At timestep 1 the angles are the frequencies themselves; the second tells the shift.
        let freq_shift = match (sin.get(1), cos.get(1)) {
            (Some(&s), Some(&c)) => {
                let ln = f64::from(s).atan2(f64::from(c)).ln();
                let shift = half as f64 + 10_000f64.ln() / ln;
                ((shift * 1000.0).round() / 1000.0) as f32
            }
            _ => 0.0,
        };
        if !freq_shift.is_finite() || freq_shift >= half as f32 {
            continue;
        }
        let found = TimestepProjection { dim: len as u32, flip_sin_to_cos, freq_shift };
        let mut expected = vec![0f32; len];
        let fits = PROBES.iter().zip(values).all(|(&t, v)| {
            found.project(t as f32, &mut expected);
            v.dims == *dims
                && v.as_floats().iter().zip(&expected).all(|(a, b)| (a - b).abs() <= TOLERANCE)
        });
        if fits {
            return Ok(found);
        }
    }
    Err(unknown())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn projections_are_told_by_their_values() {
        for (dim, flip_sin_to_cos, freq_shift) in
            [(160, true, 0.0), (4, true, 0.0), (8, false, 1.0), (32, false, 0.0), (64, true, 0.5)]
        {
            let p = TimestepProjection { dim, flip_sin_to_cos, freq_shift };
            let values: Vec<Tensor> = PROBES
                .iter()
                .map(|&t| {
                    let mut out = vec![0f32; dim as usize];
                    p.project(t as f32, &mut out);
                    Tensor::floats(&[1, dim as usize], out)
                })
                .collect();
            assert_eq!(fit(&values), Ok(p));
            let mut other = values.clone();
            if let super::super::tensor::Elements::F(v) = &mut other[3].data {
                v[1] += 0.1;
            }
            assert!(fit(&other).is_err());
        }
    }
}
