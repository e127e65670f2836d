//! Writes pictures.

use super::{Picture, Samples};
use crate::exit::{FileError, UsageError};
use image::codecs::{jpeg::JpegEncoder, png::PngEncoder, webp::WebPEncoder};
use image::{ExtendedColorType, ImageEncoder, ImageError};
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// The format of an output, told from its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// Lossless, 8 or 16 bits, with opacity.
    Png,
    /// Lossy, 8 bits, without opacity.
    Jpeg {
        /// 1 to 100.
        quality: u8,
    },
    /// Lossless, 8 bits, with opacity.
    WebP,
}

impl Encoding {
    /// The format that the extension of `path` asks for; `quality` is for JPEG alone.
    ///
    /// # Errors
    /// [`UsageError`] where the extension is none of png, jpg, jpeg and webp, or the quality is not 1 to 100.
    pub(crate) fn of(path: &Path, quality: u8) -> Result<Self, UsageError> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
        if !(1..=100).contains(&quality) {
            return Err(UsageError(format!("--quality is {quality}; it can be 1 to 100")));
        }
        match extension.to_ascii_lowercase().as_str() {
            "png" => Ok(Self::Png),
            "jpg" | "jpeg" => Ok(Self::Jpeg { quality }),
            "webp" => Ok(Self::WebP),
            _ => Err(UsageError(format!(
                "output {} names no picture format; end it in .png, .jpg or .webp",
                path.display()
            ))),
        }
    }

    /// Checks that a picture of this size and kind can be written, so that no work is done in vain.
    ///
    /// # Errors
    /// [`UsageError`] where the format cannot hold it.
    pub(crate) fn can_hold(self, width: u32, height: u32, opacity: bool) -> Result<(), UsageError> {
        let (name, side) = match self {
            Self::Png => ("PNG", u32::MAX >> 1),
            Self::Jpeg { .. } => ("JPEG", 65_535),
            Self::WebP => ("WebP", 16_383),
        };
        if width > side || height > side {
            return Err(UsageError(format!(
                "the result has {width}x{height} pixels, {name} holds at most {side} a side; end the output in .png"
            )));
        }
        if opacity && matches!(self, Self::Jpeg { .. }) {
            return Err(UsageError(
                "the picture has transparent parts, which JPEG cannot hold; end the output in .png or .webp"
                    .to_owned(),
            ));
        }
        Ok(())
    }
}

/// Writes `picture` to `file`, which will be `path`.
///
/// # Errors
/// [`FileError`] where the file cannot take it.
pub(crate) fn write(
    picture: &Picture,
    encoding: Encoding,
    file: &mut File,
    path: &Path,
) -> Result<(), FileError> {
    let mut out = BufWriter::new(file);
    let (bytes, color) = match (encoding, &picture.rgb) {
        (Encoding::Png, Samples::Sixteen(_)) => deep(picture),
        (Encoding::Png | Encoding::WebP, _) => shallow(picture),
        (Encoding::Jpeg { .. }, _) => (eight(&picture.rgb), ExtendedColorType::Rgb8),
    };
    let written = match encoding {
        Encoding::Png => encode(PngEncoder::new(&mut out), picture, &bytes, color),
        Encoding::Jpeg { quality } => {
            let encoder = JpegEncoder::new_with_quality(&mut out, quality);
            encode(encoder, picture, &bytes, color)
        }
        Encoding::WebP => encode(WebPEncoder::new_lossless(&mut out), picture, &bytes, color),
    };
    written.and_then(|()| out.flush().map_err(ImageError::IoError)).map_err(|e| FileError {
        action: "write",
        path: path.to_owned(),
        source: match e {
            ImageError::IoError(e) => e,
            other => std::io::Error::other(other),
        },
    })
}

/// 8-bit RGB samples as a PNG file.
///
/// # Errors
/// What the encoder says.
pub(crate) fn png(width: u32, height: u32, rgb: &[u8]) -> Result<Vec<u8>, ImageError> {
    let mut out = Vec::new();
    PngEncoder::new(&mut out).write_image(rgb, width, height, ExtendedColorType::Rgb8)?;
    Ok(out)
}

fn encode(
    mut encoder: impl ImageEncoder,
    picture: &Picture,
    bytes: &[u8],
    color: ExtendedColorType,
) -> Result<(), ImageError> {
    if let Some(icc) = &picture.icc {
        // An encoder that cannot carry profiles says so; the pixels are right without.
        let _ = encoder.set_icc_profile(icc.clone());
    }
    encoder.write_image(bytes, picture.width, picture.height, color)
}

/// Samples as 8 bits, rounded to the nearest.
fn eight(samples: &Samples) -> Cow<'_, [u8]> {
    match samples {
        Samples::Eight(v) => Cow::Borrowed(v),
        Samples::Sixteen(v) => {
            let nearest = |&s: &u16| ((u32::from(s) + 128) / 257) as u8;
            Cow::Owned(v.iter().map(nearest).collect())
        }
    }
}

/// Samples as 16 bits.
fn sixteen(samples: &Samples) -> Cow<'_, [u16]> {
    match samples {
        Samples::Eight(v) => Cow::Owned(v.iter().map(|&s| u16::from(s) * 257).collect()),
        Samples::Sixteen(v) => Cow::Borrowed(v),
    }
}

/// Colours and opacity interleaved, 8 bits a sample.
fn shallow(picture: &Picture) -> (Cow<'_, [u8]>, ExtendedColorType) {
    let rgb = eight(&picture.rgb);
    match &picture.opacity {
        None => (rgb, ExtendedColorType::Rgb8),
        Some(a) => (join(&rgb, &eight(a)).collect(), ExtendedColorType::Rgba8),
    }
}

/// Colours and opacity interleaved, 16 bits a sample in native byte order, as the encoders take them.
fn deep(picture: &Picture) -> (Cow<'_, [u8]>, ExtendedColorType) {
    let rgb = sixteen(&picture.rgb);
    match &picture.opacity {
        None => (native(rgb.iter().copied()), ExtendedColorType::Rgb16),
        Some(a) => {
            let all = native(join(&rgb, &sixteen(a)));
            (all, ExtendedColorType::Rgba16)
        }
    }
}

fn native(samples: impl Iterator<Item = u16>) -> Cow<'static, [u8]> {
    samples.flat_map(u16::to_ne_bytes).collect()
}

fn join<'a, T: Copy>(rgb: &'a [T], a: &'a [T]) -> impl Iterator<Item = T> + 'a {
    rgb.chunks_exact(3).zip(a).flat_map(|(p, &a)| [p[0], p[1], p[2], a])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there_and_back(picture: &Picture, name: &str) -> Picture {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        let encoding = Encoding::of(&path, 95).unwrap();
        encoding.can_hold(picture.width, picture.height, picture.opacity.is_some()).unwrap();
        write(picture, encoding, &mut File::create(&path).unwrap(), &path).unwrap();
        super::super::read(&path).unwrap()
    }

    fn rgb_profile() -> Vec<u8> {
        let mut icc = vec![0u8; 128];
        icc[16..20].copy_from_slice(b"RGB ");
        icc
    }

    #[test]
    fn lossless_formats_keep_every_sample_and_the_profile() {
        let n = 5 * 4;
        let rgb: Vec<u16> = (0..n * 3).map(|i| (i * 1091 % 65536) as u16).collect();
        let a: Vec<u16> = (0..n).map(|i| (i * 3000) as u16).collect();
        let deep = Picture {
            width: 5,
            height: 4,
            rgb: Samples::Sixteen(rgb),
            opacity: Some(Samples::Sixteen(a)),
            icc: Some(rgb_profile()),
        };
        assert_eq!(there_and_back(&deep, "a.png"), deep);
        let shallow = Picture {
            rgb: Samples::Eight(eight(&deep.rgb).into_owned()),
            opacity: deep.opacity.as_ref().map(|a| Samples::Eight(eight(a).into_owned())),
            ..deep.clone()
        };
        assert_eq!(there_and_back(&shallow, "a.png"), shallow);
        assert_eq!(there_and_back(&deep, "a.webp"), shallow);
        let opaque = Picture { opacity: None, ..deep };
        assert_eq!(there_and_back(&opaque, "a.PNG"), opaque);
    }

    #[test]
    fn jpeg_comes_near() {
        let rgb: Vec<u8> =
            (0..32 * 24).flat_map(|i| [(i % 32 * 8) as u8, 100, (i / 32 * 10) as u8]).collect();
        let p = Picture {
            width: 32,
            height: 24,
            rgb: Samples::Eight(rgb),
            opacity: None,
            icc: Some(rgb_profile()),
        };
        let back = there_and_back(&p, "a.jpg");
        assert_eq!(back.icc, p.icc);
        let worst = (0..p.rgb.len())
            .map(|i| (p.rgb.on_255(i) - back.rgb.on_255(i)).abs())
            .fold(0.0, f64::max);
        assert!(worst < 16.0, "{worst}");
    }

    #[test]
    fn sixteen_bits_round_to_eight() {
        let v: Vec<u16> = (0..=255).map(|v| v * 257).collect();
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(*eight(&Samples::Sixteen(v)), all);
        assert_eq!(*eight(&Samples::Sixteen(vec![128, 129, 65535 - 128])), [0, 1, 255]);
        assert_eq!(*sixteen(&Samples::Eight(vec![0, 1, 255])), [0, 257, 65535]);
    }

    #[test]
    fn what_a_format_cannot_hold_is_refused_beforehand() {
        let of = |n: &str| Encoding::of(Path::new(n), 95);
        assert!(of("x.tiff").unwrap_err().to_string().contains(".png, .jpg or .webp"));
        assert!(of("png").is_err());
        assert!(Encoding::of(Path::new("a.jpg"), 0).is_err());
        let webp = of("a.webp").unwrap();
        assert!(webp.can_hold(16_384, 5, false).is_err());
        assert!(of("a.jpeg").unwrap().can_hold(5, 5, true).is_err());
        assert!(webp.can_hold(5, 5, true).is_ok());
    }
}
