//! What can be computed while a graph is read: constants, and what depends on the timestep alone.

use super::file::OnnxNode;
use super::fold::fold;
use super::recognise::{Info, PROBES, Recogniser, Step};
use super::sym::{Constant, Sym, computed};
use super::tensor::{self, Tensor, attr_int};
use super::view::{View, vector_axes};
use latile_runtime::graph::ValueKind;
use std::rc::Rc;

impl Recogniser<'_> {
    pub(super) fn constant(&self, n: &OnnxNode) -> Step {
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

    pub(super) fn fold_constants(&self, n: &OnnxNode, inputs: &[Option<Sym>]) -> Step {
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
    pub(super) fn fold_time(
        &mut self,
        n: &OnnxNode,
        inputs: &[Option<Sym>],
    ) -> Result<Option<Sym>, String> {
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
    pub(super) fn projection(&mut self, values: &[Tensor]) -> Result<View, String> {
        let found = super::time::fit(values)?;
        if self.time.is_some_and(|known| known != found) {
            return Err("the timestep is projected in two ways".into());
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
}
