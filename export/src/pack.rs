//! Weights as they lie in the file.

use half::f16;
use latile_runtime::graph::{Layout, WeightSpec};
use latile_runtime::tensor::DType;

/// Output channels that lie side by side.
const LANES: usize = 16;

/// A finite value that f16 cannot hold, and its index.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Overflow {
    pub(crate) index: usize,
    pub(crate) value: f32,
}

/// Replaces `out` by the stored form of `values`, which are in the order of `spec.shape`.
///
/// # Panics
/// Where `values` has another length than the shape says.
pub(crate) fn pack(spec: &WeightSpec, values: &[f32], out: &mut Vec<u8>) -> Result<(), Overflow> {
    let dims: Vec<usize> = spec.shape.iter().map(|&d| d as usize).collect();
    assert_eq!(values.len(), dims.iter().product::<usize>(), "{} has another size", spec.name);
    out.clear();
    match spec.dtype {
        DType::F32 => store(spec.layout, &dims, values, out, |v| Ok(v.to_le_bytes())),
        DType::F16 => store(spec.layout, &dims, values, out, |value| {
            let half = f16::from_f32(value);
            if half.is_finite() { Ok(half.to_le_bytes()) } else { Err(value) }
        }),
        DType::I8 | DType::I32 => unreachable!("{} is quantized, not packed", spec.name),
    }
}

fn store<const N: usize>(
    layout: Layout,
    dims: &[usize],
    values: &[f32],
    out: &mut Vec<u8>,
    encode: impl Fn(f32) -> Result<[u8; N], f32>,
) -> Result<(), Overflow> {
    let at = |index: usize| encode(values[index]).map_err(|value| Overflow { index, value });
    if layout == Layout::Plain {
        out.reserve(values.len() * N);
        for i in 0..values.len() {
            out.extend(at(i)?);
        }
        return Ok(());
    }
    // [n, c, kh, kw] to [ceil(n / 16)][kh · kw][c][16]: a kernel position is one step in the last two axes.
    let (n, c) = (dims[0], dims[1]);
    let window: usize = dims[2..].iter().product();
    out.resize(n.next_multiple_of(LANES) * c * window * N, 0);
    let (lanes, _) = out.as_chunks_mut::<N>();
    for (tile, block) in lanes.chunks_mut(LANES * c * window).enumerate() {
        for (step, row) in block.chunks_mut(LANES).enumerate() {
            let (position, channel) = (step / c, step % c);
            for (lane, slot) in row.iter_mut().enumerate().take(n - (tile * LANES).min(n)) {
                *slot = at(((tile * LANES + lane) * c + channel) * window + position)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(shape: &[u32], dtype: DType, layout: Layout) -> WeightSpec {
        WeightSpec { name: "w".into(), shape: shape.to_vec(), dtype, layout }
    }

    #[test]
    fn every_element_lands_where_the_layout_says() {
        for (n, c, kh, kw) in
            [(1usize, 1, 1, 1), (15, 3, 3, 3), (16, 2, 1, 3), (17, 5, 3, 1), (40, 4, 2, 2)]
        {
            let values: Vec<f32> = (0..n * c * kh * kw).map(|v| v as f32 + 1.0).collect();
            let shape = [n as u32, c as u32, kh as u32, kw as u32];
            let spec = spec(&shape, DType::F32, Layout::Packed16);
            let mut bytes = Vec::new();
            pack(&spec, &values, &mut bytes).unwrap();
            assert_eq!(Some(bytes.len()), spec.stored_bytes());
            let stored: Vec<f32> =
                bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let mut seen = 0;
            for o in 0..n.next_multiple_of(16) {
                for i in 0..c {
                    for y in 0..kh {
                        for x in 0..kw {
                            let at = ((((o / 16) * kh + y) * kw + x) * c + i) * 16 + o % 16;
                            let expected =
                                if o < n { values[((o * c + i) * kh + y) * kw + x] } else { 0.0 };
                            assert_eq!(stored[at], expected);
                            seen += 1;
                        }
                    }
                }
            }
            assert_eq!(seen, stored.len());
        }
    }

    #[test]
    fn linear_weights_are_windows_of_one() {
        let spec = spec(&[3, 2], DType::F16, Layout::Packed16);
        let mut bytes = Vec::new();
        pack(&spec, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &mut bytes).unwrap();
        let stored: Vec<f32> =
            bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect();
        assert_eq!(stored.len(), 32);
        assert_eq!((&stored[..3], &stored[16..19]), (&[1.0, 3.0, 5.0][..], &[2.0, 4.0, 6.0][..]));
        assert!(stored[3..16].iter().all(|&v| v == 0.0));
    }

    #[test]
    fn values_beyond_f16_are_found() {
        let spec = spec(&[1, 3], DType::F16, Layout::Packed16);
        let mut bytes = Vec::new();
        // 65519 still rounds to 65504, 65520 does not.
        assert_eq!(pack(&spec, &[1.0, -65519.0, 0.0], &mut bytes), Ok(()));
        let overflow = pack(&spec, &[1.0, 0.0, -65520.0], &mut bytes).unwrap_err();
        assert_eq!(overflow, Overflow { index: 2, value: -65520.0 });
    }
}
