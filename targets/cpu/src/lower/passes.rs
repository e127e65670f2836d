//! In which order jobs run when some values are not stored: they are streamed, a few lines at a time,
//! through every pass over the map that reads them. Sizes and memory are not here.
//!
//! A pass runs some convolutions side by side, line after line. A GroupNorm needs the sums of all of
//! its input before the first pixel can be normalised, so a streamed value that a norm reads takes one
//! pass for its sums, and is computed once more in each later pass that reads it.

use super::fuse::{Job, Kind, Stage};
use latile_runtime::graph::{Graph, ValueId, ValueKind};

/// A job's part in a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Index of the job.
    pub(super) job: usize,
    /// Whether its result is stored whole, or passes through.
    pub(super) stored: bool,
    /// Whether it leaves the sums that a later norm needs.
    pub(super) sums: bool,
}

/// Jobs that run together, in the order of the graph. Several only where values are streamed.
pub(super) type Pass = Vec<Part>;

/// The values that can be streamed: results of convolutions that only convolutions read.
pub(super) fn streamable(graph: &Graph, jobs: &[Job]) -> Vec<bool> {
    let mut can = vec![false; graph.values.len()];
    for job in jobs {
        let output = graph.nodes[job.node].output;
        can[output.index()] = matches!(job.kind, Kind::Conv { .. })
            && matches!(graph.kind(output), ValueKind::Map(_));
    }
    for job in jobs {
        if !matches!(job.kind, Kind::Conv { .. }) {
            for value in job.reads(graph) {
                can[value.index()] = false;
            }
        }
    }
    for port in &graph.outputs {
        can[port.value.index()] = false;
    }
    can
}

/// The segments that a job normalises.
fn normalised(job: &Job) -> &[ValueId] {
    match &job.kind {
        Kind::Conv { chain, .. } | Kind::Pointwise { chain, .. }
            if matches!(chain.stage, Some(Stage::GroupNorm { .. })) =>
        {
            &chain.segments
        }
        _ => &[],
    }
}

/// Orders `jobs` into passes when the values marked in `streamed` are not stored.
pub(super) fn passes(graph: &Graph, jobs: &[Job], streamed: &[bool]) -> Vec<Pass> {
    let mut producer = vec![None; graph.values.len()];
    let mut wants_sums = vec![false; graph.values.len()];
    for (i, job) in jobs.iter().enumerate() {
        producer[graph.nodes[job.node].output.index()] = Some(i);
        for value in normalised(job) {
            wants_sums[value.index()] = true;
        }
    }
    let mut ready = vec![false; graph.values.len()];
    for port in &graph.inputs {
        ready[port.value.index()] = true;
    }
    let reads = jobs.iter().map(|j| j.reads(graph)).collect();
    let summed = vec![false; graph.values.len()];
    let mut orderer = Orderer {
        graph,
        jobs,
        streamed,
        producer,
        wants_sums,
        reads,
        ready,
        summed,
        passes: Vec::new(),
    };
    for job in 0..jobs.len() {
        let output = orderer.output(job);
        if !orderer.ready[output.index()] && !streamed[output.index()] {
            orderer.run(job);
        }
    }
    orderer.passes
}

struct Orderer<'a> {
    graph: &'a Graph,
    jobs: &'a [Job],
    streamed: &'a [bool],
    /// The job of each value.
    producer: Vec<Option<usize>>,
    /// Values that a norm reads.
    wants_sums: Vec<bool>,
    /// What each job reads.
    reads: Vec<Vec<ValueId>>,
    /// Values that are stored by now.
    ready: Vec<bool>,
    /// Values whose sums are known by now.
    summed: Vec<bool>,
    passes: Vec<Pass>,
}

impl Orderer<'_> {
    fn output(&self, job: usize) -> ValueId {
        self.graph.nodes[self.jobs[job].node].output
    }

    fn is_streamed(&self, job: usize) -> bool {
        self.streamed[self.output(job).index()]
    }

    /// `job` and the jobs of the streamed values that it needs, ascending.
    fn closure(&self, job: usize) -> Vec<usize> {
        let mut all = vec![job];
        let mut next = 0;
        while let Some(&job) = all.get(next) {
            next += 1;
            for value in &self.reads[job] {
                if self.streamed[value.index()]
                    && let Some(p) = self.producer[value.index()]
                    && !all.contains(&p)
                {
                    all.push(p);
                }
            }
        }
        all.sort_unstable();
        all
    }

    /// The first streamed value that a job of `closure` normalises before its sums are known.
    fn unsummed(&self, closure: &[usize]) -> Option<ValueId> {
        let values = closure.iter().flat_map(|&j| normalised(&self.jobs[j]));
        let unknown = |v: &&ValueId| self.streamed[v.index()] && !self.summed[v.index()];
        values.copied().find(|v| unknown(&v))
    }

    /// Adds a pass that computes `job`, after those that it needs.
    fn run(&mut self, job: usize) {
        let mut all = self.closure(job);
        while let Some(value) = self.unsummed(&all) {
            // Invariant: a streamed value has a producer, and its own closure is earlier in the graph.
            let producer = self.producer[value.index()].expect("a streamed value has a job");
            self.run(producer);
        }
        if all.len() > 1 || self.is_streamed(job) {
            self.join(&mut all);
        }
        let mut pass = Pass::new();
        for &job in &all {
            let output = self.output(job).index();
            let stored = !self.streamed[output];
            let sums = self.wants_sums[output] && !self.summed[output];
            pass.push(Part { job, stored, sums });
        }
        for part in &pass {
            let output = self.output(part.job).index();
            self.ready[output] |= part.stored;
            self.summed[output] |= part.sums;
        }
        self.passes.push(pass);
    }

    /// Takes along other jobs that could run now and share a streamed value with this pass, so that it
    /// is not computed again for them alone.
    fn join(&self, all: &mut Vec<usize>) {
        for job in 0..self.jobs.len() {
            let output = self.output(job).index();
            let wanted = if self.streamed[output] {
                self.wants_sums[output] && !self.summed[output]
            } else {
                !self.ready[output]
            };
            if !wanted || all.contains(&job) || !matches!(self.jobs[job].kind, Kind::Conv { .. }) {
                continue;
            }
            let own = self.closure(job);
            let shares = own.iter().any(|j| *j != job && all.contains(j));
            let known = |v: &ValueId| self.streamed[v.index()] || self.ready[v.index()];
            let can = own.iter().all(|&j| self.reads[j].iter().all(known));
            if shares && can && self.unsummed(&own).is_none() {
                all.extend(own);
                all.sort_unstable();
                all.dedup();
            }
        }
    }
}
