//! What an int8 model's pictures lose, measured: against the float model's, and against the pictures that the low-resolution
//! ones were made of.
//!
//! Lives here: the float model's results, kept, and the [`Verdict`] on another model's. Never here: which layers a model
//! computes how, or what is done about a verdict.

use crate::CalibrationError;
use crate::pictures::{PictureSet, Sample};
use crate::run::Options;
use crate::trajectory::{self, Meter, OnRun};
use latile_cpu::session::CpuBackend;
use latile_runtime::format::Model;
use serde::Serialize;

/// Pictures that are judged, at most.
pub const PICTURES: usize = 4;
/// Steps of sampling, at most.
const STEPS: u32 = 4;
/// Mean square of an error that 8 bits cannot show, in squares of their step: a ratio to less means nothing.
const LEAST: f64 = 1e-3;

/// What a model's pictures lose beside the float model's. Ratios are of RGB samples of 8 bits.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// PSNR between the model's picture and the float model's, in dB, by picture.
    pub paired_db: Vec<f64>,
    /// What the model's picture has less of PSNR against the truth than the float model's, in dB, by picture; below 0
    /// where it is nearer.
    pub loss_db: Vec<f64>,
    /// Mean square between model and float model over that between float model and truth, the mean of all pictures: of
    /// several causes of noise, nearly their sum.
    pub noise: f64,
}

impl Verdict {
    fn new(pictures: &[Squares]) -> Self {
        let db = |x: f64| 10.0 * x.max(LEAST).log10();
        let peak = db(255.0 * 255.0);
        let each = |f: &dyn Fn(&Squares) -> f64| pictures.iter().map(f).collect::<Vec<_>>();
        let noise = each(&|p| p.paired / p.float.max(LEAST));
        Self {
            paired_db: each(&|p| peak - db(p.paired)),
            loss_db: each(&|p| db(p.model) - db(p.float)),
            noise: mean(&noise),
        }
    }

    /// The mean of [`loss_db`](Self::loss_db), a picture that gained counting as one that lost nothing.
    #[must_use]
    pub fn loss(&self) -> f64 {
        mean(&self.loss_db.iter().map(|db| db.max(0.0)).collect::<Vec<_>>())
    }

    /// The mean of [`paired_db`](Self::paired_db).
    #[must_use]
    pub fn paired(&self) -> f64 {
        mean(&self.paired_db)
    }

    /// The least of [`paired_db`](Self::paired_db).
    #[must_use]
    pub fn worst_paired(&self) -> f64 {
        self.paired_db.iter().copied().fold(f64::INFINITY, f64::min)
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// Mean squares of differences in one picture.
struct Squares {
    /// Model and float model.
    paired: f64,
    /// Model and truth.
    model: f64,
    /// Float model and truth.
    float: f64,
}

/// Mean square by which samples differ.
fn square(a: &[u8], b: &[u8]) -> f64 {
    let sum: f64 = a.iter().zip(b).map(|(&a, &b)| f64::from(a.abs_diff(b)).powi(2)).sum();
    sum / a.len().max(1) as f64
}

/// Judges models by the pictures that the float model has made.
#[derive(Debug)]
pub struct Judge<'a> {
    backend: &'a CpuBackend,
    set: &'a PictureSet,
    options: Options,
    /// The float model's pictures.
    float: Vec<Vec<u8>>,
}

impl<'a> Judge<'a> {
    /// Runs `float` on the first pictures of `set`, four at most, in four steps at most. `progress` is told the picture and the
    /// stage before each run of a network, with multiply-accumulates done and in all.
    ///
    /// # Errors
    /// [`CalibrationError`].
    pub fn new(
        float: &Model,
        backend: &'a CpuBackend,
        set: &'a PictureSet,
        options: &Options,
        progress: &mut OnRun<'_>,
    ) -> Result<Self, CalibrationError> {
        let options = Options { steps: options.steps.min(STEPS), ..options.clone() };
        let mut judge = Self { backend, set, options, float: Vec::new() };
        judge.float = judge.pictures(float, progress)?;
        Ok(judge)
    }

    /// Multiply-accumulates of a verdict on `model`.
    ///
    /// # Errors
    /// [`CalibrationError::Plan`].
    pub fn macs(&self, model: &Model) -> Result<u64, CalibrationError> {
        Ok(trajectory::macs(model, &self.options)? * self.samples().len() as u64)
    }

    /// What the pictures of `model` lose.
    ///
    /// # Errors
    /// [`CalibrationError`].
    pub fn verdict(
        &self,
        model: &Model,
        progress: &mut OnRun<'_>,
    ) -> Result<Verdict, CalibrationError> {
        let made = self.pictures(model, progress)?;
        let squares = |(sample, (float, made)): (&Sample, (&Vec<u8>, &Vec<u8>))| Squares {
            paired: square(float, made),
            model: square(made, &sample.crop),
            float: square(float, &sample.crop),
        };
        let all = self.samples().iter().zip(self.float.iter().zip(&made)).map(squares);
        Ok(Verdict::new(&all.collect::<Vec<_>>()))
    }

    fn samples(&self) -> &'a [Sample] {
        &self.set.samples[..self.set.samples.len().min(PICTURES)]
    }

    fn pictures(
        &self,
        model: &Model,
        progress: &mut OnRun<'_>,
    ) -> Result<Vec<Vec<u8>>, CalibrationError> {
        let mut meter = Meter { progress, done: 0, total: self.macs(model)? };
        let run = |sample| {
            let made = trajectory::upscale(
                model,
                self.backend,
                self.set,
                sample,
                &self.options,
                &mut meter,
            );
            Ok(made?.0)
        };
        self.samples().iter().enumerate().map(run).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_by_picture_and_a_gain_makes_up_for_no_loss() {
        let lost = Squares { paired: 1.0, model: 11.0, float: 10.0 };
        let gained = Squares { paired: 4.0, model: 10.0, float: 20.0 };
        let verdict = Verdict::new(&[lost, gained]);
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-3, "{a} is not {b}");
        near(verdict.paired_db[0], 48.1308);
        near(verdict.worst_paired(), 48.1308 - 6.0206);
        near(verdict.paired(), 48.1308 - 3.0103);
        near(verdict.loss_db[0], 0.4139);
        near(verdict.loss_db[1], -3.0103);
        near(verdict.loss(), 0.4139 / 2.0);
        near(verdict.noise, (0.1 + 0.2) / 2.0);
    }

    #[test]
    fn equal_pictures_lose_nothing() {
        let verdict = Verdict::new(&[Squares { paired: 0.0, model: 0.0, float: 0.0 }]);
        assert_eq!((verdict.loss(), verdict.noise), (0.0, 0.0));
        assert!(verdict.paired().is_finite() && verdict.worst_paired() > 70.0);
        assert_eq!(square(&[0, 3], &[4, 3]), 8.0);
    }
}
