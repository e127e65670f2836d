//! `cargo xtask parity`: the full-size LDM-SR with random weights against diffusers.
//!
//! Runs `tests/oracle/full_size.py` (needs Python with torch and diffusers) to write the model with
//! inputs and outputs of each component, exports it in f32 and f16, runs each component with
//! `latile run`, and compares. Minutes of work and gigabytes of disk: a person's command, not CI's.

use anyhow::{Context, Result, bail, ensure};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The largest error accepted, relative to the range of diffusers' result.
const TOLERANCE: [(&str, f64); 2] = [("f32", 1e-4), ("f16", 2e-3)];

/// Component, its recorded inputs and outputs, and the compared output.
const COMPONENTS: [(&str, &str, &str); 3] = [
    ("unet", "unet/io.safetensors", "sample"),
    ("decoder", "vqvae/decoder_io.safetensors", "sample"),
    ("encoder", "vqvae/encoder_io.safetensors", "latents"),
];

/// Runs the comparison.
///
/// # Errors
/// Where a command fails or a tolerance is exceeded.
pub(crate) fn run(root: &Path, args: &[String]) -> Result<()> {
    let (mut python, mut dir) = ("python3".to_owned(), root.join("target/parity"));
    for pair in args.chunks(2) {
        match pair {
            [flag, value] if flag == "--python" => python.clone_from(value),
            [flag, value] if flag == "--dir" => dir = PathBuf::from(value),
            _ => bail!("usage: cargo xtask parity [--python PYTHON] [--dir DIR]"),
        }
    }
    let checkpoint = dir.join("diffusers");
    if !checkpoint.exists() {
        fs::create_dir_all(&dir)?;
        call(Command::new(&python).arg(root.join("tests/oracle/full_size.py")).arg(&dir))?;
    }
    call(
        Command::new(env!("CARGO"))
            .args(["build", "--release", "--package", "latile"])
            .current_dir(root),
    )?;
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let latile = target.join("release/latile");
    let mut failed = 0;
    for (precision, tolerance) in TOLERANCE {
        let model = dir.join(format!("ldm-sr-{precision}.latile"));
        call(Command::new(&latile).arg("export").arg(&checkpoint).arg("-o").arg(&model).args([
            "--precision",
            precision,
            "--with-encoder",
            "--overwrite",
        ]))?;
        for (component, recorded, output) in COMPONENTS {
            let error = component_error(
                &latile,
                &model,
                component,
                &checkpoint.join(recorded),
                output,
                &dir,
            )?;
            let verdict = if error <= tolerance { "ok" } else { "FAILED" };
            failed += usize::from(error > tolerance);
            println!(
                "{precision} {component:8} error {error:.2e} of range, at most {tolerance:.0e}: {verdict}"
            );
        }
    }
    ensure!(failed == 0, "{failed} comparisons failed");
    Ok(())
}

/// Runs one component on the recorded inputs; its largest error relative to the recorded output's range.
fn component_error(
    latile: &Path,
    model: &Path,
    component: &str,
    recorded: &Path,
    output: &str,
    dir: &Path,
) -> Result<f64> {
    let bytes = fs::read(recorded).with_context(|| recorded.display().to_string())?;
    let recorded = SafeTensors::deserialize(&bytes)?;
    let inputs: Vec<(String, TensorView<'_>)> = recorded
        .tensors()
        .into_iter()
        .filter_map(|(name, t)| Some((name.strip_prefix("0.inputs.")?.to_owned(), t)))
        .collect();
    let (given, result) = (dir.join("inputs.safetensors"), dir.join("outputs.safetensors"));
    safetensors::serialize_to_file(inputs, None, &given)?;
    let _ = fs::remove_file(&result);
    call(
        Command::new(latile)
            .arg("run")
            .arg(model)
            .args(["--component", component, "--inputs"])
            .arg(&given)
            .arg("--outputs")
            .arg(&result),
    )?;
    let bytes = fs::read(&result)?;
    let found = floats(&SafeTensors::deserialize(&bytes)?.tensor(output)?)?;
    let expected = floats(&recorded.tensor(&format!("0.outputs.{output}"))?)?;
    ensure!(
        found.len() == expected.len(),
        "{component}: {} elements, expected {}",
        found.len(),
        expected.len()
    );
    let (low, high) = expected.iter().fold((f64::MAX, f64::MIN), |(l, h), &x| (l.min(x), h.max(x)));
    let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    Ok(worst / (high - low))
}

fn floats(t: &TensorView<'_>) -> Result<Vec<f64>> {
    ensure!(t.dtype() == Dtype::F32, "a tensor of {:?}, expected f32", t.dtype());
    let number = |b: &[u8]| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    Ok(t.data().chunks_exact(4).map(number).collect())
}

fn call(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {command:?}"))?;
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(())
}
