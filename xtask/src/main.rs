//! Automation for the workspace, run as `cargo xtask COMMAND`.
//!
//! Lives here: `tidy`, which upholds the invariants of ARCHITECTURE.md that a compiler cannot see, and
//! `parity`, the long comparison of the full-size model with diffusers. Never here: anything that ships.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod parity;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask COMMAND

  tidy                      check what ARCHITECTURE.md promises: arrows, unsafety, sizes, paragraphs, links
  parity [--python PYTHON] [--dir DIR]
                            compare the full-size LDM-SR (random weights) with diffusers; minutes, 3 GB of disk";

/// The workspace's root.
fn root() -> PathBuf {
    // Invariant: this crate lies one folder below the root.
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let result = match args.first().map(String::as_str) {
        Some("tidy") if args.len() == 1 => tidy::run(&root()),
        Some("parity") => parity::run(&root(), &args[1..]),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask: {e:#}");
            ExitCode::FAILURE
        }
    }
}
