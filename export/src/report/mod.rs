//! The quality report of an int8 model: one HTML file that needs nothing else, and the same as JSON.
//!
//! Lives here: what the report says ([`QualityReport`]) and how each of its sections looks, a module each. Never
//! here: measuring (`latile_calibration::compare` does that), decoding or encoding of pictures.

mod bytes;
mod heatmap;
mod html;
mod layers;
mod slider;

pub use slider::Pictures;

use crate::{AttentionSummary, ComponentSummary, LayerSummary, Summary};
use html::escape;
use latile_calibration::compare::{Comparison, Measured};
use latile_calibration::table::{Sampling, Skipped};
use latile_calibration::{Method, Table};
use serde::Serialize;
use std::fmt::Write;

/// What is known of an int8 model's quality. Serialised, it is the report as JSON.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QualityReport<'a> {
    /// The model's name.
    pub model: &'a str,
    /// BLAKE3 of the weights it is made of.
    pub source_hash: &'a str,
    /// `int8` or `mixed`.
    pub precision: latile_runtime::format::Precision,
    /// How activation ranges were chosen.
    pub method: Option<Method>,
    /// Bytes of the model's file.
    pub bytes: u64,
    /// Its networks, with their bytes by what they are.
    pub components: &'a [ComponentSummary],
    /// Pictures it was calibrated with.
    pub pictures: Vec<&'a str>,
    /// Pictures that could not be used.
    pub skipped: &'a [Skipped],
    /// How they were run.
    pub sampling: &'a Sampling,
    /// Upper bounds of the groups of timesteps.
    pub timestep_groups: &'a [u32],
    /// Every layer, in execution order.
    pub layers: Vec<Layer<'a>>,
    /// Every attention, in execution order.
    pub attentions: Vec<Attention<'a>>,
    /// The least good int8 layers, the worst first: indices into `layers`.
    pub worst: Vec<usize>,
    /// What the two models make of the same inputs, where that was measured.
    pub measured: Option<&'a Comparison>,
}

/// A layer, estimated and measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Layer<'a> {
    /// What became of it, and the estimates.
    #[serde(flatten)]
    pub summary: &'a LayerSummary,
    /// Measured signal-to-noise ratio of its input in dB by group of timesteps, the errors of all layers before it
    /// included; empty where it was not measured.
    pub measured_input_sqnr_db: &'a [Option<f32>],
}

/// An attention's products, measured: their ranges are found as they are computed, so there is no estimate.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Attention<'a> {
    /// What became of it.
    #[serde(flatten)]
    pub summary: &'a AttentionSummary,
    /// Measured signal-to-noise ratio of its result, as the layer that reads it sees it, in dB by group of
    /// timesteps, the errors of all layers before it included; empty where it was not measured.
    pub measured_sqnr_db: &'a [Option<f32>],
}

/// Layers that are called the worst.
const WORST: usize = 10;

impl<'a> QualityReport<'a> {
    /// A report of the model that `summary` describes, made with `table` under the name `model`.
    #[must_use]
    pub fn new(
        model: &'a str,
        summary: &'a Summary,
        table: &'a Table,
        measured: Option<&'a Comparison>,
    ) -> Self {
        let input_of = |component: &str, layer: &str| {
            let same = |m: &&Measured| m.component == component && m.layer == layer;
            let found = measured.and_then(|c| c.layers.iter().find(same));
            found.map_or(&[][..], |m| &m.sqnr_db)
        };
        let layers: Vec<Layer<'a>> = summary
            .layers
            .iter()
            .map(|summary| Layer {
                summary,
                measured_input_sqnr_db: input_of(&summary.component, &summary.layer),
            })
            .collect();
        let attention = |summary: &'a AttentionSummary| Attention {
            summary,
            measured_sqnr_db: input_of(
                &summary.component,
                summary.reader.as_deref().unwrap_or_default(),
            ),
        };
        let attentions = summary.attentions.iter().map(attention).collect();
        let mut worst: Vec<usize> = (0..layers.len()).filter(|&i| layers[i].summary.int8).collect();
        worst.sort_by(|&a, &b| layers[a].least().total_cmp(&layers[b].least()));
        worst.truncate(WORST);
        Self {
            model,
            source_hash: &summary.source_hash,
            precision: summary.precision,
            method: summary.method,
            bytes: summary.bytes,
            components: &summary.components,
            pictures: table.data.iter().map(|d| d.name.as_str()).collect(),
            skipped: &table.skipped,
            sampling: &table.sampling,
            timestep_groups: table
                .components
                .iter()
                .map(|c| &c.timestep_groups[..])
                .find(|g| !g.is_empty())
                .unwrap_or_default(),
            layers,
            attentions,
            worst,
            measured,
        }
    }

    /// The report as one HTML file; `pictures` are shown where there are any.
    #[must_use]
    pub fn html(&self, pictures: Option<&Pictures>) -> String {
        let mut page = String::new();
        let title = format!("{}: quality of the int8 model", self.model);
        // Writing to a string cannot fail.
        let _ = write!(
            page,
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>{}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{}</h1>\n",
            escape(&title),
            escape(&title)
        );
        self.facts(&mut page);
        if let (Some(pictures), Some(measured)) = (pictures, self.measured) {
            slider::write(&mut page, pictures, &measured.example);
        }
        heatmap::write(&mut page, self);
        layers::worst(&mut page, self);
        layers::kept(&mut page, self);
        layers::winograd(&mut page, self);
        layers::attentions(&mut page, self);
        bytes::write(&mut page, self);
        page.push_str("</body>\n</html>\n");
        page
    }

    fn facts(&self, page: &mut String) {
        let int8 = self.layers.iter().filter(|l| l.summary.int8).count();
        let fewer = self.layers.iter().filter(|l| l.summary.winograd.is_some()).count();
        let mut rows: Vec<(&str, String)> = vec![
            ("Precision", html::json_word(&self.precision)),
            (
                "Layers",
                format!(
                    "{int8} of {} are int8, {fewer} of them by Winograd's algorithms",
                    self.layers.len()
                ),
            ),
            ("File", html::bytes(self.bytes)),
            ("Weights", self.source_hash.to_owned()),
            ("Calibrated with", self.pictures.join(", ")),
            (
                "Timesteps",
                self.sampling.timesteps.iter().map(u32::to_string).collect::<Vec<_>>().join(", "),
            ),
        ];
        if let Some(method) = self.method {
            rows.insert(1, ("Ranges", method.name().to_owned()));
        }
        for s in self.skipped {
            rows.push(("Skipped", format!("{}: {}", s.name, s.why)));
        }
        if let Some(m) = self.measured {
            rows.push((
                "Paired PSNR",
                format!("{:.2} dB, int8 against float, on {}", m.example.psnr_db, m.example.name),
            ));
            for r in &m.results {
                let found: Vec<String> = r.sqnr_db.iter().map(|v| html::db(*v)).collect();
                let what = format!("{}: SQNR of {} by group, dB", r.component, r.layer);
                rows.push(("Measured", format!("{what}: {}", found.join(", "))));
            }
        }
        page.push_str("<table class=\"facts\">\n");
        for (name, value) in rows {
            let _ = writeln!(page, "<tr><th>{name}</th><td>{}</td></tr>", escape(&value));
        }
        page.push_str("</table>\n");
    }
}

impl Layer<'_> {
    /// The least of what was measured, or else estimated.
    fn least(&self) -> f32 {
        let measured = self.measured_input_sqnr_db.iter().flatten().copied().reduce(f32::min);
        let estimated = self.summary.worst_db();
        match (measured, estimated) {
            (Some(a), Some(b)) => a.min(b),
            (a, b) => a.or(b).unwrap_or(f32::INFINITY),
        }
    }
}

const STYLE: &str = "
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}
table{border-collapse:collapse}th,td{text-align:left;padding:.15rem .8rem .15rem 0;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.facts td{word-break:break-all}.note{color:#555;max-width:50rem}
.pair{position:relative;display:inline-block;max-width:100%}
.pair img{display:block;max-width:100%;image-rendering:pixelated}
.pair img.over{position:absolute;left:0;top:0}
svg text{font:11px system-ui,sans-serif;fill:#222}
.scroll{overflow:auto}
";
