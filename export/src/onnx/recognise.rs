//! From an ONNX graph to primitive operators.
//!
//! Each node is interpreted once, in order. Constants fold; what depends on the timestep alone is computed at a few
//! timesteps and recognised as a sinusoidal projection; tensors that only regroup a feature map become views of it.
//! What remains are the operators, and the pieces into which exporters break group norms, SiLU, attention and the
//! codebook, put together again here. An operator that is not understood is an error only where something depends
//! on it.

use super::fail;
use super::file::{OnnxFile, OnnxNode};
use super::tensor::{self, Tensor, attr_float, attr_int, attr_ints, attr_text, fold};
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

/// A constant: computed, or a stored tensor that need not be loaded.
#[derive(Debug)]
pub(super) struct Constant {
    pub(super) dims: Vec<usize>,
    /// The stored tensor with the same elements in the same order, or with its two axes exchanged.
    source: Option<(String, bool)>,
    value: Option<Rc<Tensor>>,
}

impl Constant {
    /// The stored tensor's name.
    pub(super) fn name(&self) -> Option<&str> {
        self.source.as_ref().map(|(name, _)| name.as_str())
    }
}

/// What is known of an ONNX tensor.
#[derive(Clone, Debug)]
pub(super) enum Sym {
    Const(Rc<Constant>),
    /// Its value at each of [`PROBES`].
    Time(Rc<Vec<Tensor>>),
    View(View),
    Sigmoid(View),
    /// A product with a matrix whose bias may follow.
    Product {
        x: View,
        weight: Rc<Constant>,
        part: Part,
    },
    /// Normalised in groups; scale and shift follow. The view is of the input, regrouped as the result is.
    Normed {
        x: View,
        groups: usize,
        eps: f32,
        scale: Option<Rc<Constant>>,
    },
    /// A map times `1 + v[..c]`; the shift by `v[c..]` follows.
    Scaled {
        x: View,
        v: ValueId,
    },
    Difference {
        of: View,
        less: View,
    },
    Scores {
        q: ValueId,
        k: ValueId,
        heads: usize,
        width: usize,
        scale: f32,
        dims: Vec<usize>,
    },
    Probabilities {
        q: ValueId,
        k: ValueId,
        heads: usize,
        width: usize,
        scale: f32,
        dims: Vec<usize>,
    },
    /// Zeros around a map: top, left, bottom, right.
    Padded {
        x: View,
        pads: [u32; 4],
    },
    /// Not understood yet: the node that made it.
    Opaque {
        dims: Vec<usize>,
        node: usize,
    },
}

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
    b: Builder,
    info: Vec<Info>,
    /// Nodes already there, by operator and operands: exporters repeat themselves.
    known: HashMap<(String, Vec<ValueId>), ValueId>,
    weights: HashMap<(String, String), WeightId>,
    sources: Vec<(String, Part)>,
    computed: BTreeMap<String, Tensor>,
    time: Option<TimestepProjection>,
}

type Step = Result<Sym, String>;

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
        if inputs.iter().flatten().all(|s| matches!(s, Sym::Const(_) | Sym::Time(_))) {
            if let Some(sym) = self.fold_time(n, &inputs)? {
                return Ok(vec![sym]);
            }
        }
        if n.op == "Split" {
            return self.split(n, &inputs);
        }
        match self.step(n, &inputs)? {
            Some(sym) => Ok(vec![sym]),
            None => Ok(vec![self.opaque(index, n, &inputs)?]),
        }
    }

    fn constant(&self, n: &OnnxNode) -> Step {
        use super::file::Attribute;
        match n.attributes.iter().next() {
            Some((_, Attribute::Tensor(name))) => {
                let dims = self.file.tensors.get(name).map_or_else(Vec::new, |t| t.dims.clone());
                let source = Some((name.clone(), false));
                Ok(Sym::Const(Rc::new(Constant { dims, source, value: None })))
            }
            Some((_, Attribute::Float(v))) => Ok(computed(Tensor::floats(&[], vec![*v]))),
            Some((_, Attribute::Int(v))) => Ok(computed(Tensor::ints(&[], vec![*v]))),
            Some((_, Attribute::Ints(v))) => Ok(computed(Tensor::ints(&[v.len()], v.clone()))),
            _ => Err("a constant of unknown kind".into()),
        }
    }

    /// A constant's elements.
    pub(super) fn load(&self, c: &Constant) -> Result<Rc<Tensor>, String> {
        if let Some(value) = &c.value {
            return Ok(value.clone());
        }
        let Some((name, transposed)) = &c.source else {
            return Err("a constant without a value".into());
        };
        let stored = self.file.tensors.get(name).ok_or("a constant that is not stored")?;
        if stored
            .dims
            .iter()
            .try_fold(1usize, |n, &d| n.checked_mul(d))
            .is_none_or(|n| n > tensor::MAX_ELEMENTS)
        {
            return Err(format!(
                "constant {name} of shape {:?} is too large to compute with",
                stored.dims
            ));
        }
        let mut t = stored.load().map_err(|why| format!("tensor {name}: {why}"))?;
        if *transposed {
            let swap = OnnxNode { op: "Transpose".into(), ..OnnxNode::default() };
            t = fold(&swap, &[Some(&t)])?;
        }
        t.dims.clone_from(&c.dims);
        Ok(Rc::new(t))
    }

    pub(super) fn ints(&self, sym: Option<&Sym>) -> Result<Vec<i64>, String> {
        match sym {
            Some(Sym::Const(c)) => Ok(self.load(c)?.as_ints()?.to_vec()),
            Some(_) => Err("an operand that should be constant is not".into()),
            None => Err("an operand is missing".into()),
        }
    }

    pub(super) fn scalar(&self, c: &Constant) -> Result<Option<f32>, String> {
        if c.dims.iter().product::<usize>() == 1 { Ok(self.load(c)?.scalar()) } else { Ok(None) }
    }

    fn fold_constants(&self, n: &OnnxNode, inputs: &[Option<Sym>]) -> Step {
        let constants: Vec<Option<Rc<Constant>>> = inputs
            .iter()
            .map(|s| match s {
                Some(Sym::Const(c)) => Some(c.clone()),
                _ => None,
            })
            .collect();
        let first = constants.first().cloned().flatten().ok_or("it has no input")?;
        // Operators that only change a stored tensor's shape leave it where it is.
        if let (Some((name, transposed)), None) = (&first.source, &first.value) {
            let float = self.file.tensors.get(name).is_some_and(super::file::OnnxTensor::is_float);
            let moved = |dims: Vec<usize>, transposed: bool| {
                let source = Some((name.clone(), transposed));
                Ok(Sym::Const(Rc::new(Constant { dims, source, value: None })))
            };
            let rank = first.dims.len();
            match n.op.as_str() {
                "Identity" | "Dropout" => return moved(first.dims.clone(), *transposed),
                "Cast" if float && matches!(attr_int(n, "to", 0), 1 | 10 | 11 | 16) => {
                    return moved(first.dims.clone(), *transposed);
                }
                "Transpose" if float && rank == 2 && tensor::permutation(n, 2)? == [1, 0] => {
                    return moved(vec![first.dims[1], first.dims[0]], !transposed);
                }
                "Reshape" if float && !transposed => {
                    let target = self.ints(inputs.get(1).and_then(Option::as_ref))?;
                    let zero = attr_int(n, "allowzero", 0) != 0;
                    return moved(tensor::reshape_dims(&first.dims, &target, zero)?, false);
                }
                "Unsqueeze" if float && !transposed => {
                    let mut dims = first.dims.clone();
                    let axes = self.ints(inputs.get(1).and_then(Option::as_ref))?;
                    for at in tensor::unsqueeze_at(rank, &axes)? {
                        dims.insert(at.min(dims.len()), 1);
                    }
                    return moved(dims, false);
                }
                _ => {}
            }
        }
        let mut loaded: Vec<Option<Rc<Tensor>>> = Vec::new();
        for c in &constants {
            loaded.push(c.as_ref().map(|c| self.load(c)).transpose()?);
        }
        if let ("ConstantOfShape", Some(super::file::Attribute::Tensor(name))) =
            (n.op.as_str(), n.attributes.get("value"))
        {
            let value = self.file.tensors.get(name).ok_or("its value is missing")?.load()?;
            loaded.push(Some(Rc::new(value)));
        }
        let operands: Vec<Option<&Tensor>> = loaded.iter().map(|t| t.as_deref()).collect();
        Ok(computed(fold(n, &operands)?))
    }

    /// Computes at every probe; a first linear layer makes the projection an input instead.
    fn fold_time(&mut self, n: &OnnxNode, inputs: &[Option<Sym>]) -> Result<Option<Sym>, String> {
        if matches!(n.op.as_str(), "Gemm" | "MatMul") {
            return Ok(None);
        }
        let mut out = Vec::with_capacity(PROBES.len());
        for probe in 0..PROBES.len() {
            let mut loaded: Vec<Option<Rc<Tensor>>> = Vec::new();
            for s in inputs {
                loaded.push(match s {
                    Some(Sym::Time(values)) => Some(Rc::new(values[probe].clone())),
                    Some(Sym::Const(c)) => Some(self.load(c)?),
                    _ => None,
                });
            }
            let operands: Vec<Option<&Tensor>> = loaded.iter().map(|t| t.as_deref()).collect();
            out.push(fold(n, &operands)?);
        }
        Ok(Some(Sym::Time(Rc::new(out))))
    }

    /// The `time_proj` input, once a linear layer reads what was computed from the timestep.
    fn projection(&mut self, values: &[Tensor]) -> Result<View, String> {
        let found = super::time::fit(values)?;
        if let Some(known) = self.time {
            if known != found {
                return Err("the timestep is projected in two ways".into());
            }
        }
        let len = found.dim as usize;
        let value = match self.known.get(&("time_proj".to_owned(), Vec::new())) {
            Some(&value) => value,
            None => {
                let value = self.b.input("time_proj", ValueKind::Vector(found.dim));
                self.info.push(Info::Vector);
                self.known.insert(("time_proj".to_owned(), Vec::new()), value);
                value
            }
        };
        self.time = Some(found);
        Ok(View::new(value, vector_axes(len)))
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
        let value = self.emit(&name, Op::Linear { weight: id, bias }, &[x.value], kind, info);
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

/// A constant that was computed.
pub(super) fn computed(t: Tensor) -> Sym {
    Sym::Const(Rc::new(Constant { dims: t.dims.clone(), source: None, value: Some(Rc::new(t)) }))
}

/// A tensor's dimensions.
pub(super) fn dims(sym: &Sym) -> Vec<usize> {
    match sym {
        Sym::Const(c) => c.dims.clone(),
        Sym::Time(values) => values[0].dims.clone(),
        Sym::View(v) | Sym::Sigmoid(v) => v.dims(),
        Sym::Normed { x, .. } | Sym::Scaled { x, .. } => x.dims(),
        Sym::Difference { of, .. } => of.dims(),
        Sym::Product { x, weight, part } => {
            let mut dims = x.dims();
            let n =
                if *part == Part::Transposed { weight.dims.get(1) } else { weight.dims.first() };
            if let (Some(last), Some(&n)) = (dims.last_mut(), n) {
                *last = n;
            }
            dims
        }
        Sym::Scores { dims, .. } | Sym::Probabilities { dims, .. } | Sym::Opaque { dims, .. } => {
            dims.clone()
        }
        Sym::Padded { x, pads } => {
            let mut dims = x.dims();
            if let [_, _, h, w] = &mut dims[..] {
                *h += (pads[0] + pads[2]) as usize;
                *w += (pads[1] + pads[3]) as usize;
            }
            dims
        }
    }
}
