//! The definitions as plain loops: slow, obvious, and what every kernel is compared with.
//!
//! These are for tests (this crate's and others'); no session calls them.

use crate::isa::Level;
use crate::simd::{Kernel, Scalar, Simd, math};
use crate::steps::conv::ConvShape;

struct Silu(f32);

impl Kernel for Silu {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        s.max_lane(math::silu(s, s.splat(self.0)))
    }
}

/// SiLU of one number, by the scalar path.
pub fn silu(x: f32) -> f32 {
    Level::Scalar(Scalar::new()).dispatch(Silu(x))
}

/// A convolution in plain loops; see [`crate::steps::conv`] for the meaning of each operand.
#[derive(Clone, Debug)]
pub struct Conv<'a> {
    /// The shape.
    pub shape: ConvShape,
    /// `[h, w, c]`, all segments concatenated.
    pub input: &'a [f32],
    /// Per channel, scale and shift where its segment has a norm.
    pub norm: &'a [Option<(f32, f32)>],
    /// Whether SiLU follows the norm.
    pub silu: bool,
    /// `[n, c, kh, kw]`.
    pub weights: &'a [f32],
    /// Per output channel.
    pub bias: Option<&'a [f32]>,
    /// Per output channel.
    pub add: Option<&'a [f32]>,
    /// `[oh, ow, n]`.
    pub residual: Option<&'a [f32]>,
    /// Multiplies the result.
    pub output_scale: f32,
}

impl Conv<'_> {
    /// The output, `[oh, ow, n]`.
    pub fn run(&self) -> Vec<f32> {
        let ConvShape {
            w,
            c,
            n,
            kernel: [kh, kw],
            stride: [sy, sx],
            pads: [top, left, ..],
            upsample,
            ..
        } = self.shape;
        let [seen_h, seen_w] = self.shape.seen();
        let [oh, ow] = self.shape.out();
        let seen: Vec<f32> = self
            .input
            .iter()
            .enumerate()
            .map(|(i, &x)| {
                let x = match self.norm[i % c] {
                    Some((scale, shift)) => x.mul_add(scale, shift),
                    None => x,
                };
                if self.silu { silu(x) } else { x }
            })
            .collect();
        let shrink = usize::from(upsample);
        let at = |y: usize, x: usize, channel: usize| {
            // Padded coordinates.
            if y < top || x < left || y - top >= seen_h || x - left >= seen_w {
                0.0
            } else {
                seen[(((y - top) >> shrink) * w + ((x - left) >> shrink)) * c + channel]
            }
        };
        let mut out = vec![0.0; oh * ow * n];
        for y in 0..oh {
            for x in 0..ow {
                for o in 0..n {
                    let mut sum = 0.0_f32;
                    for ky in 0..kh {
                        for kx in 0..kw {
                            for channel in 0..c {
                                let a = at(y * sy + ky, x * sx + kx, channel);
                                let b = self.weights[((o * c + channel) * kh + ky) * kw + kx];
                                sum = a.mul_add(b, sum);
                            }
                        }
                    }
                    let index = (y * ow + x) * n + o;
                    let bias = self.bias.map_or(0.0, |b| b[o]) + self.add.map_or(0.0, |b| b[o]);
                    let mut v = sum + bias;
                    if let Some(residual) = self.residual {
                        v += residual[index];
                    }
                    out[index] = v * self.output_scale;
                }
            }
        }
        out
    }
}
