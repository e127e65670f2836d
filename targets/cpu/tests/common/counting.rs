//! Counts what the program allocates, on all its threads. A program that includes this has one test, so that
//! no other test's allocations are counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Counts allocations while `COUNTING` is above zero.
struct Counting;
static COUNTING: AtomicUsize = AtomicUsize::new(0);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
/// Bytes that are allocated, and the most that were since [`peak_bytes`] began.
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(COUNTING.load(Ordering::SeqCst), Ordering::SeqCst);
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
    // The thread that started this test allocates as it begins to wait for it, which on a busy machine may be late.
    static OTHERS: Once = Once::new();
    OTHERS.call_once(|| std::thread::sleep(Duration::from_millis(300)));
    ALLOCATIONS.store(0, Ordering::SeqCst);
    COUNTING.store(1, Ordering::SeqCst);
    work();
    COUNTING.store(0, Ordering::SeqCst);
    ALLOCATIONS.load(Ordering::SeqCst)
}
