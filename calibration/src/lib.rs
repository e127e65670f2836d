//! Activation ranges for the int8 export, collected by running the float model.
//!
//! Lives here: the calibration set ([`pictures`]), the run of the float model over its whole sampling
//! trajectory ([`mod@run`]), the observers of what each layer reads, the choice of an equaliser and of
//! ranges ([`choose`]), and the [`table`] they make, a file of its own; and what int8 then cost, measured on
//! pairs of runs ([`mod@compare`]; [`trajectory`] has the float model's side) and on pictures ([`judge`]). Never here: writing a model, decoding picture files, or a guessed range:
//! no data, no int8.
#![forbid(unsafe_code)]

pub mod choose;
mod collect;
pub mod compare;
mod equalise;
mod error;
pub mod judge;
mod observe;
pub mod pictures;
pub mod run;
pub mod table;
pub mod trajectory;
mod watch;

pub use compare::{Comparison, compare};
pub use error::CalibrationError;
pub use judge::{Judge, Verdict};
pub use pictures::{PictureSet, RgbPicture};
pub use run::{Options, Progress, calibrate, read_pictures};
pub use table::{
    ComponentTable, GroupTable, LayerTable, Method, Range, Ranges, SquareRanges, Table, TableError,
    WinogradRanges, int8_layers,
};
