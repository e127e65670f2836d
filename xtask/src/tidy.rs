//! `cargo xtask tidy`: what ARCHITECTURE.md promises and no compiler checks.
//!
//! Each check is a function from the tree to a list of complaints; all complaints are printed.

use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Each crate and the crates of the workspace it may depend on. An arrow that is not here is refused.
const ARROWS: &[(&str, &[&str])] = &[
    ("latile-runtime", &[]),
    ("latile-cpu", &["latile-runtime"]),
    ("latile-calibration", &["latile-runtime", "latile-cpu"]),
    ("latile-export", &["latile-runtime", "latile-cpu", "latile-calibration"]),
    ("latile", &["latile-runtime", "latile-cpu", "latile-calibration", "latile-export"]),
    ("latile-tests", &["latile-runtime", "latile-cpu", "latile-calibration", "latile-export"]),
    ("latile-benches", &["latile-runtime", "latile-cpu", "latile-calibration", "latile-export"]),
    ("xtask", &[]),
];

/// Where `unsafe` may stand: the targets' kernels, the memory map, the arena; in tests, a counting allocator.
const UNSAFE_PLACES: &[&str] =
    &["targets/", "runtime/src/format/map.rs", "runtime/src/tensor/arena.rs"];

/// Past this many bytes a source file must say why, in a comment that begins with `Size:`.
const FILE_SIZE: u64 = 28_000;

/// Rooms: each opens with a paragraph, in a crate's `src/lib.rs` or `src/main.rs`, or in a README.md.
const ROOMS: &[&str] = &[
    "runtime",
    "targets/cpu",
    "targets/rockchip",
    "targets/jetson",
    "calibration",
    "export",
    "firmware-host",
    "cli",
    "models",
    "tests",
    "benches",
    "xtask",
];

/// Runs every check.
///
/// # Errors
/// With the number of complaints, after printing them.
pub(crate) fn run(root: &Path) -> Result<()> {
    let files = tracked(root)?;
    let mut complaints = Vec::new();
    complaints.extend(arrows(root)?);
    complaints.extend(stated_reasons(root)?);
    complaints.extend(rooms(root));
    for path in &files {
        let Ok(text) = fs::read_to_string(root.join(path)) else { continue };
        let name = path.to_string_lossy().replace('\\', "/");
        if name.ends_with(".rs") {
            complaints.extend(unsafe_stands(&name, &text));
            complaints.extend(opening(&name, &text));
        }
        if name.ends_with(".rs") || name.ends_with(".py") {
            complaints.extend(size(&name, &text));
        }
        if name.ends_with(".md") {
            complaints.extend(links(root, path, &text));
        }
    }
    for c in &complaints {
        println!("tidy: {c}");
    }
    if !complaints.is_empty() {
        bail!("{} complaints; see above", complaints.len());
    }
    println!("tidy: {} files, no complaints", files.len());
    Ok(())
}

/// Files git knows or would add.
fn tracked(root: &Path) -> Result<Vec<PathBuf>> {
    let out = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard", "-z"])
        .current_dir(root)
        .output()
        .context("git is needed to list the files")?;
    if !out.status.success() {
        bail!("git ls-files failed: {}", String::from_utf8_lossy(&out.stderr));
    }
    let text = String::from_utf8(out.stdout).context("a file name is not UTF-8")?;
    Ok(text.split('\0').filter(|s| !s.is_empty()).map(PathBuf::from).collect())
}

/// Dependencies between the workspace's crates follow [`ARROWS`].
fn arrows(root: &Path) -> Result<Vec<String>> {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root)
        .output()
        .context("cargo metadata")?;
    if !out.status.success() {
        bail!("cargo metadata failed: {}", String::from_utf8_lossy(&out.stderr));
    }
    let meta: serde_json::Value = serde_json::from_slice(&out.stdout)?;
    let mut complaints = Vec::new();
    let packages = meta["packages"].as_array().context("cargo metadata lists no packages")?;
    let ours: Vec<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    for p in packages {
        let name = p["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = ARROWS.iter().find(|(n, _)| *n == name) else {
            complaints
                .push(format!("crate {name} is not in the list of arrows (xtask/src/tidy.rs)"));
            continue;
        };
        for d in p["dependencies"].as_array().into_iter().flatten() {
            let dep = d["name"].as_str().unwrap_or_default();
            if ours.contains(&dep) && dep != name && !allowed.contains(&dep) {
                complaints.push(format!(
                    "{name} depends on {dep}, against the arrows of ARCHITECTURE.md"
                ));
            }
        }
    }
    Ok(complaints)
}

/// Each shared dependency says in its line why it is there.
fn stated_reasons(root: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(root.join("Cargo.toml"))?;
    let section = text
        .split("[workspace.dependencies]")
        .nth(1)
        .and_then(|rest| rest.split("\n[").next())
        .unwrap_or_default();
    Ok(section
        .lines()
        .filter(|l| {
            l.contains('=') && !l.starts_with('#') && !l.contains("path =") && !l.contains(" # ")
        })
        .map(|l| format!("Cargo.toml: no reason stated beside `{l}`"))
        .collect())
}

/// Each room opens with a paragraph.
fn rooms(root: &Path) -> Vec<String> {
    let opens = |p: PathBuf, mark: &str| {
        fs::read_to_string(p).is_ok_and(|t| t.lines().any(|l| l.starts_with(mark) && l.len() > 20))
    };
    ROOMS
        .iter()
        .filter(|room| {
            let dir = root.join(room);
            let paragraph = opens(dir.join("src/lib.rs"), "//! ")
                || opens(dir.join("src/main.rs"), "//! ")
                || fs::read_to_string(dir.join("README.md")).is_ok_and(|t| t.len() > 80);
            !paragraph
        })
        .map(|room| format!("{room}: no opening paragraph"))
        .collect()
}

/// `unsafe` stands only where it may, and never without its reason.
fn unsafe_stands(name: &str, text: &str) -> Vec<String> {
    if UNSAFE_PLACES.iter().any(|p| name.starts_with(p)) {
        return Vec::new();
    }
    code_lines(text)
        .filter(|(_, code)| {
            code.split(|c: char| !(c.is_alphanumeric() || c == '_')).any(|word| word == "unsafe")
        })
        .map(|(line, _)| {
            format!("{name}:{line}: unsafe may not stand here (ARCHITECTURE.md, invariants)")
        })
        .collect()
}

/// Lines with comments and string literals taken out; numbered from 1. A line scanner: raw strings that
/// span lines are taken for code, which errs on the strict side.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, String)> + '_ {
    let mut comment_depth = 0usize;
    text.lines().enumerate().map(move |(i, line)| {
        let mut code = String::new();
        let mut chars = line.chars().peekable();
        let mut in_string = false;
        while let Some(c) = chars.next() {
            let next = chars.peek().copied();
            if comment_depth > 0 {
                match (c, next) {
                    ('*', Some('/')) => {
                        comment_depth -= 1;
                        chars.next();
                    }
                    ('/', Some('*')) => {
                        comment_depth += 1;
                        chars.next();
                    }
                    _ => {}
                }
            } else if in_string {
                match c {
                    '\\' => {
                        chars.next();
                    }
                    '"' => in_string = false,
                    _ => {}
                }
            } else {
                match (c, next) {
                    ('/', Some('/')) => break,
                    ('/', Some('*')) => {
                        comment_depth += 1;
                        chars.next();
                    }
                    ('"', _) => in_string = true,
                    _ => code.push(c),
                }
            }
        }
        (i + 1, code)
    })
}

/// Each source file opens with what it is.
fn opening(name: &str, text: &str) -> Vec<String> {
    let first = text.lines().find(|l| !l.trim().is_empty() && !l.starts_with("#!"));
    if first.is_some_and(|l| l.starts_with("//!")) {
        Vec::new()
    } else {
        vec![format!("{name}: does not open with a `//!` paragraph")]
    }
}

/// Files stay small, or say why not.
fn size(name: &str, text: &str) -> Vec<String> {
    if text.len() as u64 <= FILE_SIZE || text.lines().take(80).any(|l| l.contains("Size:")) {
        return Vec::new();
    }
    vec![format!(
        "{name}: {} bytes, over {FILE_SIZE}; split it, or say why not in a comment that begins with `Size:`",
        text.len()
    )]
}

/// Relative links in documents lead somewhere.
fn links(root: &Path, path: &Path, text: &str) -> Vec<String> {
    let mut complaints = Vec::new();
    for rest in text.split("](").skip(1) {
        let target = rest.split([')', '#', ' ']).next().unwrap_or_default();
        if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
            continue;
        }
        let base = root.join(path.parent().unwrap_or(Path::new("")));
        if !base.join(target).exists() {
            complaints.push(format!("{}: the link to {target} leads nowhere", path.display()));
        }
    }
    complaints
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsafe_is_found_in_code_and_not_in_words() {
        let bad = "fn f() { unsafe { g() } }";
        assert_eq!(unsafe_stands("cli/src/main.rs", bad).len(), 1);
        assert!(unsafe_stands("targets/cpu/src/x.rs", bad).is_empty());
        for fine in
            ["// unsafe here", "let s = \"unsafe\";", "#![forbid(unsafe_code)]", "/* unsafe */"]
        {
            assert!(unsafe_stands("cli/src/main.rs", fine).is_empty(), "{fine}");
        }
    }

    #[test]
    fn a_large_file_needs_its_reason() {
        let long = "//! x\n".to_owned() + &"// y\n".repeat(10_000);
        assert_eq!(size("a.rs", &long).len(), 1);
        assert!(size("a.rs", &("//! Size: a table.\n".to_owned() + &long)).is_empty());
    }

    #[test]
    fn a_file_without_an_opening_is_named() {
        assert_eq!(opening("a.rs", "use x;\n").len(), 1);
        assert!(opening("a.rs", "\n//! What this is.\n").is_empty());
    }

    #[test]
    fn a_dead_link_is_found() {
        let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        assert_eq!(
            links(&here, Path::new("x.md"), "[a](no-such-file.md) [b](Cargo.toml)").len(),
            1
        );
    }
}
