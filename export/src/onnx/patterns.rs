//! The patterns into which exporters break the operators of latent diffusion.

use super::file::OnnxNode;
use super::recognise::{Info, Recogniser};
use super::sym::{Constant, Sym, dims};
use super::tensor::{self, attr_int};
use super::view::{self, Atom, Over, View, vector_axes};
use crate::tensors::Part;
use latile_runtime::graph::{Layout, Op};

type Found = Result<Option<Sym>, String>;

impl Recogniser<'_> {
    /// Reshapes, transposes and the like: another view, nothing computed.
    pub(super) fn relayout(&mut self, n: &OnnxNode, inputs: &[Option<Sym>]) -> Found {
        let sym = |i: usize| inputs.get(i).and_then(Option::as_ref);
        let x = sym(0).ok_or("it has no input")?;
        if matches!(x, Sym::Opaque { .. }) {
            return Ok(None);
        }
        let (view, wrap): (View, Box<dyn Fn(View) -> Sym>) = match x {
            Sym::Normed { x, groups, eps, scale: None } => {
                let (groups, eps) = (*groups, *eps);
                (x.clone(), Box::new(move |x| Sym::Normed { x, groups, eps, scale: None }))
            }
            x => (self.view(x)?, Box::new(Sym::View)),
        };
        let from = view.dims();
        let out = match n.op.as_str() {
            "Reshape" => {
                let target = self.ints(sym(1))?;
                let to = tensor::reshape_dims(&from, &target, attr_int(n, "allowzero", 0) != 0)?;
                let out = view.reshape(&to);
                out.ok_or_else(|| {
                    format!("a reshape from {from:?} to {to:?} that mixes pixels and channels")
                })?
            }
            "Transpose" => view.transpose(&tensor::permutation(n, from.len())?),
            "Unsqueeze" => {
                let mut out = view;
                for at in tensor::unsqueeze_at(from.len(), &self.ints(sym(1))?)? {
                    out.axes.insert(at.min(out.axes.len()), Vec::new());
                }
                out
            }
            "Squeeze" => {
                let axes = sym(1).map(|s| self.ints(Some(s))).transpose()?;
                let gone = tensor::squeeze_at(&from, axes.as_deref())?;
                let mut out = view;
                out.axes = out
                    .axes
                    .into_iter()
                    .enumerate()
                    .filter(|(i, axis)| !(gone.contains(i) && axis.is_empty()))
                    .map(|(_, axis)| axis)
                    .collect();
                out
            }
            _ => return Ok(None),
        };
        Ok(Some(wrap(out)))
    }

    /// Part of a vector: `len` elements from `from` on, along the axis that runs over all of them.
    fn part(&self, x: &View, axis: usize, from: usize, len: usize) -> Result<View, String> {
        let total = self.channels(x.value) as usize;
        let whole = matches!(
            x.axes.get(axis).map(Vec::as_slice),
            Some([Atom { over: Over::Channels, stride: 1, .. }])
        );
        if self.map_info(x.value).is_some() || !whole || !x.is_plain() || from + len > total {
            return Err("a part of something other than a vector".into());
        }
        let mut out = x.clone();
        out.offset = from;
        out.axes[axis] = vector_axes(len).pop().unwrap_or_default();
        Ok(out)
    }

    pub(super) fn slice(&mut self, inputs: &[Option<Sym>]) -> Found {
        let Some(x @ (Sym::View(_) | Sym::Product { .. })) =
            inputs.first().and_then(Option::as_ref)
        else {
            return Ok(None);
        };
        let x = self.view(x)?;
        let mut bounds = Vec::new();
        for s in &inputs[1..] {
            match s {
                Some(Sym::Const(c)) => bounds.push(self.load(c)?),
                _ => return Err("a slice whose bounds are not constant".into()),
            }
        }
        let from = x.dims();
        let ranges = tensor::slice_ranges(&from, &bounds.iter().map(|t| &**t).collect::<Vec<_>>())?;
        let cut: Vec<usize> = (0..from.len()).filter(|&i| ranges[i] != (0, from[i])).collect();
        match cut[..] {
            [] => Ok(Some(Sym::View(x))),
            [axis] => {
                let (start, end) = ranges[axis];
                Ok(Some(Sym::View(self.part(&x, axis, start, end - start)?)))
            }
            _ => Err("a slice along several axes".into()),
        }
    }

    pub(super) fn split(
        &mut self,
        n: &OnnxNode,
        inputs: &[Option<Sym>],
    ) -> Result<Vec<Sym>, String> {
        let x = self.view(inputs.first().and_then(Option::as_ref).ok_or("it has no input")?)?;
        let axis = tensor::axis(attr_int(n, "axis", 0), x.axes.len())?;
        let size = view::size(&x.axes[axis]);
        let parts = n.outputs.len().max(1);
        let sizes: Vec<usize> = match inputs.get(1).and_then(Option::as_ref) {
            Some(s) => self.ints(Some(s))?.iter().map(|&v| v.max(0) as usize).collect(),
            None => vec![size.div_ceil(parts); parts],
        };
        if sizes.len() != parts || sizes.iter().sum::<usize>() != size {
            return Err(format!("{size} elements split into {sizes:?}"));
        }
        let mut from = 0;
        sizes
            .iter()
            .map(|&len| {
                let part = self.part(&x, axis, from, len).map(Sym::View);
                from += len;
                part
            })
            .collect()
    }

    /// Sums, differences, products and quotients.
    pub(super) fn arithmetic(&mut self, n: &OnnxNode, x: &Sym, y: &Sym) -> Found {
        let op = n.op.as_str();
        // Constants stand second wherever the order does not matter.
        if matches!(x, Sym::Const(_)) && matches!(op, "Add" | "Mul") && !matches!(y, Sym::Const(_))
        {
            return self.arithmetic(n, y, x);
        }
        match (op, x, y) {
            (_, Sym::Opaque { .. }, _) | (_, _, Sym::Opaque { .. }) => Ok(None),
            ("Add", Sym::Product { x, weight, part }, Sym::Const(b))
                if b.dims.iter().product::<usize>() > 1 || weight_rows(weight, part) == 1 =>
            {
                Ok(Some(Sym::View(self.linear(x, weight, part, Some(b))?)))
            }
            ("Mul", Sym::Normed { x, groups, eps, scale: None }, Sym::Const(k)) => {
                self.along_channels(x, k)?;
                Ok(Some(Sym::Normed {
                    x: x.clone(),
                    groups: *groups,
                    eps: *eps,
                    scale: Some(k.clone()),
                }))
            }
            ("Add", Sym::Normed { x, groups, eps, scale: Some(scale) }, Sym::Const(k)) => {
                self.along_channels(x, k)?;
                Ok(Some(Sym::View(self.group_norm(n, x, *groups, *eps, scale, k)?)))
            }
            ("Mul" | "Div", Sym::Scores { q, k, heads, width, scale, dims }, Sym::Const(c)) => {
                let Some(f) = self.scalar(c)? else {
                    return Err("scores scaled by more than one number".into());
                };
                let scale = if op == "Mul" { scale * f } else { scale / f };
                Ok(Some(Sym::Scores {
                    q: *q,
                    k: *k,
                    heads: *heads,
                    width: *width,
                    scale,
                    dims: dims.clone(),
                }))
            }
            (_, x, Sym::Const(c)) => {
                let Some(f) = self.scalar(c)? else { return Ok(None) };
                let mut v = self.view(x)?;
                match op {
                    "Add" => v.add += f,
                    "Sub" => v.add -= f,
                    "Mul" => (v.mul, v.add) = (v.mul * f, v.add * f),
                    _ => {
                        // As the builder has it: a product with the reciprocal.
                        let r = 1.0 / f;
                        (v.mul, v.add) = (v.mul * r, v.add * r);
                    }
                }
                Ok(Some(Sym::View(v)))
            }
            ("Sub", Sym::Const(c), x) => {
                let Some(f) = self.scalar(c)? else { return Ok(None) };
                let mut v = self.view(x)?;
                (v.mul, v.add) = (-v.mul, f - v.add);
                Ok(Some(Sym::View(v)))
            }
            ("Mul", Sym::Sigmoid(s), x) | ("Mul", x, Sym::Sigmoid(s)) => {
                let v = self.view(x)?;
                let v = self.settled(&v)?;
                if v != *s {
                    return Err("a product with the sigmoid of something else".into());
                }
                Ok(Some(Sym::View(self.silu(&n.name, s))))
            }
            ("Add", z, Sym::Difference { of, less }) | ("Add", Sym::Difference { of, less }, z) => {
                // z + (q − z): the codebook's straight-through sum, which is q.
                let z = self.view(z)?;
                if z == *less {
                    Ok(Some(Sym::View(of.clone())))
                } else {
                    Err("a sum with a difference".into())
                }
            }
            ("Add", Sym::Scaled { x, v }, shift) | ("Add", shift, Sym::Scaled { x, v }) => {
                let (x, v, shift) = (x.clone(), *v, self.view(shift)?);
                let c = self.channels(x.value) as usize;
                let plain = shift.mul == 1.0 && shift.add == 0.0;
                if shift.value != v || shift.offset != c || !plain || !self.beside(&x, &shift) {
                    return Err("a shift that does not belong to its scale".into());
                }
                let info = self.info(x.value);
                let out =
                    self.emit(&n.name, Op::ScaleShift, &[x.value, v], self.kind(x.value), info);
                Ok(Some(Sym::View(View::new(out, x.axes))))
            }
            _ => self.views(n, x, y),
        }
    }

    /// Arithmetic of two views.
    fn views(&mut self, n: &OnnxNode, x: &Sym, y: &Sym) -> Found {
        let (a, b) = (self.view(x)?, self.view(y)?);
        let map = |r: &Self, v: &View| r.map_info(v.value).is_some();
        match (n.op.as_str(), map(self, &a), map(self, &b)) {
            ("Add", true, true) if a.axes == b.axes => {
                let (a, b) = (self.settled(&a)?, self.settled(&b)?);
                // The same sum whichever way round it was written.
                let (first, second) = (a.value.min(b.value), a.value.max(b.value));
                if self.channels(first) != self.channels(second) {
                    return Err("a sum of maps of different channels".into());
                }
                let info = self.info(first);
                let out = self.emit(&n.name, Op::Add, &[first, second], self.kind(first), info);
                Ok(Some(Sym::View(View::new(out, a.axes))))
            }
            ("Add", false, true) => self.views(n, y, x),
            ("Add", true, false) if self.beside(&a, &b) => {
                let (a, b) = (self.settled(&a)?, self.settled(&b)?);
                let info = self.info(a.value);
                let out = self.emit(
                    &n.name,
                    Op::AddChannel,
                    &[a.value, b.value],
                    self.kind(a.value),
                    info,
                );
                Ok(Some(Sym::View(View::new(out, a.axes))))
            }
            ("Mul", false, true) => self.views(n, y, x),
            ("Mul", true, false)
                if b.add == 1.0 && b.mul == 1.0 && b.offset == 0 && self.beside(&a, &b) =>
            {
                let a = self.settled(&a)?;
                if self.channels(b.value) != 2 * self.channels(a.value) {
                    return Err("a scale whose shift is not beside it".into());
                }
                Ok(Some(Sym::Scaled { x: a, v: b.value }))
            }
            ("Sub", true, true) if a.axes == b.axes => Ok(Some(Sym::Difference { of: a, less: b })),
            _ => Err(format!(
                "{} of shapes {:?} and {:?} is not understood",
                n.op,
                a.dims(),
                b.dims()
            )),
        }
    }

    /// Whether a vector's view lies along the channels of a map's view.
    fn beside(&self, x: &View, v: &View) -> bool {
        let c = self.channels(x.value) as usize;
        let channel = |axis: &[Atom]| axis.iter().any(|a| a.over == Over::Channels);
        x.axes.len() == v.axes.len()
            && x.axes.iter().zip(&v.axes).all(|(a, b)| {
                if channel(a) {
                    view::size(a) == c && view::size(b) == c
                } else {
                    view::size(b) == 1
                }
            })
    }

    /// Checks that a constant runs along the channels of a view, whole.
    fn along_channels(&self, x: &View, k: &Constant) -> Result<(), String> {
        let c = self.channels(x.value) as usize;
        let rank = x.axes.len();
        let fits = k.dims.len() <= rank
            && k.dims.iter().rev().zip(x.axes.iter().rev()).all(|(&d, axis)| {
                let channels =
                    axis.len() == 1 && axis[0].over == Over::Channels && axis[0].size == c;
                if c > 1 && channels { d == c } else { d == 1 }
            })
            && k.dims.iter().product::<usize>() == c;
        if fits {
            Ok(())
        } else {
            Err(format!("a norm whose scale has shape {:?} on {:?}", k.dims, x.dims()))
        }
    }

    /// What a node that is not understood gives: its shape, so that others can ask for it.
    pub(super) fn opaque(
        &self,
        index: usize,
        n: &OnnxNode,
        inputs: &[Option<Sym>],
    ) -> Result<Sym, String> {
        let shape = |i: usize| {
            inputs.get(i).and_then(Option::as_ref).map(dims).ok_or("an input is missing")
        };
        let dims = match n.op.as_str() {
            "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Max" | "Min" => {
                tensor::broadcast(&shape(0)?, &shape(1)?)?
            }
            "Clip" | "Sqrt" | "Exp" | "Neg" | "Softmax" | "Sigmoid" => shape(0)?,
            "ReduceSum" => {
                let mut dims = shape(0)?;
                let axes = self.ints(inputs.get(1).and_then(Option::as_ref))?;
                let last = dims.len().checked_sub(1).ok_or("a sum of a scalar")?;
                if axes.len() != 1 || tensor::axis(axes[0], dims.len())? != last {
                    return Err(format!("a sum over axes {axes:?}"));
                }
                if attr_int(n, "keepdims", 1) != 0 {
                    dims[last] = 1
                } else {
                    dims.truncate(last)
                }
                dims
            }
            "Concat" => {
                let mut dims = shape(0)?;
                let at = tensor::axis(attr_int(n, "axis", 0), dims.len())?;
                dims[at] = 0;
                for i in 0..inputs.len() {
                    dims[at] += *shape(i)?.get(at).ok_or("parts that do not fit")?;
                }
                dims
            }
            "MatMul" => match (&shape(0)?[..], &shape(1)?[..]) {
                (&[m, _], &[_, k]) => vec![m, k],
                _ => return Err("a product of other than two matrices".into()),
            },
            "Reshape" => {
                let target = self.ints(inputs.get(1).and_then(Option::as_ref))?;
                tensor::reshape_dims(&shape(0)?, &target, attr_int(n, "allowzero", 0) != 0)?
            }
            "ArgMin" => {
                let mut dims = shape(0)?;
                let at = tensor::axis(attr_int(n, "axis", 0), dims.len())?;
                if attr_int(n, "keepdims", 1) != 0 {
                    dims[at] = 1
                } else {
                    let _ = dims.remove(at);
                }
                dims
            }
            other => return Err(format!("operator {other} is not supported here")),
        };
        Ok(Sym::Opaque { dims, node: index })
    }

    /// Rows of a table by index: the codebook, where the index is that of the nearest row.
    pub(super) fn gather(&mut self, n: &OnnxNode, inputs: &[Option<Sym>]) -> Found {
        let [Some(Sym::Const(table)), Some(Sym::Opaque { node, dims: index })] = inputs else {
            return Ok(None);
        };
        let &[entries, c] = &table.dims[..] else { return Ok(None) };
        if self.file.nodes[*node].op != "ArgMin" || attr_int(n, "axis", 0) != 0 {
            return Ok(None);
        }
        let z = super::codebook::check(self, *node, table)?;
        let (channels, h, w) = self.map_info(z.value).ok_or("a codebook for vectors")?;
        if channels != c || *index != [h * w] {
            return Err(format!("a codebook of {c} elements a row for {channels} channels"));
        }
        let name =
            table.name().unwrap_or("quantize.embedding").trim_end_matches(".weight").to_owned();
        let shape = [entries as u32, c as u32];
        let id =
            self.weight(&format!("{name}.weight"), &shape, Layout::Plain, table, Part::Whole)?;
        let value = self.emit(
            &name,
            Op::Codebook { table: id },
            &[z.value],
            self.kind(z.value),
            Info::Map { h, w },
        );
        Ok(Some(Sym::View(View::new(value, z.axes))))
    }
}

/// Rows of a linear layer's matrix.
fn weight_rows(weight: &Constant, part: &Part) -> usize {
    let axis = usize::from(*part == Part::Transposed);
    weight.dims.get(axis).copied().unwrap_or(0)
}
