//! Small constant tensors, and the operators that exporters leave for a reader to fold: shape arithmetic, the
//! sinusoidal embedding, the distances to a codebook.

use super::file::{Attribute, OnnxNode};

/// Elements beyond which nothing is folded.
pub(super) const MAX_ELEMENTS: usize = 8 << 20;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Elements {
    /// Integers and booleans.
    I(Vec<i64>),
    F(Vec<f32>),
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tensor {
    pub(super) dims: Vec<usize>,
    pub(super) data: Elements,
}

pub(super) type Folded = Result<Tensor, String>;

impl Tensor {
    pub(super) fn ints(dims: &[usize], data: Vec<i64>) -> Self {
        Self { dims: dims.to_vec(), data: Elements::I(data) }
    }

    pub(super) fn floats(dims: &[usize], data: Vec<f32>) -> Self {
        Self { dims: dims.to_vec(), data: Elements::F(data) }
    }

    pub(super) fn len(&self) -> usize {
        match &self.data {
            Elements::I(v) => v.len(),
            Elements::F(v) => v.len(),
        }
    }

    pub(super) fn as_ints(&self) -> Result<&[i64], String> {
        match &self.data {
            Elements::I(v) => Ok(v),
            Elements::F(_) => Err("floats where whole numbers are expected".into()),
        }
    }

    pub(super) fn as_floats(&self) -> Vec<f32> {
        match &self.data {
            Elements::I(v) => v.iter().map(|&v| v as f32).collect(),
            Elements::F(v) => v.clone(),
        }
    }

    /// The only element.
    pub(super) fn scalar(&self) -> Option<f32> {
        match &self.data {
            Elements::I(v) if v.len() == 1 => Some(v[0] as f32),
            Elements::F(v) if v.len() == 1 => Some(v[0]),
            _ => None,
        }
    }

    /// Elements picked by index, in a new shape.
    pub(super) fn pick(&self, dims: Vec<usize>, index: impl Iterator<Item = usize>) -> Self {
        let data = match &self.data {
            Elements::I(v) => Elements::I(index.map(|i| v[i]).collect()),
            Elements::F(v) => Elements::F(index.map(|i| v[i]).collect()),
        };
        Self { dims, data }
    }
}

pub(super) fn count(dims: &[usize]) -> Result<usize, String> {
    dims.iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d))
        .filter(|&n| n <= MAX_ELEMENTS)
        .ok_or_else(|| format!("a constant of shape {dims:?} is too large to fold"))
}

/// The shape to which two shapes broadcast.
pub(super) fn broadcast(a: &[usize], b: &[usize]) -> Result<Vec<usize>, String> {
    let rank = a.len().max(b.len());
    let at = |s: &[usize], i: usize| if i + s.len() < rank { 1 } else { s[i + s.len() - rank] };
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Ok(x),
            (1, y) => Ok(y),
            (x, 1) => Ok(x),
            _ => Err(format!("shapes {a:?} and {b:?} do not broadcast")),
        })
        .collect()
}

/// Index into `from` of each element of the broadcast shape `to`, in row-major order.
pub(super) fn broadcast_indices(from: &[usize], to: &[usize]) -> Vec<usize> {
    let total: usize = to.iter().product();
    let mut stride = vec![0usize; to.len()];
    let mut step = 1;
    for (i, &d) in from.iter().enumerate().rev() {
        stride[to.len() - from.len() + i] = if d == 1 { 0 } else { step };
        step *= d;
    }
    let mut out = Vec::with_capacity(total);
    let mut index = vec![0usize; to.len()];
    let mut at = 0usize;
    for _ in 0..total {
        out.push(at);
        for axis in (0..to.len()).rev() {
            index[axis] += 1;
            at += stride[axis];
            if index[axis] < to[axis] {
                break;
            }
            at -= to[axis] * stride[axis];
            index[axis] = 0;
        }
    }
    out
}

/// An axis that may count from the end.
pub(super) fn axis(value: i64, rank: usize) -> Result<usize, String> {
    let at = if value < 0 { value + rank as i64 } else { value };
    usize::try_from(at)
        .ok()
        .filter(|&a| a < rank.max(1))
        .ok_or_else(|| format!("axis {value} of {rank} axes"))
}

pub(super) fn attr_int(n: &OnnxNode, name: &str, default: i64) -> i64 {
    match n.attributes.get(name) {
        Some(Attribute::Int(v)) => *v,
        _ => default,
    }
}

pub(super) fn attr_ints(n: &OnnxNode, name: &str) -> Option<Vec<i64>> {
    match n.attributes.get(name) {
        Some(Attribute::Ints(v)) => Some(v.clone()),
        _ => None,
    }
}

pub(super) fn attr_float(n: &OnnxNode, name: &str, default: f32) -> f32 {
    match n.attributes.get(name) {
        Some(Attribute::Float(v)) => *v,
        _ => default,
    }
}

pub(super) fn attr_text<'n>(n: &'n OnnxNode, name: &str, default: &'n str) -> &'n str {
    match n.attributes.get(name) {
        Some(Attribute::Text(v)) => v,
        _ => default,
    }
}

/// The dimensions that `Reshape` asks for.
pub(super) fn reshape_dims(
    from: &[usize],
    target: &[i64],
    allow_zero: bool,
) -> Result<Vec<usize>, String> {
    let total: usize = from.iter().product();
    let mut dims = Vec::with_capacity(target.len());
    let mut free = None;
    for (i, &t) in target.iter().enumerate() {
        dims.push(match t {
            -1 if free.is_none() => {
                free = Some(i);
                1
            }
            0 if !allow_zero => *from.get(i).ok_or("a 0 beyond the input's axes")?,
            t => usize::try_from(t).map_err(|_| format!("a size of {t}"))?,
        });
    }
    let known: usize =
        dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or("a size that overflows")?;
    if let Some(i) = free {
        dims[i] = total.checked_div(known).ok_or("a free size beside an empty one")?;
    }
    if dims.iter().product::<usize>() != total {
        return Err(format!("{from:?} cannot become {target:?}"));
    }
    Ok(dims)
}

/// The dimensions after `Unsqueeze` at `axes`.
pub(super) fn unsqueeze_at(rank: usize, axes: &[i64]) -> Result<Vec<usize>, String> {
    let mut at = axes.iter().map(|&a| axis(a, rank + axes.len())).collect::<Result<Vec<_>, _>>()?;
    at.sort_unstable();
    Ok(at)
}

/// The axes that `Squeeze` removes.
pub(super) fn squeeze_at(dims: &[usize], axes: Option<&[i64]>) -> Result<Vec<usize>, String> {
    match axes {
        Some(axes) => axes.iter().map(|&a| axis(a, dims.len())).collect(),
        None => Ok((0..dims.len()).filter(|&i| dims[i] == 1).collect()),
    }
}

/// One axis' start, end and step of a `Slice`, clamped as ONNX has it.
pub(super) fn slice_range(
    len: usize,
    start: i64,
    end: i64,
    step: i64,
) -> Result<(usize, usize), String> {
    if step != 1 {
        return Err(format!("a slice of step {step}"));
    }
    let clamp = |v: i64| {
        let v = if v < 0 { v.saturating_add(len as i64) } else { v };
        v.clamp(0, len as i64) as usize
    };
    let (start, end) = (clamp(start), clamp(end));
    Ok((start, end.max(start)))
}

/// Per axis `(axis, start, end, step)` of a `Slice` with constant operands.
pub(super) fn slice_bounds(
    dims: &[usize],
    inputs: &[&Tensor],
) -> Result<Vec<(usize, i64, i64, i64)>, String> {
    let [starts, ends, rest @ ..] = inputs else {
        return Err("a slice without its bounds".into());
    };
    let (starts, ends) = (starts.as_ints()?, ends.as_ints()?);
    let default: Vec<i64> = (0..starts.len() as i64).collect();
    let axes = rest.first().map_or(Ok(&default[..]), |t| t.as_ints())?;
    let ones = vec![1; starts.len()];
    let steps = rest.get(1).map_or(Ok(&ones[..]), |t| t.as_ints())?;
    if ends.len() != starts.len() || axes.len() != starts.len() || steps.len() != starts.len() {
        return Err("a slice whose bounds differ in number".into());
    }
    if dims.is_empty() && !starts.is_empty() {
        return Err("a slice of a scalar".into());
    }
    (0..starts.len())
        .map(|i| Ok((axis(axes[i], dims.len())?, starts[i], ends[i], steps[i])))
        .collect()
}

/// Per axis `(start, end)` of a `Slice` of step 1.
pub(super) fn slice_ranges(
    dims: &[usize],
    inputs: &[&Tensor],
) -> Result<Vec<(usize, usize)>, String> {
    let mut out: Vec<(usize, usize)> = dims.iter().map(|&d| (0, d)).collect();
    for (axis, start, end, step) in slice_bounds(dims, inputs)? {
        out[axis] = slice_range(dims[axis], start, end, step)?;
    }
    Ok(out)
}

/// `Shape` with its optional start and end.
pub(super) fn shape_slice(n: &OnnxNode, dims: &[i64]) -> Folded {
    let len = dims.len();
    let (start, end) = slice_range(len, attr_int(n, "start", 0), attr_int(n, "end", i64::MAX), 1)?;
    Ok(Tensor::ints(&[end - start], dims[start..end].to_vec()))
}

/// The permutation of a `Transpose`.
pub(super) fn permutation(n: &OnnxNode, rank: usize) -> Result<Vec<usize>, String> {
    let perm = attr_ints(n, "perm").unwrap_or_else(|| (0..rank as i64).rev().collect());
    let out: Vec<usize> = perm.iter().map(|&p| axis(p, rank)).collect::<Result<_, _>>()?;
    let mut sorted = out.clone();
    sorted.sort_unstable();
    if sorted.iter().copied().eq(0..rank) {
        Ok(out)
    } else {
        Err(format!("a permutation {perm:?}"))
    }
}
