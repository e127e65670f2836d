//! The codebook of a VQ autoencoder: each pixel becomes the nearest row of a table.
//!
//! Nearest is the smallest `sum over c, from 0, of (z[c] - e[c])²`, fused, in the order of c
//! and in `f32`; of equals the first (van den Oord et al. 2017, eq. 1). Differences are squared
//! instead of expanded into |z|² + |e|² - 2ze: that costs one more instruction and does not
//! cancel, so another choice than in exact arithmetic needs two rows as near as rounding. A
//! pixel with a NaN, or none of whose distances is finite, becomes row 0.

use super::element::{Pointer, SharedOut};
use super::{Output, SharedMut, Source, StepError, check_len};
use crate::isa::{Isa, Level};
use crate::pool::Pool;
use crate::simd::{Kernel, LANES, Simd};

const STEP: &str = "codebook";

/// Pixels of a task.
const TASK_PIXELS: usize = 64;

/// `f32` elements of the packed table of `entries` rows of `channels`.
pub const fn packed_len(entries: usize, channels: usize) -> usize {
    entries.div_ceil(LANES) * LANES * channels
}

/// Packs a table `[entries, channels]` as [`codebook`] reads it, `[ceil(entries / 16)][channels]
/// [16]`, rows beyond the last infinitely far.
///
/// # Errors
/// [`StepError::Shape`] when the table is empty or not a whole number of rows,
/// [`StepError::Length`] when `packed` is not of [`packed_len`].
pub fn pack(table: &[f32], channels: usize, packed: &mut [f32]) -> Result<(), StepError> {
    let entries = check_table(table, channels)?;
    check_len(STEP, "packed table", packed.len(), packed_len(entries, channels))?;
    packed.fill(f32::INFINITY);
    for (entry, row) in table.chunks_exact(channels).enumerate() {
        for (c, &x) in row.iter().enumerate() {
            packed[(entry / LANES * channels + c) * LANES + entry % LANES] = x;
        }
    }
    Ok(())
}

/// The number of entries.
fn check_table(table: &[f32], channels: usize) -> Result<usize, StepError> {
    // Entries are numbered in `f32` lanes' bits, as `i32`.
    let limit = i32::MAX as usize - LANES;
    if channels == 0
        || table.is_empty()
        || !table.len().is_multiple_of(channels)
        || table.len() > limit
    {
        return Err(StepError::Shape {
            step: STEP,
            reason: format!(
                "a table of {} elements cannot be used as rows of {channels}",
                table.len()
            ),
        });
    }
    Ok(table.len() / channels)
}

/// The operands of one lookup.
#[derive(Debug)]
pub struct CodebookArgs<'a> {
    /// The table, `[entries, channels]`.
    pub table: &'a [f32],
    /// The same from [`pack`].
    pub packed: &'a [f32],
    /// Channels of a pixel and a row.
    pub channels: usize,
    /// The map, `[pixels, channels]`.
    pub x: Source<'a>,
    /// The nearest rows, `[pixels, channels]`.
    pub out: Output<'a>,
    /// Their numbers, `[pixels]`.
    pub indices: Option<&'a mut [u32]>,
}

/// Replaces each pixel by the nearest row of the table.
///
/// # Errors
/// [`StepError::Shape`] when the table or the map is not a whole number of rows,
/// [`StepError::Length`] when another operand has the wrong size, [`StepError::Worker`] when a
/// worker panicked.
pub fn codebook(level: Level, pool: &Pool, mut args: CodebookArgs<'_>) -> Result<(), StepError> {
    let channels = args.channels;
    let entries = check_table(args.table, channels)?;
    check_len(STEP, "packed table", args.packed.len(), packed_len(entries, channels))?;
    if !args.x.len().is_multiple_of(channels) {
        return Err(StepError::Shape {
            step: STEP,
            reason: format!(
                "a map of {} elements is not a whole number of pixels of {channels} channels",
                args.x.len()
            ),
        });
    }
    let pixels = args.x.len() / channels;
    check_len(STEP, "output", args.out.len(), args.x.len())?;
    if let Some(indices) = &args.indices {
        check_len(STEP, "indices", indices.len(), pixels)?;
    }
    let x = Pointer::of(args.x);
    let out = SharedOut::new(&mut args.out);
    let indices = args.indices.map(|i| SharedMut(i.as_mut_ptr()));
    let (table, packed) = (args.table, args.packed);
    pool.run(pixels.div_ceil(TASK_PIXELS), &|task, _| {
        let first = task * TASK_PIXELS;
        level.dispatch(Lookup {
            table,
            packed,
            channels,
            x,
            out,
            indices,
            first,
            last: (first + TASK_PIXELS).min(pixels),
        });
    })
    .map_err(|source| StepError::Worker { step: STEP, source })
}

/// Pixels `first..last`; the operands were checked.
struct Lookup<'a> {
    table: &'a [f32],
    packed: &'a [f32],
    channels: usize,
    x: Pointer,
    out: SharedOut,
    indices: Option<SharedMut<u32>>,
    first: usize,
    last: usize,
}

impl Kernel for Lookup<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // As many pixels share a block of the table as the registers hold.
        match (S::ISA, self.channels) {
            (Isa::Avx512, 3) => self.pixels::<S, 3, 4>(s),
            (Isa::Avx512, 4) => self.pixels::<S, 4, 4>(s),
            (Isa::Avx512, _) => self.pixels::<S, 0, 4>(s),
            (_, 3) => self.pixels::<S, 3, 2>(s),
            (_, 4) => self.pixels::<S, 4, 2>(s),
            _ => self.pixels::<S, 0, 2>(s),
        }
    }
}

impl Lookup<'_> {
    /// All of it, `P` pixels at a time. `C` is the number of channels, or 0 where it is not
    /// known to the compiler.
    #[inline(always)]
    fn pixels<S: Simd, const C: usize, const P: usize>(&self, s: S) {
        let mut pixel = self.first;
        while pixel < self.last {
            let count = (self.last - pixel).min(P);
            let found = self.nearest::<S, C, P>(s, pixel, count);
            for (p, &entry) in found[..count].iter().enumerate() {
                self.put(s, pixel + p, entry);
            }
            pixel += count;
        }
    }

    /// The nearest entries of `count <= P` pixels from `first`.
    #[inline(always)]
    fn nearest<S: Simd, const C: usize, const P: usize>(
        &self,
        s: S,
        first: usize,
        count: usize,
    ) -> [u32; P] {
        let channels = if C == 0 { self.channels } else { C };
        // Missing pixels repeat the last one.
        let pixels: [usize; P] = std::array::from_fn(|p| first + p.min(count - 1));
        let known: [[f32; C]; P] =
            std::array::from_fn(|p| std::array::from_fn(|c| self.element(pixels[p], c)));
        let mut nearest = [s.splat(f32::INFINITY); P];
        // Entry numbers, as bits in `f32` lanes: they are moved, never computed with.
        let mut entries = [s.splat(0.0); P];
        let lanes: [f32; LANES] = std::array::from_fn(|i| f32::from_bits(i as u32));
        let mut entry = s.to_bits(s.load_slice(&lanes));
        let step = s.splat_i(LANES as i32);
        for block in self.packed.chunks_exact(channels * LANES) {
            let mut sums = [s.splat(0.0); P];
            for c in 0..channels {
                let e = s.load_slice(&block[c * LANES..]);
                for p in 0..P {
                    let z = if C == 0 { self.element(pixels[p], c) } else { known[p][c] };
                    let d = s.sub(s.splat(z), e);
                    sums[p] = s.mul_add(d, d, sums[p]);
                }
            }
            let number = s.from_bits(entry);
            for p in 0..P {
                entries[p] = s.select_gt(nearest[p], sums[p], number, entries[p]);
                nearest[p] = s.select_gt(nearest[p], sums[p], sums[p], nearest[p]);
            }
            entry = s.add_i(entry, step);
        }
        let mut result = [0; P];
        for (p, result) in result.iter_mut().enumerate() {
            let (mut distance, mut number) = ([0.0; LANES], [0.0; LANES]);
            s.store_slice(nearest[p], &mut distance);
            s.store_slice(entries[p], &mut number);
            let mut best = (f32::INFINITY, 0);
            for (d, n) in distance.into_iter().zip(number.map(f32::to_bits)) {
                if d < best.0 || (d == best.0 && n < best.1) {
                    best = (d, n);
                }
            }
            *result = best.1;
        }
        result
    }

    #[inline(always)]
    fn element(&self, pixel: usize, c: usize) -> f32 {
        let at = pixel * self.channels + c;
        // SAFETY: the pixel is one of the map's.
        unsafe {
            match self.x {
                Pointer::F32(p) => *p.add(at),
                Pointer::F16(p) => (*p.add(at)).to_f32_const(),
            }
        }
    }

    /// Writes one pixel's row and number.
    #[inline(always)]
    fn put<S: Simd>(&self, s: S, pixel: usize, entry: u32) {
        let row = &self.table[entry as usize * self.channels..][..self.channels];
        for (i, x) in row.chunks(LANES).enumerate() {
            // SAFETY: the pixel is one of the output's, and this task's alone.
            unsafe {
                let at = pixel * self.channels + i * LANES;
                self.out.write(s, s.load_slice(x), at, x.len());
            }
        }
        if let Some(indices) = self.indices {
            // SAFETY: as above.
            unsafe { *indices.get().add(pixel) = entry };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::element::testing::{Tensor, assert_bits, computed, random};
    use super::*;

    /// The definition, as plain loops.
    fn nearest(z: &[f32], table: &[f32]) -> u32 {
        let mut best = (f32::INFINITY, 0);
        for (entry, row) in table.chunks(z.len()).enumerate() {
            let distance = z.iter().zip(row).fold(0.0_f32, |sum, (z, e)| {
                let d = z - e;
                d.mul_add(d, sum)
            });
            if distance < best.0 {
                best = (distance, entry as u32);
            }
        }
        best.1
    }

    struct Found {
        map: Vec<f32>,
        indices: Vec<u32>,
    }

    fn run(
        level: Level,
        threads: usize,
        table: &[f32],
        channels: usize,
        x: &Tensor,
        half: bool,
    ) -> Found {
        let mut packed = vec![f32::NAN; packed_len(table.len() / channels, channels)];
        pack(table, channels, &mut packed).unwrap();
        let len = x.source().len();
        let mut out = Tensor::new(&vec![f32::NAN; len], half);
        let mut indices = vec![u32::MAX; len / channels];
        let args = CodebookArgs {
            table,
            packed: &packed,
            channels,
            x: x.source(),
            out: out.output(),
            indices: Some(&mut indices),
        };
        codebook(level, &Pool::new(threads).unwrap(), args).unwrap();
        Found { map: out.widened(), indices }
    }

    #[test]
    fn same_rows_as_plain_loops() {
        for (entries, channels, pixels) in [
            (1, 1, 1),
            (15, 3, 5),
            (16, 4, 64),
            (17, 2, 65),
            (33, 5, 63),
            (500, 3, 131),
            (100, 16, 7),
            (40, 17, 10),
        ] {
            let mut table = random(entries * channels, 1);
            if entries > 20 {
                // Two rows the same: the first wins.
                let row = table[3 * channels..4 * channels].to_vec();
                table[19 * channels..20 * channels].copy_from_slice(&row);
            }
            for half in [false, true] {
                let mut z = random(pixels * channels, 2);
                // Some pixels are rows of the table.
                for (z, e) in z.chunks_mut(2 * channels).zip(table.chunks(channels)) {
                    z[..channels].copy_from_slice(e);
                }
                let x = Tensor::new(&z, half);
                let expected: Vec<u32> =
                    x.widened().chunks(channels).map(|z| nearest(z, &table)).collect();
                let map: Vec<f32> = expected
                    .iter()
                    .flat_map(|&i| &table[i as usize * channels..][..channels])
                    .copied()
                    .collect();
                for level in Level::float_levels() {
                    for threads in 1..=4 {
                        let found = run(level, threads, &table, channels, &x, half);
                        let what = format!("{entries}x{channels} {}", level.isa());
                        assert_eq!(found.indices, expected, "{what}");
                        assert_bits(&found.map, &Tensor::new(&map, half).widened(), &what);
                    }
                }
            }
        }
    }

    #[test]
    fn nearest_in_f64_but_for_ties_within_rounding() {
        let (entries, pixels) = (8192, 256);
        let table = random(entries * 3, 7);
        let x = Tensor::new(&random(pixels * 3, 8), false);
        let found = run(Level::best(), 2, &table, 3, &x, false);
        for (z, &index) in x.widened().chunks(3).zip(&found.indices) {
            let distance = |row: &[f32]| -> f64 {
                z.iter().zip(row).map(|(z, e)| (f64::from(*z) - f64::from(*e)).powi(2)).sum()
            };
            let least = table.chunks(3).map(distance).fold(f64::INFINITY, f64::min);
            let chosen = distance(&table[index as usize * 3..][..3]);
            assert!(chosen <= least * (1.0 + 4e-7) + 1e-14, "{chosen:e} {least:e}");
        }
    }

    #[test]
    fn damaged_pixels_get_the_first_row() {
        let table: Vec<f32> = (0..60).map(|i| i as f32).collect();
        for level in Level::float_levels() {
            for bad in [f32::NAN, f32::INFINITY, f32::MAX] {
                let x = Tensor::new(&[30.0, 31.0, 32.0, 40.0, bad, 40.0, 57.0, 58.0, 60.0], false);
                let found = run(level, 1, &table, 3, &x, false);
                assert_eq!(found.indices, [10, 0, 19]);
            }
        }
    }

    #[test]
    fn wrong_operands_are_refused() {
        let pool = Pool::new(1).unwrap();
        assert!(pack(&[], 3, &mut []).is_err());
        assert!(pack(&[0.0; 4], 3, &mut [0.0; 48]).is_err());
        assert!(pack(&[0.0; 3], 0, &mut []).is_err());
        assert!(pack(&[0.0; 3], 3, &mut [0.0; 47]).is_err());
        let run = |packed: usize, x: usize, out: usize, indices: usize| {
            let args = CodebookArgs {
                table: &[0.0; 6],
                packed: &vec![0.0; packed],
                channels: 3,
                x: Source::F32(&vec![0.0; x]),
                out: Output::F32(&mut vec![0.0; out]),
                indices: Some(&mut vec![0; indices]),
            };
            codebook(Level::best(), &pool, args)
        };
        run(48, 9, 9, 3).unwrap();
        run(48, 0, 0, 0).unwrap();
        for (error, says) in [
            (run(47, 9, 9, 3), "packed"),
            (run(48, 8, 8, 2), "pixels"),
            (run(48, 9, 8, 3), "output"),
            (run(48, 9, 9, 2), "indices"),
        ] {
            let error = error.unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    /// Not a test of results: prints the time of a lookup as large as a 64 x 64 latent's.
    #[test]
    #[ignore = "a measurement: cargo test --release -p latile-cpu --lib -- --ignored --nocapture"]
    fn time() {
        let table = random(8192 * 3, 7);
        let x = Tensor::new(&random(4096 * 3, 8), false);
        for level in Level::float_levels() {
            let start = computed();
            let runs = if level.isa() == Isa::Scalar { 1 } else { 20 };
            for _ in 0..runs {
                run(level, 1, &table, 3, &x, false);
            }
            println!("{}: {:.1} ms", level.isa(), (computed() - start) * 1e3 / f64::from(runs));
        }
    }
}
