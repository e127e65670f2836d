//! The pipeline: noise and schedules against numbers from torch and diffusers, and the flow of a picture
//! through a backend whose networks are simple enough to be checked by hand.
#![allow(clippy::unwrap_used)]

mod budget;
mod consistency;
mod fake;
mod flow;
mod noise;
mod oracle;
mod refusals;
mod resume;
mod runner;
mod schedule;
mod scratch;
