//! Which levels of a mixed model stay float, by the pictures that it makes.
//!
//! Lives here: what a level is, and the search for those that int8 costs most. Never here: how a model is made with a level
//! kept, or how its pictures are judged; both are brought along.
//!
//! Why levels and pictures: noise of single layers, or of a network's result, does not tell what a picture loses. Layers of
//! one level read each other's noise, and a decoder lets through what it takes for detail.

use crate::quantize::Glob;
use latile_calibration::Verdict;
use latile_runtime::format::{Model, Role};
use latile_runtime::graph::{Node, Op, ShapeError, ValueKind};

/// What a mixed model's pictures may lose by default, in dB: see [`Limits::loss_db`].
pub const MAX_LOSS_DB: f64 = 0.1;
/// See [`Limits::paired_db`].
const LEAST_PAIRED_DB: f64 = 35.0;
/// See [`Limits::worst_paired_db`].
const LEAST_WORST_PAIRED_DB: f64 = 32.0;
/// Side of the input that work is counted at, in multiples of what the network takes.
const SIDE: usize = 8;

/// What a model's pictures may lose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// PSNR against the truth, in dB, at most: the mean of [`Verdict::loss_db`].
    pub loss_db: f64,
    /// PSNR between the model's pictures and the float model's, in dB, at least: the mean.
    pub paired_db: f64,
    /// The least of it.
    pub worst_paired_db: f64,
}

impl Limits {
    /// Those for a loss of `loss_db`.
    #[must_use]
    pub fn of_loss(loss_db: f64) -> Self {
        Self { loss_db, paired_db: LEAST_PAIRED_DB, worst_paired_db: LEAST_WORST_PAIRED_DB }
    }

    fn hold(&self, verdict: &Verdict) -> bool {
        verdict.loss() <= self.loss_db
            && verdict.paired() >= self.paired_db
            && verdict.worst_paired() >= self.worst_paired_db
    }
}

/// A level of a network: its layers between two changes of the map's size.
#[derive(Clone, Debug, PartialEq)]
pub struct Level {
    /// The names of its layers: `unet.up_blocks.2.*`.
    pub glob: Glob,
    /// Multiply-accumulates of its int8 layers and attentions in a picture, at one and the same size of input for all levels.
    pub work: f64,
}

/// The levels of `int8` that have int8 layers, in execution order; `steps` is how often a U-Net runs for each time that a
/// decoder does. The encoder has none: it makes no picture.
///
/// # Errors
/// A graph whose shapes cannot be told.
pub fn levels(int8: &Model, steps: u32) -> Result<Vec<Level>, ShapeError> {
    let mut all: Vec<Level> = Vec::new();
    for spec in &int8.manifest().components {
        let runs = match spec.role {
            Role::Unet => f64::from(steps),
            Role::Decoder => 1.0,
            _ => continue,
        };
        let graph = &spec.graph;
        let side = SIDE * spec.multiple.max(1) as usize;
        let maps = graph.inputs.iter().filter(|p| matches!(graph.kind(p.value), ValueKind::Map(_)));
        let shapes = graph.infer(&vec![(side, side); maps.count()])?;
        // Networks may take other multiples: what counts is the work for a pixel of the latent.
        let per_pixel = 1.0 / (side * side) as f64;
        for node in graph.nodes.iter().filter(|n| is_int8(n)) {
            let glob = Glob::new(format!("{}.{}", spec.role.name(), pattern(&node.name)));
            let work = graph.node_macs(node, &shapes) as f64 * per_pixel * runs;
            match all.iter_mut().find(|l| l.glob == glob) {
                Some(level) => level.work += work,
                None => all.push(Level { glob, work }),
            }
        }
    }
    Ok(all)
}

fn is_int8(node: &Node) -> bool {
    node.op.quant().is_some() || matches!(node.op, Op::Attention { int8: true, .. })
}

/// The pattern of the level that a layer is of: the first part of its name, with the number that follows it. An autoencoder's
/// halves are first parts of their own in a checkpoint, and count for nothing.
fn pattern(name: &str) -> String {
    let half = ["decoder.", "encoder."].into_iter().find(|half| name.starts_with(half));
    let begin = half.map_or(0, str::len);
    let mut ends = name.match_indices('.').map(|(at, _)| at).filter(|&at| at >= begin);
    let Some(first) = ends.next() else { return name.to_owned() };
    let number = |end: &usize| {
        let part = &name[first + 1..*end];
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit())
    };
    let end = ends.next().filter(number).unwrap_or(first);
    format!("{}.*", &name[..end])
}

/// What a search came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// The levels that stay float, in execution order.
    pub kept: Vec<KeptLevel>,
    /// What the model's pictures lose with them; none where nothing but float holds the limits.
    pub verdict: Option<Verdict>,
}

/// A level that stays float.
#[derive(Clone, Debug, PartialEq)]
pub struct KeptLevel {
    /// The names of its layers.
    pub glob: Glob,
    /// Its noise as int8 where all else is float: [`Verdict::noise`].
    pub noise: f64,
}

/// Verdicts that a search over `levels` levels takes, at most.
#[must_use]
pub fn verdicts(levels: usize) -> u64 {
    1 + levels as u64 + u64::from(usize::BITS - levels.leading_zeros())
}

/// Which of `levels` stay float so that the pictures hold `limits`: none if they do so anyway; else those that make most noise
/// for their work, each alone in int8, as many as it takes. `judge` gives the verdict on the model that has the levels at
/// the given indices in float, all others in int8.
///
/// # Errors
/// Those of `judge`.
pub fn choose<E>(
    levels: &[Level],
    limits: &Limits,
    judge: &mut dyn FnMut(&[usize]) -> Result<Verdict, E>,
) -> Result<Choice, E> {
    let verdict = judge(&[])?;
    if limits.hold(&verdict) {
        return Ok(Choice { kept: Vec::new(), verdict: Some(verdict) });
    }
    let mut ranked: Vec<(usize, f64)> = Vec::new();
    for i in 0..levels.len() {
        let others: Vec<usize> = (0..levels.len()).filter(|&other| other != i).collect();
        ranked.push((i, judge(&others)?.noise));
    }
    // Stable: of equals the first in execution order. A level with an int8 layer has work.
    let rate = |&(i, noise): &(usize, f64)| noise / levels[i].work;
    ranked.sort_by(|a, b| rate(a).total_cmp(&rate(b)));
    let rest = |from: usize| {
        let mut kept: Vec<usize> = ranked[from..].iter().map(|r| r.0).collect();
        kept.sort_unstable();
        kept
    };
    // The first `good` of the ranking hold the limits in int8, the first `bad` do not.
    let (mut good, mut bad) = (0, levels.len());
    let mut found = None;
    while bad - good > 1 {
        let middle = usize::midpoint(good, bad);
        let verdict = judge(&rest(middle))?;
        if limits.hold(&verdict) {
            (good, found) = (middle, Some(verdict));
        } else {
            bad = middle;
        }
    }
    let kept = rest(good);
    let noise = |i: usize| ranked.iter().find(|r| r.0 == i).map_or(0.0, |r| r.1);
    let kept = kept.into_iter();
    Ok(Choice {
        kept: kept.map(|i| KeptLevel { glob: levels[i].glob.clone(), noise: noise(i) }).collect(),
        verdict: found,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    #[test]
    fn a_level_is_the_first_part_of_a_name_with_its_number() {
        for (name, level) in [
            ("up_blocks.2.resnets.0.conv1", "up_blocks.2.*"),
            ("up_blocks.12.upsamplers.0.conv", "up_blocks.12.*"),
            ("mid_block.attentions.0.to_q", "mid_block.*"),
            ("mid_block.conv", "mid_block.*"),
            ("output.7", "output.*"),
            ("decoder.up_blocks.3.resnets.0.conv1", "decoder.up_blocks.3.*"),
            ("decoder.mid_block.resnets.0.conv1", "decoder.mid_block.*"),
            ("decoder.conv_in", "decoder.conv_in"),
            ("quant_conv", "quant_conv"),
            ("", ""),
            (".", ".*"),
        ] {
            assert_eq!(pattern(name), level, "{name}");
        }
    }

    /// Levels of equal work whose noise adds up.
    fn found(noise: &[f64], work: &[f64], limits: &Limits) -> (Vec<usize>, u64, Choice) {
        let name = |i: usize| Glob::new(format!("level {i}"));
        let levels: Vec<Level> =
            work.iter().enumerate().map(|(i, &work)| Level { glob: name(i), work }).collect();
        let mut asked = 0;
        let mut judge = |kept: &[usize]| {
            asked += 1;
            assert!(kept.is_sorted());
            let noise: f64 = (0..noise.len()).filter(|i| !kept.contains(i)).map(|i| noise[i]).sum();
            let paired = 60.0 - noise;
            Ok::<_, Infallible>(Verdict {
                paired_db: vec![paired, paired + 2.0],
                loss_db: vec![noise, -1.0],
                noise,
            })
        };
        let Ok(choice) = choose(&levels, limits, &mut judge);
        let index = |k: &KeptLevel| levels.iter().position(|l| l.glob == k.glob).unwrap();
        (choice.kept.iter().map(index).collect(), asked, choice)
    }

    #[test]
    fn the_noisiest_for_their_work_are_kept_until_the_limit_holds() {
        let limits = |loss| Limits { loss_db: loss, paired_db: 0.0, worst_paired_db: 0.0 };
        let noise = [0.2, 1.0, 0.1, 4.0, 0.3];
        let same = [1.0; 5];
        // Nothing to do: one verdict.
        let (kept, asked, choice) = found(&noise, &same, &limits(2.81));
        assert_eq!((kept, asked), (vec![], 1));
        assert_eq!(choice.verdict.unwrap().loss(), noise.iter().sum::<f64>() / 2.0);
        for (loss, expected) in [(0.81, vec![3]), (0.31, vec![1, 3]), (0.051, vec![0, 1, 3, 4])] {
            let (kept, asked, choice) = found(&noise, &same, &limits(loss));
            assert_eq!(kept, expected, "{loss}");
            assert!(asked <= verdicts(5), "{asked} verdicts");
            assert!(choice.verdict.unwrap().loss() <= loss);
            assert_eq!(choice.kept[0].noise, noise[expected[0]]);
        }
        // Much work makes up for noise.
        let (kept, ..) = found(&noise, &[1.0, 1.0, 1.0, 100.0, 1.0], &limits(2.06));
        assert_eq!(kept, [0, 1, 4]);
        // Nothing holds: all of them stay float.
        let (kept, _, choice) = found(&noise, &same, &limits(0.01));
        assert_eq!((kept, choice.verdict), (vec![0, 1, 2, 3, 4], None));
    }

    #[test]
    fn pictures_that_lose_nothing_but_differ_do_not_hold() {
        let noise = [10.0, 30.0];
        let limits = Limits::of_loss(100.0);
        assert_eq!(found(&noise, &[1.0; 2], &limits).0, [1]);
        let worst = Limits { paired_db: 0.0, worst_paired_db: 55.0, ..limits };
        assert_eq!(found(&[4.0, 6.0], &[1.0; 2], &worst).0, [1]);
    }
}
