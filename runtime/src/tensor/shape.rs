//! Concrete shapes of values, known once a picture size is.

/// The shape of a value at a given picture size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shape {
    /// A feature map, `height × width × channels`, channels innermost.
    Map {
        /// Rows.
        h: usize,
        /// Columns.
        w: usize,
        /// Channels.
        c: usize,
    },
    /// A vector without spatial extent, such as a time embedding.
    Vector {
        /// Elements.
        len: usize,
    },
}

impl Shape {
    /// Number of elements; `None` where that overflows.
    #[must_use]
    pub fn elements(self) -> Option<usize> {
        match self {
            Self::Map { h, w, c } => h.checked_mul(w)?.checked_mul(c),
            Self::Vector { len } => Some(len),
        }
    }

    /// Channels of a map, or elements of a vector.
    #[must_use]
    pub fn channels(self) -> usize {
        match self {
            Self::Map { c, .. } => c,
            Self::Vector { len } => len,
        }
    }

    /// Pixels of a map, 1 for a vector.
    #[must_use]
    pub fn pixels(self) -> usize {
        match self {
            Self::Map { h, w, .. } => h * w,
            Self::Vector { .. } => 1,
        }
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Map { h, w, c } => write!(f, "{h}x{w}x{c}"),
            Self::Vector { len } => write!(f, "{len}"),
        }
    }
}
