//! What both peer programs share: the arguments, the inputs, and the line protocol their parent speaks.
//!
//! Standard input takes `run K` (K timed runs), `dump PATH` (the last output, raw f32) and `quit`; every line is
//! answered by one JSON object on standard output.

use anyhow::{Context, Result, bail};
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::Instant;

/// One input: its shape and values, as floats or as integers.
pub enum Input {
    /// f32 values.
    Float(Vec<usize>, Vec<f32>),
    /// i64 values.
    Int(Vec<usize>, Vec<i64>),
}

/// The command line: `MODEL THREADS (f32|i64):1x6x64x64:PATH ...`, the inputs in the graph's order.
pub struct Arguments {
    /// The ONNX file.
    pub model: PathBuf,
    /// Threads to use.
    pub threads: usize,
    /// The inputs.
    pub inputs: Vec<Input>,
}

/// Reads the command line and the files of the inputs.
pub fn arguments() -> Result<Arguments> {
    let mut words = std::env::args().skip(1);
    let usage = "usage: MODEL THREADS (f32|i64):SHAPE:PATH ...";
    let model = words.next().context(usage)?.into();
    let threads = words.next().context(usage)?.parse().context("THREADS is no number")?;
    let inputs = words.map(|word| input(&word)).collect::<Result<_>>()?;
    Ok(Arguments { model, threads, inputs })
}

fn input(word: &str) -> Result<Input> {
    let mut parts = word.splitn(3, ':');
    let (Some(kind), Some(shape), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
        bail!("{word}: expected (f32|i64):SHAPE:PATH");
    };
    let shape = shape
        .split('x')
        .map(|extent| extent.parse().with_context(|| format!("{word}: {extent} is no extent")))
        .collect::<Result<Vec<usize>>>()?;
    let bytes = std::fs::read(path).with_context(|| path.to_owned())?;
    let count: usize = shape.iter().product();
    let width = if kind == "f32" { 4 } else { 8 };
    if bytes.len() != count * width {
        bail!("{path}: {} bytes, expected {}", bytes.len(), count * width);
    }
    Ok(match kind {
        "f32" => {
            let floats = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
            Input::Float(shape, floats.collect())
        }
        "i64" => {
            let ints = bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b));
            Input::Int(shape, ints.collect())
        }
        _ => bail!("{word}: the type is f32 or i64"),
    })
}

/// The process' peak resident set in bytes (VmHWM), 0 where /proc has none.
fn peak_rss() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib =
        line.and_then(|rest| rest.split_whitespace().next()).and_then(|n| n.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Answers the parent's lines until `quit` or the end of input. `run` performs one inference and returns its output.
pub fn serve(mut run: impl FnMut() -> Result<Vec<f32>>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::json!({ "ready": true }))?;
    out.flush()?;
    let mut last = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
        match word {
            "run" => {
                let mut seconds = Vec::new();
                for _ in 0..rest.parse::<usize>().context("run K")? {
                    let start = Instant::now();
                    last = run()?;
                    seconds.push(start.elapsed().as_secs_f64());
                }
                let answer =
                    serde_json::json!({ "seconds": seconds, "peak_rss_bytes": peak_rss() });
                writeln!(out, "{answer}")?;
            }
            "dump" => {
                let bytes: Vec<u8> = last.iter().flat_map(|v| v.to_le_bytes()).collect();
                std::fs::write(rest, bytes).with_context(|| rest.to_owned())?;
                writeln!(out, "{}", serde_json::json!({ "values": last.len() }))?;
            }
            "quit" => break,
            _ => bail!("unknown line {line:?}"),
        }
        out.flush()?;
    }
    Ok(())
}
