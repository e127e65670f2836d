//! The latent of a whole picture, in memory or in a scratch file.
//!
//! Lives here: [`Scratch`], where such a file may be, and `Field`, the latent with the few things that the
//! stages do to it: filling it with noise, reading a tile's window, moving a finished row by a step, going
//! through its rows. Never here: what is computed, and when a file is taken (`budget`).
//!
//! In memory the values lie as NHWC. In the file, f32 in the machine's byte order, each row lies channel after
//! channel: value (y, x, c) is number `(y·C + c)·W + x`. Noise comes channel plane by channel plane, as torch
//! draws it, and so goes there in runs of a row's width; a row of all channels is still one piece. The file is
//! read and written by explicit calls. It is not mapped, because mapped pages would be the process's, which is
//! what the file is to avoid; what the system keeps of it in its cache is the system's.
//!
//! The file has no name where the system allows that, is removed as soon as it is open on other Unix systems,
//! and when it is closed elsewhere: nothing is left of it after a crash. All of it is written, and waited
//! for, before the run begins, so a disk that has no room says so then. A write that the system takes and
//! then fails is told by the next wait alone: there is one after each step.

use super::noise::Generator;
use super::plan::PipelineError;
use super::upscale::buffer;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// A latent of fewer bytes stays in memory: a file would save less than budgets are rounded by.
const LEAST: usize = 4 << 20;

/// Where a run may put its latent if memory does not suffice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scratch {
    folder: PathBuf,
    least: usize,
}

impl Scratch {
    /// A file in `folder`, which must exist and be on a disk: in a file system that lies in memory, the file
    /// would take what it is to save.
    #[must_use]
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), least: LEAST }
    }

    /// Only for a latent of at least so many bytes; 4 MiB unless said.
    #[must_use]
    pub fn at_least(self, bytes: usize) -> Self {
        Self { least: bytes, ..self }
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether a latent of so many bytes may be there.
    pub(super) fn takes(&self, bytes: usize) -> bool {
        bytes >= self.least
    }
}

/// Numbers for a whole field in torch's order: channel plane by channel plane.
pub(super) enum Planes<'a> {
    /// The next of a generator.
    Drawn(&'a mut Generator),
    /// The caller's.
    Given(&'a [f32]),
}

impl Planes<'_> {
    fn each(self, count: usize, mut take: impl FnMut(f32)) {
        match self {
            Self::Drawn(generator) => generator.randn(count, |_, value| take(value)),
            Self::Given(values) => values.iter().copied().for_each(take),
        }
    }
}

/// The latent.
pub(super) struct Field {
    height: usize,
    width: usize,
    channels: usize,
    values: Values,
}

enum Values {
    Memory(Vec<f32>),
    File(Spilled),
}

impl Field {
    /// Zeros in memory, or nothing yet in a file of `scratch`'s folder.
    ///
    /// # Errors
    /// [`PipelineError::OutOfMemory`], [`PipelineError::Scratch`].
    pub(super) fn new(
        [height, width]: [usize; 2],
        channels: usize,
        scratch: Option<&Scratch>,
    ) -> Result<Self, PipelineError> {
        let len = height * width * channels;
        let values = match scratch {
            None => Values::Memory(buffer(len, 0f32, "the latent")?),
            Some(scratch) => {
                let line = || buffer(width * channels, 0f32, "a row of the latent");
                let (planes, line) = (line()?, line()?);
                let bytes = len * size_of::<f32>();
                let folder = scratch.folder.clone();
                let file = match tempfile::tempfile_in(&folder) {
                    Ok(file) => file,
                    Err(source) => {
                        return Err(PipelineError::Scratch {
                            action: "make",
                            folder,
                            bytes,
                            source,
                        });
                    }
                };
                log::info!("the latent is in a file of {bytes} bytes in {}", folder.display());
                Values::File(Spilled { file, folder, bytes, planes, line, finite: true })
            }
        };
        Ok(Self { height, width, channels, values })
    }

    /// Bytes of memory that a field takes, in memory or in a file.
    pub(super) fn bytes([height, width]: [usize; 2], channels: usize, in_file: bool) -> usize {
        let rows = if in_file { 2 } else { height };
        rows * width * channels * size_of::<f32>()
    }

    /// Rows.
    pub(super) fn height(&self) -> usize {
        self.height
    }

    /// Number of values.
    pub(super) fn len(&self) -> usize {
        self.height * self.width * self.channels
    }

    /// Sets all values, and makes sure that there is room for them.
    ///
    /// # Errors
    /// [`PipelineError::Scratch`].
    pub(super) fn fill(&mut self, values: Planes<'_>) -> Result<(), PipelineError> {
        if let Values::File(file) = &mut self.values {
            file.finite = true;
        }
        self.go_through(values, true, |old, new| *old = new)?;
        self.settle()
    }

    /// Adds `scale` times these numbers.
    ///
    /// # Errors
    /// [`PipelineError::Scratch`].
    pub(super) fn add(&mut self, scale: f32, values: Planes<'_>) -> Result<(), PipelineError> {
        self.go_through(values, false, |value, n| *value += scale * n)
    }

    /// Calls `put` with each value, plane by plane, and the number that comes for it; where `fresh`, what was
    /// there before does not matter.
    fn go_through(
        &mut self,
        values: Planes<'_>,
        fresh: bool,
        put: impl Fn(&mut f32, f32),
    ) -> Result<(), PipelineError> {
        let (len, width, channels) = (self.len(), self.width, self.channels);
        match &mut self.values {
            Values::Memory(all) => {
                let (mut i, mut channel) = (0, 0);
                values.each(len, |n| {
                    put(&mut all[i], n);
                    i += channels;
                    if i >= len {
                        channel += 1;
                        i = channel;
                    }
                });
                Ok(())
            }
            Values::File(file) => {
                let mut failed = Ok(());
                let (mut x, mut y, mut channel) = (0, 0, 0);
                values.each(len, |n| {
                    if failed.is_err() {
                        return;
                    }
                    let at = (y * channels + channel) * width;
                    if x == 0 && !fresh {
                        failed = file.read(at, 0..width);
                    }
                    put(&mut file.planes[x], n);
                    x += 1;
                    if x == width {
                        if failed.is_ok() {
                            failed = file.write(at, 0..width);
                        }
                        (x, y) = (0, y + 1);
                        if y == self.height {
                            (y, channel) = (0, channel + 1);
                        }
                    }
                });
                failed
            }
        }
    }

    /// Reads the `height × width` pixels from (`top`, `left`) on into `to`, where a pixel is `wide` values
    /// and its first ones are the latent's.
    ///
    /// # Errors
    /// [`PipelineError::Scratch`].
    pub(super) fn window(
        &mut self,
        (top, left): (usize, usize),
        width: usize,
        wide: usize,
        to: &mut [f32],
    ) -> Result<(), PipelineError> {
        let channels = self.channels;
        for (y, row) in (top..).zip(to.chunks_exact_mut(width * wide)) {
            match &mut self.values {
                Values::Memory(all) => {
                    let from = &all[(y * self.width + left) * channels..][..width * channels];
                    let pixels = row.chunks_exact_mut(wide).zip(from.chunks_exact(channels));
                    pixels.for_each(|(to, from)| to[..channels].copy_from_slice(from));
                }
                Values::File(file) => {
                    for channel in 0..channels {
                        file.read((y * channels + channel) * self.width + left, 0..width)?;
                        let pixels = row.chunks_exact_mut(wide).zip(&file.planes);
                        pixels.for_each(|(to, &from)| to[channel] = from);
                    }
                }
            }
        }
        Ok(())
    }

    /// Row `y`, `width × channels`.
    ///
    /// # Errors
    /// [`PipelineError::Scratch`].
    pub(super) fn row(&mut self, y: usize) -> Result<&[f32], PipelineError> {
        let line = self.width * self.channels;
        match &mut self.values {
            Values::Memory(all) => Ok(&all[y * line..][..line]),
            Values::File(file) => {
                file.load(y, self.width)?;
                Ok(&file.line)
            }
        }
    }

    /// Changes row `y`, `width × channels`.
    ///
    /// # Errors
    /// [`PipelineError::Scratch`].
    pub(super) fn update(
        &mut self,
        y: usize,
        change: impl FnOnce(&mut [f32]),
    ) -> Result<(), PipelineError> {
        if let Values::File(file) = &mut self.values {
            file.load(y, self.width)?;
        }
        self.replace(y, |row| {
            change(row);
            Ok(())
        })
    }

    /// Sets row `y`, `width × channels`, all of which `set` writes.
    ///
    /// # Errors
    /// [`PipelineError::Scratch`], and those of `set`.
    pub(super) fn replace(
        &mut self,
        y: usize,
        set: impl FnOnce(&mut [f32]) -> Result<(), PipelineError>,
    ) -> Result<(), PipelineError> {
        let line = self.width * self.channels;
        match &mut self.values {
            Values::Memory(all) => set(&mut all[y * line..][..line]),
            Values::File(file) => {
                set(&mut file.line)?;
                file.store(y, self.width)
            }
        }
    }

    /// Whether all values are finite. A file's are looked at as they are written.
    pub(super) fn is_finite(&self) -> bool {
        match &self.values {
            Values::Memory(all) => all.iter().all(|v| v.is_finite()),
            Values::File(file) => file.finite,
        }
    }

    /// Waits until all that was written is where it belongs.
    ///
    /// # Errors
    /// [`PipelineError::Scratch`].
    pub(super) fn settle(&self) -> Result<(), PipelineError> {
        match &self.values {
            Values::Memory(_) => Ok(()),
            Values::File(file) => file.file.sync_data().map_err(|e| file.error("write", e)),
        }
    }
}

/// A field in a file.
struct Spilled {
    file: File,
    folder: PathBuf,
    /// Of the file.
    bytes: usize,
    /// What is read and written: a row channel after channel, or a part of one channel's.
    planes: Vec<f32>,
    /// A row pixel after pixel.
    line: Vec<f32>,
    /// All that was written since the field was filled.
    finite: bool,
}

impl Spilled {
    /// Reads `part` of `planes` from value number `at` on.
    fn read(&mut self, at: usize, part: std::ops::Range<usize>) -> Result<(), PipelineError> {
        let bytes = bytemuck::cast_slice_mut(&mut self.planes[part]);
        let read = read_at(&self.file, bytes, (at * size_of::<f32>()) as u64);
        read.map_err(|e| self.error("read", e))
    }

    /// Writes `part` of `planes` as the values from number `at` on.
    fn write(&mut self, at: usize, part: std::ops::Range<usize>) -> Result<(), PipelineError> {
        let values = &self.planes[part];
        self.finite &= values.iter().all(|v| v.is_finite());
        let written =
            write_at(&self.file, bytemuck::cast_slice(values), (at * size_of::<f32>()) as u64);
        written.map_err(|e| self.error("write", e))
    }

    /// Row `y` into `line`.
    fn load(&mut self, y: usize, width: usize) -> Result<(), PipelineError> {
        let len = self.line.len();
        self.read(y * len, 0..len)?;
        for (channel, plane) in self.planes.chunks_exact(width).enumerate() {
            let pixels = self.line.chunks_exact_mut(len / width);
            pixels.zip(plane).for_each(|(pixel, &v)| pixel[channel] = v);
        }
        Ok(())
    }

    /// `line` as row `y`.
    fn store(&mut self, y: usize, width: usize) -> Result<(), PipelineError> {
        let len = self.line.len();
        for (channel, plane) in self.planes.chunks_exact_mut(width).enumerate() {
            let pixels = self.line.chunks_exact(len / width);
            plane.iter_mut().zip(pixels).for_each(|(v, pixel)| *v = pixel[channel]);
        }
        self.write(y * len, 0..len)
    }

    fn error(&self, action: &'static str, source: io::Error) -> PipelineError {
        PipelineError::Scratch { action, folder: self.folder.clone(), bytes: self.bytes, source }
    }
}

#[cfg(unix)]
fn read_at(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at)
}

#[cfg(unix)]
fn write_at(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, at)
}

#[cfg(not(unix))]
fn read_at(mut file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    io::Seek::seek(&mut file, io::SeekFrom::Start(at))?;
    io::Read::read_exact(&mut file, bytes)
}

#[cfg(not(unix))]
fn write_at(mut file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    io::Seek::seek(&mut file, io::SeekFrom::Start(at))?;
    io::Write::write_all(&mut file, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn both([h, w]: [usize; 2], channels: usize) -> [Field; 2] {
        let scratch = Scratch::new(std::env::temp_dir());
        [None, Some(&scratch)].map(|s| Field::new([h, w], channels, s).unwrap())
    }

    fn bits(field: &mut Field) -> Vec<u32> {
        (0..field.height())
            .flat_map(|y| field.row(y).unwrap().iter().map(|v| v.to_bits()).collect::<Vec<_>>())
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

        /// Whatever is done to a field, it is the same in memory and in a file, and what torch's order says.
        #[test]
        fn a_file_holds_what_memory_holds(
            h in 1usize..9, w in 1usize..40, channels in 1usize..9, at in [0f64..1.0, 0f64..1.0, 0f64..1.0, 0f64..1.0],
        ) {
            let mut fields = both([h, w], channels);
            let part = |share: f64, n: usize| (share * n as f64) as usize;
            let (top, left) = (part(at[0], h), part(at[1], w));
            let (height, width) = (1 + part(at[2], h - top), 1 + part(at[3], w - left));
            let given: Vec<f32> = (0..h * w * channels).map(|i| (i as f32).sin()).collect();
            let mut seen = Vec::new();
            for field in &mut fields {
                let mut generator = Generator::new(3);
                field.fill(Planes::Drawn(&mut generator)).unwrap();
                let mut planes = vec![0.0; field.len()];
                Generator::new(3).randn(planes.len(), |i, v| planes[i] = v);
                for y in 0..h {
                    let row = field.row(y).unwrap();
                    for (i, v) in row.iter().enumerate() {
                        assert_eq!(*v, planes[(i % channels * h + y) * w + i / channels]);
                    }
                }
                field.add(0.3, Planes::Drawn(&mut generator)).unwrap();
                field.add(-0.7, Planes::Given(&given)).unwrap();
                field.update(top, |row| row.iter_mut().for_each(|v| *v *= 1.1)).unwrap();
                field.replace(h - 1, |row| {
                    row.iter_mut().zip(&given).for_each(|(to, v)| *to = *v);
                    Ok(())
                }).unwrap();
                field.settle().unwrap();
                let wide = channels + 2;
                let mut window = vec![f32::NAN; height * width * wide];
                field.window((top, left), width, wide, &mut window).unwrap();
                for (i, pixel) in window.chunks(wide).enumerate() {
                    let row = field.row(top + i / width).unwrap();
                    assert_eq!(pixel[..channels], row[(left + i % width) * channels..][..channels]);
                    assert!(pixel[channels..].iter().all(|v| v.is_nan()), "the rest is the caller's");
                }
                assert!(field.is_finite());
                seen.push((bits(field), generator.next_u32()));
            }
            prop_assert_eq!(&seen[0], &seen[1]);
            for field in &mut fields {
                field.update(top, |row| row[0] = f32::INFINITY).unwrap();
                assert!(!field.is_finite());
                field.fill(Planes::Given(&given)).unwrap();
                assert!(field.is_finite(), "it begins anew");
                let row = h - 1;
                field.replace(row, |row| { row.fill(f32::MAX); Ok(()) }).unwrap();
                field.add(f32::MAX, Planes::Given(&given)).unwrap();
                seen.push((vec![u32::from(field.is_finite())], 0));
            }
            prop_assert_eq!(&seen[2], &seen[3]);
        }
    }

    #[test]
    fn bytes_are_what_is_allocated() {
        let ([h, w], channels) = ([7, 5], 3);
        for field in both([h, w], channels) {
            let (found, in_file) = match &field.values {
                Values::Memory(all) => (all.capacity(), false),
                Values::File(file) => (file.planes.capacity() + file.line.capacity(), true),
            };
            assert_eq!(found * size_of::<f32>(), Field::bytes([h, w], channels, in_file));
        }
    }

    /// A file that has lost its end, and one that cannot be written.
    #[test]
    fn a_failing_file_is_an_error_that_says_where() {
        let [_, mut field] = both([4, 6], 2);
        field.fill(Planes::Given(&[1.0; 48])).unwrap();
        let Values::File(file) = &mut field.values else { panic!("a file was asked for") };
        file.file.set_len(100).unwrap();
        let error = field.row(3).unwrap_err();
        assert!(matches!(error, PipelineError::Scratch { action: "read", .. }), "{error}");
        let text = error.to_string();
        let folder = std::env::temp_dir();
        for words in ["scratch file of", &folder.display().to_string(), "--scratch", "--memory"] {
            assert!(text.contains(words), "{words}: {text}");
        }
        #[cfg(target_os = "linux")]
        {
            let Values::File(file) = &mut field.values else { panic!("a file was asked for") };
            file.file = File::options().write(true).open("/dev/full").unwrap();
            let error = field.fill(Planes::Given(&[1.0; 48])).unwrap_err();
            assert!(matches!(error, PipelineError::Scratch { action: "write", .. }), "{error}");
            assert!(error.to_string().contains("No space left"), "{error}");
        }
    }
}
