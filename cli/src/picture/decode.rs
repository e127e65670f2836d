//! Reads a picture file that nobody vouches for.
//!
//! The format is told from the content, never from the name. Nothing that grows with the picture is
//! allocated before its size is known and allowed: the decoders' own limits are off, or loose, in several of
//! their constructors.

use super::{Picture, PictureError, Samples};
use image::codecs::{jpeg::JpegDecoder, png::PngDecoder, webp::WebPDecoder};
use image::{DynamicImage, ImageDecoder, ImageFormat, Limits, metadata::Orientation};
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;

/// The largest picture that is decoded: 8192 × 8192.
pub(crate) const MAX_PIXELS: u64 = 1 << 26;
/// The largest file: the JPEG decoder reads it whole.
const MAX_FILE: u64 = 1 << 28;
/// What a decoder may take beside the pixels: profiles, text, rows under way.
const MAX_SIDE_DATA: u64 = 1 << 25;
/// The longest ICC profile that is kept.
const MAX_ICC: usize = 1 << 22;

/// Reads the picture at `path`, upright (its EXIF orientation applied), palettes and greys made RGB.
///
/// # Errors
/// [`PictureError::Io`] where the file cannot be read, [`PictureError::Refused`] where it is no PNG, JPEG or
/// WebP, damaged, animated, empty, or has more than [`MAX_PIXELS`].
pub(crate) fn read(path: &Path) -> Result<Picture, PictureError> {
    read_within(path, None)
}

/// As [`read`], within `limit` bytes of memory.
///
/// # Errors
/// As [`read`], and [`PictureError::Memory`] where its pixels alone take more, before they are read.
pub(crate) fn read_within(path: &Path, limit: Option<usize>) -> Result<Picture, PictureError> {
    let io = |source| PictureError::Io { path: path.to_owned(), source };
    let refused = |why: String| PictureError::Refused { path: path.to_owned(), why };
    let file = File::open(path).map_err(io)?;
    let meta = file.metadata().map_err(io)?;
    if !meta.is_file() {
        return Err(io(std::io::Error::other("it is not a regular file")));
    }
    if meta.len() == 0 {
        return Err(refused("the file is empty".to_owned()));
    }
    if meta.len() > MAX_FILE {
        return Err(refused(format!(
            "the file has {} bytes, more than the {MAX_FILE} that are read; save it smaller",
            meta.len()
        )));
    }
    let mut reader = BufReader::new(file);
    let mut head = Vec::with_capacity(32);
    reader.by_ref().take(32).read_to_end(&mut head).map_err(io)?;
    reader.rewind().map_err(io)?;

    let decoded = match image::guess_format(&head) {
        Ok(ImageFormat::Png) => png(&head, reader, limit),
        Ok(ImageFormat::Jpeg) => JpegDecoder::new(reader)
            .map_err(|e| Refusal::Why(reason("JPEG", &e)))
            .and_then(|d| finish("JPEG", d, limit)),
        Ok(ImageFormat::WebP) => webp(reader, limit),
        Ok(other) => Err(Refusal::Why(format!(
            "its content is {}, which is not read; convert it to PNG, JPEG or WebP",
            format!("{other:?}").to_uppercase()
        ))),
        Err(_) => Err(Refusal::Why(
            "its content is not a picture, whatever its name says; give a PNG, JPEG or WebP file"
                .to_owned(),
        )),
    };
    decoded.map_err(|e| match e {
        Refusal::Why(why) => refused(why),
        Refusal::Memory { bytes, limit } => {
            PictureError::Memory { path: path.to_owned(), bytes, limit }
        }
    })
}

/// Why a picture is not decoded.
enum Refusal {
    Why(String),
    Memory { bytes: usize, limit: usize },
}

impl From<String> for Refusal {
    fn from(why: String) -> Self {
        Self::Why(why)
    }
}

fn limits() -> Limits {
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_SIDE_DATA);
    limits
}

const NO_PIXELS: &str = "it has no pixels: its width or height is 0";
const ANIMATION: &str = "it is an animation; save the frame you want as a picture";

/// `head` is the file's beginning. Its header, IHDR, gives width and height at bytes 16 and 20; the decoder
/// calls a picture without pixels merely invalid.
fn png(head: &[u8], reader: BufReader<File>, limit: Option<usize>) -> Result<Picture, Refusal> {
    if let Some(size) = head.get(16..24)
        && (size[..4] == [0; 4] || size[4..] == [0; 4])
    {
        return Err(NO_PIXELS.to_owned().into());
    }
    let decoder = PngDecoder::with_limits(reader, limits()).map_err(|e| reason("PNG", &e))?;
    if decoder.is_apng().map_err(|e| reason("PNG", &e))? {
        return Err(ANIMATION.to_owned().into());
    }
    finish("PNG", decoder, limit)
}

fn webp(reader: BufReader<File>, limit: Option<usize>) -> Result<Picture, Refusal> {
    let decoder = WebPDecoder::new(reader).map_err(|e| reason("WebP", &e))?;
    if decoder.has_animation() {
        return Err(ANIMATION.to_owned().into());
    }
    finish("WebP", decoder, limit)
}

fn reason(format: &str, error: &image::ImageError) -> String {
    let text = error.to_string();
    if text.contains("Image width or height is set to zero") {
        return NO_PIXELS.to_owned();
    }
    format!("its {format} data is damaged ({text}); copy or save the file again")
}

/// Decodes, once the size is known to be allowed.
fn finish(
    format: &str,
    mut decoder: impl ImageDecoder,
    limit: Option<usize>,
) -> Result<Picture, Refusal> {
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 {
        return Err(NO_PIXELS.to_owned().into());
    }
    if pixels > MAX_PIXELS {
        return Err(Refusal::Why(format!(
            "{width}x{height} is {} megapixels, more than the {} that are read; crop or shrink it first",
            pixels / 1_000_000,
            MAX_PIXELS / 1_000_000
        )));
    }
    // A plan counts exactly, but only once the picture is there: what cannot be is not read at all.
    let bytes = usize::try_from(decoder.total_bytes()).unwrap_or(usize::MAX);
    if let Some(limit) = limit.filter(|&limit| bytes > limit) {
        return Err(Refusal::Memory { bytes, limit });
    }
    // Damaged metadata is no reason to refuse sound pixels.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let icc = decoder
        .icc_profile()
        .ok()
        .flatten()
        .filter(|p| p.len() <= MAX_ICC && p.get(16..20) == Some(b"RGB "));
    let color = decoder.color_type().has_color();
    let mut limits = Limits::no_limits();
    // The pixels, and as much again for decoders that hold planes beside them.
    limits.max_alloc = Some(2 * decoder.total_bytes() + MAX_SIDE_DATA);
    decoder.set_limits(limits).map_err(|e| reason(format, &e))?;
    let mut image = DynamicImage::from_decoder(decoder).map_err(|e| reason(format, &e))?;
    image.apply_orientation(orientation);
    let mut picture = split(image)?;
    picture.icc = icc.filter(|_| color);
    Ok(picture)
}

/// Parts colours and opacity; greys become three equal channels.
fn split(image: DynamicImage) -> Result<Picture, String> {
    use Samples::{Eight, Sixteen};
    let (width, height) = (image.width(), image.height());
    let (rgb, opacity) = match image {
        DynamicImage::ImageLuma8(i) => (Eight(triple(&i)), None),
        DynamicImage::ImageLuma16(i) => (Sixteen(triple(&i)), None),
        DynamicImage::ImageRgb8(i) => (Eight(i.into_raw()), None),
        DynamicImage::ImageRgb16(i) => (Sixteen(i.into_raw()), None),
        DynamicImage::ImageLumaA8(i) => {
            let (grey, a) = part::<u8, 2>(&i);
            (Eight(triple(&grey)), Some(Eight(a)))
        }
        DynamicImage::ImageLumaA16(i) => {
            let (grey, a) = part::<u16, 2>(&i);
            (Sixteen(triple(&grey)), Some(Sixteen(a)))
        }
        DynamicImage::ImageRgba8(i) => {
            let (rgb, a) = part::<u8, 4>(&i);
            (Eight(rgb), Some(Eight(a)))
        }
        DynamicImage::ImageRgba16(i) => {
            let (rgb, a) = part::<u16, 4>(&i);
            (Sixteen(rgb), Some(Sixteen(a)))
        }
        other => {
            return Err(format!(
                "its samples are {:?}, which are not read; save it with 8 or 16 bits a sample",
                other.color()
            ));
        }
    };
    Ok(Picture { width, height, rgb, opacity: opacity.filter(|a| !a.all_full()), icc: None })
}

fn triple<T: Copy>(grey: &[T]) -> Vec<T> {
    grey.iter().flat_map(|&v| [v; 3]).collect()
}

/// Parts the last of `N` interleaved channels from the others.
fn part<T: Copy, const N: usize>(samples: &[T]) -> (Vec<T>, Vec<T>) {
    let pixels = samples.len() / N;
    let mut colours = Vec::with_capacity(pixels * (N - 1));
    let mut last = Vec::with_capacity(pixels);
    for p in samples.chunks_exact(N) {
        colours.extend_from_slice(&p[..N - 1]);
        last.push(p[N - 1]);
    }
    (colours, last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};

    fn read_bytes(bytes: &[u8]) -> Result<Picture, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.png");
        std::fs::write(&path, bytes).unwrap();
        read(&path).map_err(|e| e.to_string())
    }

    fn encode(pixels: &[u8], w: u32, h: u32, color: ExtendedColorType) -> Vec<u8> {
        let mut out = Vec::new();
        PngEncoder::new(&mut out).write_image(pixels, w, h, color).unwrap();
        out
    }

    #[test]
    fn every_sample_kind_becomes_rgb() {
        let p = read_bytes(&encode(&[9, 7], 2, 1, ExtendedColorType::L8)).unwrap();
        assert_eq!(p.rgb, Samples::Eight(vec![9, 9, 9, 7, 7, 7]));
        assert_eq!(p.opacity, None);

        let p = read_bytes(&encode(&[9, 255, 7, 255], 2, 1, ExtendedColorType::La8)).unwrap();
        assert_eq!(p.opacity, None, "full opacity is none");
        let p = read_bytes(&encode(&[9, 255, 7, 0], 2, 1, ExtendedColorType::La8)).unwrap();
        assert_eq!(p.opacity, Some(Samples::Eight(vec![255, 0])));
        assert_eq!(p.rgb, Samples::Eight(vec![9, 9, 9, 7, 7, 7]));

        let deep: Vec<u8> =
            [1u16, 2, 3, 40000, 5, 6, 7, 8].iter().flat_map(|v| v.to_ne_bytes()).collect();
        let p = read_bytes(&encode(&deep, 1, 2, ExtendedColorType::Rgba16)).unwrap();
        assert_eq!((p.width, p.height), (1, 2));
        assert_eq!(p.rgb, Samples::Sixteen(vec![1, 2, 3, 5, 6, 7]));
        assert_eq!(p.opacity, Some(Samples::Sixteen(vec![40000, 8])));
    }

    /// A PNG of one row: `ihdr` (width, height, depth, colour type), further chunks, then `rows` as they are.
    fn raw_png(ihdr: (u32, u32, u8, u8), chunks: &[(&[u8; 4], &[u8])], rows: &[u8]) -> Vec<u8> {
        let mut out = b"\x89PNG\r\n\x1a\n".to_vec();
        let mut head = Vec::new();
        head.extend(ihdr.0.to_be_bytes());
        head.extend(ihdr.1.to_be_bytes());
        head.extend([ihdr.2, ihdr.3, 0, 0, 0]);
        let mut zlib = vec![0x78, 1, 1];
        zlib.extend((rows.len() as u16).to_le_bytes());
        zlib.extend((!(rows.len() as u16)).to_le_bytes());
        zlib.extend(rows);
        zlib.extend(adler32(rows).to_be_bytes());
        let mut put = |name: &[u8; 4], data: &[u8]| {
            out.extend((data.len() as u32).to_be_bytes());
            let body: Vec<u8> = name.iter().chain(data).copied().collect();
            out.extend(&body);
            out.extend(crc32(&body).to_be_bytes());
        };
        put(b"IHDR", &head);
        for (name, data) in chunks {
            put(name, data);
        }
        put(b"IDAT", &zlib);
        put(b"IEND", &[]);
        out
    }

    fn crc32(data: &[u8]) -> u32 {
        !data.iter().fold(!0u32, |mut c, &b| {
            c ^= u32::from(b);
            for _ in 0..8 {
                c = if c & 1 == 1 { 0xedb8_8320 ^ (c >> 1) } else { c >> 1 };
            }
            c
        })
    }

    fn adler32(data: &[u8]) -> u32 {
        let (a, b) = data.iter().fold((1u32, 0u32), |(a, b), &x| {
            let a = (a + u32::from(x)) % 65521;
            (a, (b + a) % 65521)
        });
        b << 16 | a
    }

    #[test]
    fn a_palette_with_transparency_is_expanded() {
        let palette = [10, 20, 30, 40, 50, 60];
        // One byte of filter, then two pixels of one bit: entries 0 and 1.
        let png =
            raw_png((2, 1, 1, 3), &[(b"PLTE", &palette), (b"tRNS", &[128])], &[0, 0b0100_0000]);
        let p = read_bytes(&png).unwrap();
        assert_eq!(p.rgb, Samples::Eight(palette.to_vec()));
        assert_eq!(p.opacity, Some(Samples::Eight(vec![128, 255])));
    }

    #[test]
    fn a_picture_without_pixels_or_with_too_many_is_refused() {
        for (w, h) in [(0, 5), (5, 0), (0, 0)] {
            let err = read_bytes(&raw_png((w, h, 8, 2), &[], &[])).unwrap_err();
            assert!(err.contains("width or height is 0"), "{err}");
        }
        let mut jpeg = jpeg(16, 8);
        let sof = jpeg.windows(2).position(|m| m == [0xff, 0xc0]).unwrap();
        jpeg[sof + 5..sof + 9].fill(0);
        let err = read_bytes(&jpeg).unwrap_err();
        assert!(err.contains("width or height is 0"), "{err}");
        let err = read_bytes(&raw_png((13_000, 13_000, 8, 2), &[], &[0])).unwrap_err();
        assert!(err.contains("13000x13000 is 169 megapixels"), "{err}");
        let err =
            read_bytes(&raw_png((u32::MAX >> 1, u32::MAX >> 1, 16, 6), &[], &[0])).unwrap_err();
        assert!(err.contains("refused"), "{err}");
    }

    #[test]
    fn a_png_cut_anywhere_or_with_a_byte_changed_never_panics() {
        let whole = encode(&[77; 4 * 3 * 3], 4, 3, ExtendedColorType::Rgb8);
        for n in 0..whole.len() {
            // The last chunk marks the end only; a decoder may do without it.
            if n < whole.len() - 16 {
                assert!(read_bytes(&whole[..n]).is_err(), "cut at {n}");
            }
            let mut changed = whole.clone();
            changed[n] ^= 0x55;
            let _ = read_bytes(&changed);
        }
    }

    #[test]
    fn what_is_no_picture_is_named() {
        let err = read_bytes(b"hello, I am a text file\n").unwrap_err();
        assert!(err.contains("p.png is refused: its content is not a picture"), "{err}");
        let err = read_bytes(b"GIF89a\x01\0\x01\0\0\0\0").unwrap_err();
        assert!(err.contains("its content is GIF"), "{err}");
        let err = read_bytes(b"").unwrap_err();
        assert!(err.contains("the file is empty"), "{err}");
        let animation = raw_png((1, 1, 8, 0), &[(b"acTL", &[0, 0, 0, 2, 0, 0, 0, 0])], &[0, 0]);
        let err = read_bytes(&animation).unwrap_err();
        assert!(err.contains("animation"), "{err}");
    }

    fn jpeg(w: u32, h: u32) -> Vec<u8> {
        let mut jpeg = Vec::new();
        image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, 95)
            .write_image(&vec![90; (w * h * 3) as usize], w, h, ExtendedColorType::Rgb8)
            .unwrap();
        jpeg
    }

    /// Calibration tables are the same everywhere only if pictures are: what is expected was decoded on x86-64.
    #[test]
    fn a_photograph_is_the_same_pixels_everywhere() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/coffee.jpg");
        let p = read(&path).unwrap();
        let Samples::Eight(rgb) = p.rgb else { panic!("JPEG has 8 bits") };
        // FNV-1a, 64 bits.
        let hash = rgb.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, &b| {
            (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
        });
        assert_eq!(hash, 0x3e28_7b06_7313_3f86, "{hash:x}");
    }

    #[test]
    fn a_photograph_on_its_side_is_turned_upright() {
        // 16 × 8, and EXIF says "rotate 90° clockwise to view".
        let mut jpeg = jpeg(16, 8);
        let tiff: &[u8] = &[
            b'I', b'I', 42, 0, 8, 0, 0, 0, // little-endian TIFF, first directory at 8
            1, 0, 0x12, 1, 3, 0, 1, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, // Orientation = 6
        ];
        let mut app1 = vec![0xff, 0xe1];
        app1.extend((2 + 6 + tiff.len() as u16).to_be_bytes());
        app1.extend(b"Exif\0\0");
        app1.extend(tiff);
        jpeg.splice(2..2, app1);
        let p = read_bytes(&jpeg).unwrap();
        assert_eq!((p.width, p.height), (8, 16));
    }
}
