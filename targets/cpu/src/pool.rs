//! A fixed pool of threads that runs numbered tasks.
//!
//! [`Pool::run`] hands out task numbers from one atomic counter to the calling thread and the
//! pool's own; it allocates nothing. Which worker runs a task is not determined: tasks must
//! not depend on it for their result. Tasks here are compute only; nothing blocks on I/O.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Iterations that a thread spins before it parks (some tens of microseconds: about the gap
/// between two steps).
const SPINS: u32 = 4_000;

/// The most threads that a pool may have.
pub const MAX_THREADS: usize = 256;

/// Why the pool failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// A task panicked; the others were left or finished, and their output is not whole.
    #[error("a worker thread panicked: {message}; this is a bug in latile, please report it")]
    Panicked {
        /// What the panic said.
        message: String,
    },
    /// The operating system refused a thread.
    #[error("cannot start worker thread {index} of {threads}: {reason}; ask for fewer threads")]
    Spawn {
        /// The thread's number.
        index: usize,
        /// Threads asked for.
        threads: usize,
        /// What the system said.
        reason: String,
    },
    /// A number of threads outside 1..=[`MAX_THREADS`].
    #[error("{threads} threads were asked for; give a number from 1 to {MAX_THREADS}")]
    Threads {
        /// Threads asked for.
        threads: usize,
    },
}

type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// One run's work, valid while `run` waits.
#[derive(Clone, Copy)]
struct Job {
    /// The task function; its true lifetime is that of the `run` call.
    task: *const Task<'static>,
    count: usize,
}

// SAFETY: the pointer is used only between the job's publication and the last worker's
// departure, while `run` keeps the pointee alive; the pointee is Sync.
unsafe impl Send for Job {}

struct State {
    /// Rises by one with each run.
    epoch: usize,
    job: Option<Job>,
    stop: bool,
    panic: Option<String>,
}

struct Shared {
    state: Mutex<State>,
    start: Condvar,
    done: Condvar,
    /// Mirror of `State::epoch`, to spin on.
    epoch: AtomicUsize,
    /// The next task's number.
    next: AtomicUsize,
    /// Pool threads that have not left the present run.
    active: AtomicUsize,
    failed: AtomicBool,
    stop: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while holding the lock; a poisoned state is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes tasks until none is left.
    fn work(&self, job: Job, worker: usize) {
        // SAFETY: see `Job`: `run` keeps the pointee alive until every worker has left.
        let task = unsafe { &*job.task };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            while !self.failed.load(Ordering::Relaxed) {
                let index = self.next.fetch_add(1, Ordering::Relaxed);
                if index >= job.count {
                    break;
                }
                task(index, worker);
            }
        }));
        if let Err(payload) = outcome {
            self.failed.store(true, Ordering::Relaxed);
            self.lock().panic.get_or_insert(message(&*payload));
        }
    }
}

fn message(payload: &(dyn Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}

/// A fixed number of threads, the caller's included.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// One run at a time.
    turn: Mutex<()>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool of `threads`, the caller's included: `threads - 1` are started here.
    ///
    /// # Errors
    /// [`PoolError::Threads`] for a number out of range, [`PoolError::Spawn`] when the system
    /// refuses a thread.
    pub fn new(threads: usize) -> Result<Self, PoolError> {
        if threads == 0 || threads > MAX_THREADS {
            return Err(PoolError::Threads { threads });
        }
        let shared = Arc::new(Shared {
            state: Mutex::new(State { epoch: 0, job: None, stop: false, panic: None }),
            start: Condvar::new(),
            done: Condvar::new(),
            epoch: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            active: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let mut pool =
            Pool { shared, threads: Vec::with_capacity(threads - 1), turn: Mutex::new(()) };
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let handle = std::thread::Builder::new()
                .name(format!("latile-{index}"))
                .spawn(move || serve(&shared, index))
                .map_err(|error| PoolError::Spawn { index, threads, reason: error.to_string() })?;
            pool.threads.push(handle);
        }
        Ok(pool)
    }

    /// Threads, the caller's included. Worker numbers are below this.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Calls `task(index, worker)` once for every index below `count` and waits for all.
    /// Two tasks that run at once have different worker numbers. A task must not call `run` of
    /// its own pool: it would wait for itself.
    ///
    /// # Errors
    /// [`PoolError::Panicked`] when a task panicked.
    pub fn run(&self, count: usize, task: &Task<'_>) -> Result<(), PoolError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; this call does not return before every worker
        // has left the job, and clears it.
        let task: *const Task<'static> =
            unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        let job = Job { task, count };
        shared.next.store(0, Ordering::Relaxed);
        shared.failed.store(false, Ordering::Relaxed);
        let helped = count > 1 && !self.threads.is_empty();
        if helped {
            shared.active.store(self.threads.len(), Ordering::Relaxed);
            {
                let mut state = shared.lock();
                state.job = Some(job);
                state.epoch = state.epoch.wrapping_add(1);
                shared.epoch.store(state.epoch, Ordering::Release);
            }
            shared.start.notify_all();
        }
        shared.work(job, 0);
        if helped {
            let mut spins = 0;
            while shared.active.load(Ordering::Acquire) != 0 && spins < SPINS {
                std::hint::spin_loop();
                spins += 1;
            }
            let mut state = shared.lock();
            while shared.active.load(Ordering::Acquire) != 0 {
                state = shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.job = None;
        }
        match shared.lock().panic.take() {
            None => Ok(()),
            Some(message) => Err(PoolError::Panicked { message }),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.lock().stop = true;
        self.shared.start.notify_all();
        for thread in self.threads.drain(..) {
            // A worker catches its tasks' panics, so joining cannot fail for one.
            let _ = thread.join();
        }
    }
}

/// A pool thread's life.
fn serve(shared: &Shared, worker: usize) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while shared.epoch.load(Ordering::Acquire) == seen
            && !shared.stop.load(Ordering::Relaxed)
            && spins < SPINS
        {
            std::hint::spin_loop();
            spins += 1;
        }
        let job = {
            let mut state = shared.lock();
            while state.epoch == seen && !state.stop {
                state = shared.start.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.stop {
                return;
            }
            seen = state.epoch;
            state.job
        };
        if let Some(job) = job {
            shared.work(job, worker);
        }
        if shared.active.fetch_sub(1, Ordering::AcqRel) == 1 {
            // Under the lock, so that the caller cannot miss it between its check and its wait.
            drop(shared.lock());
            shared.done.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in 1..=4 {
            let pool = Pool::new(threads).unwrap();
            assert_eq!(pool.threads(), threads);
            for count in [0, 1, 2, 3, 100, 1000] {
                let hits: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                pool.run(count, &|index, worker| {
                    assert!(worker < threads);
                    hits[index].fetch_add(1, Ordering::Relaxed);
                })
                .unwrap();
                assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn many_short_runs() {
        let pool = Pool::new(3).unwrap();
        let total = AtomicUsize::new(0);
        for _ in 0..5000 {
            pool.run(4, &|index, _| {
                total.fetch_add(index, Ordering::Relaxed);
            })
            .unwrap();
        }
        assert_eq!(total.load(Ordering::Relaxed), 5000 * 6);
    }

    #[test]
    fn a_panic_is_an_error_and_the_pool_lives() {
        for threads in [1, 3] {
            let pool = Pool::new(threads).unwrap();
            let error = pool.run(50, &|index, _| assert_ne!(index, 7, "task seven")).unwrap_err();
            assert!(error.to_string().contains("task seven"), "{error}");
            let count = AtomicUsize::new(0);
            pool.run(50, &|_, _| {
                count.fetch_add(1, Ordering::Relaxed);
            })
            .unwrap();
            assert_eq!(count.load(Ordering::Relaxed), 50);
        }
    }

    #[test]
    fn thread_counts_are_checked() {
        assert!(matches!(Pool::new(0), Err(PoolError::Threads { threads: 0 })));
        assert!(Pool::new(MAX_THREADS + 1).is_err());
    }
}
