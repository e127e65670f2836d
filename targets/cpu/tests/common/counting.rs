//! Counts what the program allocates, on all its threads but the test harness's. A program that includes this has one test, so that
//! no other test's allocations are counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts allocations while `COUNTING` is above zero.
struct Counting;
static COUNTING: AtomicUsize = AtomicUsize::new(0);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
/// Bytes that are allocated, and the most that were since [`peak_bytes`] began.
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The thread that allocates first, the program's own: it waits for the test, and allocates as it begins to, which on a
/// busy machine may be late. Not counted.
static HARNESS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static PLACE: u8 = const { 0 };
}

/// A number that this thread alone has while it lives, found without allocating.
fn here() -> usize {
    PLACE.with(|place| std::ptr::from_ref(place).addr())
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = HARNESS.compare_exchange(0, here(), Ordering::SeqCst, Ordering::SeqCst);
        if here() != HARNESS.load(Ordering::SeqCst) {
            ALLOCATIONS.fetch_add(COUNTING.load(Ordering::SeqCst), Ordering::SeqCst);
        }
        let live = LIVE.fetch_add(layout.size(), Ordering::SeqCst) + layout.size();
        PEAK.fetch_max(live, Ordering::SeqCst);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that `work` had allocated at once beside what there was before it.
#[allow(dead_code)]
pub(crate) fn peak_bytes<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.load(Ordering::SeqCst);
    PEAK.store(before, Ordering::SeqCst);
    let made = work();
    (made, PEAK.load(Ordering::SeqCst) - before)
}

/// Allocations while `work` ran.
#[allow(dead_code)]
pub(crate) fn allocations(work: impl FnOnce()) -> usize {
    if here() == HARNESS.load(Ordering::SeqCst) {
        // The test runs on the program's first thread (`--test-threads 1`): then nobody waits for it.
        HARNESS.store(usize::MAX, Ordering::SeqCst);
    }
    ALLOCATIONS.store(0, Ordering::SeqCst);
    COUNTING.store(1, Ordering::SeqCst);
    work();
    COUNTING.store(0, Ordering::SeqCst);
    ALLOCATIONS.load(Ordering::SeqCst)
}
