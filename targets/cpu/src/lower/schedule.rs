//! In which order the convolutions of a pass compute their lines, how many lines of each streamed value
//! are alive at once, and where stored maps may share memory: a pure simulation of line numbers.

/// Rows `y[0]..y[1]` of the output of convolution `step` of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Strip {
    pub(crate) step: usize,
    pub(crate) y: [usize; 2],
}

/// What a convolution reads of one map.
pub(super) struct Read<'a> {
    /// The map: a value's number.
    pub(super) value: usize,
    /// The convolution of the same pass that computes it, unless it is stored.
    pub(super) from: Option<usize>,
    /// The map's rows, from and to, that some rows of the output need; never falling.
    pub(super) rows: Box<dyn Fn([usize; 2]) -> [usize; 2] + 'a>,
    /// Whether it is added to the output pixel by pixel, so that the output may take its place.
    pub(super) added: bool,
}

/// A convolution of a pass.
pub(super) struct Worker<'a> {
    /// Rows of the output.
    pub(super) height: usize,
    /// Rows computed at once.
    pub(super) strip: usize,
    pub(super) reads: Vec<Read<'a>>,
    /// Whether every row must be computed, wanted by others or not.
    pub(super) whole: bool,
}

/// The order of a pass.
pub(super) struct Schedule {
    pub(super) order: Vec<Strip>,
    /// Lines that a ring for each worker's output needs.
    pub(super) lines: Vec<usize>,
}

impl Worker<'_> {
    fn next(&self, front: usize) -> [usize; 2] {
        [front, self.height.min(front + self.strip)]
    }
}

/// Orders the strips of a pass: those that are wanted whole advance together, and each asks for the
/// lines that it needs when it needs them.
pub(super) fn schedule(workers: &[Worker<'_>]) -> Schedule {
    let mut s = State {
        workers,
        front: vec![0; workers.len()],
        out: Schedule { order: Vec::new(), lines: vec![0; workers.len()] },
    };
    loop {
        // The one that is furthest behind; of equals the first. Compared without rounding.
        let open = |&i: &usize| workers[i].whole && s.front[i] < workers[i].height;
        let behind = (0..workers.len()).filter(open).min_by(|&a, &b| {
            let share = |i: usize, j: usize| s.front[i] as u128 * workers[j].height as u128;
            share(a, b).cmp(&share(b, a))
        });
        match behind {
            Some(worker) => s.advance(worker),
            None => return s.out,
        }
    }
}

struct State<'w> {
    workers: &'w [Worker<'w>],
    /// Rows that each has computed.
    front: Vec<usize>,
    out: Schedule,
}

impl State<'_> {
    /// Computes the next strip of `step`, after what it needs.
    fn advance(&mut self, step: usize) {
        let worker = &self.workers[step];
        let y = worker.next(self.front[step]);
        for read in &worker.reads {
            if let Some(from) = read.from {
                let needed = (read.rows)(y)[1];
                while self.front[from] < needed {
                    self.advance(from);
                }
            }
        }
        // The oldest line that somebody still needs; lines of this strip are needed themselves.
        let mut oldest = y[0];
        for (other, front) in self.workers.iter().zip(&self.front) {
            if *front < other.height {
                for read in other.reads.iter().filter(|r| r.from == Some(step)) {
                    oldest = oldest.min((read.rows)(other.next(*front))[0]);
                }
            }
        }
        self.front[step] = y[1];
        self.out.lines[step] = self.out.lines[step].max(y[1] - oldest).min(worker.height);
        self.out.order.push(Strip { step, y });
    }
}

/// By how many bytes the stored map `value` must lie behind the output of worker `writer`, each with the
/// bytes of its rows, so that no line is overwritten that is still to be read; at most 0 where both may
/// begin at one place. Where `in_place`, the writer itself may add the line that it overwrites.
pub(super) fn distance(
    workers: &[Worker<'_>],
    order: &[Strip],
    (value, value_row): (usize, usize),
    (writer, writer_row): (usize, usize),
    in_place: bool,
) -> isize {
    let mut needed = usize::MAX;
    let mut distance = 0_isize;
    for strip in order.iter().rev() {
        for read in workers[strip.step].reads.iter().filter(|r| r.value == value) {
            if !(in_place && strip.step == writer && read.added) {
                needed = needed.min((read.rows)(strip.y)[0]);
            }
        }
        if strip.step == writer && needed != usize::MAX {
            let end = (strip.y[1] * writer_row) as isize;
            distance = distance.max(end - (needed * value_row) as isize);
        }
    }
    distance
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reader of rows y - 1 .. y + 1 of a map `height` high.
    fn window(value: usize, from: Option<usize>, height: usize) -> Read<'static> {
        let rows = move |[a, b]: [usize; 2]| [a.saturating_sub(1), height.min(b + 1)];
        Read { value, from, rows: Box::new(rows), added: false }
    }

    fn added(value: usize, from: Option<usize>) -> Read<'static> {
        Read { value, from, rows: Box::new(|y| y), added: true }
    }

    fn worker(
        height: usize,
        strip: usize,
        whole: bool,
        reads: Vec<Read<'static>>,
    ) -> Worker<'static> {
        Worker { height, strip, reads, whole }
    }

    /// Every row once and in order, nothing read before it is there or after it is gone.
    fn check(workers: &[Worker<'_>], s: &Schedule) {
        let mut front = vec![0; workers.len()];
        for strip in &s.order {
            assert_eq!(strip.y[0], front[strip.step]);
            for read in &workers[strip.step].reads {
                if let Some(from) = read.from {
                    let [a, b] = (read.rows)(strip.y);
                    assert!(b <= front[from] && front[from] - a <= s.lines[from], "{strip:?}");
                }
            }
            front[strip.step] = strip.y[1];
        }
        for (worker, front) in workers.iter().zip(front) {
            assert!(!worker.whole || front == worker.height);
        }
    }

    #[test]
    fn a_residual_block_streams_through_few_lines() {
        for (height, strip) in [(64, 16), (70, 16), (33, 4), (16, 16), (1, 4)] {
            // x -> h -> out + x
            let workers = [
                worker(height, strip, false, vec![window(0, None, height)]),
                worker(height, strip, true, vec![window(1, Some(0), height), added(0, None)]),
            ];
            let s = schedule(&workers);
            check(&workers, &s);
            assert!(s.lines[0] <= 2 * strip + 2, "{:?}", s.lines);
            // The result may take the place of x.
            assert!(distance(&workers, &s.order, (0, 10), (1, 10), true) <= 0);
            let apart = distance(&workers, &s.order, (0, 10), (1, 10), false);
            assert!(apart > 0 && apart <= 10 * (strip as isize + 1));
        }
    }

    #[test]
    fn an_enlarged_map_overwrites_the_one_it_is_made_from() {
        // Rows of the result are as long as two of the input's.
        let (small, large) = (50, 100);
        let rows = move |[a, b]: [usize; 2]| [a.saturating_sub(1) / 2, small.min(b / 2 + 1)];
        let up = Read { value: 0, from: None, rows: Box::new(rows), added: false };
        let workers = [
            worker(large, 8, false, vec![up]),
            worker(large, 8, true, vec![window(1, Some(0), large)]),
        ];
        let s = schedule(&workers);
        check(&workers, &s);
        let apart = distance(&workers, &s.order, (0, 20), (1, 20), false);
        // The input lies where the result's end will be, but for lines that are read by then.
        assert!((20 * 30..=20 * (50 + 24)).contains(&apart), "{apart}");
    }

    #[test]
    fn two_results_share_what_is_streamed() {
        let workers = [
            worker(40, 4, true, vec![window(0, None, 40)]),
            worker(40, 8, true, vec![added(1, Some(0))]),
            worker(
                20,
                4,
                true,
                vec![Read {
                    value: 1,
                    from: Some(0),
                    rows: Box::new(|[a, b]| [2 * a, 40.min(2 * b + 1)]),
                    added: false,
                }],
            ),
        ];
        let s = schedule(&workers);
        check(&workers, &s);
        assert!(s.lines[0] < 40, "{:?}", s.lines);
    }
}
