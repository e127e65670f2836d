//! Which rows of its output a convolution computes, and which rows its operands hold: the whole map,
//! some rows of it, or a ring of lines that rows pass through.

use super::conv::{MAX_SEGMENTS, STEP};
use super::conv_plan::ConvPlan;
use super::{StepError, check_len};

/// The rows that a tensor holds of a map: row `y` of the map is row `(y - first) % ring` of the tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The map's row at the tensor's start; 0 for a ring.
    pub first: usize,
    /// Rows after which a ring begins again.
    pub ring: usize,
}

impl Window {
    /// The whole map.
    pub const WHOLE: Self = Window { first: 0, ring: usize::MAX };

    /// The map's rows from `first` on.
    pub const fn from(first: usize) -> Self {
        Window { first, ring: usize::MAX }
    }

    /// A ring of `rows` lines.
    pub const fn ring(rows: usize) -> Self {
        Window { first: 0, ring: rows }
    }

    /// The tensor's row that is row `y` of the map.
    #[inline(always)]
    pub(super) const fn row(self, y: usize) -> usize {
        (y - self.first) % self.ring
    }

    /// Checks that a tensor of `len` elements holds rows `y` of a map of `height` rows of `row` elements.
    fn check(
        self,
        operand: &'static str,
        len: usize,
        y: [usize; 2],
        [height, row]: [usize; 2],
    ) -> Result<(), StepError> {
        if self == Self::WHOLE && y == [0, height] {
            return check_len(STEP, operand, len, height * row);
        }
        if self.ring != usize::MAX && y[1] - y[0] <= self.ring {
            return check_len(STEP, operand, len, self.ring * row);
        }
        if self.ring == usize::MAX && self.first <= y[0] && len >= (y[1] - self.first) * row {
            return Ok(());
        }
        let reason = format!("{operand}: {len} elements as {self:?} do not hold rows {y:?}");
        Err(StepError::Shape { step: STEP, reason })
    }
}

/// A part of a convolution: some rows of the output, from tensors that need not hold whole maps.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Output rows, from and to. The first is a multiple of [`ConvPlan::block_rows`], and so is the
    /// last but at the end of the map; there are at most as many as the plan's strips have.
    pub y: [usize; 2],
    /// The rows that each segment holds, upsampling not counted.
    pub inputs: [Window; MAX_SEGMENTS],
    /// The rows that the output holds; a residual in place is there too.
    pub out: Window,
    /// The rows that a residual of its own holds.
    pub residual: Window,
}

impl Rows {
    /// All rows, of whole maps.
    pub const fn all(plan: &ConvPlan) -> Self {
        Rows {
            y: [0, plan.shape().out()[0]],
            inputs: [Window::WHOLE; MAX_SEGMENTS],
            out: Window::WHOLE,
            residual: Window::WHOLE,
        }
    }

    pub(super) fn check_part(&self, plan: &ConvPlan) -> Result<(), StepError> {
        let height = plan.shape().out()[0];
        let block = plan.block_rows();
        let [from, to] = self.y;
        let ends = to == height || to.is_multiple_of(block);
        if from >= to
            || to > height
            || to - from > plan.strip_rows()
            || !from.is_multiple_of(block)
            || !ends
        {
            let reason = format!(
                "rows {:?} of {height} are no part in blocks of {block}, {} at a time",
                self.y,
                plan.strip_rows()
            );
            return Err(StepError::Shape { step: STEP, reason });
        }
        Ok(())
    }

    /// Checks the length of an input segment.
    pub(super) fn check_input(
        &self,
        plan: &ConvPlan,
        segment: usize,
        channels: usize,
        len: usize,
    ) -> Result<(), StepError> {
        let rows = plan.shape().input_rows(self.y);
        let map = [plan.shape().h, plan.shape().w * channels];
        self.inputs[segment].check("input", len, rows, map)
    }

    /// Checks the lengths of the output and of a residual.
    pub(super) fn check_outputs(
        &self,
        plan: &ConvPlan,
        out: usize,
        residual: Option<usize>,
    ) -> Result<(), StepError> {
        let [height, width] = plan.shape().out();
        let map = [height, width * plan.shape().n];
        self.out.check("output", out, self.y, map)?;
        match residual {
            Some(len) => self.residual.check("residual", len, self.y, map),
            None => Ok(()),
        }
    }
}
