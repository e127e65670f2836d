//! Overlapping tiles: where they lie, how much each counts, and their blending band by band.
//!
//! Tiles are independent and their seams are blended: cheap and approximate. Predictions of latents are
//! averaged as in LDM's patch sampling. Its weights jump where a tile begins, though, and more the nearer
//! that is to another border, which shows in pixels: decoded tiles are cross-faded instead.
//! All tiles of a grid have one size, so one session serves them all. A picture that fits into one tile is
//! not blended at all.

/// A tile's weight next to its border (LDM's `clip_min_weight`), so that it never vanishes.
const LOWEST_WEIGHT: f32 = 0.01;
/// The weight in the middle of a tile (LDM's `clip_max_weight`).
const HIGHEST_WEIGHT: f32 = 0.5;

/// The share of an overlap, at either end, that is not used of the tile that ends there: its decoder saw
/// padding where the picture goes on.
const HALO: f32 = 0.25;

/// How much the pixels of a tile count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// By the distance to the nearest border ([`Grid::weight`]).
    BorderDistance,
    /// One tile into the next, linearly over the middle half of their overlap; nothing at the borders of
    /// the picture ([`Axis::fade`], both directions multiplied).
    CrossFade,
}

/// Whether a frame is run as one tile or as several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tiling {
    /// As suits the picture and the memory at hand.
    #[default]
    Auto,
    /// One tile, the whole frame: the model's result as it is.
    Exact,
    /// Overlapping tiles where the picture is larger than one, blended: approximate, and of any size.
    Blend,
}

/// Why no grid can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TileError {
    /// The tile is smaller than the model can take.
    #[error(
        "a tile of {tile} latent pixels is too small: this model needs multiples of {multiple}"
    )]
    TooSmall {
        /// Tile side asked for.
        tile: usize,
        /// The model's multiple.
        multiple: usize,
    },
    /// Tiles would not advance.
    #[error(
        "an overlap of {overlap} latent pixels (in multiples of {multiple}) leaves nothing of a tile of {tile}; use a smaller overlap or a larger tile"
    )]
    Overlap {
        /// Overlap asked for.
        overlap: usize,
        /// Tile side asked for.
        tile: usize,
        /// The model's multiple.
        multiple: usize,
    },
}

/// Tiles along one axis. They begin at multiples of the model's `multiple`, so that all of them see the
/// picture at the same phase of its downsampling.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Axis {
    len: usize,
    tile: usize,
    starts: Vec<usize>,
}

impl Axis {
    /// Covers `len` (a multiple of `multiple`) with as few equal tiles of at most `tile` as overlap by at
    /// least `overlap`, then makes them as small as that number of tiles allows, and spreads them evenly.
    ///
    /// # Errors
    /// [`TileError`].
    pub fn new(
        len: usize,
        multiple: usize,
        tile: usize,
        overlap: usize,
    ) -> Result<Self, TileError> {
        debug_assert!(multiple > 0 && len > 0 && len.is_multiple_of(multiple));
        if tile < multiple {
            return Err(TileError::TooSmall { tile, multiple });
        }
        // In units of `multiple`.
        let (length, largest, shared) =
            (len / multiple, tile / multiple, overlap.div_ceil(multiple));
        if shared >= largest {
            return Err(TileError::Overlap { overlap, tile, multiple });
        }
        let (count, side) = if length <= largest {
            (1, length)
        } else {
            let count = (length - shared).div_ceil(largest - shared);
            (count, (length + (count - 1) * shared).div_ceil(count))
        };
        let starts =
            (0..count).map(|i| i * (length - side) / (count - 1).max(1) * multiple).collect();
        Ok(Self { len, tile: side * multiple, starts })
    }

    /// Length of the axis.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the axis has no extent, which never happens.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Side of every tile.
    #[must_use]
    pub fn tile(&self) -> usize {
        self.tile
    }

    /// Where tiles begin, ascending.
    #[must_use]
    pub fn starts(&self) -> &[usize] {
        &self.starts
    }

    /// The smallest overlap of neighbours, 0 for a single tile.
    #[must_use]
    pub fn overlap(&self) -> usize {
        let shared = self.starts.windows(2).map(|w| w[0] + self.tile - w[1]);
        shared.min().unwrap_or(0)
    }

    /// The weight of element `i` of tile `k`: 0 in the first quarter of an overlap, then rising to 1, which it
    /// reaches before the last quarter.
    #[must_use]
    pub fn fade(&self, k: usize, i: usize) -> f32 {
        let rise = |i: usize, first: usize, second: usize| {
            let overlap = self.starts[first] + self.tile - self.starts[second];
            let share = (i as f32 + 0.5) / overlap as f32;
            ((share - HALO) / (1.0 - 2.0 * HALO)).clamp(0.0, 1.0)
        };
        let before = if k > 0 { rise(i, k - 1, k) } else { 1.0 };
        let last = k + 1 == self.starts.len();
        before.min(if last { 1.0 } else { rise(self.tile - 1 - i, k, k + 1) })
    }

    fn scaled(&self, factor: usize) -> Self {
        Self {
            len: self.len * factor,
            tile: self.tile * factor,
            starts: self.starts.iter().map(|s| s * factor).collect(),
        }
    }

    /// Distance of element `i` of a tile to its nearer end, as a share of the tile's extent.
    fn distance(&self, i: usize) -> f32 {
        if self.tile < 2 {
            return HIGHEST_WEIGHT;
        }
        let share = i as f32 / (self.tile - 1) as f32;
        share.min(1.0 - share)
    }
}

/// Tiles over a picture, in rows from top to bottom, each from left to right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Vertical positions.
    pub rows: Axis,
    /// Horizontal positions.
    pub cols: Axis,
}

impl Grid {
    /// Covers `height × width`; see [`Axis::new`].
    ///
    /// # Errors
    /// [`TileError`].
    pub fn new(
        [height, width]: [usize; 2],
        multiple: usize,
        tile: usize,
        overlap: usize,
    ) -> Result<Self, TileError> {
        Ok(Self {
            rows: Axis::new(height, multiple, tile, overlap)?,
            cols: Axis::new(width, multiple, tile, overlap)?,
        })
    }

    /// One tile that covers `height × width`, both multiples of `multiple`.
    ///
    /// # Errors
    /// None that can happen; see [`Axis::new`].
    pub fn whole([height, width]: [usize; 2], multiple: usize) -> Result<Self, TileError> {
        Self::new([height, width], multiple, height.max(width), 0)
    }

    /// Number of tiles.
    #[must_use]
    pub fn tiles(&self) -> usize {
        self.rows.starts.len() * self.cols.starts.len()
    }

    /// Height and width of every tile.
    #[must_use]
    pub fn tile(&self) -> [usize; 2] {
        [self.rows.tile, self.cols.tile]
    }

    /// The same tiles on a grid `factor` times as fine.
    #[must_use]
    pub fn scaled(&self, factor: usize) -> Self {
        Self { rows: self.rows.scaled(factor), cols: self.cols.scaled(factor) }
    }

    /// The weight of pixel (y, x) of a tile: its distance to the nearest border as a share of the tile's
    /// extent in that direction, clipped to 0.01..0.5 (LDM's `delta_border` and `get_weighting`).
    #[must_use]
    pub fn weight(&self, y: usize, x: usize) -> f32 {
        let nearest = self.rows.distance(y).min(self.cols.distance(x));
        nearest.clamp(LOWEST_WEIGHT, HIGHEST_WEIGHT)
    }

    /// Bytes that blending maps of `channels` takes.
    #[must_use]
    pub fn blend_bytes(&self, channels: usize) -> usize {
        if self.tiles() == 1 {
            return 0;
        }
        (self.rows.tile * self.cols.len)
            .saturating_mul(channels + 1)
            .saturating_mul(size_of::<f32>())
    }
}

/// Weighted sums of tiles. It holds one row of tiles: rows that no later tile reaches are given away.
#[derive(Debug)]
pub struct Blend {
    grid: Grid,
    channels: usize,
    weights: Weights,
    /// Weighted values, `rows.tile × cols.len × channels`; empty for a single tile.
    sum: Vec<f32>,
    /// Weights, `rows.tile × cols.len`.
    weight: Vec<f32>,
    /// Tiles added.
    added: usize,
}

impl Blend {
    /// An empty sum. `None` where there is no memory for it.
    #[must_use]
    pub fn new(grid: &Grid, channels: usize, weights: Weights) -> Option<Self> {
        let zeros = |n: Option<usize>| {
            let n = n?;
            let mut v = Vec::new();
            v.try_reserve_exact(n).ok()?;
            v.resize(n, 0f32);
            Some(v)
        };
        let pixels = match grid.tiles() {
            1 => Some(0),
            _ => grid.rows.tile.checked_mul(grid.cols.len),
        };
        Some(Self {
            grid: grid.clone(),
            channels,
            weights,
            sum: zeros(pixels.and_then(|p| p.checked_mul(channels)))?,
            weight: zeros(pixels)?,
            added: 0,
        })
    }

    /// Adds the next tile of the grid (`tile × tile × channels`, NHWC). Each row of the picture that is now
    /// complete goes to `sink(y, row)`, in order, once.
    ///
    /// After the last tile the sum is empty again, and the grid may be gone through once more.
    ///
    /// # Panics
    /// Where `values` has another length.
    pub fn add(&mut self, values: &[f32], sink: &mut dyn FnMut(usize, &[f32])) {
        let (grid, channels) = (&self.grid, self.channels);
        let [tile_h, tile_w] = grid.tile();
        assert_eq!(values.len(), tile_h * tile_w * channels, "another tile");
        if grid.tiles() == 1 {
            for (y, row) in values.chunks_exact(tile_w * channels).enumerate() {
                sink(y, row);
            }
            return;
        }
        let across = grid.cols.starts.len();
        let (row, col) = (self.added / across, self.added % across);
        let width = grid.cols.len;
        let left = grid.cols.starts[col];
        for y in 0..tile_h {
            let fade = grid.rows.fade(row, y);
            let start = y * width + left;
            let weights = &mut self.weight[start..][..tile_w];
            let sums = &mut self.sum[start * channels..][..tile_w * channels];
            let line = &values[y * tile_w * channels..][..tile_w * channels];
            let pixels = sums.chunks_exact_mut(channels).zip(line.chunks_exact(channels));
            for (x, (weight, (sum, value))) in weights.iter_mut().zip(pixels).enumerate() {
                let w = match self.weights {
                    Weights::BorderDistance => grid.weight(y, x),
                    Weights::CrossFade => fade * grid.cols.fade(col, x),
                };
                *weight += w;
                for (s, v) in sum.iter_mut().zip(value) {
                    *s += w * v;
                }
            }
        }
        self.added = (self.added + 1) % grid.tiles();
        if col + 1 == across {
            let top = grid.rows.starts[row];
            let next = grid.rows.starts.get(row + 1).copied();
            self.release(top, next.unwrap_or(grid.rows.len), sink);
        }
    }

    /// Gives away rows `top..next` and moves what lies below to the front.
    fn release(&mut self, top: usize, next: usize, sink: &mut dyn FnMut(usize, &[f32])) {
        let width = self.grid.cols.len;
        let (done, line) = (next - top, width * self.channels);
        for (i, row) in self.sum[..done * line].chunks_exact_mut(line).enumerate() {
            let weights = &self.weight[i * width..][..width];
            for (pixel, w) in row.chunks_exact_mut(self.channels).zip(weights) {
                for value in pixel {
                    *value /= w;
                }
            }
            sink(top + i, row);
        }
        for (buffer, len) in [(&mut self.sum, done * line), (&mut self.weight, done * width)] {
            buffer.copy_within(len.., 0);
            let kept = buffer.len() - len;
            buffer[kept..].fill(0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn axis_strategy() -> impl Strategy<Value = (usize, usize, usize, usize)> {
        (1usize..9, 1usize..60, 1usize..20).prop_flat_map(|(multiple, units, tile)| {
            let tile = tile * multiple;
            (Just(units * multiple), Just(multiple), Just(tile), 0..=(tile - multiple))
        })
    }

    proptest! {
        #[test]
        fn tiles_cover_overlap_and_fit((len, multiple, tile, overlap) in axis_strategy()) {
            let a = Axis::new(len, multiple, tile, overlap).unwrap();
            prop_assert!(a.tile() <= tile && a.tile().is_multiple_of(multiple));
            prop_assert_eq!(a.starts()[0], 0);
            prop_assert_eq!(a.starts().last().unwrap() + a.tile(), len);
            prop_assert!(a.starts().iter().all(|s| s.is_multiple_of(multiple)));
            for w in a.starts().windows(2) {
                prop_assert!(w[1] > w[0]);
                prop_assert!(w[0] + a.tile() >= w[1] + overlap);
            }
            prop_assert_eq!(a.starts().len() == 1, len <= tile);
            // As few tiles as the largest allowed size needs.
            let shared = overlap.div_ceil(multiple) * multiple;
            if len > tile {
                let fewer = a.starts().len() - 1;
                prop_assert!(fewer * tile - (fewer - 1) * shared < len);
            }
        }

        #[test]
        fn blending_equal_tiles_gives_back_the_picture(
            (h, m, tile, overlap) in axis_strategy(), wide in 1usize..20, channels in 1usize..4, factor in 1usize..3,
            fade: bool,
        ) {
            let grid = Grid::new([h, wide * m], m, tile, overlap).unwrap().scaled(factor);
            let (h, w) = (grid.rows.len(), grid.cols.len());
            let picture: Vec<f32> = (0..h * w * channels).map(|i| (i as f32 * 0.7).sin()).collect();
            let weights = if fade { Weights::CrossFade } else { Weights::BorderDistance };
            let mut blend = Blend::new(&grid, channels, weights).unwrap();
            // Twice: a blend is empty again after its last tile.
            for _ in 0..2 {
                let mut rows = Vec::new();
                for &top in grid.rows.starts() {
                    for &left in grid.cols.starts() {
                        let values: Vec<f32> = (0..grid.rows.tile())
                            .flat_map(|y| picture[((top + y) * w + left) * channels..][..grid.cols.tile() * channels].to_vec())
                            .collect();
                        blend.add(&values, &mut |y, row| {
                            assert_eq!(rows.len(), y * w * channels);
                            rows.extend_from_slice(row);
                        });
                    }
                }
                prop_assert_eq!(rows.len(), picture.len());
                for (a, b) in rows.iter().zip(&picture) {
                    prop_assert!((a - b).abs() <= 4e-6, "{} {}", a, b);
                }
            }
        }
    }

    proptest! {
        /// Tiles of different brightness: from pixel to pixel no more changes than the ramps have, at the
        /// borders of the picture too.
        #[test]
        fn a_cross_fade_has_no_jumps(
            h in 5usize..30, w in 5usize..30, tile in 3usize..12, overlap in 1usize..3, levels in prop::collection::vec(0f32..1.0, 7),
        ) {
            let grid = Grid::new([h, w], 1, tile, overlap.min(tile / 2)).unwrap().scaled(4);
            let mut blend = Blend::new(&grid, 1, Weights::CrossFade).unwrap();
            let mut out = Vec::new();
            for k in 0..grid.tiles() {
                let values = vec![levels[k % levels.len()]; grid.rows.tile() * grid.cols.tile()];
                blend.add(&values, &mut |_, row| out.extend_from_slice(row));
            }
            let overlaps = [grid.rows.overlap(), grid.cols.overlap()].map(|o| if o == 0 { 1000 } else { o });
            // A ramp of half an overlap; where three tiles meet in one, sums of weights vary as well.
            let most = 2.0 * 2.0 / *overlaps.iter().min().unwrap() as f32 + 1e-5;
            let width = w * 4;
            for i in 0..out.len() {
                for next in [(i % width + 1 < width).then_some(i + 1), (i + width < out.len()).then_some(i + width)] {
                    let Some(next) = next else { continue };
                    prop_assert!((out[i] - out[next]).abs() <= most, "{} {} {}", out[i], out[next], most);
                }
            }
        }
    }

    #[test]
    fn a_fade_leaves_out_the_halo() {
        let axis = Axis::new(24, 1, 16, 8).unwrap();
        let [first, second]: [Vec<f32>; 2] =
            std::array::from_fn(|k| (0..16).map(|i| axis.fade(k, i)).collect());
        assert_eq!(first[..8], [1.0; 8]);
        assert_eq!(first[8..], [1.0, 1.0, 0.875, 0.625, 0.375, 0.125, 0.0, 0.0]);
        assert_eq!(second[..8], [0.0, 0.0, 0.125, 0.375, 0.625, 0.875, 1.0, 1.0]);
        assert_eq!(second[8..], [1.0; 8]);
    }

    #[test]
    fn weights_are_border_distances() {
        let grid = Grid::new([9, 5], 1, 9, 0).unwrap();
        assert_eq!(grid.weight(0, 2), 0.01);
        assert_eq!(grid.weight(4, 2), 0.5);
        assert_eq!(grid.weight(2, 1), 0.25);
        assert_eq!(grid.weight(1, 2), 0.125);
        let one = Grid::new([1, 1], 1, 4, 0).unwrap();
        assert_eq!(one.weight(0, 0), 0.5);
    }

    #[test]
    fn a_picture_just_beyond_a_tile_gets_smaller_tiles() {
        let a = Axis::new(136, 8, 128, 16).unwrap();
        assert_eq!((a.tile(), a.starts()), (80, &[0, 56][..]));
        assert_eq!(a.overlap(), 24);
    }

    #[test]
    fn impossible_tiles_are_refused() {
        let small = Axis::new(64, 8, 7, 0).unwrap_err();
        assert_eq!(small, TileError::TooSmall { tile: 7, multiple: 8 });
        let shared = Axis::new(64, 8, 16, 9).unwrap_err();
        assert!(shared.to_string().contains("smaller overlap"), "{shared}");
    }
}
