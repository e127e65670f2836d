//! The C library's allocator, told to give large blocks back.
//!
//! glibc maps a block of 128 KiB or more on its own and unmaps it when it is freed; but each time it does, it
//! raises that bound to the block's size, so that the next block of it, as an arena is, comes from the heap
//! and stays resident after it is freed. A process that promises how much it has at most cannot do with that.

/// Keeps the bound where it starts: every block of 128 KiB or more is given back as soon as it is freed.
/// For a program's beginning; does nothing where the C library is not glibc.
pub fn give_back_large_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn mallopt(parameter: i32, value: i32) -> i32;
        }
        const TRIM_THRESHOLD: i32 = -1;
        const MMAP_THRESHOLD: i32 = -3;
        const BOUND: i32 = 128 << 10;
        for parameter in [MMAP_THRESHOLD, TRIM_THRESHOLD] {
            // SAFETY: the C library's function, as malloc.h declares it; it may be called at any time.
            if unsafe { mallopt(parameter, BOUND) } == 0 {
                log::debug!("the allocator keeps its own bounds");
            }
        }
    }
}
