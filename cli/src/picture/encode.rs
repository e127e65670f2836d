//! Writes pictures, from the top, as their rows come.
//!
//! A PNG's rows go through the encoder into the file one by one, and a JPEG's in bands of eight
//! ([`super::bands`]); a WebP is collected, because its encoder goes over the whole picture several times.

use super::bands::{self, Bands};
use crate::exit::UsageError;
use image::codecs::{png::PngEncoder, webp::WebPEncoder};
use image::{ExtendedColorType, ImageEncoder, ImageError};
use std::cell::RefCell;
use std::collections::TryReserveError;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::rc::Rc;

/// Bytes of an IDAT chunk, which is collected before it is written.
const CHUNK: usize = 1 << 16;
/// What compressing a profile takes beside the profile: the state of `flate2`.
const DEFLATE: usize = 1 << 19;
/// What an encoder takes at any size: tables, a thread's stack, a buffered file.
const FIXED: usize = 1 << 17;

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

/// A result before its first row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Form {
    /// Columns, at least 1.
    pub(crate) width: u32,
    /// Rows, at least 1.
    pub(crate) height: u32,
    /// Samples of 16 bits, in a PNG; of 8 otherwise.
    pub(crate) deep: bool,
    /// Four channels, the last of them opacity; three otherwise.
    pub(crate) opacity: bool,
    /// The ICC profile.
    pub(crate) icc: Option<Vec<u8>>,
}

impl Form {
    /// Bytes of a row.
    pub(crate) fn line(&self) -> usize {
        let channels = if self.opacity { 4 } else { 3 };
        (self.width as usize).saturating_mul(channels * if self.deep { 2 } else { 1 })
    }

    /// Bytes of all rows.
    pub(crate) fn bytes(&self) -> usize {
        self.line().saturating_mul(self.height as usize)
    }
}

/// A picture on its way into a file.
pub(crate) enum Encoder {
    /// Row by row.
    Png(Box<Rows>),
    /// In bands of rows.
    Jpeg(Bands),
    /// Collected first.
    WebP(Form, Vec<u8>, File),
}

impl Encoding {
    /// Room for the rows that are collected before the first is written: none, or all of them.
    ///
    /// # Errors
    /// Where there is no memory for them.
    pub(crate) fn collection(self, form: &Form) -> Result<Vec<u8>, TryReserveError> {
        let mut rows = Vec::new();
        if self == Self::WebP {
            rows.try_reserve_exact(form.bytes())?;
        }
        Ok(rows)
    }

    /// Bytes that writing a picture takes while its rows come, and beside them at its end; an upper bound, as
    /// for pixels that do not compress. The form's own profile is not counted, its copies are.
    pub(crate) fn bytes(self, form: &Form) -> [usize; 2] {
        let (line, profile) = (form.line(), form.icc.as_ref().map_or(0, Vec::len));
        let lines = |n: usize| line.saturating_mul(n).saturating_add(FIXED);
        match self {
            // The row as it comes, and beside it the encoder's last, next and filtered.
            Self::Png if profile > 0 => [lines(4).saturating_add(CHUNK + DEFLATE + profile), 0],
            Self::Png => [lines(4).saturating_add(CHUNK), 0],
            Self::Jpeg { .. } => [lines(1 + bands::ROWS * bands::COUNT).saturating_add(profile), 0],
            // The compressed picture stands whole, and the samples as the encoder transforms them.
            Self::WebP => {
                let transformed = (form.width as usize).saturating_mul(form.height as usize);
                let end = form.bytes().saturating_add(transformed.saturating_mul(4));
                [form.bytes().saturating_add(lines(1)), end.saturating_add(profile)]
            }
        }
    }
}

impl Encoder {
    /// Begins a picture in `file`; `collection` is what [`Encoding::collection`] gave.
    ///
    /// # Errors
    /// Where the file cannot take it.
    pub(crate) fn new(
        encoding: Encoding,
        form: Form,
        collection: Vec<u8>,
        file: File,
    ) -> io::Result<Self> {
        Ok(match encoding {
            Encoding::Png => Self::Png(Box::new(Rows::new(form, file)?)),
            Encoding::Jpeg { quality } => {
                Self::Jpeg(Bands::new(file, (form.width, form.height), quality, form.icc)?)
            }
            Encoding::WebP => Self::WebP(form, collection, file),
        })
    }

    /// Takes the next row: interleaved samples, those of 16 bits with the high byte first.
    ///
    /// # Errors
    /// Where the file cannot take it, or an earlier one.
    pub(crate) fn row(&mut self, row: &[u8]) -> io::Result<()> {
        match self {
            Self::Png(rows) => rows.row(row),
            Self::Jpeg(bands) => bands.row(row),
            Self::WebP(_, all, _) => {
                all.extend_from_slice(row);
                Ok(())
            }
        }
    }

    /// Ends the picture, once it has all its rows.
    ///
    /// # Errors
    /// Where something could not be written.
    pub(crate) fn finish(self) -> io::Result<()> {
        match self {
            Self::Png(rows) => rows.finish(),
            Self::Jpeg(bands) => bands.finish(),
            Self::WebP(form, all, file) => {
                let mut out = BufWriter::new(file);
                let mut encoder = WebPEncoder::new_lossless(&mut out);
                if let Some(icc) = form.icc {
                    // An encoder that cannot carry profiles says so; the pixels are right without.
                    let _ = encoder.set_icc_profile(icc);
                }
                let color =
                    if form.opacity { ExtendedColorType::Rgba8 } else { ExtendedColorType::Rgb8 };
                encoder.write_image(&all, form.width, form.height, color).map_err(|e| match e {
                    ImageError::IoError(e) => e,
                    other => io::Error::other(other),
                })?;
                out.flush()
            }
        }
    }
}

/// A PNG under way. Its rows are compressed as `image` compresses a whole picture's.
pub(crate) struct Rows {
    stream: png::StreamWriter<'static, Outlet>,
    outlet: Outlet,
}

impl Rows {
    fn new(form: Form, file: File) -> io::Result<Self> {
        let outlet = Outlet(Rc::new(RefCell::new((BufWriter::new(file), None))));
        let mut info = png::Info::with_size(form.width, form.height);
        info.icc_profile = form.icc.map(Into::into);
        let mut encoder = png::Encoder::with_info(outlet.clone(), info)?;
        encoder.set_color(if form.opacity { png::ColorType::Rgba } else { png::ColorType::Rgb });
        encoder.set_depth(if form.deep { png::BitDepth::Sixteen } else { png::BitDepth::Eight });
        encoder.set_compression(png::Compression::Fast);
        encoder.set_filter(png::Filter::Adaptive);
        let stream = encoder.write_header()?.into_stream_writer_with_size(CHUNK)?;
        outlet.check()?;
        Ok(Self { stream, outlet })
    }

    fn row(&mut self, row: &[u8]) -> io::Result<()> {
        self.stream.write_all(row)?;
        self.outlet.check()
    }

    fn finish(self) -> io::Result<()> {
        self.stream.finish()?;
        self.outlet.check()?;
        self.outlet.0.borrow_mut().0.flush()
    }
}

/// The file under a PNG encoder, which writes its last chunks as it is dropped and so cannot say what went
/// wrong then; and its compressor takes an error for impossible. So errors wait here.
#[derive(Clone)]
struct Outlet(Rc<RefCell<(BufWriter<File>, Option<io::Error>)>>);

impl Outlet {
    /// # Errors
    /// What went wrong since it was asked the last time.
    fn check(&self) -> io::Result<()> {
        self.0.borrow_mut().1.take().map_or(Ok(()), Err)
    }
}

impl Write for Outlet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (out, error) = &mut *self.0.borrow_mut();
        if error.is_none() {
            *error = out.write_all(bytes).err();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
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

#[cfg(test)]
mod tests {
    use super::super::{Picture, Samples};
    use super::*;

    fn rows(picture: &Picture) -> Vec<u8> {
        let interleaved = |i: usize, c: usize| match (c, &picture.opacity) {
            (3, Some(a)) => (a, i),
            _ => (&picture.rgb, i * 3 + c),
        };
        let channels = if picture.opacity.is_some() { 4 } else { 3 };
        (0..(picture.width * picture.height) as usize)
            .flat_map(|i| (0..channels).map(move |c| interleaved(i, c)))
            .flat_map(|(samples, i)| match samples {
                Samples::Eight(v) => vec![v[i]],
                Samples::Sixteen(v) => v[i].to_be_bytes().to_vec(),
            })
            .collect()
    }

    fn write(picture: &Picture, encoding: Encoding, file: File) -> io::Result<()> {
        let form = Form {
            width: picture.width,
            height: picture.height,
            deep: matches!(picture.rgb, Samples::Sixteen(_)),
            opacity: picture.opacity.is_some(),
            icc: picture.icc.clone(),
        };
        let (line, collection) = (form.line(), encoding.collection(&form).unwrap());
        let mut encoder = Encoder::new(encoding, form, collection, file)?;
        for row in rows(picture).chunks(line) {
            encoder.row(row)?;
        }
        encoder.finish()
    }

    fn there_and_back(picture: &Picture, name: &str) -> Picture {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        let encoding = Encoding::of(&path, 95).unwrap();
        encoding.can_hold(picture.width, picture.height, picture.opacity.is_some()).unwrap();
        write(picture, encoding, File::create(&path).unwrap()).unwrap();
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
            rgb: Samples::Eight((0..n * 3).map(|i| (i * 71 % 256) as u8).collect()),
            opacity: Some(Samples::Eight((0..n).map(|i| (i * 12) as u8).collect())),
            ..deep.clone()
        };
        assert_eq!(there_and_back(&shallow, "a.png"), shallow);
        assert_eq!(there_and_back(&shallow, "a.webp"), shallow);
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

    /// Several chunks, and the pixels of the file that `image` makes of the whole picture.
    #[test]
    fn a_png_in_rows_is_that_of_a_whole_picture() {
        let (w, h) = (301, 257);
        let picture = Picture {
            width: w,
            height: h,
            rgb: Samples::Eight((0..w * h * 3).map(|i| (i.wrapping_mul(i) % 253) as u8).collect()),
            opacity: None,
            icc: None,
        };
        let dir = tempfile::tempdir().unwrap();
        let (path, whole) = (dir.path().join("a.png"), dir.path().join("b.png"));
        write(&picture, Encoding::Png, File::create(&path).unwrap()).unwrap();
        std::fs::write(&whole, png(w, h, &rows(&picture)).unwrap()).unwrap();
        let (bytes, expected) = (std::fs::read(&path).unwrap(), std::fs::read(&whole).unwrap());
        assert!(bytes.windows(4).filter(|w| w == b"IDAT").count() > 1);
        assert_eq!(bytes[..33], expected[..33], "signature, IHDR and its checksum");
        assert!(bytes.ends_with(b"\0\0\0\0IEND\xae\x42\x60\x82"));
        assert_eq!(super::super::read(&path).unwrap(), super::super::read(&whole).unwrap());
    }

    /// A disk that is full at the first chunk, in the middle, or only at the last.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error_whenever_it_is_full() {
        for side in [1, 100, 400] {
            let picture = Picture {
                width: side,
                height: side,
                rgb: Samples::Eight((0..side * side * 3).map(|i| (i * 37 % 251) as u8).collect()),
                opacity: None,
                icc: None,
            };
            for encoding in [Encoding::Png, Encoding::Jpeg { quality: 95 }, Encoding::WebP] {
                let full = File::options().write(true).open("/dev/full").unwrap();
                let error = write(&picture, encoding, full).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{encoding:?} {side}");
            }
        }
    }

    #[test]
    fn only_a_collected_picture_takes_memory_by_its_height() {
        let form = |height| Form { width: 1000, height, deep: false, opacity: true, icc: None };
        let [low, high] = [form(10), form(10_000)];
        for encoding in [Encoding::Png, Encoding::Jpeg { quality: 95 }] {
            assert_eq!(encoding.bytes(&low), encoding.bytes(&high));
        }
        let webp = Encoding::WebP.bytes(&high);
        assert!(webp[0] > 40_000_000 && webp[1] > 40_000_000, "{webp:?}");
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
