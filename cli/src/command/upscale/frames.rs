//! `latile upscale --frames`: raw frames in, larger frames out, until the input ends.
//!
//! Everything is prepared before the first frame and stays: sessions, arenas, weights and buffers. A thread
//! reads ahead by one frame; it also keeps a wait for input, which the system restarts after a signal, from
//! holding up Ctrl-C. A frame is written when it is complete, and in one piece, so that whoever reads never
//! sees half of one. Raw output allocates nothing once the first frame has passed.

use super::{Args, options, result_size};
use crate::args::STANDARD;
use crate::bundled;
use crate::console::{bytes, remark, say, say_json};
use crate::exit::{FileError, PipeClosed, Stopped, UsageError};
use crate::interrupt::Interrupt;
use crate::memory::{self, peak_rss_bytes};
use crate::picture::{self, PictureError};
use crate::progress::Pace;
use latile_runtime::format::Spacing;
use latile_runtime::persist::Output;
use latile_runtime::pipeline::budget::{Caller, Mode};
use latile_runtime::pipeline::{Budget, Picture, PipelineError, Pixels, Plan, Strategy, to_byte};
use std::fs::File;
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// Bytes of a pixel.
const RGB: usize = 3;
/// How long Ctrl-C may wait while no frame comes.
const GLANCE: Duration = Duration::from_millis(50);

/// Columns and rows of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) width: u32,
    pub(crate) height: u32,
}

/// `320x180`.
pub(super) fn size(text: &str) -> Result<Size, String> {
    let sides = text.split_once('x').map(|(w, h)| (w.parse(), h.parse()));
    let Some((Ok(width), Ok(height))) = sides else {
        return Err("a size of frames is WIDTHxHEIGHT in pixels, such as 320x180".to_owned());
    };
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 || pixels > picture::MAX_PIXELS {
        return Err(format!(
            "frames of {width}x{height} have {pixels} pixels; 1 to {} are read",
            picture::MAX_PIXELS
        ));
    }
    Ok(Size { width, height })
}

/// How frames are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// `height × width × 3` bytes.
    Raw,
    /// A PNG file each.
    Png,
}

/// `raw` or `png`.
pub(super) fn format(name: &str) -> Result<Format, String> {
    match name {
        "raw" => Ok(Format::Raw),
        "png" => Ok(Format::Png),
        _ => Err("an output format is raw or png".to_owned()),
    }
}

/// What `--json` prints. Sizes are `[height, width]`.
#[derive(serde::Serialize)]
struct Report<'a> {
    input: &'a str,
    output: &'a str,
    model: &'a str,
    precision: &'static str,
    input_size: [u32; 2],
    output_size: [u32; 2],
    backend: &'a str,
    isa: &'a str,
    threads: usize,
    seed: u64,
    steps: usize,
    eta: f32,
    spacing: Spacing,
    consistency: f32,
    tiles: usize,
    frames: u64,
    /// From the beginning of the first frame to the end of the last, waiting included.
    seconds: f64,
    frames_per_s: f64,
    /// Of one frame.
    gmac: f64,
    arena_bytes: usize,
    weight_bytes: usize,
    pipeline_bytes: usize,
    /// The file in which the latent was; 0 where it was in memory.
    scratch_bytes: usize,
    /// What the process was to have at most.
    planned_bytes: Option<usize>,
    peak_rss_bytes: Option<u64>,
}

/// Checks everything that can be checked, then upscales frame after frame.
///
/// # Errors
/// Every way in which the model, the options, the memory, a frame or either stream can be unfit; [`Stopped`],
/// [`PipeClosed`]. Frames completed before it have been written.
pub(super) fn run(args: &Args, size: Size, interrupt: &Interrupt) -> anyhow::Result<()> {
    let refuse = |why: &str| Err(UsageError(why.to_owned()).into());
    if args.resume.is_some() || args.resume_every.is_some() {
        return refuse("--resume keeps a picture under way; frames are done one by one");
    }
    let to_stdout = args.output == Path::new(STANDARD);
    if to_stdout && args.json {
        return refuse(
            "--json prints to standard output, where the frames go; name a file or a FIFO for them",
        );
    }
    if to_stdout && std::io::stdout().is_terminal() {
        return refuse(
            "frames are bytes for another program, and standard output is a terminal; pipe them on, or name a file",
        );
    }
    let input = Source::check(&args.input)?;
    let model = bundled::open(args.model.as_deref(), args.weights)?;
    let options = options(args)?;
    let (width, height) = (size.width as usize, size.height as usize);
    let plan = Plan::new(&model, width, height, &options)?;
    let output_size = result_size(&plan, Path::new(&input.name))?;
    let backend = super::super::cpu(args.threads)?;
    let plan = plan.within(&backend, &budget(args, [width * height, pixels_of(output_size)]))?;
    memory::warn_of_scratch(&plan, &options);
    let mut runner = plan.runner(&backend)?;
    let mut output = Sink::open(&args.output, args.overwrite)?;
    let format = args.output_format.unwrap_or(Format::Raw);
    interrupt.check()?;

    let line = output_size[1] as usize * RGB;
    let mut pixels = zeros(line * output_size[0] as usize, "the larger frame")?;
    let frames = Frames::start(input, width * height * RGB)?;
    let mut done = 0;
    let mut start = None;
    let mut pace = Pace::new();
    let ended = loop {
        let frame = match frames.next(interrupt, done) {
            Ok(Some(frame)) => frame,
            Ok(None) => break Ok(()),
            Err(e) => break Err(e),
        };
        start.get_or_insert_with(Instant::now);
        let picture = Picture { width, height, pixels: Pixels::Rgb8(&frame) };
        let result = runner.run(
            picture,
            &mut |_| {
                if interrupt.raised() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            },
            &mut |y, row| {
                for (byte, &value) in pixels[y * line..][..line].iter_mut().zip(row) {
                    *byte = to_byte(value);
                }
            },
        );
        frames.give_back(frame);
        match result {
            Ok(()) => {}
            Err(PipelineError::Cancelled) => break Err(stopped(done)),
            Err(e) => break Err(anyhow::Error::from(e).context(format!("frame {}", done + 1))),
        }
        let written = match format {
            Format::Raw => output.put(&pixels),
            Format::Png => picture::png(output_size[1], output_size[0], &pixels)
                .map_err(anyhow::Error::from)
                .and_then(|png| output.put(&png)),
        };
        // What a file holds now is not whole frames: it is not kept.
        written?;
        done += 1;
        pace.at(done);
    };
    if done > 0 {
        output.commit()?;
    }
    ended?;

    let seconds = start.map_or(0.0, |s| s.elapsed().as_secs_f64());
    let done_by = runner.report();
    let report = Report {
        input: &frames.name,
        output: &args.output.to_string_lossy(),
        model: model.name(),
        precision: model.manifest().precision.dtype().name(),
        input_size: [size.height, size.width],
        output_size,
        backend: &done_by.backend,
        isa: &done_by.isa,
        threads: done_by.threads,
        seed: done_by.seed,
        steps: done_by.steps,
        eta: done_by.eta,
        spacing: done_by.spacing,
        consistency: done_by.consistency,
        tiles: done_by.tiles,
        frames: done,
        seconds,
        frames_per_s: done as f64 / seconds,
        gmac: done_by.gmac,
        arena_bytes: done_by.arena_bytes,
        weight_bytes: done_by.weight_bytes,
        pipeline_bytes: done_by.pipeline_bytes,
        scratch_bytes: done_by.scratch_bytes,
        planned_bytes: plan.strategy().map(Strategy::peak),
        peak_rss_bytes: peak_rss_bytes(),
    };
    match (args.json, to_stdout) {
        (true, _) => say_json(&report),
        (false, true) => {
            remark(&describe(&report, "standard output"));
            Ok(())
        }
        (false, false) => Ok(say(&describe(&report, report.output))?),
    }
}

fn pixels_of([height, width]: [u32; 2]) -> usize {
    height as usize * width as usize
}

/// What the stream may take: two frames are on their way in, one is made, and the encoder holds a PNG twice.
fn budget(args: &Args, [input, output]: [usize; 2]) -> Budget {
    let copies = match args.output_format.unwrap_or(Format::Raw) {
        Format::Raw => 1,
        Format::Png => 3,
    };
    Budget {
        limit: args.memory,
        base: memory::base_bytes(0),
        caller: Caller {
            input: input.saturating_mul(2 * RGB),
            result: output.saturating_mul(copies * RGB),
            finish: 0,
        },
        so_far: memory::so_far(),
        mode: Mode::Warm,
    }
}

fn describe(r: &Report<'_>, output: &str) -> String {
    let [h, w] = r.output_size;
    let peak = r.peak_rss_bytes.map_or(String::new(), |p| format!(", peak {}", bytes(p)));
    format!(
        "{output}  {} frames of {w}x{h}, {} steps, {:.1} s, {:.2} frames/s on {} with {} threads{peak}",
        r.frames, r.steps, r.seconds, r.frames_per_s, r.isa, r.threads
    )
}

fn stopped(done: u64) -> anyhow::Error {
    Stopped(match done {
        0 => "no frame was complete".to_owned(),
        1 => "1 frame was complete and is written".to_owned(),
        n => format!("{n} frames were complete and are written"),
    })
    .into()
}

fn zeros(len: usize, what: &'static str) -> Result<Vec<u8>, PipelineError> {
    let mut v = Vec::new();
    v.try_reserve_exact(len).map_err(|_| PipelineError::OutOfMemory { bytes: len, what })?;
    v.resize(len, 0);
    Ok(v)
}

/// Where frames come from.
struct Source {
    name: String,
    path: Option<PathBuf>,
}

impl Source {
    /// Checks that there is such a stream, without opening it: a FIFO would wait for its writer.
    fn check(path: &Path) -> Result<Self, FileError> {
        if path == Path::new(STANDARD) {
            return Ok(Self { name: "standard input".to_owned(), path: None });
        }
        let error = |source| FileError { action: "read", path: path.to_owned(), source };
        if path.metadata().map_err(error)?.is_dir() {
            return Err(error(std::io::Error::other("it is a folder")));
        }
        Ok(Self { name: path.display().to_string(), path: Some(path.to_owned()) })
    }

    fn open(&self) -> std::io::Result<Box<dyn Read>> {
        Ok(match &self.path {
            None => Box::new(std::io::stdin()),
            Some(path) => Box::new(File::open(path)?),
        })
    }
}

/// What the reading thread has to say.
enum Message {
    Frame(Vec<u8>),
    /// The input has ended, with this many bytes behind the last whole frame.
    End(usize),
    Failed(std::io::Error),
}

/// Frames, read ahead by a thread of their own. It ends with the input, or with the process.
struct Frames {
    name: String,
    path: PathBuf,
    bytes: usize,
    full: Receiver<Message>,
    empty: SyncSender<Vec<u8>>,
}

impl Frames {
    fn start(source: Source, len: usize) -> anyhow::Result<Self> {
        let (to_main, full) = sync_channel(1);
        let (empty, to_fill) = sync_channel(2);
        for _ in 0..2 {
            // Invariant: the channel has room for both.
            let _ = empty.send(zeros(len, "a frame")?);
        }
        let (name, path) = (source.name.clone(), source.path.clone());
        std::thread::Builder::new().name("latile-frames".to_owned()).spawn(move || {
            let mut input = match source.open() {
                Ok(input) => input,
                Err(e) => return drop(to_main.send(Message::Failed(e))),
            };
            for mut frame in to_fill {
                let read = match fill(&mut input, &mut frame) {
                    Ok(n) if n == frame.len() => Message::Frame(frame),
                    Ok(n) => Message::End(n),
                    Err(e) => Message::Failed(e),
                };
                let last = !matches!(read, Message::Frame(_));
                // Nobody listens any more where the run has ended.
                if to_main.send(read).is_err() || last {
                    return;
                }
            }
        })?;
        let path = path.unwrap_or_else(|| "standard input".into());
        Ok(Self { name, path, bytes: len, full, empty })
    }

    /// The next frame, or nothing where the input has ended behind frame `done`.
    fn next(&self, interrupt: &Interrupt, done: u64) -> anyhow::Result<Option<Vec<u8>>> {
        let refused = |why| PictureError::Refused { path: self.path.clone(), why };
        loop {
            if interrupt.raised() {
                return Err(stopped(done));
            }
            return match self.full.recv_timeout(GLANCE) {
                Err(RecvTimeoutError::Timeout) => continue,
                Ok(Message::Frame(frame)) => Ok(Some(frame)),
                Ok(Message::End(0)) if done > 0 => Ok(None),
                Ok(Message::End(had)) => Err(refused(format!(
                    "it ended in frame {}, with {had} of its {} bytes; check that --frames is the size of what is sent, as rgb24",
                    done + 1,
                    self.bytes
                ))
                .into()),
                Ok(Message::Failed(source)) => {
                    Err(FileError { action: "read", path: self.path.clone(), source }.into())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    Err(anyhow::anyhow!("the thread that reads frames has ended"))
                }
            };
        }
    }

    /// The frame's memory, to be filled again.
    fn give_back(&self, frame: Vec<u8>) {
        // A reader that has ended needs no more.
        let _ = self.empty.send(frame);
    }
}

/// Reads until `frame` is full or the input ends; how many bytes that were.
fn fill(input: &mut dyn Read, frame: &mut [u8]) -> std::io::Result<usize> {
    let mut had = 0;
    while had < frame.len() {
        match input.read(&mut frame[had..]) {
            Ok(0) => break,
            Ok(n) => had += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(had)
}

/// Where frames go.
enum Sink {
    Stdout(std::io::Stdout),
    /// A FIFO or a device.
    Stream(File, PathBuf),
    /// A file, which appears when the stream has ended.
    File(Output, PathBuf),
}

impl Sink {
    fn open(path: &Path, overwrite: bool) -> anyhow::Result<Self> {
        if path == Path::new(STANDARD) {
            return Ok(Self::Stdout(std::io::stdout()));
        }
        let path = path.to_owned();
        match path.metadata() {
            Ok(meta) if !meta.is_file() && !meta.is_dir() => {
                match File::options().write(true).open(&path) {
                    Ok(file) => Ok(Self::Stream(file, path)),
                    Err(source) => Err(FileError { action: "write", path, source }.into()),
                }
            }
            _ => Ok(Self::File(Output::create(&path, overwrite)?, path)),
        }
    }

    fn put(&mut self, frame: &[u8]) -> anyhow::Result<()> {
        let (written, path) = match self {
            Self::Stdout(out) => {
                let mut out = out.lock();
                (out.write_all(frame).and_then(|()| out.flush()), Path::new("standard output"))
            }
            Self::Stream(file, path) => (file.write_all(frame), path.as_path()),
            Self::File(output, path) => (output.file().write_all(frame), path.as_path()),
        };
        written.map_err(|source| match source.kind() {
            ErrorKind::BrokenPipe => PipeClosed.into(),
            _ => FileError { action: "write", path: path.to_owned(), source }.into(),
        })
    }

    fn commit(self) -> anyhow::Result<()> {
        match self {
            Self::File(output, _) => Ok(output.commit()?),
            Self::Stdout(_) | Self::Stream(..) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        assert_eq!(size("320x180"), Ok(Size { width: 320, height: 180 }));
        for wrong in ["", "320", "320x", "x180", "-1x5", "3x4x5", "320X180", "a×b"] {
            assert!(size(wrong).unwrap_err().contains("320x180"), "{wrong}");
        }
        for wrong in ["0x5", "5x0", "8193x8192", "4294967295x4294967295"] {
            assert!(size(wrong).unwrap_err().contains("pixels"), "{wrong}");
        }
    }

    /// A pipe gives what it has, in pieces.
    #[test]
    fn a_frame_is_read_in_pieces() {
        struct Pieces(Vec<u8>);
        impl Read for Pieces {
            fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
                let n = to.len().min(3).min(self.0.len());
                to[..n].copy_from_slice(&self.0[..n]);
                self.0.drain(..n);
                Ok(n)
            }
        }
        let mut input = Pieces((0..25).collect());
        let mut frame = [0; 10];
        for (n, first) in [(10, 0), (10, 10), (5, 20), (0, 20)] {
            assert_eq!(fill(&mut input, &mut frame).unwrap(), n);
            assert_eq!(frame[0], first);
        }
    }
}
