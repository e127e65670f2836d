"""Workers that train one set of weights together without waiting for each other.

Each worker is a process with its own optimiser and its own share of the crops. After every step it adds its share (one over
the number of workers) of what it changed to weights in shared memory, and goes on from the sum. A worker that the machine
starves only contributes less. (Adding the whole change, or merging more rarely, makes the workers correct the same error
twice: the mean colour of the results then swings, and training goes several times slower.) With one worker a run is decided
by its seed; with several it is not, since the order of the sums is the machine's.
"""

import os

import torch
import torch.multiprocessing as mp

class Team:
    """`rank` 0 leads: it alone keeps the average, the logs and the checkpoints, and its progress is everyone's."""

    def __init__(self, rank, size, shared):
        self.rank, self.size, self.shared, self.seen, self.parent = rank, size, shared, None, os.getppid()

    @property
    def leads(self):
        return self.rank == 0

    def start(self, parameters):
        """After the leader has restored its checkpoint: everyone takes the leader's weights."""
        if self.size == 1:
            return
        flat = flatten(parameters)
        if self.leads:
            self.shared["weights"][:flat.numel()] = flat
            self.shared["ready"].set()
        else:
            self.shared["ready"].wait()
            flat = self.shared["weights"][:flat.numel()].clone()
            unflatten(flat, parameters)
        self.seen = flat.clone()

    def merge(self, parameters):
        """Adds this worker's share of its changes to the shared weights and takes the sum."""
        if self.size == 1:
            return
        flat = flatten(parameters)
        with self.shared["lock"]:
            weights = self.shared["weights"][:flat.numel()]
            weights.add_(flat - self.seen, alpha=1 / self.size)
            flat = weights.clone()
        unflatten(flat, parameters)
        self.seen = flat

    def progress(self, own):
        """The leader's progress, 0 to 1; `own` is this worker's."""
        if self.size == 1:
            return own
        if os.getppid() != self.parent:
            raise SystemExit("the process that started this worker is gone")
        if self.leads:
            self.shared["progress"].value = own
        return self.shared["progress"].value


@torch.no_grad()
def flatten(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


@torch.no_grad()
def unflatten(flat, parameters):
    at = 0
    for p in parameters:
        p.copy_(flat[at:at + p.numel()].view_as(p))
        at += p.numel()


def _enter(rank, work, size, shared, threads, arguments):
    torch.set_num_threads(threads)
    work(Team(rank, size, shared), arguments)


def run(work, arguments, most_parameters=64_000_000):
    """Calls `work(team, arguments)` in `arguments.workers` processes; one worker runs in this one. On a CPU each of several
    workers takes one thread: two of one thread do far more than one of two, which waits for the slower core after every
    operator."""
    if arguments.workers == 1:
        work(Team(0, 1, None), arguments)
        return
    context = mp.get_context("spawn")
    shared = {"weights": torch.zeros(most_parameters).share_memory_(), "lock": context.Lock(), "ready": context.Event(),
              "progress": context.Value("d", 0.0)}
    mp.spawn(_enter, (work, arguments.workers, shared, 1, arguments), arguments.workers)


def add_arguments(p):
    p.add_argument("--workers", type=int, default=1, help="processes that share the training (CPU: one per core)")
