//! Which operators become one step: pattern matching on the primitive graph, without sizes or memory.
//!
//! The graph is walked once from its end. An operator whose result something needs becomes a [`Job`];
//! what lies before it and only scales, activates, doubles or joins becomes the job's [`Chain`]
//! (recomputed by each consumer, never stored), and what lies after a convolution and only adds or
//! scales becomes its epilogue. What fits nowhere is a job of its own, so every valid graph lowers.

use latile_runtime::graph::{Graph, Op, ValueId, ValueKind};
use std::collections::HashSet;

/// The per-channel `x · scale + shift` of a chain.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Stage {
    /// The node's GroupNorm, then the modulation (ScaleShift) by a vector where there is one.
    GroupNorm { node: usize, modulation: Option<ValueId> },
    /// ScaleShift by a vector, without a norm before it.
    Modulate(ValueId),
    /// AddChannel of a vector.
    AddChannel(ValueId),
    /// The same for every channel.
    Affine { mul: f32, add: f32 },
}

/// What a job reads: segments side by side, then the stage, then SiLU, then each pixel doubled.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Chain {
    pub(super) segments: Vec<ValueId>,
    pub(super) stage: Option<Stage>,
    pub(super) silu: bool,
    pub(super) upsample: bool,
}

impl Chain {
    fn of(value: ValueId) -> Self {
        Self { segments: vec![value], stage: None, silu: false, upsample: false }
    }
}

/// What a job computes.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    /// The convolution (or linear layer over a map) of node `core`:
    /// `(conv(chain) + bias + add + residual) · scale`.
    Conv { core: usize, chain: Chain, add: Option<ValueId>, residual: Option<ValueId>, scale: f32 },
    /// `chain + residual`, element by element.
    Pointwise { chain: Chain, residual: Option<ValueId> },
    /// A linear layer over a vector, its input activated first where `silu` is set.
    VectorLinear { input: ValueId, silu: bool },
    /// The node's operator alone: pooling, attention, codebook, or element-wise on a vector.
    Alone,
}

/// One step to be, in place of node `node` and those fused with it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Job {
    /// The node whose output it computes.
    pub(super) node: usize,
    pub(super) kind: Kind,
}

impl Job {
    /// The node that names its step: of a convolution the one that convolves.
    pub(super) const fn core(&self) -> usize {
        match self.kind {
            Kind::Conv { core, .. } => core,
            _ => self.node,
        }
    }

    /// What is added to its result, element by element.
    pub(super) const fn residual(&self) -> Option<ValueId> {
        match self.kind {
            Kind::Conv { residual, .. } | Kind::Pointwise { residual, .. } => residual,
            _ => None,
        }
    }

    /// Every value that it reads, maps and vectors.
    pub(super) fn reads(&self, graph: &Graph) -> Vec<ValueId> {
        let of_chain = |c: &Chain| -> Vec<ValueId> {
            let vector = match c.stage {
                Some(Stage::GroupNorm { modulation, .. }) => modulation,
                Some(Stage::Modulate(v) | Stage::AddChannel(v)) => Some(v),
                Some(Stage::Affine { .. }) | None => None,
            };
            c.segments.iter().copied().chain(vector).collect()
        };
        match &self.kind {
            Kind::Conv { chain, add, residual, .. } => {
                let mut all = of_chain(chain);
                all.extend(add.iter().chain(residual));
                all
            }
            Kind::Pointwise { chain, residual } => {
                let mut all = of_chain(chain);
                all.extend(residual);
                all
            }
            Kind::VectorLinear { input, .. } => vec![*input],
            Kind::Alone => graph.nodes[self.node].inputs.clone(),
        }
    }
}

/// Cuts a validated graph into jobs, in execution order. Nodes that no output depends on are dropped.
pub(super) fn fuse(graph: &Graph) -> Vec<Job> {
    let mut fuser = Fuser::new(graph);
    let mut jobs = Vec::new();
    for node in (0..graph.nodes.len()).rev() {
        if !fuser.needed.contains(&graph.nodes[node].output) {
            continue;
        }
        let kind = fuser.kind(node);
        let job = Job { node, kind };
        fuser.needed.extend(job.reads(graph));
        jobs.push(job);
    }
    jobs.reverse();
    jobs
}

struct Fuser<'g> {
    graph: &'g Graph,
    /// The node that computes each value; none for an input.
    producer: Vec<Option<usize>>,
    /// How often each value is read, the graph's outputs included.
    reads: Vec<usize>,
    /// Values that are stored: outputs, and what jobs found so far read.
    needed: HashSet<ValueId>,
}

/// A convolution and what follows it; see [`Kind::Conv`].
struct Tail {
    core: usize,
    add: Option<ValueId>,
    residual: Option<ValueId>,
    scale: f32,
}

impl<'g> Fuser<'g> {
    fn new(graph: &'g Graph) -> Self {
        let mut producer = vec![None; graph.values.len()];
        let mut reads = vec![0; graph.values.len()];
        for (i, node) in graph.nodes.iter().enumerate() {
            producer[node.output.index()] = Some(i);
            for v in &node.inputs {
                reads[v.index()] += 1;
            }
        }
        let needed: HashSet<ValueId> = graph.outputs.iter().map(|p| p.value).collect();
        for v in &needed {
            reads[v.index()] += 1;
        }
        Self { graph, producer, reads, needed }
    }

    fn kind(&self, node: usize) -> Kind {
        let n = &self.graph.nodes[node];
        if matches!(self.graph.kind(n.output), ValueKind::Vector(_)) {
            return self.vector_kind(node);
        }
        if let Some(tail) = self.tail(node) {
            let chain = self.chain(self.graph.nodes[tail.core].inputs[0]);
            let Tail { core, add, residual, scale } = tail;
            return Kind::Conv { core, chain, add, residual, scale };
        }
        match n.op {
            Op::Add => {
                // The longer chain is folded in; the other operand is read as it is.
                let chains = [self.chain(n.inputs[0]), self.chain(n.inputs[1])];
                let plain = chains[0] == Chain::of(n.inputs[0]);
                let (own, other) = if plain { (1, 0) } else { (0, 1) };
                let [first, second] = chains;
                Kind::Pointwise {
                    chain: if own == 0 { first } else { second },
                    residual: Some(n.inputs[other]),
                }
            }
            Op::GroupNorm { .. }
            | Op::Silu
            | Op::AddChannel
            | Op::ScaleShift
            | Op::Concat
            | Op::Upsample2x
            | Op::Affine { .. } => {
                Kind::Pointwise { chain: self.chain_through(node), residual: None }
            }
            Op::Conv2d { .. }
            | Op::UpConv2x { .. }
            | Op::Linear { .. }
            | Op::AvgPool2x
            | Op::Attention { .. }
            | Op::Codebook { .. } => Kind::Alone,
        }
    }

    fn vector_kind(&self, node: usize) -> Kind {
        let n = &self.graph.nodes[node];
        if !matches!(n.op, Op::Linear { .. }) {
            return Kind::Alone;
        }
        let input = n.inputs[0];
        // A vector is short: activating it again for each reader costs less than a step.
        match self.producer[input.index()].map(|p| &self.graph.nodes[p]) {
            Some(p) if p.op == Op::Silu && !self.needed.contains(&input) => {
                Kind::VectorLinear { input: p.inputs[0], silu: true }
            }
            _ => Kind::VectorLinear { input, silu: false },
        }
    }

    /// The chain that ends in `value`; `value` alone where it is stored anyway.
    fn chain(&self, value: ValueId) -> Chain {
        let mut chain = Chain::of(value);
        while self.extend(&mut chain, false) {}
        chain
    }

    /// The chain that ends in the element-wise node `node`, whose result is to be stored.
    fn chain_through(&self, node: usize) -> Chain {
        let mut chain = Chain::of(self.graph.nodes[node].output);
        let mut first = true;
        while self.extend(&mut chain, first) {
            first = false;
        }
        chain
    }

    /// Takes the operator before the chain into it; false where that cannot be. `forced` takes it even
    /// where its result is stored or another step could have taken it.
    fn extend(&self, chain: &mut Chain, forced: bool) -> bool {
        let [value] = chain.segments[..] else {
            return false;
        };
        if self.needed.contains(&value) && !forced {
            return false;
        }
        let Some(node) = self.producer[value.index()] else {
            return false;
        };
        let n = &self.graph.nodes[node];
        let no_stage = chain.stage.is_none();
        match n.op {
            Op::Upsample2x if !chain.upsample => chain.upsample = true,
            Op::Silu if no_stage && !chain.silu => chain.silu = true,
            Op::GroupNorm { .. } if no_stage => {
                chain.stage = Some(Stage::GroupNorm { node, modulation: None });
            }
            Op::ScaleShift if no_stage => {
                let inner = n.inputs[0];
                let norm = self.producer[inner.index()].filter(|&p| {
                    matches!(self.graph.nodes[p].op, Op::GroupNorm { .. })
                        && !self.needed.contains(&inner)
                });
                if let Some(norm) = norm {
                    chain.stage =
                        Some(Stage::GroupNorm { node: norm, modulation: Some(n.inputs[1]) });
                    chain.segments = vec![self.graph.nodes[norm].inputs[0]];
                    return true;
                }
                chain.stage = Some(Stage::Modulate(n.inputs[1]));
            }
            // Left to the convolution before it where there is one: stored once, not redone by each reader.
            Op::AddChannel if no_stage && (forced || self.tail(node).is_none()) => {
                chain.stage = Some(Stage::AddChannel(n.inputs[1]));
            }
            Op::Affine { mul, add } if no_stage && (forced || self.tail(node).is_none()) => {
                chain.stage = Some(Stage::Affine { mul, add });
            }
            Op::Concat => {
                chain.segments = n.inputs.clone();
                return true;
            }
            _ => return false,
        }
        chain.segments = vec![n.inputs[0]];
        true
    }

    /// The convolution whose epilogue ends in `node`, if there is one.
    fn tail(&self, node: usize) -> Option<Tail> {
        let mut at = node;
        let mut scale = 1.0;
        if let Op::Affine { mul, add: 0.0 } = self.graph.nodes[at].op {
            scale = mul;
            at = self.only_for(self.graph.nodes[at].inputs[0])?;
        }
        let n = &self.graph.nodes[at];
        if n.op != Op::Add {
            let (core, add) = self.biased(at)?;
            return Some(Tail { core, add, residual: None, scale });
        }
        let side = |own: usize, other: usize| {
            let (core, add) = self.biased(self.only_for(n.inputs[own])?)?;
            Some(Tail { core, add, residual: Some(n.inputs[other]), scale })
        };
        match (side(0, 1), side(1, 0)) {
            // The wider window takes the sum: a shortcut's 1 x 1 is the cheaper one to have run before.
            (Some(a), Some(b)) if self.taps(a.core) > self.taps(b.core) => Some(a),
            (a, b) => b.or(a),
        }
    }

    /// `node` as a convolution, with the vector that is added to its channels.
    fn biased(&self, node: usize) -> Option<(usize, Option<ValueId>)> {
        let n = &self.graph.nodes[node];
        if n.op == Op::AddChannel {
            let core = self.only_for(n.inputs[0])?;
            return self.is_conv(core).then_some((core, Some(n.inputs[1])));
        }
        self.is_conv(node).then_some((node, None))
    }

    fn is_conv(&self, node: usize) -> bool {
        let n = &self.graph.nodes[node];
        n.op.matrix().is_some() && matches!(self.graph.kind(n.output), ValueKind::Map(_))
    }

    fn taps(&self, node: usize) -> u64 {
        match self.graph.nodes[node].op {
            Op::Conv2d { kernel, .. } => u64::from(kernel[0]) * u64::from(kernel[1]),
            Op::UpConv2x { .. } => 4,
            _ => 1,
        }
    }

    /// The producer of a value that has one reader alone.
    fn only_for(&self, value: ValueId) -> Option<usize> {
        (self.reads[value.index()] == 1).then_some(self.producer[value.index()]).flatten()
    }
}
