//! Shapes of convolutions: extents, what follows from them, and which of them can be computed.

use super::StepError;
use super::conv::STEP;

/// The most rows of a kernel.
pub const MAX_KERNEL_ROWS: usize = 16;

/// The shape of a convolution; see [`ConvPlan`](super::conv::ConvPlan).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    /// Input height, before upsampling.
    pub h: usize,
    /// Input width, before upsampling.
    pub w: usize,
    /// Input channels, of all segments together.
    pub c: usize,
    /// Output channels.
    pub n: usize,
    /// Kernel height and width.
    pub kernel: [usize; 2],
    /// Vertical and horizontal stride.
    pub stride: [usize; 2],
    /// Zeros above, left, below and right; inserted after norm, activation and upsampling.
    pub pads: [usize; 4],
    /// Whether each input pixel is read as a 2x2 block of equal pixels.
    pub upsample: bool,
}

impl ConvShape {
    /// A Linear layer over `rows` vectors of `c` features.
    pub const fn linear(rows: usize, c: usize, n: usize) -> Self {
        ConvShape {
            h: 1,
            w: rows,
            c,
            n,
            kernel: [1, 1],
            stride: [1, 1],
            pads: [0; 4],
            upsample: false,
        }
    }

    /// A `k`x`k` convolution of stride 1 that keeps the size (`k` odd).
    pub const fn same(h: usize, w: usize, c: usize, n: usize, k: usize) -> Self {
        ConvShape { h, w, c, n, kernel: [k, k], stride: [1, 1], pads: [k / 2; 4], upsample: false }
    }

    /// Height and width of the input as the kernel sees it, without padding.
    pub const fn seen(&self) -> [usize; 2] {
        if self.upsample { [2 * self.h, 2 * self.w] } else { [self.h, self.w] }
    }

    /// Output height and width.
    pub const fn out(&self) -> [usize; 2] {
        let [h, w] = self.seen();
        [
            (h + self.pads[0] + self.pads[2] - self.kernel[0]) / self.stride[0] + 1,
            (w + self.pads[1] + self.pads[3] - self.kernel[1]) / self.stride[1] + 1,
        ]
    }

    /// The rows of the input, before upsampling, that output rows `y` (from and to) read.
    pub fn input_rows(&self, y: [usize; 2]) -> [usize; 2] {
        let shrink = usize::from(self.upsample);
        let seen = self.seen()[0];
        let first = (y[0] * self.stride[0]).saturating_sub(self.pads[0]).min(seen - 1);
        let last = (y[1] - 1) * self.stride[0] + self.kernel[0];
        let last = last.saturating_sub(self.pads[0]).clamp(first + 1, seen);
        [first >> shrink, ((last - 1) >> shrink) + 1]
    }

    /// Elements of the output.
    pub const fn out_len(&self) -> usize {
        let [h, w] = self.out();
        h * w * self.n
    }

    /// Multiply-adds.
    pub const fn macs(&self) -> u64 {
        self.out_len() as u64 * (self.kernel[0] * self.kernel[1] * self.c) as u64
    }

    /// Elements of the packed weight: `[ceil(n / 16)][kh][kw][c][16]`.
    pub const fn packed_len(&self) -> usize {
        self.n.div_ceil(16) * self.kernel[0] * self.kernel[1] * self.c * 16
    }

    pub(super) fn check(&self) -> Result<(), StepError> {
        let refuse = |reason: String| Err(StepError::Shape { step: STEP, reason });
        let sides = [
            self.h,
            self.w,
            self.c,
            self.n,
            self.kernel[0],
            self.kernel[1],
            self.stride[0],
            self.stride[1],
        ];
        if sides.contains(&0) {
            return refuse(format!("{self:?} has a zero extent"));
        }
        // Far above any picture, and small enough that the products below stay in usize.
        const SIDE: usize = 1 << 20;
        if sides.iter().chain(&self.pads).any(|&x| x > SIDE) {
            return refuse(format!("{self:?} has an extent over {SIDE}"));
        }
        if self.kernel[0] > MAX_KERNEL_ROWS {
            return refuse(format!(
                "a kernel of {} rows; {MAX_KERNEL_ROWS} are the most",
                self.kernel[0]
            ));
        }
        let [h, w] = self.seen();
        if h + self.pads[0] + self.pads[2] < self.kernel[0]
            || w + self.pads[1] + self.pads[3] < self.kernel[1]
        {
            return refuse(format!(
                "a kernel of {}x{} does not fit the padded input of {}x{}",
                self.kernel[0],
                self.kernel[1],
                h + self.pads[0] + self.pads[2],
                w + self.pads[1] + self.pads[3],
            ));
        }
        // 16 TiB: sums of a few such products stay far below isize::MAX.
        let fits = |xs: &[usize]| {
            let bytes = xs.iter().try_fold(4_usize, |a, &x| a.checked_mul(x));
            bytes.is_some_and(|b| b <= 1 << 44)
        };
        let [oh, ow] = self.out();
        let k = [self.kernel[0], self.kernel[1], self.c, self.n + 15];
        let padded = [h + self.pads[0] + self.pads[2], w + self.pads[1] + self.pads[3], self.c];
        if !fits(&padded) || !fits(&[oh, ow, self.n]) || !fits(&k) {
            return refuse(format!("{self:?} does not fit the address space"));
        }
        Ok(())
    }
}
