//! Shapes of convolutions: extents, what follows from them, and which of them can be computed.

use super::StepError;
use super::conv::STEP;
use latile_runtime::graph::Winograd;

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
    /// Whether the output is twice as high and wide as there are windows: output `(2y + py, 2x + px)`, of phase
    /// `2 * py + px`, is that of the window at `(y + py, x + px)` by the filters of its phase. Strides are 1 then.
    pub phases: bool,
    /// The algorithm of Winograd's by which a 3x3 kernel is applied, in int8. Strides are 1 then.
    pub winograd: Option<Winograd>,
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
            phases: false,
            winograd: None,
        }
    }

    /// A `k`x`k` convolution of stride 1 that keeps the size (`k` odd).
    pub const fn same(h: usize, w: usize, c: usize, n: usize, k: usize) -> Self {
        ConvShape {
            h,
            w,
            c,
            n,
            kernel: [k, k],
            stride: [1, 1],
            pads: [k / 2; 4],
            upsample: false,
            phases: false,
            winograd: None,
        }
    }

    /// A 3x3 convolution of a map upsampled by two, as four 2x2 ones of the map itself.
    pub const fn doubling(h: usize, w: usize, c: usize, n: usize) -> Self {
        ConvShape { kernel: [2, 2], pads: [1; 4], phases: true, ..ConvShape::same(h, w, c, n, 1) }
    }

    /// Height and width of the input as the kernel sees it, without padding.
    pub const fn seen(&self) -> [usize; 2] {
        if self.upsample { [2 * self.h, 2 * self.w] } else { [self.h, self.w] }
    }

    /// By how many bits an output's row or column is larger than its window's.
    pub(super) const fn doubled(&self) -> usize {
        self.phases as usize
    }

    /// Rows and columns that the outputs of one window, of all phases, read.
    pub(super) const fn reach(&self) -> [usize; 2] {
        [self.kernel[0] + self.doubled(), self.kernel[1] + self.doubled()]
    }

    /// Windows, down and across: outputs of a phase.
    pub(super) const fn windows(&self) -> [usize; 2] {
        let ([h, w], reach) = (self.seen(), self.reach());
        [
            (h + self.pads[0] + self.pads[2] - reach[0]) / self.stride[0] + 1,
            (w + self.pads[1] + self.pads[3] - reach[1]) / self.stride[1] + 1,
        ]
    }

    /// Output height and width.
    pub const fn out(&self) -> [usize; 2] {
        let [h, w] = self.windows();
        [h << self.doubled(), w << self.doubled()]
    }

    /// The rows of the input, before upsampling, that output rows `y` (from and to) read.
    pub fn input_rows(&self, y: [usize; 2]) -> [usize; 2] {
        let shrink = usize::from(self.upsample);
        let seen = self.seen()[0];
        // Of the padded input, the first that an output row reads.
        let top = |y: usize| (y >> self.doubled()) * self.stride[0] + (y & self.doubled());
        let first = top(y[0]).saturating_sub(self.pads[0]).min(seen - 1);
        let last = top(y[1] - 1) + self.kernel[0];
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

    /// Phases of the output.
    pub(super) const fn phase_count(&self) -> usize {
        if self.phases { 4 } else { 1 }
    }

    /// Points of the input that a tile of windows is made from, where Winograd's algorithm makes tiles; else 1.
    pub(super) const fn points(&self) -> usize {
        match self.winograd {
            Some(w) => w.points(),
            None => 1,
        }
    }

    /// Windows of a tile, down and across; of a tile of no algorithm 1.
    pub(super) const fn tile(&self) -> [usize; 2] {
        match self.winograd {
            Some(w) => w.tile(),
            None => [1, 1],
        }
    }

    /// Whether lines of a band are those of tiles two windows high, each with all that its tiles see. Else they are rows of
    /// the padded input.
    pub(super) const fn squares(&self) -> bool {
        matches!(self.winograd, Some(Winograd::Square))
    }

    /// The lines of a band that rows of windows `y` (from and to) read.
    pub(super) const fn lines(&self, y: [usize; 2]) -> [usize; 2] {
        if self.squares() {
            [y[0] / 2, y[1].div_ceil(2)]
        } else {
            [y[0] * self.stride[0], (y[1] - 1) * self.stride[0] + self.reach()[0]]
        }
    }

    /// Rows of the weight: one for each output channel; where there are phases or points, in each of
    /// them one for every channel of whole panels of sixteen.
    pub const fn filters(&self) -> usize {
        let parts = self.phase_count() * self.points();
        if parts > 1 { parts * self.n.next_multiple_of(16) } else { self.n }
    }

    /// Elements of a bias: one for each filter, but of a Winograd layer one for each output channel.
    pub const fn biases(&self) -> usize {
        if self.winograd.is_some() { self.n } else { self.filters() }
    }

    /// Height and width of the kernel that a row of the weight is.
    pub const fn stored_kernel(&self) -> [usize; 2] {
        match self.winograd {
            Some(w) => [w.kernel()[0] as usize, w.kernel()[1] as usize],
            None => self.kernel,
        }
    }

    /// Elements of the packed weight: `[ceil(filters / 16)][kh][kw][c][16]`.
    pub const fn packed_len(&self) -> usize {
        let [kh, kw] = self.stored_kernel();
        self.filters().div_ceil(16) * kh * kw * self.c * 16
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
        if self.phases && self.stride != [1, 1] {
            return refuse(format!("{self:?} has phases and a stride"));
        }
        if self.winograd.is_some()
            && (self.stride != [1, 1] || self.kernel != [3, 3] || self.phases)
        {
            return refuse(format!("{self:?} has points, but not a 3x3 kernel of stride 1"));
        }
        let ([h, w], reach) = (self.seen(), self.reach());
        if h + self.pads[0] + self.pads[2] < reach[0] || w + self.pads[1] + self.pads[3] < reach[1]
        {
            return refuse(format!(
                "a kernel of {}x{} does not fit the padded input of {}x{}",
                reach[0],
                reach[1],
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
        let k = [self.kernel[0], self.kernel[1], self.c, self.filters() + 15];
        let padded = [h + self.pads[0] + self.pads[2], w + self.pads[1] + self.pads[3], self.c];
        if !fits(&padded) || !fits(&[oh, ow, self.n]) || !fits(&k) {
            return refuse(format!("{self:?} does not fit the address space"));
        }
        Ok(())
    }
}
