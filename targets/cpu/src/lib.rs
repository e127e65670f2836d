//! The CPU target of latile: the only place with SIMD.
//!
//! Here live the instruction sets and their vector operations ([`isa`], [`simd`]), the matrix
//! kernels and their [`registry`], the thread [`pool`] and the fused
//! [`steps`] that a session runs, and what a program tells its [`allocator`]. Importers, file formats and pipelines never do.

pub mod allocator;
pub mod isa;
pub mod kernels;
mod lower;
pub mod naive;
pub mod peak;
pub mod pool;
pub mod reference;
pub mod registry;
mod residency;
pub mod session;
pub mod simd;
pub mod steps;
