//! What every latile device runs: the `.latile` reader, the graph and its memory plan, the samplers,
//! and the tile-by-tile pipeline that turns a frame into a larger one.
//!
//! Lives here: tensor types and the arena ([`tensor`]), primitive operators with shape inference and
//! liveness ([`graph`]), the file format ([`mod@format`]), files that are whole or absent ([`persist`]), the one
//! boundary to hardware ([`backend`]) and the flow of a picture ([`pipeline`]).
//!
//! Never here: SIMD, threads, vendor code, ONNX, protobuf, or the name of any target. The pipeline sees
//! hardware only through [`backend::Backend`] and [`backend::Session`]. `unsafe` stands only in the memory
//! map (`format::map`) and the arena (`tensor::arena`).
#![deny(unsafe_code)]

pub mod backend;
pub mod format;
pub mod graph;
pub mod persist;
pub mod pipeline;
pub mod tensor;
