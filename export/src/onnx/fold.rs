//! Evaluates the operators that exporters leave for a reader to fold: shape arithmetic, the sinusoidal embedding, the
//! distances to a codebook.

use super::file::OnnxNode;
use super::tensor::{
    Elements, Folded, MAX_ELEMENTS, Tensor, attr_int, axis, broadcast, broadcast_indices, count,
    permutation, reshape_dims, shape_slice, slice_bounds, squeeze_at, unsqueeze_at,
};

/// The indices that a `Slice` keeps of an axis, with any step.
fn slice_indices(len: usize, start: i64, end: i64, step: i64) -> Result<Vec<usize>, String> {
    let n = len as i64;
    let wrap = |v: i64| if v < 0 { v.saturating_add(n) } else { v };
    let out: Vec<i64> = match step {
        0 => return Err("a slice of step 0".into()),
        1.. => (wrap(start).clamp(0, n)..wrap(end).clamp(0, n)).step_by(step as usize).collect(),
        _ => {
            let (first, last) = (wrap(start).clamp(-1, n - 1), wrap(end).clamp(-1, n - 1));
            let step = usize::try_from(step.unsigned_abs()).unwrap_or(usize::MAX);
            (last + 1..=first).rev().step_by(step).collect()
        }
    };
    Ok(out.into_iter().map(|i| i as usize).collect())
}

/// Evaluates a node whose inputs are all constant; absent optional inputs are `None`.
pub(super) fn fold(n: &OnnxNode, inputs: &[Option<&Tensor>]) -> Folded {
    let x = |i: usize| -> Result<&Tensor, String> {
        inputs.get(i).copied().flatten().ok_or_else(|| format!("input {i} is missing"))
    };
    match n.op.as_str() {
        "Identity" | "Dropout" => Ok(x(0)?.clone()),
        "Add" => binary(x(0)?, x(1)?, |a, b| a + b, |a, b| Some(a.wrapping_add(b))),
        "Sub" => binary(x(0)?, x(1)?, |a, b| a - b, |a, b| Some(a.wrapping_sub(b))),
        "Mul" => binary(x(0)?, x(1)?, |a, b| a * b, |a, b| Some(a.wrapping_mul(b))),
        "Div" => binary(x(0)?, x(1)?, |a, b| a / b, i64::checked_div),
        "Mod" => binary(x(0)?, x(1)?, |a, b| a % b, |a, b| a.checked_rem_euclid(b)),
        "Pow" => binary(x(0)?, x(1)?, f32::powf, |a, b| a.checked_pow(u32::try_from(b).ok()?)),
        "Max" => binary(x(0)?, x(1)?, f32::max, |a, b| Some(a.max(b))),
        "Min" => binary(x(0)?, x(1)?, f32::min, |a, b| Some(a.min(b))),
        "Equal" => {
            let out = binary(
                x(0)?,
                x(1)?,
                |a, b| f32::from(u8::from(a == b)),
                |a, b| Some(i64::from(a == b)),
            )?;
            Ok(Tensor::ints(&out.dims, out.as_floats().iter().map(|&v| v as i64).collect()))
        }
        "Clip" => {
            let low = inputs.get(1).copied().flatten().and_then(Tensor::scalar).unwrap_or(f32::MIN);
            let high =
                inputs.get(2).copied().flatten().and_then(Tensor::scalar).unwrap_or(f32::MAX);
            map(x(0)?, |v| v.max(low).min(high))
        }
        "Sqrt" => map(x(0)?, f32::sqrt),
        "Sin" => map(x(0)?, f32::sin),
        "Cos" => map(x(0)?, f32::cos),
        "Exp" => map(x(0)?, f32::exp),
        "Floor" => map(x(0)?, f32::floor),
        "Reciprocal" => map(x(0)?, f32::recip),
        "Neg" => match &x(0)?.data {
            Elements::I(v) => {
                Ok(Tensor::ints(&x(0)?.dims, v.iter().map(|v| v.wrapping_neg()).collect()))
            }
            Elements::F(_) => map(x(0)?, |v| -v),
        },
        "Cast" => {
            let t = x(0)?;
            match attr_int(n, "to", 0) {
                1 | 10 | 11 | 16 => Ok(Tensor::floats(&t.dims, t.as_floats())),
                6 | 7 | 9 => Ok(match &t.data {
                    Elements::I(_) => t.clone(),
                    Elements::F(v) => Tensor::ints(&t.dims, v.iter().map(|&v| v as i64).collect()),
                }),
                to => Err(format!("a cast to type {to}")),
            }
        }
        "Shape" => {
            let dims: Vec<i64> = x(0)?.dims.iter().map(|&d| d as i64).collect();
            shape_slice(n, &dims)
        }
        "Reshape" => {
            let t = x(0)?;
            let dims = reshape_dims(&t.dims, x(1)?.as_ints()?, attr_int(n, "allowzero", 0) != 0)?;
            Ok(Tensor { dims, ..t.clone() })
        }
        "Unsqueeze" => {
            let t = x(0)?;
            let mut dims = t.dims.clone();
            for at in unsqueeze_at(dims.len(), x(1)?.as_ints()?)? {
                dims.insert(at.min(dims.len()), 1);
            }
            Ok(Tensor { dims, ..t.clone() })
        }
        "Squeeze" => {
            let t = x(0)?;
            let axes = inputs.get(1).copied().flatten().map(Tensor::as_ints).transpose()?;
            let at = squeeze_at(&t.dims, axes)?;
            let dims = t
                .dims
                .iter()
                .enumerate()
                .filter(|(i, _)| !at.contains(i))
                .map(|(_, &d)| d)
                .collect();
            Ok(Tensor { dims, ..t.clone() })
        }
        "Transpose" => {
            let t = x(0)?;
            let perm = permutation(n, t.dims.len())?;
            let dims: Vec<usize> = perm.iter().map(|&p| t.dims[p]).collect();
            let mut stride = vec![1usize; t.dims.len()];
            for i in (1..t.dims.len()).rev() {
                stride[i - 1] = stride[i] * t.dims[i];
            }
            let indices = (0..t.len()).map(|mut i| {
                let mut at = 0;
                for (&d, &p) in dims.iter().zip(&perm).rev() {
                    at += i % d * stride[p];
                    i /= d;
                }
                at
            });
            Ok(t.pick(dims.clone(), indices))
        }
        "Expand" => {
            let t = x(0)?;
            let want: Option<Vec<usize>> =
                x(1)?.as_ints()?.iter().map(|&d| usize::try_from(d).ok()).collect();
            let dims = broadcast(&t.dims, &want.ok_or("a negative size")?)?;
            count(&dims)?;
            Ok(t.pick(dims.clone(), broadcast_indices(&t.dims, &dims).into_iter()))
        }
        "ConstantOfShape" => {
            let dims: Option<Vec<usize>> =
                x(0)?.as_ints()?.iter().map(|&d| usize::try_from(d).ok()).collect();
            let dims = dims.ok_or("a negative size")?;
            let len = count(&dims)?;
            // The value's own tensor comes in as an extra input, already decoded.
            match inputs.get(1).copied().flatten().map(|t| &t.data) {
                Some(Elements::I(v)) => {
                    Ok(Tensor::ints(&dims, vec![*v.first().ok_or("no value")?; len]))
                }
                Some(Elements::F(v)) => {
                    Ok(Tensor::floats(&dims, vec![*v.first().ok_or("no value")?; len]))
                }
                None => Ok(Tensor::floats(&dims, vec![0.0; len])),
            }
        }
        "Range" => {
            let (start, limit, step) = (x(0)?.as_ints()?, x(1)?.as_ints()?, x(2)?.as_ints()?);
            let (&[start], &[limit], &[step]) = (start, limit, step) else {
                return Err("a range of lists".into());
            };
            if step <= 0 || limit.saturating_sub(start) > MAX_ELEMENTS as i64 {
                return Err(format!("a range from {start} to {limit} by {step}"));
            }
            let out: Vec<i64> = (start..limit).step_by(step as usize).collect();
            Ok(Tensor::ints(&[out.len()], out))
        }
        "Gather" => {
            let (t, index) = (x(0)?, x(1)?);
            let at = axis(attr_int(n, "axis", 0), t.dims.len())?;
            let len = *t.dims.get(at).ok_or("a gather from a scalar")?;
            let inner: usize = t.dims[at + 1..].iter().product();
            let outer: usize = t.dims[..at].iter().product();
            let rows = index.as_ints()?;
            let rows: Option<Vec<usize>> = rows
                .iter()
                .map(|&r| {
                    usize::try_from(if r < 0 { r + len as i64 } else { r })
                        .ok()
                        .filter(|&r| r < len)
                })
                .collect();
            let rows = rows.ok_or("an index out of range")?;
            let mut dims = t.dims[..at].to_vec();
            dims.extend(&index.dims);
            dims.extend(&t.dims[at + 1..]);
            count(&dims)?;
            let indices = (0..outer).flat_map(|o| {
                rows.iter().flat_map(move |&r| (0..inner).map(move |i| (o * len + r) * inner + i))
            });
            Ok(t.pick(dims, indices))
        }
        "Slice" => {
            let t = x(0)?;
            let bounds: Vec<&Tensor> = inputs[1..].iter().map_while(|t| *t).collect();
            let mut kept: Vec<Vec<usize>> = t.dims.iter().map(|&d| (0..d).collect()).collect();
            for (axis, start, end, step) in slice_bounds(&t.dims, &bounds)? {
                kept[axis] = slice_indices(t.dims[axis], start, end, step)?;
            }
            let dims: Vec<usize> = kept.iter().map(Vec::len).collect();
            let total: usize = dims.iter().product();
            let indices = (0..total).map(|mut i| {
                let (mut at, mut stride) = (0, 1);
                for axis in (0..dims.len()).rev() {
                    at += kept[axis][i % dims[axis]] * stride;
                    i /= dims[axis];
                    stride *= t.dims[axis];
                }
                at
            });
            Ok(t.pick(dims.clone(), indices))
        }
        "Concat" => concat(n, inputs),
        "Where" => {
            let (c, a, b) = (x(0)?, x(1)?, x(2)?);
            let dims = broadcast(&broadcast(&c.dims, &a.dims)?, &b.dims)?;
            count(&dims)?;
            let pick = broadcast_indices(&c.dims, &dims);
            let (ia, ib) = (broadcast_indices(&a.dims, &dims), broadcast_indices(&b.dims, &dims));
            let c = c.as_ints()?;
            match (&a.data, &b.data) {
                (Elements::I(a), Elements::I(b)) => {
                    let f = |i: usize| if c[pick[i]] != 0 { a[ia[i]] } else { b[ib[i]] };
                    Ok(Tensor::ints(&dims, (0..pick.len()).map(f).collect()))
                }
                _ => {
                    let (a, b) = (a.as_floats(), b.as_floats());
                    let f = |i: usize| if c[pick[i]] != 0 { a[ia[i]] } else { b[ib[i]] };
                    Ok(Tensor::floats(&dims, (0..pick.len()).map(f).collect()))
                }
            }
        }
        "ReduceSum" => {
            let t = x(0)?;
            let axes = x(1)?.as_ints()?;
            let last = t.dims.len().checked_sub(1).ok_or("a sum of a scalar")?;
            if axes.len() != 1 || axis(axes[0], t.dims.len())? != last {
                return Err(format!("a sum over axes {axes:?}; only the last is supported"));
            }
            let width = t.dims[last];
            let sums: Vec<f32> = match width {
                0 => vec![0.0; t.dims[..last].iter().product()],
                _ => t.as_floats().chunks(width).map(|c| c.iter().sum()).collect(),
            };
            let mut dims = t.dims[..last].to_vec();
            if attr_int(n, "keepdims", 1) != 0 {
                dims.push(1);
            }
            Ok(Tensor::floats(&dims, sums))
        }
        "MatMul" => {
            let (a, b) = (x(0)?, x(1)?);
            let (&[m, k], &[k2, cols]) = (&a.dims[..], &b.dims[..]) else {
                return Err("a product of constants that are not matrices".into());
            };
            if k != k2 {
                return Err(format!("a product of {:?} and {:?}", a.dims, b.dims));
            }
            count(&[m, cols])?;
            let (a, b) = (a.as_floats(), b.as_floats());
            let mut out = vec![0f32; m * cols];
            for (row, out) in out.chunks_mut(cols.max(1)).enumerate() {
                for i in 0..k {
                    let f = a[row * k + i];
                    out.iter_mut().zip(&b[i * cols..]).for_each(|(o, v)| *o += f * v);
                }
            }
            Ok(Tensor::floats(&[m, cols], out))
        }
        "ArgMin" => {
            let t = x(0)?;
            let last = t.dims.len().checked_sub(1).ok_or("ArgMin of a scalar")?;
            if axis(attr_int(n, "axis", 0), t.dims.len())? != last || t.dims[last] == 0 {
                return Err("ArgMin over another axis than the last".into());
            }
            let values = t.as_floats();
            let best = |row: &[f32]| {
                row.iter().enumerate().fold(0, |b, (i, v)| if *v < row[b] { i } else { b }) as i64
            };
            let out = values.chunks(t.dims[last]).map(best).collect();
            let mut dims = t.dims[..last].to_vec();
            if attr_int(n, "keepdims", 1) != 0 {
                dims.push(1);
            }
            Ok(Tensor::ints(&dims, out))
        }
        other => Err(format!("{other} is not supported on constants")),
    }
}

fn concat(n: &OnnxNode, inputs: &[Option<&Tensor>]) -> Folded {
    let parts: Vec<&Tensor> =
        inputs.iter().copied().collect::<Option<Vec<_>>>().ok_or("a missing part")?;
    let first = *parts.first().ok_or("nothing to join")?;
    let at = axis(attr_int(n, "axis", 0), first.dims.len())?;
    let mut dims = first.dims.clone();
    let fits = |p: &Tensor| {
        p.dims.len() == dims.len() && (0..dims.len()).all(|i| i == at || p.dims[i] == dims[i])
    };
    if at >= dims.len() || !parts.iter().all(|p| fits(p)) {
        return Err("parts that do not fit".into());
    }
    dims[at] = parts.iter().map(|p| p.dims[at]).sum();
    count(&dims)?;
    let outer: usize = dims[..at].iter().product();
    let inner: usize = dims[at + 1..].iter().product();
    let ints = parts.iter().all(|p| matches!(p.data, Elements::I(_)));
    let (mut i_out, mut f_out) = (Vec::new(), Vec::new());
    for o in 0..outer {
        for p in &parts {
            let row = p.dims[at] * inner;
            match &p.data {
                Elements::I(v) if ints => i_out.extend(&v[o * row..(o + 1) * row]),
                Elements::I(v) => f_out.extend(v[o * row..(o + 1) * row].iter().map(|&v| v as f32)),
                Elements::F(v) => f_out.extend(&v[o * row..(o + 1) * row]),
            }
        }
    }
    Ok(if ints { Tensor::ints(&dims, i_out) } else { Tensor::floats(&dims, f_out) })
}

fn map(t: &Tensor, f: impl Fn(f32) -> f32) -> Folded {
    Ok(Tensor::floats(&t.dims, t.as_floats().into_iter().map(f).collect()))
}

fn binary(
    a: &Tensor,
    b: &Tensor,
    f: impl Fn(f32, f32) -> f32,
    g: impl Fn(i64, i64) -> Option<i64>,
) -> Folded {
    let dims = broadcast(&a.dims, &b.dims)?;
    count(&dims)?;
    let (ia, ib) = (broadcast_indices(&a.dims, &dims), broadcast_indices(&b.dims, &dims));
    if let (Elements::I(a), Elements::I(b)) = (&a.data, &b.data) {
        let out: Option<Vec<i64>> = ia.iter().zip(&ib).map(|(&i, &j)| g(a[i], b[j])).collect();
        return Ok(Tensor::ints(&dims, out.ok_or("whole numbers without a result")?));
    }
    let (a, b) = (a.as_floats(), b.as_floats());
    Ok(Tensor::floats(&dims, ia.iter().zip(&ib).map(|(&i, &j)| f(a[i], b[j])).collect()))
}

#[cfg(test)]
mod tests {
    use super::super::file::Attribute;
    use super::*;

    fn run(op: &str, attributes: &[(&str, i64)], inputs: &[&Tensor]) -> Folded {
        let attributes =
            attributes.iter().map(|(k, v)| ((*k).to_owned(), Attribute::Int(*v))).collect();
        let node = OnnxNode { op: op.to_owned(), attributes, ..OnnxNode::default() };
        fold(&node, &inputs.iter().map(|t| Some(*t)).collect::<Vec<_>>())
    }

    fn ints(v: &[i64]) -> Tensor {
        Tensor::ints(&[v.len()], v.to_vec())
    }

    #[test]
    fn slices_follow_onnx() {
        let t = ints(&[0, 1, 2, 3, 4]);
        let slice = |start: i64, end: i64, step: i64| {
            let out = run(
                "Slice",
                &[],
                &[&t, &ints(&[start]), &ints(&[end]), &ints(&[0]), &ints(&[step])],
            )
            .unwrap();
            out.as_ints().unwrap().to_vec()
        };
        assert_eq!(slice(1, 3, 1), [1, 2]);
        assert_eq!(slice(-2, i64::MAX, 1), [3, 4]);
        assert_eq!(slice(0, 5, 2), [0, 2, 4]);
        assert_eq!(slice(-1, i64::MIN, -1), [4, 3, 2, 1, 0]);
        assert_eq!(slice(3, 0, -2), [3, 1]);
        assert_eq!(slice(4, 2, 1), [0i64; 0]);
        assert!(
            run("Slice", &[], &[&t, &ints(&[0]), &ints(&[1]), &ints(&[0]), &ints(&[0])]).is_err()
        );
    }

    #[test]
    fn shapes_broadcast_and_transpose() {
        let a = Tensor::floats(&[2, 1], vec![1.0, 10.0]);
        let b = Tensor::floats(&[3], vec![1.0, 2.0, 3.0]);
        let out = run("Mul", &[], &[&a, &b]).unwrap();
        assert_eq!(out, Tensor::floats(&[2, 3], vec![1.0, 2.0, 3.0, 10.0, 20.0, 30.0]));
        let turned = run("Transpose", &[], &[&out]).unwrap();
        assert_eq!(turned, Tensor::floats(&[3, 2], vec![1.0, 10.0, 2.0, 20.0, 3.0, 30.0]));
        let joined = run("Concat", &[("axis", -1)], &[&a, &out]).unwrap();
        assert_eq!(
            joined,
            Tensor::floats(&[2, 4], vec![1.0, 1.0, 2.0, 3.0, 10.0, 10.0, 20.0, 30.0])
        );
        let rows = run("Gather", &[("axis", 0)], &[&turned, &ints(&[-1, 0])]).unwrap();
        assert_eq!(rows, Tensor::floats(&[2, 2], vec![3.0, 30.0, 1.0, 10.0]));
        assert!(run("Add", &[], &[&out, &turned]).is_err());
        let arg = run(
            "ArgMin",
            &[("axis", 1), ("keepdims", 0)],
            &[&Tensor::floats(&[2, 3], vec![3.0, 1.0, 1.0, 5.0, 6.0, 4.0])],
        );
        assert_eq!(arg.unwrap(), ints(&[1, 2]));
    }

    #[test]
    fn hostile_sizes_are_errors() {
        assert!(run("ConstantOfShape", &[], &[&ints(&[1 << 40, 1 << 40])]).is_err());
        assert!(run("ConstantOfShape", &[], &[&ints(&[-1])]).is_err());
        assert!(run("Expand", &[], &[&ints(&[1]), &ints(&[1 << 62])]).is_err());
        assert!(
            run(
                "Range",
                &[],
                &[
                    &Tensor::ints(&[], vec![0]),
                    &Tensor::ints(&[], vec![i64::MAX]),
                    &Tensor::ints(&[], vec![1])
                ]
            )
            .is_err()
        );
        assert!(run("Div", &[], &[&ints(&[1]), &ints(&[0])]).is_err());
        assert!(run("Reshape", &[], &[&ints(&[1, 2]), &ints(&[-1, 0, i64::MAX])]).is_err());
        assert!(run("Gather", &[], &[&ints(&[1]), &ints(&[i64::MIN])]).is_err());
        assert!(run("Unsqueeze", &[], &[&ints(&[1]), &ints(&[i64::MIN])]).is_err());
    }
}
