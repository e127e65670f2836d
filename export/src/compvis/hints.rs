//! What shapes do not tell: attention heads, the parameterization, norm groups.

use crate::ExportError;
use latile_runtime::format::Prediction;
use std::path::Path;

/// How many heads attention has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heads {
    /// As many heads of this width as fit (`num_head_channels`).
    Width(u32),
    /// This many heads (`num_heads`).
    Count(u32),
}

/// What a checkpoint's config says beyond its shapes. Empty hints leave it to what is known.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Hints {
    /// Heads of the U-Net's attention.
    pub heads: Option<Heads>,
    /// Groups of every norm; CompVis' networks always have 32.
    pub norm_groups: Option<u32>,
    /// What the U-Net predicts (`parameterization`).
    pub prediction: Option<Prediction>,
    /// First and last beta (`linear_start`, `linear_end`), for checkpoints without a `betas` buffer.
    pub betas: Option<(f64, f64)>,
    /// Training timesteps (`timesteps`), likewise.
    pub timesteps: Option<u32>,
    /// The latent's scale (`scale_factor`), likewise.
    pub scale_factor: Option<f32>,
}

/// The largest config that is read.
const MAX_BYTES: u64 = 1 << 20;

impl Hints {
    /// Reads what is needed of a CompVis model config: single lines `key: value` of keys that occur once.
    ///
    /// # Errors
    /// [`ExportError::Layout`] where the file cannot be read, or a key of interest has a value that cannot be used.
    pub fn read(path: &Path) -> Result<Self, ExportError> {
        let fail = |why: String| ExportError::Layout { path: path.to_owned(), why };
        let size = std::fs::metadata(path).map_err(|e| fail(e.to_string()))?.len();
        if size > MAX_BYTES {
            return Err(fail(format!("a model config of {size} bytes")));
        }
        let text = std::fs::read_to_string(path).map_err(|e| fail(e.to_string()))?;
        let find = |key: &str| -> Result<Option<&str>, ExportError> {
            let mut found = None;
            for line in text.lines() {
                let Some((k, v)) = line.trim().trim_start_matches("- ").split_once(':') else {
                    continue;
                };
                if k.trim() != key {
                    continue;
                }
                let v = v.split(" #").next().unwrap_or(v).trim().trim_matches(['"', '\'']);
                match found {
                    Some(other) if other != v => {
                        return Err(fail(format!("{key} stands twice, as {other} and as {v}")));
                    }
                    _ => found = Some(v),
                }
            }
            Ok(found.filter(|v| !v.is_empty() && *v != "null" && *v != "~"))
        };
        let number = |key: &str| -> Result<Option<f64>, ExportError> {
            find(key)?
                .map(|v| v.parse().map_err(|_| fail(format!("{key} is {v}, expected a number"))))
                .transpose()
        };
        let whole = |key: &str| -> Result<Option<u32>, ExportError> {
            find(key)?
                .map(|v| {
                    v.parse().map_err(|_| fail(format!("{key} is {v}, expected a whole number")))
                })
                .transpose()
        };
        // A negative value means unset, which `u32` cannot hold: those keys are read as text.
        let positive = |key: &str| -> Result<Option<u32>, ExportError> {
            if find(key)?.is_some_and(|v| v.starts_with('-')) { Ok(None) } else { whole(key) }
        };
        let heads = match (positive("num_head_channels")?, positive("num_heads")?) {
            (Some(width), _) => Some(Heads::Width(width)),
            (None, Some(count)) => Some(Heads::Count(count)),
            (None, None) => None,
        };
        let prediction = match find("parameterization")? {
            None => None,
            Some("eps") => Some(Prediction::Epsilon),
            Some("x0") => Some(Prediction::Sample),
            Some("v") => Some(Prediction::V),
            Some(other) => {
                return Err(fail(format!("parameterization is {other}; supported: eps, v, x0")));
            }
        };
        Ok(Self {
            heads,
            norm_groups: None,
            prediction,
            betas: number("linear_start")?.zip(number("linear_end")?),
            timesteps: whole("timesteps")?,
            scale_factor: number("scale_factor")?.map(|v| v as f32),
        })
    }

    /// These hints, and `other`'s where these say nothing.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            heads: self.heads.or(other.heads),
            norm_groups: self.norm_groups.or(other.norm_groups),
            prediction: self.prediction.or(other.prediction),
            betas: self.betas.or(other.betas),
            timesteps: self.timesteps.or(other.timesteps),
            scale_factor: self.scale_factor.or(other.scale_factor),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn read(text: &str) -> Result<Hints, ExportError> {
        let mut f = tempfile::NamedTempFile::new().unwrap();
        f.write_all(text.as_bytes()).unwrap();
        Hints::read(f.path())
    }

    #[test]
    fn a_model_config_is_read() {
        let text = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    linear_start: 0.0015\n\
            \x20   linear_end: 0.0155 # widest\n    timesteps: 1000\n    parameterization: \"eps\"\n    unet_config:\n      params:\n\
            \x20       num_head_channels: 32\n        num_heads: -1\n";
        let hints = read(text).unwrap();
        assert_eq!(hints.heads, Some(Heads::Width(32)));
        assert_eq!(hints.betas, Some((0.0015, 0.0155)));
        assert_eq!(hints.timesteps, Some(1000));
        assert_eq!(hints.prediction, Some(Prediction::Epsilon));
        assert_eq!(
            read("num_head_channels: -1\nnum_heads: 8\n").unwrap().heads,
            Some(Heads::Count(8))
        );
        assert_eq!(read("").unwrap(), Hints::default());
    }

    #[test]
    fn contradictions_and_nonsense_are_refused() {
        assert!(read("num_heads: 8\nx:\n  num_heads: 4\n").is_err());
        assert!(read("linear_start: abc\nlinear_end: 1").is_err());
        assert!(read("parameterization: y").is_err());
    }
}
