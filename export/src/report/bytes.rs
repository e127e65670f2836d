//! Bytes of the file by what they are.

use super::QualityReport;
use super::html::{bytes, escape};
use std::fmt::Write;

/// Width of the longest bar, in pixels.
const LONGEST: u64 = 420;

pub(super) fn write(page: &mut String, report: &QualityReport<'_>) {
    let mut parts: Vec<(String, u64)> = Vec::new();
    for c in report.components {
        let b = &c.bytes;
        for (what, n) in [
            ("int8 weights", b.int8),
            ("scales and sums of int8 weights", b.int8_scales),
            ("f16 weights", b.float),
            ("biases, norms and codebooks", b.other),
        ] {
            if n > 0 {
                parts.push((format!("{}: {what}", c.role), n));
            }
        }
    }
    let known: u64 = parts.iter().map(|p| p.1).sum();
    parts.push((
        "description, and padding between weights".to_owned(),
        report.bytes.saturating_sub(known),
    ));
    let most = parts.iter().map(|p| p.1).max().unwrap_or(1).max(1);
    let _ = writeln!(
        page,
        "<h2>Bytes by part</h2>\n<table id=\"bytes\">\n<tr><th>part</th><th class=\"n\">bytes</th><th></th></tr>"
    );
    for (name, n) in parts {
        let width = (n * LONGEST).div_ceil(most);
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td class=\"n\">{}</td><td><svg width=\"{LONGEST}\" height=\"12\"><rect x=\"0\" y=\"1\" width=\"{width}\" height=\"10\" fill=\"#7aa6d8\"/></svg></td></tr>",
            escape(&name),
            bytes(n)
        );
    }
    page.push_str("</table>\n");
}
