//! Turns a trained latent diffusion checkpoint into one `.latile` file.
//!
//! Lives here: weight sources ([`source`]), the configs of diffusers folders ([`diffusers`]) and the key layout
//! of CompVis checkpoints ([`compvis`]), both resolved to one description of the networks ([`arch`]), the graph
//! builder that turns that description into primitive operators ([`build`]), and the streaming writer
//! ([`export`]). ONNX graphs come in through `onnx` where that feature is on.
//!
//! Never here: kernels, samplers, pictures. No checkpoint is ever executed: pickles are read by a machine
//! without calls ([`source::pickle`]).
#![forbid(unsafe_code)]

pub mod source;
