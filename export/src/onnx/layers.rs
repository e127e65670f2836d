//! The layers: convolutions, linear layers, attention, norms, joins and resizes.

use super::file::OnnxNode;
use super::recognise::{Info, Recogniser};
use super::sym::{Constant, Sym};
use super::tensor::{self, Tensor, attr_float, attr_int, attr_ints, attr_text};
use super::view::{View, heads, map_axes};
use crate::tensors::Part;
use latile_runtime::graph::{Layout, Op, Pad, ValueId, ValueKind};

type Found = Result<Option<Sym>, String>;

impl Recogniser<'_> {
    pub(super) fn conv(
        &mut self,
        n: &OnnxNode,
        x: ValueId,
        extra: [u32; 4],
        w: &Constant,
        bias: Option<&Sym>,
    ) -> Result<View, String> {
        let pair = |key: &str, default: i64| attr_ints(n, key).unwrap_or_else(|| vec![default; 2]);
        let &[rows, columns, kh, kw] = &w.dims[..] else {
            return Err(format!(
                "a kernel of shape {:?}; only two-dimensional ones are supported",
                w.dims
            ));
        };
        if attr_int(n, "group", 1) != 1 || pair("dilations", 1) != [1, 1] {
            return Err("a grouped or dilated convolution".into());
        }
        if !matches!(attr_text(n, "auto_pad", "NOTSET"), "NOTSET" | "VALID") {
            return Err("automatic padding".into());
        }
        let small = |v: i64| {
            u32::try_from(v).ok().filter(|&v| v <= 64).ok_or("a stride or padding out of range")
        };
        let strides = pair("strides", 1);
        let pads = attr_ints(n, "pads").unwrap_or_else(|| vec![0; 4]);
        let (&[sy, sx], &[t, l, b, r]) = (&strides[..], &pads[..]) else {
            return Err("strides or pads of unknown number".into());
        };
        let pad = Pad {
            top: small(t)? + extra[0],
            left: small(l)? + extra[1],
            bottom: small(b)? + extra[2],
            right: small(r)? + extra[3],
        };
        let stride = [small(sy)?.max(1), small(sx)?.max(1)];
        let (c, h, wd) = self.map_info(x).ok_or("its input is not a map")?;
        if columns != c || kh == 0 || kw == 0 || kh > 64 || kw > 64 {
            return Err(format!("a kernel of shape {:?} on {c} channels", w.dims));
        }
        let side = |n: usize, before: u32, after: u32, k: usize, s: u32| {
            let padded = n + before as usize + after as usize;
            padded
                .checked_sub(k)
                .map(|rest| rest / s as usize + 1)
                .ok_or("a kernel larger than its input")
        };
        let (oh, ow) = (
            side(h, pad.top, pad.bottom, kh, stride[0])?,
            side(wd, pad.left, pad.right, kw, stride[1])?,
        );
        let rows32 = u32::try_from(rows).map_err(|_| "too many channels")?;
        let kernel = [kh as u32, kw as u32];
        let name = w.name().unwrap_or(&n.name).trim_end_matches(".weight").to_owned();
        let shape = [rows32, c as u32, kernel[0], kernel[1]];
        let weight =
            self.weight(&format!("{name}.weight"), &shape, Layout::Packed16, w, Part::Whole)?;
        let bias = match bias {
            None => None,
            Some(Sym::Const(b)) => Some(self.weight(
                &format!("{name}.bias"),
                &[rows32],
                Layout::Plain,
                b,
                Part::Whole,
            )?),
            Some(_) => return Err("a convolution whose bias is not constant".into()),
        };
        let op = Op::Conv2d { weight, bias, kernel, stride, pad, quant: None };
        let out = self.emit(&name, op, &[x], ValueKind::Map(rows32), Info::Map { h: oh, w: ow });
        Ok(View::new(out, map_axes(rows, oh, ow)))
    }

    pub(super) fn silu(&mut self, name: &str, x: &View) -> View {
        let info = self.info(x.value);
        let value = self.emit(name, Op::Silu, &[x.value], self.kind(x.value), info);
        View::new(value, x.axes.clone())
    }

    /// A product with a matrix, scores of attention, or their sum over values.
    pub(super) fn matmul(&mut self, a: &Sym, b: &Sym) -> Found {
        match (a, b) {
            (Sym::Opaque { .. }, _) | (_, Sym::Opaque { .. }) => Ok(None),
            (a, Sym::Const(w)) if w.dims.len() == 2 && !matches!(a, Sym::Const(_)) => {
                let x = self.view(a)?;
                Ok(Some(Sym::Product { x, weight: w.clone(), part: Part::Transposed }))
            }
            (Sym::Probabilities { q, k, heads: count, width, scale, .. }, v) => {
                let (q, k, count, width, mut scale) = (*q, *k, *count, *width, *scale);
                let v = self.view(v)?;
                let v = self.settled(&v)?;
                let (c, h, w) = self.map_info(v.value).ok_or("attention over a vector")?;
                if heads(&v.axes, c, h, w) != Some((count, width))
                    || self.map_info(q) != Some((c, h, w))
                {
                    return Err("attention whose values lie otherwise than its queries".into());
                }
                // Exporters multiply queries and keys by roots of the scale: the usual one is meant exactly.
                let usual = 1.0 / (width as f32).sqrt();
                if (scale / usual - 1.0).abs() < 1e-5 {
                    scale = usual;
                }
                let op = Op::Attention { heads: count as u32, scale, int8: false };
                let info = self.info(q);
                let out = self.emit("attention", op, &[q, k, v.value], self.kind(q), info);
                Ok(Some(Sym::View(View::new(out, v.axes))))
            }
            (q, k) => {
                let (q, k) = (self.view(q)?, self.view(k)?);
                let mut turned = k.clone();
                let rank = turned.axes.len();
                if rank < 2 || q.axes.len() < 2 {
                    return Err("a product of vectors".into());
                }
                turned.axes.swap(rank - 1, rank - 2);
                let known = |r: &Self, v: &View| {
                    let (c, h, w) = r.map_info(v.value)?;
                    heads(&v.axes, c, h, w)
                };
                match (known(self, &q), known(self, &turned)) {
                    (Some(a), Some(b)) if a == b && q.add == 0.0 && k.add == 0.0 => {
                        let mut dims = q.dims();
                        let keys = k.dims()[rank - 1];
                        if let Some(last) = dims.last_mut() {
                            *last = keys;
                        }
                        let scale = q.mul * k.mul;
                        Ok(Some(Sym::Scores {
                            q: q.value,
                            k: k.value,
                            heads: a.0,
                            width: a.1,
                            scale,
                            dims,
                        }))
                    }
                    _ => Err(format!(
                        "a product of shapes {:?} and {:?} that is not attention",
                        q.dims(),
                        k.dims()
                    )),
                }
            }
        }
    }

    /// Normalisation of `[1, groups, …]`: a group norm whose scale and shift follow.
    pub(super) fn instance_norm(&mut self, n: &OnnxNode, inputs: &[Option<Sym>]) -> Found {
        let sym = |i: usize| inputs.get(i).and_then(Option::as_ref);
        let x = self.view(sym(0).ok_or("it has no input")?)?;
        let x = self.settled(&x)?;
        let (c, h, w) = self.map_info(x.value).ok_or("a norm of a vector")?;
        let groups = x.dims().get(1).copied().unwrap_or(0);
        let map = View::new(x.value, map_axes(c, h, w));
        let grouped = (groups > 0 && c.is_multiple_of(groups))
            .then(|| map.reshape(&[1, groups, c / groups * h * w]))
            .flatten();
        if grouped.as_ref() != Some(&x) {
            return Err(format!("a norm of shape {:?} that is not a group norm", x.dims()));
        }
        let (Some(Sym::Const(scale)), Some(Sym::Const(shift))) = (sym(1), sym(2)) else {
            return Err("a norm whose scale is not constant".into());
        };
        let all = |t: &Tensor, v: f32| t.as_floats().iter().all(|&e| e == v);
        let eps = attr_float(n, "epsilon", 1e-5);
        if groups == c && !(all(&*self.load(scale)?, 1.0) && all(&*self.load(shift)?, 0.0)) {
            // One channel a group: its own scale and shift are the norm's.
            return Ok(Some(Sym::View(self.group_norm(n, &x, groups, eps, scale, shift)?)));
        }
        if !(all(&*self.load(scale)?, 1.0) && all(&*self.load(shift)?, 0.0)) {
            return Err("a norm with a scale for each group".into());
        }
        Ok(Some(Sym::Normed { x, groups, eps, scale: None }))
    }

    pub(super) fn group_norm(
        &mut self,
        n: &OnnxNode,
        x: &View,
        groups: usize,
        eps: f32,
        scale: &Constant,
        shift: &Constant,
    ) -> Result<View, String> {
        let c = self.map_info(x.value).ok_or("a norm of a vector")?.0;
        let elements = |k: &Constant| k.dims.iter().product::<usize>();
        if elements(scale) != c || elements(shift) != c || groups == 0 || !c.is_multiple_of(groups)
        {
            return Err(format!(
                "a norm of {groups} groups with {} scales on {c} channels",
                elements(scale)
            ));
        }
        let shape = [c as u32];
        let name = n.name.clone();
        let weight =
            self.weight(&format!("{name}.weight"), &shape, Layout::Plain, scale, Part::Whole)?;
        let bias =
            self.weight(&format!("{name}.bias"), &shape, Layout::Plain, shift, Part::Whole)?;
        let op = Op::GroupNorm { groups: groups as u32, eps, weight, bias };
        let info = self.info(x.value);
        let out = self.emit(&name, op, &[x.value], self.kind(x.value), info);
        Ok(View::new(out, x.axes.clone()))
    }

    pub(super) fn concat(&mut self, n: &OnnxNode, inputs: &[Option<Sym>]) -> Found {
        if inputs.iter().flatten().any(|s| matches!(s, Sym::Opaque { .. } | Sym::Const(_))) {
            return Ok(None);
        }
        let values = inputs.iter().flatten().map(|s| self.map(s)).collect::<Result<Vec<_>, _>>()?;
        let axis = tensor::axis(attr_int(n, "axis", 0), 4)?;
        let first = *values.first().ok_or("nothing to join")?;
        let (_, h, w) = self.map_info(first).ok_or("nothing to join")?;
        if axis != 1
            || values.iter().any(|&v| self.map_info(v).is_none_or(|(_, a, b)| (a, b) != (h, w)))
        {
            return Err("maps joined otherwise than by channels".into());
        }
        let c: u32 = values.iter().map(|&v| self.channels(v)).sum();
        let out = self.emit(&n.name, Op::Concat, &values, ValueKind::Map(c), Info::Map { h, w });
        Ok(Some(Sym::View(View::new(out, map_axes(c as usize, h, w)))))
    }

    pub(super) fn resize(&mut self, n: &OnnxNode, inputs: &[Option<Sym>]) -> Found {
        let sym = |i: usize| inputs.get(i).and_then(Option::as_ref);
        let value = self.map(sym(0).ok_or("it has no input")?)?;
        let (c, h, w) = self.map_info(value).ok_or("its input is not a map")?;
        let how = (
            attr_text(n, "mode", "nearest"),
            attr_text(n, "coordinate_transformation_mode", "half_pixel"),
            attr_text(n, "nearest_mode", "round_prefer_floor"),
        );
        // At exactly twice the size these pick the same pixels: no half-pixel position is a tie.
        let nearest = matches!(
            how,
            ("nearest", "asymmetric", "floor")
                | (
                    "nearest",
                    "half_pixel" | "pytorch_half_pixel",
                    "round_prefer_floor" | "round_prefer_ceil"
                )
        );
        let to = match (sym(3), sym(2)) {
            (Some(Sym::Const(sizes)), _) if !sizes.dims.contains(&0) => {
                self.load(sizes)?.as_ints()?.iter().map(|&v| v as f32).collect()
            }
            (_, Some(Sym::Const(scales))) => {
                let from = [1, c, h, w].map(|v| v as f32);
                self.load(scales)?.as_floats().iter().zip(from).map(|(s, f)| s * f).collect()
            }
            _ => Vec::new(),
        };
        if !nearest || to != [1.0, c as f32, 2.0 * h as f32, 2.0 * w as f32] {
            return Err(format!(
                "a resize from {h}x{w} to {to:?} by {how:?}; only twice the size by nearest is supported"
            ));
        }
        let info = Info::Map { h: 2 * h, w: 2 * w };
        let out = self.emit(&n.name, Op::Upsample2x, &[value], self.kind(value), info);
        Ok(Some(Sym::View(View::new(out, map_axes(c, 2 * h, 2 * w)))))
    }
}
