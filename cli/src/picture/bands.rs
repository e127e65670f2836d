//! A JPEG written as its rows come. The encoder asks for pixels, eight rows after eight rows, where a run
//! gives them: so it has a thread of its own, which waits for each band.

use image::codecs::jpeg::JpegEncoder;
use image::{GenericImageView, ImageEncoder, ImageError, Rgb};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

/// Rows that the encoder takes at a time: it goes over the picture in blocks of 8 × 8, each pixel once.
pub(crate) const ROWS: usize = 8;
/// Bands there are: one that fills, one that is encoded.
pub(crate) const COUNT: usize = 2;
const RGB: usize = 3;

/// A JPEG under way.
#[derive(Debug)]
pub(crate) struct Bands {
    filling: Vec<u8>,
    full: Option<SyncSender<Vec<u8>>>,
    empty: Receiver<Vec<u8>>,
    thread: Option<JoinHandle<Result<(), ImageError>>>,
    band: usize,
}

impl Bands {
    /// Begins a picture of `width × height` pixels in `file`.
    ///
    /// # Errors
    /// Where there can be no thread.
    pub(crate) fn new(
        file: File,
        (width, height): (u32, u32),
        quality: u8,
        icc: Option<Vec<u8>>,
    ) -> io::Result<Self> {
        let band = width as usize * RGB * ROWS;
        let (full, to_encode) = sync_channel(1);
        let (to_fill, empty) = sync_channel(COUNT);
        for _ in 1..COUNT {
            // Invariant: the channel has room for all of them, and its other end is here.
            let _ = to_fill.send(Vec::with_capacity(band));
        }
        let encode = move || {
            let aborted = Rc::new(Cell::new(false));
            let mut out = Outlet { out: BufWriter::new(file), aborted: Rc::clone(&aborted) };
            let view = View {
                size: (width, height),
                full: to_encode,
                empty: to_fill,
                at: RefCell::new((0, Vec::new())),
                aborted,
            };
            let mut encoder = JpegEncoder::new_with_quality(&mut out, quality);
            if let Some(icc) = icc {
                // A profile too long for the format is left out; the pixels are right without.
                let _ = encoder.set_icc_profile(icc);
            }
            encoder.encode_image(&view)?;
            Ok(out.flush()?)
        };
        Ok(Self {
            filling: Vec::with_capacity(band),
            full: Some(full),
            empty,
            thread: Some(std::thread::Builder::new().name("latile-jpeg".to_owned()).spawn(encode)?),
            band,
        })
    }

    /// Takes the next row, `width × 3` bytes.
    ///
    /// # Errors
    /// Where an earlier row could not be written.
    pub(crate) fn row(&mut self, row: &[u8]) -> io::Result<()> {
        self.filling.extend_from_slice(row);
        if self.filling.len() >= self.band { self.send() } else { Ok(()) }
    }

    fn send(&mut self) -> io::Result<()> {
        let band = std::mem::take(&mut self.filling);
        let sent = self.full.as_ref().is_some_and(|full| full.send(band).is_ok());
        match self.empty.recv() {
            Ok(mut band) if sent => {
                band.clear();
                self.filling = band;
                Ok(())
            }
            // The thread has ended early, and knows why.
            _ => Err(self.join().err().unwrap_or_else(|| io::Error::other("the encoder ended"))),
        }
    }

    /// Ends the picture, once it has all its rows.
    ///
    /// # Errors
    /// Where something could not be written.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        if !self.filling.is_empty() {
            let band = std::mem::take(&mut self.filling);
            // A thread that does not take it says why.
            let _ = self.full.as_ref().map(|full| full.send(band));
        }
        self.join()
    }

    fn join(&mut self) -> io::Result<()> {
        self.full = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(Err(ImageError::IoError(e)))) => Err(e),
            Some(Ok(Err(other))) => Err(io::Error::other(other)),
            Some(Err(_)) => Err(io::Error::other("the JPEG encoder failed")),
            Some(Ok(Ok(()))) | None => Ok(()),
        }
    }
}

impl Drop for Bands {
    fn drop(&mut self) {
        // Where the picture was not finished its file goes away, and with it whatever went wrong.
        let _ = self.join();
    }
}

/// The file, until the rows stop coming.
struct Outlet {
    out: BufWriter<File>,
    aborted: Rc<Cell<bool>>,
}

impl Write for Outlet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.aborted.get() {
            return Err(io::Error::other("the picture has fewer rows than it was to have"));
        }
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.aborted.get() { self.write(&[]).map(|_| ()) } else { self.out.flush() }
    }
}

/// The picture as the encoder sees it: a band at a time.
struct View {
    size: (u32, u32),
    full: Receiver<Vec<u8>>,
    empty: SyncSender<Vec<u8>>,
    /// The number of the next band, and the one before it.
    at: RefCell<(usize, Vec<u8>)>,
    aborted: Rc<Cell<bool>>,
}

impl GenericImageView for View {
    type Pixel = Rgb<u8>;

    fn dimensions(&self) -> (u32, u32) {
        self.size
    }

    fn get_pixel(&self, x: u32, y: u32) -> Rgb<u8> {
        let (x, y) = (x as usize, y as usize);
        let mut at = self.at.borrow_mut();
        let (next, band) = &mut *at;
        while y / ROWS >= *next {
            // Nobody fills it again where the run has ended.
            let done = std::mem::take(band);
            if *next > 0 {
                let _ = self.empty.send(done);
            }
            match self.full.recv() {
                Ok(more) => *band = more,
                Err(_) => self.aborted.set(true),
            }
            *next += 1;
        }
        let start = (y % ROWS * self.size.0 as usize + x) * RGB;
        match band.get(start..start + RGB) {
            Some(&[r, g, b]) => Rgb([r, g, b]),
            _ => {
                self.aborted.set(true);
                Rgb([0; RGB])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::ExtendedColorType;

    fn rgb(w: usize, h: usize) -> Vec<u8> {
        (0..w * h)
            .flat_map(|i| [(i % w * 7) as u8, (i / w * 5) as u8, (i * i % 251) as u8])
            .collect()
    }

    #[test]
    fn the_file_is_that_of_a_whole_picture() {
        for (w, h) in [(1, 1), (8, 8), (9, 7), (31, 24), (16, 17), (50, 41)] {
            let pixels = rgb(w, h);
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.jpg");
            let size = (w as u32, h as u32);
            let icc = vec![7; 200];
            let mut bands =
                Bands::new(File::create(&path).unwrap(), size, 90, Some(icc.clone())).unwrap();
            pixels.chunks(w * 3).for_each(|row| bands.row(row).unwrap());
            bands.finish().unwrap();
            let mut expected = Vec::new();
            let mut encoder = JpegEncoder::new_with_quality(&mut expected, 90);
            encoder.set_icc_profile(icc).unwrap();
            encoder.write_image(&pixels, size.0, size.1, ExtendedColorType::Rgb8).unwrap();
            assert!(std::fs::read(&path).unwrap() == expected, "{w}x{h}");
        }
    }

    #[test]
    fn a_picture_without_its_last_rows_is_none() {
        for rows in [0, 3, 8, 20] {
            let file = tempfile::tempfile().unwrap();
            let mut bands = Bands::new(file, (16, 24), 90, None).unwrap();
            let pixels = rgb(16, rows);
            pixels.chunks(16 * 3).for_each(|row| bands.row(row).unwrap());
            let error = bands.finish().unwrap_err().to_string();
            assert!(error.contains("fewer rows"), "{rows}: {error}");
        }
        // Given up in the middle, it ends.
        let mut bands = Bands::new(tempfile::tempfile().unwrap(), (16, 9000), 90, None).unwrap();
        rgb(16, 20).chunks(16 * 3).for_each(|row| bands.row(row).unwrap());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_ends_it() {
        let file = File::options().write(true).open("/dev/full").unwrap();
        let mut bands = Bands::new(file, (2000, 2000), 95, None).unwrap();
        let row: Vec<u8> = (0..6000).map(|i| (i * i % 251) as u8).collect();
        let error = (0..2000).find_map(|_| bands.row(&row).err()).expect("the disk is full");
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(bands.row(&[0; 6000 * 8]).is_err());
    }
}
