//! Tensors that are a graph value seen through reshapes and transposes.
//!
//! A feature map has three factors, channels, rows and columns; every reshape and transpose in a latent diffusion
//! network only regroups and reorders them. A [`View`] says which factors each axis is made of, so
//! `[1, C, H, W]`, `[1, H·W, C]` and `[1, heads, H·W, d]` are all views of one value, and no reshape becomes an
//! operator. Sizes are concrete: a graph of free size is read at an example size.

use latile_runtime::graph::ValueId;

/// What a factor of an axis runs over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    Rows,
    Columns,
    Channels,
}

/// A factor: `size` steps of `stride` along channels, or all rows or columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Atom {
    pub(super) over: Over,
    pub(super) size: usize,
    pub(super) stride: usize,
}

/// Which factors each axis is made of, outermost first; an axis of size one has none.
pub(super) type Axes = Vec<Vec<Atom>>;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct View {
    pub(super) value: ValueId,
    pub(super) axes: Axes,
    /// The first channel, for parts of a vector.
    pub(super) offset: usize,
    /// The tensor is `value · mul + add`.
    pub(super) mul: f32,
    pub(super) add: f32,
}

fn atom(over: Over, size: usize) -> Vec<Atom> {
    if size == 1 { Vec::new() } else { vec![Atom { over, size, stride: 1 }] }
}

/// `[1, c, h, w]`.
pub(super) fn map_axes(c: usize, h: usize, w: usize) -> Axes {
    vec![Vec::new(), atom(Over::Channels, c), atom(Over::Rows, h), atom(Over::Columns, w)]
}

/// `[1, len]`.
pub(super) fn vector_axes(len: usize) -> Axes {
    vec![Vec::new(), atom(Over::Channels, len)]
}

/// Pixels as one axis.
fn pixels(h: usize, w: usize) -> Vec<Atom> {
    [atom(Over::Rows, h), atom(Over::Columns, w)].concat()
}

/// An axis' size.
pub(super) fn size(axis: &[Atom]) -> usize {
    axis.iter().map(|a| a.size).product()
}

impl View {
    pub(super) fn new(value: ValueId, axes: Axes) -> Self {
        Self { value, axes, offset: 0, mul: 1.0, add: 0.0 }
    }

    pub(super) fn dims(&self) -> Vec<usize> {
        self.axes.iter().map(|a| size(a)).collect()
    }

    /// Whether it is the value itself, neither scaled nor a part.
    pub(super) fn is_plain(&self) -> bool {
        self.mul == 1.0 && self.add == 0.0 && self.offset == 0
    }

    /// Whether the axes are `[…1, h·w, c]` with any number of leading ones.
    pub(super) fn is_tokens(&self, c: usize, h: usize, w: usize) -> bool {
        match &self.axes[..] {
            [lead @ .., p, ch] => {
                lead.iter().all(Vec::is_empty)
                    && *p == pixels(h, w)
                    && *ch == atom(Over::Channels, c)
            }
            _ => false,
        }
    }

    pub(super) fn transpose(&self, perm: &[usize]) -> Self {
        let axes = perm.iter().map(|&p| self.axes[p].clone()).collect();
        Self { axes, ..self.clone() }
    }

    /// Regroups the factors into axes of the given sizes; `None` where a size cuts through rows or columns.
    pub(super) fn reshape(&self, dims: &[usize]) -> Option<Self> {
        let mut queue: Vec<Atom> = self.axes.iter().flatten().copied().rev().collect();
        let mut axes: Axes = Vec::with_capacity(dims.len());
        for &dim in dims {
            let mut axis: Vec<Atom> = Vec::new();
            let mut have = 1usize;
            while have < dim {
                let a = queue.pop()?;
                let need = dim / have;
                if !dim.is_multiple_of(have) {
                    return None;
                }
                if need.is_multiple_of(a.size) {
                    have *= a.size;
                    axis.push(a);
                } else if a.over == Over::Channels && a.size.is_multiple_of(need) {
                    let rest = a.size / need;
                    axis.push(Atom { size: need, stride: a.stride * rest, ..a });
                    queue.push(Atom { size: rest, ..a });
                    have = dim;
                } else {
                    return None;
                }
            }
            axes.push(merged(axis));
        }
        queue.is_empty().then(|| Self { axes, ..self.clone() })
    }
}

/// Neighbouring channel factors that together run over channels in order, as one.
fn merged(axis: Vec<Atom>) -> Vec<Atom> {
    let mut out: Vec<Atom> = Vec::with_capacity(axis.len());
    for a in axis {
        match out.last_mut() {
            Some(last)
                if last.over == Over::Channels
                    && a.over == Over::Channels
                    && last.stride == a.size * a.stride =>
            {
                last.size *= a.size;
                last.stride = a.stride;
            }
            _ => out.push(a),
        }
    }
    out
}

/// The heads and their width where the axes are a projection split into heads: `[…1, heads, p, d]`, `p` pixels.
pub(super) fn heads(axes: &[Vec<Atom>], c: usize, h: usize, w: usize) -> Option<(usize, usize)> {
    let [lead @ .., p, d] = axes else {
        return None;
    };
    let d_size = size(d);
    let heads: Vec<&Vec<Atom>> = lead.iter().filter(|a| !a.is_empty()).collect();
    let count = heads.first().map_or(1, |a| size(a));
    let expected_head = if count == 1 {
        Vec::new()
    } else {
        vec![Atom { over: Over::Channels, size: count, stride: d_size }]
    };
    let fits = heads.len() <= 1
        && heads.first().is_none_or(|a| **a == expected_head)
        && *p == pixels(h, w)
        && *d == atom(Over::Channels, d_size)
        && count * d_size == c;
    fits.then_some((count, d_size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_reshapes_keep_track_of_channels() {
        let x = View::new(ValueId(0), map_axes(12, 4, 5));
        let tokens = x.reshape(&[1, 12, 20]).unwrap().transpose(&[0, 2, 1]);
        assert!(tokens.is_tokens(12, 4, 5));
        let split = tokens.reshape(&[1, 20, 3, 4]).unwrap().transpose(&[0, 2, 1, 3]);
        assert_eq!(split.dims(), [1, 3, 20, 4]);
        assert_eq!(heads(&split.axes, 12, 4, 5), Some((3, 4)));
        let batch = split.reshape(&[3, 20, 4]).unwrap();
        assert_eq!(heads(&batch.axes, 12, 4, 5), Some((3, 4)));
        let back = split.transpose(&[0, 2, 1, 3]).reshape(&[1, 20, 12]).unwrap();
        assert_eq!(back, tokens);
        assert_eq!(back.transpose(&[0, 2, 1]).reshape(&[1, 12, 4, 5]).unwrap(), x);
        // Heads that interleave channels are another thing.
        let odd = tokens.reshape(&[1, 20, 4, 3]).unwrap().transpose(&[0, 3, 1, 2]);
        assert_eq!(heads(&odd.axes, 12, 4, 5), None);
    }

    #[test]
    fn groups_join_channels_and_pixels() {
        let x = View::new(ValueId(0), map_axes(12, 4, 5));
        let groups = x.reshape(&[1, 3, 80]).unwrap();
        assert_eq!(groups.axes[1], [Atom { over: Over::Channels, size: 3, stride: 4 }]);
        assert_eq!(groups.reshape(&[1, 12, 4, 5]).unwrap(), x);
        assert_eq!(x.reshape(&[1, 12, 2, 10]), None);
        assert_eq!(x.reshape(&[1, 12, 4]), None);
    }
}
