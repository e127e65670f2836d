//! Pictures as files and as numbers.
//!
//! Lives here: reading PNG, JPEG and WebP with limits ([`decode`]), writing them row by row ([`sink`],
//! [`encode`], [`bands`]), resizing an opacity channel ([`opacity`]), what all that takes in memory ([`cost`])
//! and measuring one picture against another ([`measure`]). Never here: networks, tiles, the command line.

mod bands;
mod cost;
mod decode;
mod encode;
mod measure;
mod opacity;
mod sink;

pub(crate) use cost::{Kind, caller};
pub(crate) use decode::{MAX_PIXELS, read, read_within};
pub(crate) use encode::{Encoding, Form, png};
pub(crate) use measure::{Measures, measure};
pub(crate) use opacity::Enlarger;
pub(crate) use sink::{Sink, Target};

use latile_runtime::pipeline::budget::mib;
use std::path::PathBuf;

/// Why a picture cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PictureError {
    /// The file cannot be read.
    #[error("cannot read picture {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Its pixels alone take more memory than there may be.
    #[error(
        "picture {}: its pixels alone take {}, and {} are allowed (--memory); crop or shrink it first, or allow several times as much",
        path.display(), mib(*.bytes), mib(*.limit)
    )]
    Memory {
        /// The file.
        path: PathBuf,
        /// Bytes of its pixels.
        bytes: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The file is no picture that latile takes.
    #[error("picture {} is refused: {why}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        why: String,
    },
}

/// Samples of one or more channels, interleaved, as deep as the file had them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Samples {
    /// 0 to 255.
    Eight(Vec<u8>),
    /// 0 to 65535.
    Sixteen(Vec<u16>),
}

impl Samples {
    /// Number of samples.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Eight(v) => v.len(),
            Self::Sixteen(v) => v.len(),
        }
    }

    /// Sample `i` on the scale 0 to 255.
    pub(crate) fn on_255(&self, i: usize) -> f64 {
        match self {
            Self::Eight(v) => f64::from(v[i]),
            Self::Sixteen(v) => f64::from(v[i]) / 257.0,
        }
    }

    /// Whether every sample has its largest value.
    fn all_full(&self) -> bool {
        match self {
            Self::Eight(v) => v.iter().all(|&s| s == u8::MAX),
            Self::Sixteen(v) => v.iter().all(|&s| s == u16::MAX),
        }
    }
}

/// A picture in memory, upright, in the colour space its file names (sRGB where it names none).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Picture {
    /// Columns, at least 1.
    pub(crate) width: u32,
    /// Rows, at least 1.
    pub(crate) height: u32,
    /// Red, green, blue of each pixel, row by row.
    pub(crate) rgb: Samples,
    /// Opacity of each pixel, where the file has one that is not full everywhere; not premultiplied.
    pub(crate) opacity: Option<Samples>,
    /// The file's ICC profile for its RGB values, to go along with them.
    pub(crate) icc: Option<Vec<u8>>,
}
