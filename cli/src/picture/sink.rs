//! A result on its way to its file: rows of the run's numbers become samples, get their opacity, and go
//! through the encoder, one by one. Nothing here grows with the picture's height but a WebP.

use super::encode::{Encoder, Encoding, Form};
use super::opacity::Enlarger;
use crate::exit::FileError;
use latile_runtime::persist::{Output, sweep};
use latile_runtime::pipeline::PipelineError;
use std::io;
use std::path::PathBuf;

/// Where a result goes.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// The file, which appears when it is whole.
    pub(crate) path: PathBuf,
    /// Replace it.
    pub(crate) overwrite: bool,
    /// No other process is writing it, so what one that was killed has left beside it can go.
    pub(crate) alone: bool,
}

/// A result under way. Dropped before [`Sink::finish`], it leaves nothing behind.
pub(crate) struct Sink {
    target: Target,
    encoding: Encoding,
    form: Form,
    opacity: Option<Enlarger>,
    collection: Vec<u8>,
    row: Vec<u8>,
    /// From the first row on, so that a run that ends before it has touched no file.
    open: Option<(Encoder, Output)>,
}

impl Sink {
    /// A result of `form`, with `opacity` if it has any, to be written as `encoding`.
    ///
    /// # Errors
    /// [`PipelineError::OutOfMemory`] where it must be collected and cannot.
    pub(crate) fn new(
        target: Target,
        encoding: Encoding,
        form: Form,
        opacity: Option<Enlarger>,
    ) -> Result<Self, PipelineError> {
        let collection = encoding
            .collection(&form)
            .map_err(|_| PipelineError::OutOfMemory { bytes: form.bytes(), what: "the result" })?;
        let row = Vec::with_capacity(form.line());
        Ok(Self { target, encoding, form, opacity, collection, row, open: None })
    }

    /// Takes the next row from the top: red, green and blue of each pixel, −1 to 1.
    ///
    /// # Errors
    /// [`PersistError`](latile_runtime::persist::PersistError), [`FileError`] where the file cannot take it.
    pub(crate) fn put(&mut self, row: &[f32]) -> anyhow::Result<()> {
        join(row, self.opacity.as_mut(), self.form.deep, &mut self.row);
        if self.open.is_none() {
            let Target { path, overwrite, alone } = &self.target;
            if *alone {
                sweep(path);
            }
            let mut output = Output::create(path, *overwrite)?;
            let encoder = output.file().try_clone().and_then(|file| {
                let collection = std::mem::take(&mut self.collection);
                Encoder::new(self.encoding, self.form.clone(), collection, file)
            });
            self.open = Some((encoder.map_err(|e| self.error(e))?, output));
        }
        let written = match &mut self.open {
            Some((encoder, _)) => encoder.row(&self.row),
            None => Ok(()),
        };
        Ok(written.map_err(|e| self.error(e))?)
    }

    /// Ends the file and puts it in its place, unless `check` has something against it.
    ///
    /// # Errors
    /// As [`Sink::put`], and what `check` says; then nothing is left there.
    pub(crate) fn finish(
        mut self,
        check: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let Some((encoder, output)) = self.open.take() else {
            return Err(self.error(io::Error::other("the result has no rows")).into());
        };
        encoder.finish().map_err(|e| self.error(e))?;
        check()?;
        Ok(output.commit()?)
    }

    fn error(&self, source: io::Error) -> FileError {
        FileError { action: "write", path: self.target.path.clone(), source }
    }
}

/// Makes `out` the encoder's row: samples of 8 bits, or of 16 with the high byte first, rounded half to even.
fn join(row: &[f32], opacity: Option<&mut Enlarger>, deep: bool, out: &mut Vec<u8>) {
    out.clear();
    let sample = |v: f32| {
        let most = if deep { 65535.0 } else { 255.0 };
        ((v.clamp(-1.0, 1.0) / 2.0 + 0.5) * most).round_ties_even() as u16
    };
    let mut put = |v: u16| match deep {
        true => out.extend_from_slice(&v.to_be_bytes()),
        false => out.push(v as u8),
    };
    let Some(opacity) = opacity else {
        return row.iter().for_each(|&v| put(sample(v)));
    };
    let had = opacity.is_deep();
    for (pixel, &a) in row.chunks_exact(3).zip(opacity.next()) {
        pixel.iter().for_each(|&v| put(sample(v)));
        put(match (had, deep) {
            (true, false) => ((a as u32 + 128) / 257) as u16,
            (false, true) => a as u16 * 257,
            _ => a as u16,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::Samples;
    use super::*;
    use std::path::Path;

    #[test]
    fn rows_become_samples() {
        let joined = |row: &[f32], deep| {
            let mut out = Vec::new();
            join(row, None, deep, &mut out);
            out
        };
        assert_eq!(joined(&[-1.0, 0.0, 1.0], false), [0, 128, 255]);
        assert_eq!(joined(&[-2.0, 2.0, 0.5], false), [0, 255, 191]);
        assert_eq!(joined(&[-1.0, 1.0, 1.0 / 65535.0], true), [0, 0, 255, 255, 128, 0]);
    }

    #[test]
    fn opacity_comes_fourth_at_the_depth_of_the_others() {
        let joined = |samples, deep| {
            let mut opacity = Enlarger::new(samples, (2, 1), (2, 1)).unwrap();
            let mut out = Vec::new();
            join(&[1.0; 6], Some(&mut opacity), deep, &mut out);
            out
        };
        let deep = Samples::Sixteen(vec![129, 65535 - 129]);
        assert_eq!(joined(deep.clone(), false), [255, 255, 255, 1, 255, 255, 255, 254]);
        assert_eq!(joined(deep, true)[6..8], [0, 129]);
        let shallow = Samples::Eight(vec![2, 200]);
        assert_eq!(joined(shallow.clone(), false), [255, 255, 255, 2, 255, 255, 255, 200]);
        assert_eq!(joined(shallow, true)[6..8], [2, 2]);
    }

    /// Before the first row no file is touched; before the end it does not appear; given up, it leaves nothing.
    #[test]
    fn a_result_is_whole_or_absent() {
        let dir = tempfile::tempdir().unwrap();
        let target = |alone| Target { path: dir.path().join("a.png"), overwrite: false, alone };
        let names = || std::fs::read_dir(dir.path()).unwrap().count();
        for name in ["a.png", "a.jpg", "a.webp"] {
            let encoding = Encoding::of(Path::new(name), 90).unwrap();
            let form = Form { width: 4, height: 2, deep: false, opacity: false, icc: None };
            let mut sink = Sink::new(target(false), encoding, form.clone(), None).unwrap();
            assert_eq!(names(), 0);
            sink.put(&[0.5; 12]).unwrap();
            assert_eq!(names(), 1);
            assert!(!target(false).path.exists());
            drop(sink);
            assert_eq!(names(), 0);

            let mut sink = Sink::new(target(false), encoding, form.clone(), None).unwrap();
            sink.put(&[0.5; 12]).unwrap();
            sink.put(&[0.0; 12]).unwrap();
            let refused = sink.finish(|| anyhow::bail!("stop")).unwrap_err();
            assert_eq!(refused.to_string(), "stop");
            assert_eq!(names(), 0);
        }
        // What a killed process has left goes, and the file appears.
        let form = Form { width: 4, height: 1, deep: true, opacity: false, icc: None };
        std::fs::write(dir.path().join(".a.png.Ab1.part"), b"half").unwrap();
        let mut sink = Sink::new(target(true), Encoding::Png, form, None).unwrap();
        sink.put(&[0.0; 12]).unwrap();
        sink.finish(|| Ok(())).unwrap();
        assert_eq!(names(), 1);
        let picture = super::super::read(&target(true).path).unwrap();
        assert_eq!(picture.rgb, Samples::Sixteen(vec![32768; 12]));
    }
}
