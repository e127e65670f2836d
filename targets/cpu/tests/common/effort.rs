//! How many cases a test that enumerates them takes.
//!
//! Lives here: the reading of `LATILE_TEST_EFFORT`. Never here: what a test asserts, which is the same at any effort.
#![allow(unreachable_pub)]

/// `full` cases; `short` of them where `LATILE_TEST_EFFORT=short`, which is for emulated processors.
///
/// # Panics
/// Where the variable is neither `short` nor `full`.
#[must_use]
pub fn cases(full: usize, short: usize) -> usize {
    match std::env::var("LATILE_TEST_EFFORT").as_deref() {
        Err(_) | Ok("full") => full,
        Ok("short") => short,
        Ok(other) => panic!("LATILE_TEST_EFFORT={other}: say full, which is the default, or short"),
    }
}
