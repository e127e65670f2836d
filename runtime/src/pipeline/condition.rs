//! The picture as the U-Net and the consistency with the input see it, at any size and from either kind of samples.
//!
//! Lives here: the check that a picture is what its size says, its values on the scale −1 to 1, and its
//! continuation by reflection beyond its right and lower edge. Never here: tiles, latents.

use super::plan::{PipelineError, RGB};
use super::upscale::{Picture, Pixels};

/// The picture, −1 to 1, continued by reflection.
pub(super) struct Condition<'a> {
    picture: Picture<'a>,
}

impl<'a> Condition<'a> {
    pub(super) fn new(
        picture: Picture<'a>,
        [height, width]: [usize; 2],
    ) -> Result<Self, PipelineError> {
        let found = match picture.pixels {
            Pixels::Rgb8(p) => p.len(),
            Pixels::Rgb16(p) => p.len(),
            Pixels::Unit(p) => p.len(),
        };
        let refuse = |why: String| Err(PipelineError::Picture(why));
        if [picture.height, picture.width] != [height, width] {
            return refuse(format!(
                "it is {}x{}, the run was planned for {width}x{height}",
                picture.width, picture.height
            ));
        }
        if found != height * width * RGB {
            return refuse(format!(
                "{found} samples were given for {width}x{height} pixels of {RGB}"
            ));
        }
        if let Pixels::Unit(p) = picture.pixels
            && let Some(i) = p.iter().position(|v| !v.is_finite())
        {
            let pixel = i / RGB;
            return refuse(format!(
                "the pixel at column {}, row {} is not finite",
                pixel % width,
                pixel / width
            ));
        }
        Ok(Self { picture })
    }

    pub(super) fn pixel(&self, y: usize, x: usize) -> [f32; RGB] {
        let Picture { width, height, .. } = self.picture;
        let start = (reflect(y, height) * width + reflect(x, width)) * RGB;
        std::array::from_fn(|c| match self.picture.pixels {
            Pixels::Rgb8(p) => 2.0 * (f32::from(p[start + c]) / 255.0) - 1.0,
            Pixels::Rgb16(p) => 2.0 * (f32::from(p[start + c]) / 65535.0) - 1.0,
            Pixels::Unit(p) => p[start + c],
        })
    }

    pub(super) fn row(&self, y: usize, to: &mut [f32]) {
        for (x, pixel) in to.chunks_exact_mut(RGB).enumerate() {
            pixel.copy_from_slice(&self.pixel(y, x));
        }
    }
}

/// Where position `i` lies in `0..len` when the edges are mirrors; the edge itself is not repeated, and a
/// single element is all there is.
fn reflect(i: usize, len: usize) -> usize {
    if len == 1 {
        return 0;
    }
    let folded = i % (2 * (len - 1));
    folded.min(2 * (len - 1) - folded)
}
