//! The codebook's search, recognised by what it finds.
//!
//! Exporters spell "the nearest row" in many ways (squares and a matrix product, differences, with and without the
//! root). Instead of matching each, the nodes between the latent and `ArgMin` are evaluated on probe vectors, and
//! the indices compared with a search of our own.

use super::fold::fold;
use super::recognise::Recogniser;
use super::sym::{Constant, Sym};
use super::tensor::{Elements, Tensor};
use super::view::View;
use std::collections::HashMap;

/// Probe vectors.
const PROBES: usize = 64;
/// More nodes than any spelling of the search has.
const MAX_NODES: usize = 64;

/// The view that the search at node `argmin` looks up in `table`.
pub(super) fn check(r: &Recogniser<'_>, argmin: usize, table: &Constant) -> Result<View, String> {
    // The nodes of the search, and the latent they read.
    let mut nodes = vec![argmin];
    let mut latent: Option<View> = None;
    let mut at = 0;
    while let Some(&index) = nodes.get(at) {
        at += 1;
        for name in &r.file.nodes[index].inputs {
            match r.syms.get(name) {
                Some(Sym::Opaque { node, .. }) if !nodes.contains(node) => nodes.push(*node),
                Some(Sym::View(v)) => {
                    let plain = View { mul: 1.0, add: 0.0, ..v.clone() };
                    if latent.as_ref().is_some_and(|l| *l != plain) {
                        return Err("a search over two different tensors".into());
                    }
                    latent = Some(plain);
                }
                _ => {}
            }
        }
        if nodes.len() > MAX_NODES {
            return Err("a search that is not a codebook's".into());
        }
    }
    let latent = latent.ok_or("a search over constants")?;
    let (c, h, w) = r.map_info(latent.value).ok_or("a search over a vector")?;
    if !latent.is_tokens(c, h, w)
        || latent.axes.len() != 2
        || table.dims.len() != 2
        || table.dims[1] != c
    {
        return Err("a search whose latent does not lie as one vector a row".into());
    }
    let rows = r.load(table)?.as_floats();
    let probes = probes(&rows, c);
    // Nodes stand in execution order: evaluating them by index satisfies every dependency.
    nodes.sort_unstable();
    let mut values: HashMap<&str, Tensor> = HashMap::new();
    for &index in &nodes {
        let n = &r.file.nodes[index];
        let mut operands: Vec<Option<Tensor>> = Vec::new();
        for name in &n.inputs {
            operands.push(match (values.get(name.as_str()), r.syms.get(name)) {
                (Some(t), _) => Some(t.clone()),
                (None, Some(Sym::View(v))) => {
                    let scaled = probes.iter().map(|p| p * v.mul + v.add).collect();
                    Some(Tensor::floats(&[PROBES, c], scaled))
                }
                (None, Some(Sym::Const(k))) => Some(cut((*r.load(k)?).clone(), h * w)),
                (None, _) if name.is_empty() => None,
                _ => return Err("a search that cannot be followed".into()),
            });
        }
        let operands: Vec<Option<&Tensor>> = operands.iter().map(Option::as_ref).collect();
        let out = fold(n, &operands)?;
        values.insert(n.outputs.first().map_or("", String::as_str), out);
    }
    let name = r.file.nodes[argmin].outputs.first().map_or("", String::as_str);
    let found = values.get(name).ok_or("a search without a result")?.as_ints()?.to_vec();
    let distance = |probe: &[f32], row: usize| -> f64 {
        rows[row * c..][..c].iter().zip(probe).map(|(a, b)| f64::from(a - b).powi(2)).sum()
    };
    for (probe, &index) in probes.chunks(c).zip(&found) {
        let best = (0..rows.len() / c).map(|i| distance(probe, i)).fold(f64::MAX, f64::min);
        let got =
            usize::try_from(index).ok().filter(|&i| i < rows.len() / c).map(|i| distance(probe, i));
        // Rounding may prefer another of two rows that are all but equally near.
        let size: f64 = probe.iter().map(|v| f64::from(*v).powi(2)).sum();
        if got.is_none_or(|d| d - best > 1e-5 * (1.0 + size + best)) {
            return Err("a search that does not find the nearest row of the table".into());
        }
    }
    if found.len() == PROBES {
        Ok(latent)
    } else {
        Err("a search that does not give one index a row".into())
    }
}

/// Vectors near rows of the table, the same every time.
fn probes(rows: &[f32], c: usize) -> Vec<f32> {
    let count = (rows.len() / c).max(1);
    let mean = rows.iter().map(|v| v.abs()).sum::<f32>() / rows.len().max(1) as f32;
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..PROBES)
        .flat_map(|_| {
            let row = next() as usize % count;
            let noise: Vec<f32> =
                (0..c).map(|_| (next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect();
            noise.into_iter().enumerate().map(move |(i, e)| (row * c + i, e))
        })
        .map(|(at, e)| rows.get(at).copied().unwrap_or(0.0) + e * mean)
        .collect()
}

/// A column of equal values as long as the latent has pixels, cut to the number of probes.
fn cut(t: Tensor, pixels: usize) -> Tensor {
    match (&t.data, &t.dims[..]) {
        (Elements::F(v), &[rows, 1])
            if rows == pixels && v.iter().all(|e| Some(e) == v.first()) =>
        {
            Tensor::floats(&[PROBES, 1], vec![v.first().copied().unwrap_or(0.0); PROBES])
        }
        _ => t,
    }
}
