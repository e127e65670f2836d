//! Convolutions among the jobs: what they read and write, alone or side by side in a pass.

use super::*;

/// Where a convolution's operands are.
#[derive(Clone, Copy)]
pub(super) struct ConvPlace {
    /// Whether the output takes the residual's place.
    pub(super) in_place: bool,
    /// Lines of the output's ring, where it is not stored whole.
    pub(super) lines: Option<usize>,
    /// Whether it leaves sums for a norm.
    pub(super) sums: bool,
    pub(super) scratch: BufferId,
    /// Whether it runs strip by strip.
    pub(super) holds: bool,
}

/// Tasks that a strip should have for each thread.
const STRIP_TASKS: usize = 2;
/// The most rows of a strip.
const STRIP_ROWS: usize = 64;

/// The parts of a convolution job's core.
fn matrix(op: &Op) -> Matrix<'_> {
    // Invariant: `fuse` makes such jobs of operators that have these parts alone.
    op.matrix().expect("the core of a convolution job is one")
}

impl<'m> Builder<'m, '_> {
    /// Adds the steps that make the coefficients of a convolution's norm, where there are none yet.
    pub(super) fn chain_coefficients(&mut self, job: &Job) -> Result<(), PrepareError> {
        if let Kind::Conv { core, chain, .. } = &job.kind
            && let Some(stage) = chain.stage
        {
            self.coefficients(*core, stage, &chain.segments)?;
        }
        Ok(())
    }

    /// How a convolution job is computed.
    pub(super) fn conv_plan(&self, job: &Job) -> Result<ConvPlan, PrepareError> {
        let Kind::Conv { core, chain, .. } = &job.kind else {
            unreachable!("only convolutions are planned as such");
        };
        let [h, w, _] = self.shape(chain.segments[0]);
        let c = chain.segments.iter().map(|&v| self.shape(v)[2]).sum();
        let n = self.shape(self.graph.nodes[*core].output)[2];
        let op = &self.graph.nodes[*core].op;
        let shape = match op {
            Op::Conv2d { kernel, stride, pad, .. } => ConvShape {
                kernel: kernel.map(|v| v as usize),
                stride: stride.map(|v| v as usize),
                pads: [pad.top, pad.left, pad.bottom, pad.right].map(|v| v as usize),
                ..ConvShape::same(h, w, c, n, 1)
            },
            Op::UpConv2x { .. } => ConvShape::doubling(h, w, c, n),
            _ => ConvShape::same(h, w, c, n, 1),
        };
        let (weight, _, quant) = matrix(op);
        let winograd = quant.and_then(|q| q.winograd);
        let shape = ConvShape { upsample: chain.upsample, winograd, ..shape };
        let plan = match (quant, self.graph.weight(weight).dtype) {
            (Some(_), _) => ConvPlan::int8(shape, self.level),
            (None, DType::F32) => ConvPlan::new(shape, WeightType::F32, self.level),
            (None, _) => ConvPlan::new(shape, WeightType::F16, self.level),
        };
        plan.map_err(|e: StepError| self.unsupported(*core, &e))
    }

    /// The step of a convolution, whose coefficients exist.
    pub(super) fn conv(
        &mut self,
        job: &Job,
        plan: ConvPlan,
        place: ConvPlace,
    ) -> Result<(u64, Action<'m>), PrepareError> {
        let Kind::Conv { core, chain, add, residual, scale } = &job.kind else {
            unreachable!("only convolutions become such steps");
        };
        let inputs = self.inputs(*core, chain)?;
        let (weight, bias, quant) = matrix(&self.graph.nodes[*core].op);
        let (weights, ranges): (_, &'m [QuantRange]) = match quant {
            Some(q) => (Weights::I8(self.int8(*core, weight, q)?), &q.ranges),
            None => (self.packed(*core, weight)?, &[]),
        };
        let mut holds = Holds::default();
        for (hold, value) in holds.inputs.iter_mut().zip(&chain.segments) {
            *hold = self.hold(*value);
        }
        let add = add.map(|v| self.read(v));
        if let Some(value) = residual {
            holds.residual = self.hold(*value);
        }
        let (residual, replaced) = self.addend(*residual, place.in_place);
        let layout = place.sums.then(|| plan.sums());
        let Written { out, sums } = match place.lines {
            None => self.written(job.node, replaced, layout),
            Some(lines) => {
                holds.out = Hold::Ring(lines);
                self.ring(job.node, lines, layout)
            }
        };
        let step = ConvStep {
            inputs,
            weights,
            ranges,
            bias: self.bias(*core, bias)?,
            add,
            residual,
            scale: *scale,
            out,
            sums,
            scratch: place.scratch,
            plan,
            holds: place.holds.then_some(holds),
        };
        let macs = self.graph.node_macs(&self.graph.nodes[*core], self.shapes);
        Ok((macs, Action::Conv(Box::new(step))))
    }

    fn hold(&self, value: ValueId) -> Hold {
        self.rings[value.index()].map_or(Hold::Whole, Hold::Ring)
    }

    /// The output of `node` as a ring of lines.
    fn ring(&mut self, node: usize, lines: usize, layout: Option<SumsLayout>) -> Written {
        let value = self.graph.nodes[node].output;
        let [_, w, c] = self.shape(value);
        let row = w.saturating_mul(c);
        let out = self.fresh(row.saturating_mul(lines), self.dtype_of(value).size());
        self.dtypes[out.0] = self.dtype_of(value);
        self.rings[value.index()] = Some(lines);
        let out = self.keep(value, out).buffer;
        Written { out, sums: layout.map(|layout| self.sums_of(value, layout)) }
    }

    /// Adds pass `index`, whose jobs are convolutions that run side by side.
    pub(super) fn pass(
        &mut self,
        index: usize,
        pass: &[Part],
        jobs: &[Job],
    ) -> Result<(), PrepareError> {
        let mut plans = Vec::new();
        for part in pass {
            self.chain_coefficients(&jobs[part.job])?;
            plans.push(strips(self.conv_plan(&jobs[part.job])?, self.threads));
        }
        let workers: Vec<_> = pass
            .iter()
            .zip(&plans)
            .map(|(part, plan)| self.worker(part, plan, pass, jobs))
            .collect();
        let schedule = schedule(&workers);
        let scratch = plans.iter().map(|plan| plan.scratch_len(self.threads)).max().unwrap_or(0);
        let scratch = self.fresh(scratch, 4);
        let first = self.steps.len();
        for (i, part) in pass.iter().enumerate() {
            let job = &jobs[part.job];
            let output = self.graph.nodes[job.node].output;
            // Bytes of a row.
            let row = |b: &Self, v: ValueId| {
                let [_, w, c] = b.shape(v);
                w * c * b.dtype_of(v).size()
            };
            let (own, order) = (row(self, output), &schedule.order);
            let apart = |b: &Self, v: ValueId, in_place| {
                let read = (v.index(), row(b, v));
                distance(&workers, order, read, (i, own), in_place)
            };
            let in_place = part.stored
                && job.residual().is_some_and(|v| {
                    self.replaceable(index, v, output) && apart(self, v, true) <= 0
                });
            let place = ConvPlace {
                in_place,
                lines: (!part.stored).then_some(schedule.lines[i]),
                sums: part.sums,
                scratch,
                holds: true,
            };
            let (macs, action) = self.conv(job, plans[i], place)?;
            if part.stored && !in_place {
                let mut dying: Vec<ValueId> =
                    pass.iter().flat_map(|p| jobs[p.job].reads(self.graph)).collect();
                dying.retain(|&v| self.replaceable(index, v, output) && self.is_map(v));
                dying.sort_unstable();
                dying.dedup();
                for v in dying {
                    let distance = apart(self, v, false).unsigned_abs();
                    let Some(out) = self.values[output.index()] else { continue };
                    let replaced = self.bound(v, self.now()).buffer;
                    self.overlays.push(Overlay { replaced: replaced.0, by: out.0, distance });
                }
            }
            self.push_part(job.core(), macs, action);
        }
        drop(workers);
        self.passes.push(Pass::Streamed { first, steps: pass.len(), order: schedule.order });
        self.moment += 1;
        for part in pass.iter().filter(|p| !p.stored) {
            let value = self.graph.nodes[jobs[part.job].node].output;
            self.values[value.index()] = None;
            self.rings[value.index()] = None;
        }
        Ok(())
    }

    fn is_map(&self, value: ValueId) -> bool {
        matches!(self.graph.kind(value), ValueKind::Map(_))
    }

    /// A convolution of a pass as its schedule sees it.
    fn worker<'w>(
        &self,
        part: &Part,
        plan: &'w ConvPlan,
        pass: &[Part],
        jobs: &[Job],
    ) -> Worker<'w> {
        let Kind::Conv { chain, residual, .. } = &jobs[part.job].kind else {
            unreachable!("a pass has convolutions only");
        };
        let from = |v: ValueId| {
            let makes = |p: &Part| !p.stored && self.graph.nodes[jobs[p.job].node].output == v;
            pass.iter().position(makes)
        };
        let windows = chain.segments.iter().map(|&v| Read {
            value: v.index(),
            from: from(v),
            rows: Box::new(|y| plan.shape().input_rows(y)),
            added: false,
        });
        let added = residual.iter().map(|&v| Read {
            value: v.index(),
            from: from(v),
            rows: Box::new(|y| y),
            added: true,
        });
        Worker {
            height: plan.shape().out()[0],
            strip: plan.strip_rows(),
            reads: windows.chain(added).collect(),
            whole: part.stored || part.sums,
        }
    }
}

/// The plan in strips that give all threads something to do, and no larger.
fn strips(plan: ConvPlan, threads: usize) -> ConvPlan {
    let height = plan.shape().out()[0];
    let block = plan.block_rows();
    let per_block = plan.tasks().div_ceil(height.div_ceil(block)).max(1);
    let blocks = (STRIP_TASKS * threads).div_ceil(per_block);
    plan.in_strips((blocks * block).min(STRIP_ROWS.max(block)))
}
