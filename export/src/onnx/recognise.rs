//! From an ONNX graph to primitive operators.
//!
//! Each node is interpreted once, in order. Constants fold; what depends on the timestep alone is computed at a few
//! timesteps and recognised as a sinusoidal projection; tensors that only regroup a feature map become views of it.
//! What remains are the operators, and the pieces into which exporters break group norms, SiLU, attention and the
//! codebook, put together again here. An operator that is not understood is an error only where something depends
//! on it.

use super::fail;
use super::file::{OnnxFile, OnnxNode};
use super::sym::{Constant, Sym, computed, dims};
use super::tensor::{self, Tensor, attr_float, attr_int, attr_ints, attr_text};
use super::view::{View, map_axes, vector_axes};
use crate::ExportError;
use crate::build::Builder;
use crate::tensors::Part;
use latile_runtime::format::TimestepProjection;
use latile_runtime::graph::{Graph, Layout, Op, ValueId, ValueKind, WeightId};
use latile_runtime::tensor::DType;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

/// The size at which graphs of free size are read: rows and columns differ, and both can be halved often.
const EXAMPLE: (usize, usize) = (192, 320);
/// Timesteps at which the projection is computed.
pub(super) const PROBES: [i64; 5] = [0, 1, 37, 500, 999];

/// A recognised graph.
pub(super) struct Recognised {
    pub(super) graph: Graph,
    /// The stored tensor and its part for each weight.
    pub(super) sources: Vec<(String, Part)>,
    /// Weights that were computed from constants.
    pub(super) computed: BTreeMap<String, Tensor>,
    pub(super) time: Option<TimestepProjection>,
    /// Map rows of the input for each row of the output, at the size it was read at.
    pub(super) factor: (usize, usize),
}

/// What a value is, at the size the graph is read at.
#[derive(Clone, Copy, Debug)]
pub(super) enum Info {
    Map { h: usize, w: usize },
    Vector,
}

pub(super) struct Recogniser<'f> {
    pub(super) file: &'f OnnxFile,
    pub(super) syms: HashMap<String, Sym>,
    pub(super) b: Builder,
    pub(super) info: Vec<Info>,
    /// Nodes already there, by operator and operands: exporters repeat themselves.
    pub(super) known: HashMap<(String, Vec<ValueId>), ValueId>,
    weights: HashMap<(String, String), WeightId>,
    sources: Vec<(String, Part)>,
    computed: BTreeMap<String, Tensor>,
    pub(super) time: Option<TimestepProjection>,
}

pub(super) type Step = Result<Sym, String>;

/// Recognises a component. A U-Net's inputs are a map and a timestep, the others' a map alone.
pub(super) fn recognise(
    file: &OnnxFile,
    packed: DType,
    input: &str,
    output: &str,
) -> Result<Recognised, ExportError> {
    let mut r = Recogniser {
        file,
        syms: HashMap::new(),
        b: Builder::new(packed),
        info: Vec::new(),
        known: HashMap::new(),
        weights: HashMap::new(),
        sources: Vec::new(),
        computed: BTreeMap::new(),
        time: None,
    };
    let mut rows_in = 0;
    for port in &file.inputs {
        let sym = match port.dims[..] {
            [None | Some(1), Some(c), h, w] if rows_in == 0 => {
                let (h, w) = (h.unwrap_or(EXAMPLE.0), w.unwrap_or(EXAMPLE.1));
                rows_in = h;
                let value = r.b.input(input, ValueKind::Map(c as u32));
                r.info.push(Info::Map { h, w });
                Sym::View(View::new(value, map_axes(c, h, w)))
            }
            [] | [None | Some(1)] => {
                let dims: Vec<usize> = port.dims.iter().map(|_| 1).collect();
                Sym::Time(Rc::new(PROBES.iter().map(|&t| Tensor::ints(&dims, vec![t])).collect()))
            }
            _ => {
                return Err(fail(
                    &file.path,
                    format!(
                        "input {} has shape {:?}; supported are one map [1, channels, height, width] and one timestep \
                         (conditioning by text or class is not)",
                        port.name, port.dims
                    ),
                ));
            }
        };
        r.syms.insert(port.name.clone(), sym);
    }
    for (name, t) in &file.tensors {
        let constant =
            Constant { dims: t.dims.clone(), source: Some((name.clone(), false)), value: None };
        r.syms.insert(name.clone(), Sym::Const(Rc::new(constant)));
    }
    for (index, node) in file.nodes.iter().enumerate() {
        let at = |why: String| fail(&file.path, format!("node {} ({}): {why}", node.name, node.op));
        let results = r.node(index, node).map_err(at)?;
        for (name, sym) in node.outputs.iter().zip(results) {
            r.syms.insert(name.clone(), sym);
        }
    }
    let [port] = &file.outputs[..] else {
        return Err(fail(
            &file.path,
            format!("it has {} outputs, expected one", file.outputs.len()),
        ));
    };
    let sym = r.syms.get(&port.name).cloned();
    let value = match sym {
        Some(sym) => r.map(&sym),
        None => Err("nothing computes it".to_owned()),
    };
    let value = value.map_err(|why| fail(&file.path, format!("output {}: {why}", port.name)))?;
    let rows_out = match r.info[value.index()] {
        Info::Map { h, .. } => h,
        Info::Vector => return Err(fail(&file.path, "its output is not a map")),
    };
    Ok(Recognised {
        graph: r.b.finish(output, value),
        sources: r.sources,
        computed: r.computed,
        time: r.time,
        factor: (rows_in, rows_out),
    })
}

impl Recogniser<'_> {
    fn node(&mut self, index: usize, n: &OnnxNode) -> Result<Vec<Sym>, String> {
        let mut inputs: Vec<Option<Sym>> = Vec::with_capacity(n.inputs.len());
        for name in &n.inputs {
            inputs.push(match name.as_str() {
                "" => None,
                name => Some(
                    self.syms
                        .get(name)
                        .cloned()
                        .ok_or_else(|| format!("its input {name} is not defined"))?,
                ),
            });
        }
        if n.attributes.values().any(|a| matches!(a, super::file::Attribute::Other)) {
            return Err("an attribute of unknown kind".into());
        }
        if n.op == "Constant" {
            return Ok(vec![self.constant(n)?]);
        }
        if n.op == "Shape" {
            let x = inputs.first().cloned().flatten().ok_or("it has no input")?;
            let dims: Vec<i64> = dims(&x).iter().map(|&d| d as i64).collect();
            return Ok(vec![computed(tensor::shape_slice(n, &dims)?)]);
        }
        if inputs.iter().flatten().all(|s| matches!(s, Sym::Const(_))) && !n.inputs.is_empty() {
            return Ok(vec![self.fold_constants(n, &inputs)?]);
        }
        if inputs.iter().flatten().all(|s| matches!(s, Sym::Const(_) | Sym::Time(_)))
            && let Some(sym) = self.fold_time(n, &inputs)?
        {
            return Ok(vec![sym]);
        }
        if n.op == "Split" {
            return self.split(n, &inputs);
        }
        match self.step(n, &inputs)? {
            Some(sym) => Ok(vec![sym]),
            None => Ok(vec![self.opaque(index, n, &inputs)?]),
        }
    }

    /// Adds an operator, or finds it where it is there already.
    pub(super) fn emit(
        &mut self,
        name: &str,
        op: Op,
        inputs: &[ValueId],
        kind: ValueKind,
        info: Info,
    ) -> ValueId {
        let key = (format!("{op:?}"), inputs.to_vec());
        if let Some(&value) = self.known.get(&key) {
            return value;
        }
        let value = self.b.node(name, op, inputs, kind);
        self.info.push(info);
        self.known.insert(key, value);
        value
    }

    /// A weight of the graph: the stored tensor's name, or a computed one.
    pub(super) fn weight(
        &mut self,
        name: &str,
        shape: &[u32],
        layout: Layout,
        c: &Constant,
        part: Part,
    ) -> Result<WeightId, String> {
        let stored = match &c.source {
            Some((stored, false)) => stored.clone(),
            Some((stored, true)) if matches!(part, Part::Whole | Part::Transposed) => {
                // Its two axes are exchanged once more by reading it as it lies.
                let other = if part == Part::Whole { Part::Transposed } else { Part::Whole };
                return Ok(self.weight_at(name, shape, layout, stored.clone(), other));
            }
            _ => {
                let stored = format!("computed.{}", self.computed.len());
                self.computed.insert(stored.clone(), (*self.load(c)?).clone());
                stored
            }
        };
        Ok(self.weight_at(name, shape, layout, stored, part))
    }

    fn weight_at(
        &mut self,
        name: &str,
        shape: &[u32],
        layout: Layout,
        stored: String,
        part: Part,
    ) -> WeightId {
        let key = (stored.clone(), format!("{shape:?} {layout:?} {part:?}"));
        if let Some(&id) = self.weights.get(&key) {
            return id;
        }
        let id = self.b.weight(name.to_owned(), shape, layout);
        self.weights.insert(key, id);
        self.sources.push((stored, part));
        id
    }

    pub(super) fn info(&self, value: ValueId) -> Info {
        self.info[value.index()]
    }

    pub(super) fn kind(&self, value: ValueId) -> ValueKind {
        self.b.kind(value)
    }

    pub(super) fn channels(&self, value: ValueId) -> u32 {
        self.b.channels(value)
    }

    pub(super) fn map_info(&self, value: ValueId) -> Option<(usize, usize, usize)> {
        match self.info[value.index()] {
            Info::Map { h, w } => Some((self.b.channels(value) as usize, h, w)),
            Info::Vector => None,
        }
    }

    /// A view whose pending bias, scale or norm is done with.
    pub(super) fn view(&mut self, sym: &Sym) -> Result<View, String> {
        match sym {
            Sym::View(v) => Ok(v.clone()),
            Sym::Product { x, weight, part } => self.linear(x, weight, part, None),
            Sym::Time(values) => self.projection(values),
            Sym::Opaque { node, .. } => {
                let n = &self.file.nodes[*node];
                Err(format!(
                    "its input comes from node {} ({}), which is not understood there",
                    n.name, n.op
                ))
            }
            Sym::Const(_) => Err("its input is a constant".into()),
            Sym::Normed { .. } => Err("its input is normalised without a scale and shift".into()),
            _ => Err("its input is part of a pattern that is not complete".into()),
        }
    }

    /// The graph value of a view that is exactly that value, with a pending factor applied.
    pub(super) fn settled(&mut self, v: &View) -> Result<View, String> {
        if v.offset != 0 {
            return Err("its input is part of a vector".into());
        }
        if v.mul == 1.0 && v.add == 0.0 {
            return Ok(v.clone());
        }
        let info = self.info[v.value.index()];
        let op = Op::Affine { mul: v.mul, add: v.add };
        let value = self.emit("affine", op, &[v.value], self.b.kind(v.value), info);
        Ok(View::new(value, v.axes.clone()))
    }

    /// The value of a tensor that is a whole map `[1, c, h, w]`.
    pub(super) fn map(&mut self, sym: &Sym) -> Result<ValueId, String> {
        let v = self.view(sym)?;
        let v = self.settled(&v)?;
        match self.map_info(v.value) {
            Some((c, h, w)) if v.axes == map_axes(c, h, w) => Ok(v.value),
            _ => Err(format!("its input of shape {:?} is not a feature map", v.dims())),
        }
    }

    /// A linear layer over a view of tokens or a vector.
    pub(super) fn linear(
        &mut self,
        x: &View,
        weight: &Constant,
        part: &Part,
        bias: Option<&Constant>,
    ) -> Result<View, String> {
        let x = self.settled(x)?;
        let c = self.b.channels(x.value) as usize;
        let (rows, columns) = match (part, &weight.dims[..]) {
            (Part::Transposed, &[c, n]) | (_, &[n, c]) => (n, c),
            _ => return Err(format!("a matrix of shape {:?}", weight.dims)),
        };
        let info = self.info[x.value.index()];
        let fits = match self.map_info(x.value) {
            Some((c, h, w)) => x.is_tokens(c, h, w),
            None => x.axes == vector_axes(c),
        };
        if !fits || columns != c {
            return Err(format!("a linear layer of {columns} inputs on shape {:?}", x.dims()));
        }
        let n = u32::try_from(rows).map_err(|_| "a matrix that is too large")?;
        let name = bias
            .and_then(|b| b.source.as_ref())
            .or(weight.source.as_ref())
            .map_or("linear", |s| s.0.as_str());
        let name = name.trim_end_matches(".bias").trim_end_matches(".weight").to_owned();
        let shape = [n, self.b.channels(x.value)];
        let id =
            self.weight(&format!("{name}.weight"), &shape, Layout::Packed16, weight, part.clone())?;
        let bias = match bias {
            Some(b) => {
                Some(self.weight(&format!("{name}.bias"), &[n], Layout::Plain, b, Part::Whole)?)
            }
            None => None,
        };
        let kind = match info {
            Info::Map { .. } => ValueKind::Map(n),
            Info::Vector => ValueKind::Vector(n),
        };
        let value =
            self.emit(&name, Op::Linear { weight: id, bias, quant: None }, &[x.value], kind, info);
        let mut axes = x.axes.clone();
        if let Some(last) = axes.last_mut() {
            *last = vector_axes(rows).pop().unwrap_or_default();
        }
        Ok(View::new(value, axes))
    }

    /// Interprets a node that has a view among its inputs; `None` where it is not understood by itself.
    fn step(&mut self, n: &OnnxNode, inputs: &[Option<Sym>]) -> Result<Option<Sym>, String> {
        let sym = |i: usize| inputs.get(i).and_then(Option::as_ref);
        let x = sym(0).ok_or("it has no input")?;
        let some = |v: View| Ok(Some(Sym::View(v)));
        match n.op.as_str() {
            "Identity" | "Dropout" => Ok(Some(x.clone())),
            "Cast"
                if matches!(attr_int(n, "to", 0), 1 | 10 | 11 | 16)
                    && !matches!(x, Sym::Opaque { .. }) =>
            {
                Ok(Some(x.clone()))
            }
            "Reshape" | "Flatten" | "Unsqueeze" | "Squeeze" | "Transpose" => {
                self.relayout(n, inputs)
            }
            "Conv" => {
                let (x, pads) = match x {
                    Sym::Padded { x, pads } => (Sym::View(x.clone()), *pads),
                    x => (x.clone(), [0; 4]),
                };
                let value = self.map(&x)?;
                let (Some(Sym::Const(w)), bias) = (sym(1).cloned(), sym(2).cloned()) else {
                    return Err("a convolution whose kernel is not constant".into());
                };
                some(self.conv(n, value, pads, &w, bias.as_ref())?)
            }
            "Gemm" => {
                let (Some(Sym::Const(w)), bias) = (sym(1), sym(2)) else {
                    return Err("a linear layer whose matrix is not constant".into());
                };
                let plain = attr_float(n, "alpha", 1.0) == 1.0
                    && attr_float(n, "beta", 1.0) == 1.0
                    && attr_int(n, "transA", 0) == 0;
                if !plain {
                    return Err("a Gemm with alpha, beta or transA".into());
                }
                let part =
                    if attr_int(n, "transB", 0) == 0 { Part::Transposed } else { Part::Whole };
                let x = self.view(x)?;
                let bias = match bias {
                    None => None,
                    Some(Sym::Const(b)) => Some(b),
                    Some(_) => return Err("a linear layer whose bias is not constant".into()),
                };
                some(self.linear(&x, w, &part, bias.map(|b| &**b))?)
            }
            "MatMul" => self.matmul(x, sym(1).ok_or("it has one input")?),
            "Sigmoid" => match x {
                Sym::Opaque { .. } => Ok(None),
                x => {
                    let v = self.view(x)?;
                    Ok(Some(Sym::Sigmoid(self.settled(&v)?)))
                }
            },
            "Swish" if attr_float(n, "alpha", 1.0) == 1.0 => {
                let v = self.view(x)?;
                let v = self.settled(&v)?;
                some(self.silu(&n.name, &v))
            }
            "InstanceNormalization" => self.instance_norm(n, inputs),
            "GroupNormalization" => {
                let v = self.view(x)?;
                let v = self.settled(&v)?;
                let (Some(Sym::Const(scale)), Some(Sym::Const(shift))) = (sym(1), sym(2)) else {
                    return Err("a norm whose scale is not constant".into());
                };
                let groups = attr_int(n, "num_groups", 0).max(0) as usize;
                let eps = attr_float(n, "epsilon", 1e-5);
                some(self.group_norm(n, &v, groups, eps, scale, shift)?)
            }
            "Softmax" => match x {
                Sym::Scores { q, k, heads, width, scale, dims } => {
                    let axis = tensor::axis(attr_int(n, "axis", -1), dims.len())?;
                    if axis + 1 != dims.len() {
                        return Err("a softmax over another axis than the keys".into());
                    }
                    let (q, k, heads, width, scale) = (*q, *k, *heads, *width, *scale);
                    Ok(Some(Sym::Probabilities { q, k, heads, width, scale, dims: dims.clone() }))
                }
                _ => Ok(None),
            },
            "Concat" => self.concat(n, inputs),
            "Resize" => self.resize(n, inputs),
            "AveragePool" => {
                let two = |key: &str| attr_ints(n, key).is_some_and(|v| v == [2, 2]);
                let zero = attr_ints(n, "pads").is_none_or(|p| p.iter().all(|&p| p == 0));
                if !(two("kernel_shape")
                    && two("strides")
                    && zero
                    && attr_int(n, "ceil_mode", 0) == 0)
                {
                    return Err("an average over other than 2 x 2 pixels".into());
                }
                let value = self.map(x)?;
                let Some((c, h, w)) = self.map_info(value) else { return Ok(None) };
                let info = Info::Map { h: h / 2, w: w / 2 };
                let out = self.emit(&n.name, Op::AvgPool2x, &[value], self.b.kind(value), info);
                some(View::new(out, map_axes(c, h / 2, w / 2)))
            }
            "Pad" => {
                let pads = self.ints(sym(1))?;
                let zero = match sym(2) {
                    None => true,
                    Some(Sym::Const(c)) => self.scalar(c)? == Some(0.0),
                    Some(_) => false,
                };
                let constant = attr_text(n, "mode", "constant") == "constant";
                let sides = match pads[..] {
                    [0, 0, t, l, 0, 0, b, r] => {
                        [t, l, b, r].map(|v| u32::try_from(v).unwrap_or(u32::MAX))
                    }
                    _ => return Err(format!("padding {pads:?}")),
                };
                if !(zero && constant && sides.iter().all(|&p| p <= 64)) {
                    return Err(format!("padding {pads:?} other than by zeros"));
                }
                let value = self.map(x)?;
                let Some((c, h, w)) = self.map_info(value) else { return Ok(None) };
                Ok(Some(Sym::Padded { x: View::new(value, map_axes(c, h, w)), pads: sides }))
            }
            "Slice" => self.slice(inputs),
            "Expand" if matches!(x, Sym::View(_)) => {
                let want = self.ints(sym(1))?;
                let want: Vec<usize> = want.iter().map(|&d| d.max(0) as usize).collect();
                let have = dims(x);
                if tensor::broadcast(&have, &want)? == have {
                    Ok(Some(x.clone()))
                } else {
                    Ok(None)
                }
            }
            "Gather" => self.gather(n, inputs),
            "Add" | "Sub" | "Mul" | "Div" => {
                let y = sym(1).ok_or("it has one input")?;
                self.arithmetic(n, x, y)
            }
            _ => Ok(None),
        }
    }
}
