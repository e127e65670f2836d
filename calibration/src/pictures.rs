//! The calibration set: pictures of a folder, cut and reduced to what a super-resolution model is run on.
//!
//! Lives here: which files of a folder are taken, what is recorded of them, the crop and its low-resolution
//! counterpart. Never here: decoding, which the caller brings along.

use crate::CalibrationError;
use crate::table::{Datum, Skipped};
use latile_runtime::pipeline::consistency::reduced;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Names that end so, in any case, are taken for pictures.
const ENDINGS: [&str; 4] = ["png", "jpg", "jpeg", "webp"];
/// Channels.
const RGB: usize = 3;

/// A decoded picture, 8 bits a sample, red, green, blue of each pixel, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RgbPicture {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// `width × height × 3` samples.
    pub rgb: Vec<u8>,
}

/// Decodes the picture file at a path, or says what is wrong with it.
pub type Decode<'a> = dyn FnMut(&Path) -> Result<RgbPicture, String> + 'a;

/// A picture of the set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// What the table says of it.
    pub datum: Datum,
    /// The square cut from its middle: `side × side × 3`.
    pub crop: Vec<u8>,
}

/// Pictures to calibrate with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PictureSet {
    /// Side of the crops.
    pub side: usize,
    /// The pictures, by name.
    pub samples: Vec<Sample>,
    /// Those that could not be used, by name.
    pub skipped: Vec<Skipped>,
}

impl PictureSet {
    /// Takes up to `count` pictures of `folder`, spread evenly over its names in order, and cuts a square of
    /// `side` pixels from the middle of each. Hidden files, folders and names that do not end like a
    /// picture's are passed over. A picture that is damaged or smaller than the square is skipped, which
    /// the set records, and another is taken in its place while there are any.
    ///
    /// # Errors
    /// [`CalibrationError::Folder`] where the folder cannot be read, [`CalibrationError::NoPictures`] where
    /// no picture is left.
    pub fn read(
        folder: &Path,
        count: usize,
        side: usize,
        decode: &mut Decode<'_>,
    ) -> Result<Self, CalibrationError> {
        Self::of(names(folder)?, folder, count, side, decode)
    }

    /// Takes up to `count` pictures of `folder` that are not in this set, in the same way: what a model is judged on must
    /// not be what its ranges were made of. None where there is no such picture.
    ///
    /// # Errors
    /// [`CalibrationError::Folder`] where the folder cannot be read.
    pub fn others(
        &self,
        folder: &Path,
        count: usize,
        decode: &mut Decode<'_>,
    ) -> Result<Option<Self>, CalibrationError> {
        let mut names = names(folder)?;
        let seen = |name: &str| {
            self.samples.iter().any(|s| s.datum.name == name)
                || self.skipped.iter().any(|s| s.name == name)
        };
        names.retain(|name| !seen(&name.display().to_string()));
        match Self::of(names, folder, count, self.side, decode) {
            Ok(set) => Ok(Some(set)),
            Err(CalibrationError::NoPictures { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Takes up to `count` of `names`, files of `folder`.
    fn of(
        names: Vec<PathBuf>,
        folder: &Path,
        count: usize,
        side: usize,
        decode: &mut Decode<'_>,
    ) -> Result<Self, CalibrationError> {
        let none = |why: String| CalibrationError::NoPictures { folder: folder.to_owned(), why };
        if names.is_empty() {
            return Err(none("it holds no .png, .jpg or .webp file".to_owned()));
        }
        let mut set = Self { side, samples: Vec::new(), skipped: Vec::new() };
        for i in order(names.len(), count) {
            if set.samples.len() == count {
                break;
            }
            let name = names[i].display().to_string();
            match sample(&folder.join(&names[i]), &name, side, decode) {
                Ok(sample) => set.samples.push(sample),
                Err(why) => set.skipped.push(Skipped { name, why }),
            }
        }
        if set.samples.is_empty() {
            let all: Vec<String> =
                set.skipped.iter().map(|s| format!("{}: {}", s.name, s.why)).collect();
            return Err(none(format!("none of its pictures can be used ({})", all.join("; "))));
        }
        set.samples.sort_by(|a, b| a.datum.name.cmp(&b.datum.name));
        set.skipped.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(set)
    }
}

/// Picture files in `folder`, in the order of their names' bytes.
fn names(folder: &Path) -> Result<Vec<PathBuf>, CalibrationError> {
    let failed = |source| CalibrationError::Folder { path: folder.to_owned(), source };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = PathBuf::from(entry.file_name());
        let hidden = name.as_os_str().as_encoded_bytes().starts_with(b".");
        let ending = name.extension().map(|e| e.to_string_lossy().to_lowercase());
        let picture = ending.is_some_and(|e| ENDINGS.contains(&e.as_str()));
        if !hidden && picture && !entry.path().is_dir() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// The order in which `of` names are tried: `count` spread evenly, then all others.
fn order(of: usize, count: usize) -> Vec<usize> {
    let chosen: Vec<usize> = (0..count.min(of)).map(|k| k * of / count.min(of)).collect();
    let others = (0..of).filter(|i| chosen.binary_search(i).is_err());
    chosen.iter().copied().chain(others).collect()
}

fn sample(path: &Path, name: &str, side: usize, decode: &mut Decode<'_>) -> Result<Sample, String> {
    let picture = decode(path)?;
    let (width, height) = (picture.width as usize, picture.height as usize);
    if width.checked_mul(height).and_then(|n| n.checked_mul(RGB)) != Some(picture.rgb.len()) {
        return Err(format!("{} samples were decoded for {width}x{height}", picture.rgb.len()));
    }
    if width < side || height < side {
        return Err(format!(
            "it is {width}x{height}, smaller than the {side}x{side} that are cut from it; use larger pictures, or a smaller --size"
        ));
    }
    let (top, left) = ((height - side) / 2, (width - side) / 2);
    let crop = (top..top + side)
        .flat_map(|y| &picture.rgb[(y * width + left) * RGB..][..side * RGB])
        .copied()
        .collect();
    let blake3 = hash(path).map_err(|e| format!("it cannot be read: {e}"))?;
    let datum = Datum { name: name.to_owned(), blake3, size: [picture.width, picture.height] };
    Ok(Sample { datum, crop })
}

fn hash(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut chunk = vec![0u8; 1 << 16];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hasher.finalize().to_hex().to_string()),
            n => hasher.update(&chunk[..n]),
        };
    }
}

impl Sample {
    /// The crop reduced by `factor` as Pillow's bicubic filter does, 8 bits a sample: what is upscaled.
    /// `None` where there is no memory for it.
    pub(crate) fn low(&self, side: usize, factor: usize) -> Option<Vec<u8>> {
        let wide: Vec<f32> = self.crop.iter().map(|&v| f32::from(v)).collect();
        let low = reduced(&wide, [side, side], factor)?;
        Some(low.iter().map(|v| v.round_ties_even().clamp(0.0, 255.0) as u8).collect())
    }

    /// The crop's upper left `side` pixels as an autoencoder takes them, −1 to 1.
    pub(crate) fn unit(&self, crop_side: usize, side: usize) -> Vec<f32> {
        (0..side)
            .flat_map(|y| &self.crop[y * crop_side * RGB..][..side * RGB])
            .map(|&v| f32::from(v) / 255.0 * 2.0 - 1.0)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files whose content is `WxH`, one colour gradient.
    fn decode(path: &Path) -> Result<RgbPicture, String> {
        let text = std::fs::read_to_string(path).map_err(|e| e.to_string())?;
        let (w, h) = text.split_once('x').ok_or("its content is not a picture")?;
        let (width, height): (u32, u32) = (w.parse().unwrap(), h.parse().unwrap());
        let rgb = (0..width * height * 3).map(|i| (i % 251) as u8).collect();
        Ok(RgbPicture { width, height, rgb })
    }

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn pictures_alone_are_taken_and_the_broken_are_named() {
        let dir = folder(&[
            (".hidden.png", "9x9"),
            ("README.md", "9x9"),
            ("a.PNG", "8x12"),
            ("b.jpeg", "junk"),
            ("c.webp", "9x9"),
            ("d.jpg", "7x90"),
        ]);
        std::fs::create_dir(dir.path().join("folder.png")).unwrap();
        let set = PictureSet::read(dir.path(), 8, 8, &mut decode).unwrap();
        let names: Vec<_> = set.samples.iter().map(|s| s.datum.name.as_str()).collect();
        assert_eq!(names, ["a.PNG", "c.webp"]);
        assert_eq!(set.samples[0].datum.size, [8, 12]);
        assert_eq!(set.samples[0].datum.blake3, blake3::hash(b"8x12").to_hex().as_str());
        let skipped: Vec<_> = set.skipped.iter().map(|s| (s.name.as_str(), &s.why[..])).collect();
        assert_eq!(skipped[0], ("b.jpeg", "its content is not a picture"));
        assert!(skipped[1].1.contains("7x90, smaller than the 8x8"), "{skipped:?}");
        // The middle of 8x12: two rows are left out above.
        assert_eq!(set.samples[0].crop[0], 2 * 8 * 3);
        assert_eq!(set.samples[0].crop.len(), 8 * 8 * 3);
    }

    #[test]
    fn nothing_to_calibrate_with_is_refused() {
        let empty = folder(&[("notes.txt", "")]);
        let err = PictureSet::read(empty.path(), 8, 8, &mut decode).unwrap_err().to_string();
        assert!(err.contains("no .png, .jpg or .webp file") && err.contains("o data"), "{err}");
        let broken = folder(&[("x.png", "?"), ("y.png", "2x2")]);
        let err = PictureSet::read(broken.path(), 8, 8, &mut decode).unwrap_err().to_string();
        assert!(err.contains("x.png: its content") && err.contains("y.png: it is 2x2"), "{err}");
        let err = PictureSet::read(&empty.path().join("no"), 8, 8, &mut decode).unwrap_err();
        assert!(matches!(err, CalibrationError::Folder { .. }), "{err}");
    }

    #[test]
    fn a_few_of_many_are_spread_and_replaced_where_broken() {
        assert_eq!(order(10, 4)[..4], [0, 2, 5, 7]);
        assert_eq!(order(3, 8), [0, 1, 2]);
        let mut all = order(10, 4);
        all.sort_unstable();
        assert_eq!(all, (0..10).collect::<Vec<_>>());
        let files: Vec<(String, &str)> =
            (0..10).map(|i| (format!("{i}.png"), if i == 5 { "?" } else { "8x8" })).collect();
        let files: Vec<(&str, &str)> = files.iter().map(|(n, t)| (n.as_str(), *t)).collect();
        let dir = folder(&files);
        let set = PictureSet::read(dir.path(), 4, 8, &mut decode).unwrap();
        let names: Vec<_> = set.samples.iter().map(|s| s.datum.name.as_str()).collect();
        assert_eq!(names, ["0.png", "1.png", "2.png", "7.png"]);
        // What to judge by is none of them, and there may be nothing left.
        let others = set.others(dir.path(), 3, &mut decode).unwrap().unwrap();
        let names: Vec<_> = others.samples.iter().map(|s| s.datum.name.as_str()).collect();
        assert_eq!(names, ["3.png", "4.png", "8.png"]);
        let all = PictureSet::read(dir.path(), 10, 8, &mut decode).unwrap();
        assert_eq!(all.others(dir.path(), 3, &mut decode).unwrap(), None);
        assert_eq!(set.skipped.len(), 1);
    }

    #[test]
    fn the_low_resolution_counterpart_is_the_mean_of_what_is_even() {
        let datum = Datum { name: String::new(), blake3: String::new(), size: [16, 16] };
        let flat = Sample { datum: datum.clone(), crop: vec![77; 16 * 16 * 3] };
        assert_eq!(flat.low(16, 4).unwrap(), vec![77; 4 * 4 * 3]);
        let ramp: Vec<u8> =
            (0..16).flat_map(|_| (0..16u8).flat_map(|x| [x * 10, 0, 255])).collect();
        let low = Sample { datum, crop: ramp.clone() }.low(16, 4).unwrap();
        // PIL: Image.fromarray(ramp).resize((4, 4), Image.BICUBIC)
        let row: Vec<u8> = low[..12].chunks(3).map(|p| p[0]).collect();
        assert_eq!(row, [16, 54, 96, 134]);
        assert!(low.chunks(3).all(|p| p[1] == 0 && p[2] == 255));
    }
}
