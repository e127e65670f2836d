//! The packed weight layout of convolutions and Linear layers.
//!
//! *packed16* is `[ceil(n / 16)][kh][kw][c][16]`: sixteen output channels innermost (one
//! AVX-512 register, two AVX2, four NEON), zeros where `n` ends, and K in the order in which it
//! is summed. The same bytes serve every instruction set.

/// The shape of a weight as checkpoints store it, `[n, c, kh, kw]` (a Linear's `[n, c]` has
/// `kh = kw = 1`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightShape {
    /// Output channels.
    pub n: usize,
    /// Input channels.
    pub c: usize,
    /// Kernel height.
    pub kh: usize,
    /// Kernel width.
    pub kw: usize,
}

impl WeightShape {
    /// Elements as stored in a checkpoint.
    #[allow(clippy::len_without_is_empty)] // shapes here have no zero extent
    pub const fn len(&self) -> usize {
        self.n * self.c * self.kh * self.kw
    }

    /// Elements once packed.
    pub const fn packed_len(&self) -> usize {
        self.n.div_ceil(16) * 16 * self.c * self.kh * self.kw
    }
}

/// Packs `weights` (`[n, c, kh, kw]`) into `out`, converting each element.
///
/// # Panics
/// When a slice's length is not what the shape says.
pub fn pack16<S: Copy, D: Copy + Default>(
    weights: &[S],
    shape: WeightShape,
    out: &mut [D],
    convert: impl Fn(S) -> D,
) {
    let WeightShape { n, c, kh, kw } = shape;
    assert_eq!(weights.len(), shape.len(), "weights do not match {shape:?}");
    assert_eq!(out.len(), shape.packed_len(), "out does not match {shape:?}");
    let mut rows = out.chunks_exact_mut(16);
    for panel in 0..n.div_ceil(16) {
        for tap in 0..kh * kw {
            for channel in 0..c {
                let row = rows.next().expect("packed_len counts exactly these rows");
                for (lane, to) in row.iter_mut().enumerate() {
                    let output = panel * 16 + lane;
                    *to = if output < n {
                        convert(weights[(output * c + channel) * kh * kw + tap])
                    } else {
                        D::default()
                    };
                }
            }
        }
    }
}

/// The inverse of [`pack16`], for tools that read a packed file.
///
/// # Panics
/// When a slice's length is not what the shape says.
pub fn unpack16<S: Copy, D: Copy>(
    packed: &[S],
    shape: WeightShape,
    out: &mut [D],
    convert: impl Fn(S) -> D,
) {
    let WeightShape { n, c, kh, kw } = shape;
    assert_eq!(packed.len(), shape.packed_len(), "packed does not match {shape:?}");
    assert_eq!(out.len(), shape.len(), "out does not match {shape:?}");
    for output in 0..n {
        for channel in 0..c {
            for tap in 0..kh * kw {
                let row = (output / 16 * kh * kw + tap) * c + channel;
                out[(output * c + channel) * kh * kw + tap] =
                    convert(packed[row * 16 + output % 16]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_and_unpacks() {
        for (n, c, kh, kw) in [(1, 1, 1, 1), (16, 3, 3, 3), (17, 5, 1, 3), (3, 2, 2, 1)] {
            let shape = WeightShape { n, c, kh, kw };
            let weights: Vec<u32> = (1..=shape.len() as u32).collect();
            let mut packed = vec![9_u32; shape.packed_len()];
            pack16(&weights, shape, &mut packed, |x| x);
            assert_eq!(packed[0], 1);
            let zeros = packed.iter().filter(|&&x| x == 0).count();
            assert_eq!(zeros, shape.packed_len() - shape.len());
            let mut back = vec![0_u32; shape.len()];
            unpack16(&packed, shape, &mut back, |x| x);
            assert_eq!(back, weights);
        }
        // [n=2, c=2, kh=1, kw=2]: K runs over kw before c.
        let shape = WeightShape { n: 2, c: 2, kh: 1, kw: 2 };
        let mut packed = vec![0; 64];
        pack16(&[1, 2, 3, 4, 5, 6, 7, 8], shape, &mut packed, |x| x);
        let k: Vec<_> = packed.chunks(16).map(|row| (row[0], row[1])).collect();
        assert_eq!(k, [(1, 5), (3, 7), (2, 6), (4, 8)]);
    }
}
