//! Weights as they lie in the file.

use half::f16;
use latile_runtime::graph::{Layout, WeightSpec};
use latile_runtime::tensor::DType;

/// Output channels that lie side by side.
const LANES: usize = 16;
/// Input channels that lie side by side in [`Layout::Packed16x4`].
const QUAD: usize = 4;

/// A finite value that the stored type cannot hold, and its index.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Overflow {
    pub(crate) index: usize,
    pub(crate) value: f32,
}

/// Replaces `out` by the stored form of `values`, which are in the order of `spec.shape`. Values of the integer
/// types are whole numbers, which f32 holds exactly up to 2²⁴: more than the sum of any int8 layer's weights.
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
        DType::I8 => store(spec.layout, &dims, values, out, |v| {
            if v.abs() <= 127.0 && v.trunc() == v { Ok((v as i8).to_le_bytes()) } else { Err(v) }
        }),
        DType::I32 => store(spec.layout, &dims, values, out, |v| {
            let exact = (1 << 24) as f32;
            if v.abs() <= exact && v.trunc() == v { Ok((v as i32).to_le_bytes()) } else { Err(v) }
        }),
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
    let side_by_side = match layout {
        Layout::Plain => {
            out.reserve(values.len() * N);
            for i in 0..values.len() {
                out.extend(at(i)?);
            }
            return Ok(());
        }
        Layout::Packed16 => 1,
        Layout::Packed16x4 => QUAD,
    };
    // [n, c, kh, kw] to [ceil(n / 16)][kh · kw][ceil(c / 1 or 4)][16][1 or 4]: a kernel position is one step
    // in the last two axes.
    let (n, c) = (dims[0], dims[1]);
    let window: usize = dims[2..].iter().product();
    let groups = c.div_ceil(side_by_side);
    let row_len = LANES * side_by_side;
    out.resize(n.div_ceil(LANES) * window * groups * row_len * N, 0);
    let (slots, _) = out.as_chunks_mut::<N>();
    for (tile, block) in slots.chunks_mut(row_len * groups * window).enumerate() {
        for (step, row) in block.chunks_mut(row_len).enumerate() {
            let (position, first) = (step / groups, step % groups * side_by_side);
            let channels = first..c.min(first + side_by_side);
            let lanes = n - (tile * LANES).min(n);
            for (lane, part) in row.chunks_mut(side_by_side).enumerate().take(lanes) {
                for (slot, channel) in part.iter_mut().zip(channels.clone()) {
                    *slot = at(((tile * LANES + lane) * c + channel) * window + position)?;
                }
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
    fn int8_elements_land_where_the_layout_says() {
        for (n, c, kh, kw) in [
            (1usize, 1, 1, 1),
            (15, 3, 3, 3),
            (16, 4, 1, 3),
            (17, 5, 3, 1),
            (33, 8, 2, 2),
            (40, 7, 3, 3),
        ] {
            let values: Vec<f32> = (0..n * c * kh * kw).map(|v| (v % 255) as f32 - 127.0).collect();
            let shape = [n as u32, c as u32, kh as u32, kw as u32];
            let spec = spec(&shape, DType::I8, Layout::Packed16x4);
            let mut bytes = vec![9; 5];
            pack(&spec, &values, &mut bytes).unwrap();
            assert_eq!(Some(bytes.len()), spec.stored_bytes());
            let quads = c.div_ceil(4);
            let mut expected = vec![0i8; bytes.len()];
            for o in 0..n {
                for i in 0..c {
                    for y in 0..kh {
                        for x in 0..kw {
                            let row = ((o / 16 * kh + y) * kw + x) * quads + i / 4;
                            expected[(row * 16 + o % 16) * 4 + i % 4] =
                                values[((o * c + i) * kh + y) * kw + x] as i8;
                        }
                    }
                }
            }
            let stored: Vec<i8> = bytes.iter().map(|&b| b as i8).collect();
            assert_eq!(stored, expected, "{shape:?}");
        }
    }

    #[test]
    fn integers_are_whole_and_in_range() {
        let mut bytes = Vec::new();
        let i8s = spec(&[2, 2], DType::I8, Layout::Packed16x4);
        for (bad, index) in [(-128.0, 0), (128.0, 1), (0.5, 2), (f32::NAN, 3)] {
            let mut values = [-127.0, 127.0, 0.0, -0.0];
            assert_eq!(pack(&i8s, &values, &mut bytes), Ok(()));
            values[index] = bad;
            assert_eq!(pack(&i8s, &values, &mut bytes).unwrap_err().index, index);
        }
        let i32s = spec(&[3], DType::I32, Layout::Plain);
        pack(&i32s, &[-8_323_072.0, 16_777_216.0, 3.0], &mut bytes).unwrap();
        let stored: Vec<i32> =
            bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
        assert_eq!(stored, [-8_323_072, 16_777_216, 3]);
        assert!(pack(&i32s, &[0.0, 0.0, 0.25], &mut bytes).is_err());
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
