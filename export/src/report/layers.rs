//! The worst layers, those that stayed float, the convolutions by Winograd's algorithm, and the attentions.

use super::QualityReport;
use super::html::{db, escape};
use std::fmt::Write;

fn listed(values: &[f32]) -> String {
    values.iter().map(|&v| db(Some(v))).collect::<Vec<_>>().join(" / ")
}

pub(super) fn worst(page: &mut String, report: &QualityReport<'_>) {
    if report.worst.is_empty() {
        return;
    }
    page.push_str("<h2>Worst layers</h2>\n<p class=\"note\">In dB, by group of timesteps.</p>\n<table id=\"worst\">\n<tr><th>network</th><th>layer</th><th class=\"n\">estimated</th><th class=\"n\">its input alone</th><th class=\"n\">its weights alone</th><th class=\"n\">measured input</th></tr>\n");
    for &i in &report.worst {
        let (l, measured) = (report.layers[i].summary, report.layers[i].measured_input_sqnr_db);
        let measured: Vec<String> = measured.iter().map(|v| db(*v)).collect();
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>",
            escape(&l.component),
            escape(&l.layer),
            listed(&l.sqnr_db),
            listed(&l.input_sqnr_db),
            db(l.weight_sqnr_db),
            if measured.is_empty() { "–".to_owned() } else { measured.join(" / ") }
        );
    }
    page.push_str("</table>\n");
}

pub(super) fn kept(page: &mut String, report: &QualityReport<'_>) {
    page.push_str("<h2>Kept in f16</h2>\n");
    let kept = || report.layers.iter().map(|l| l.summary).filter(|l| !l.int8);
    if kept().next().is_none() {
        page.push_str("<p class=\"note\">No convolution and no linear layer over a map.</p>\n");
        return;
    }
    page.push_str("<table id=\"kept\">\n<tr><th>network</th><th>layer</th><th class=\"n\">weights</th><th>why</th></tr>\n");
    for l in kept() {
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td>{}</td><td class=\"n\">{}</td><td>{}</td></tr>",
            escape(&l.component),
            escape(&l.layer),
            l.weights,
            escape(l.why.as_deref().unwrap_or_default())
        );
    }
    page.push_str("</table>\n");
}

pub(super) fn winograd(page: &mut String, report: &QualityReport<'_>) {
    let asked = || {
        report
            .layers
            .iter()
            .map(|l| l.summary)
            .filter(|l| l.winograd.is_some() || l.direct.is_some())
    };
    if asked().next().is_none() {
        return;
    }
    page.push_str("<h2>Winograd’s algorithms</h2>\n<p class=\"note\">Convolutions of 3 × 3 and stride 1, which they compute with two thirds, F(2, 3), or four ninths, F(2 x 2, 3 x 3), of the multiply-adds. Noise: what that of the rounded input grows by, estimated, in dB, in the worst group of timesteps.</p>\n<table id=\"winograd\">\n<tr><th>network</th><th>layer</th><th class=\"n\">noise</th><th>computed</th></tr>\n");
    for l in asked() {
        let computed = match (l.winograd, &l.direct) {
            (Some(by), _) => format!("by {}", by.formula()),
            (None, why) => format!("directly: {}", why.as_deref().unwrap_or_default()),
        };
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td>{}</td><td class=\"n\">{}</td><td>{}</td></tr>",
            escape(&l.component),
            escape(&l.layer),
            db(l.winograd_noise_db),
            escape(&computed)
        );
    }
    page.push_str("</table>\n");
}

pub(super) fn attentions(page: &mut String, report: &QualityReport<'_>) {
    if report.attentions.is_empty() {
        return;
    }
    page.push_str("<h2>Attention</h2>\n<p class=\"note\">The products of queries with keys and of weights with values. Their ranges are found as they are computed, so nothing is estimated. Measured: in dB by group of timesteps, of the result as the next layer reads it, the errors of all layers before it included.</p>\n<table id=\"attention\">\n<tr><th>network</th><th>attention</th><th class=\"n\">heads</th><th>products</th><th class=\"n\">measured</th></tr>\n");
    for a in &report.attentions {
        let s = a.summary;
        let products = match &s.why {
            None => "int8".to_owned(),
            Some(why) => format!("float: {why}"),
        };
        let measured: Vec<String> = a.measured_sqnr_db.iter().map(|v| db(*v)).collect();
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td>{}</td><td class=\"n\">{} × {}</td><td>{}</td><td class=\"n\">{}</td></tr>",
            escape(&s.component),
            escape(&s.attention),
            s.heads,
            s.head_channels,
            escape(&products),
            if measured.is_empty() { "–".to_owned() } else { measured.join(" / ") }
        );
    }
    page.push_str("</table>\n");
}
