//! How near one picture is to another: PSNR and SSIM, on the scale 0 to 255.
//!
//! Works row by row, so that memory does not grow with the height.

use super::{Picture, Samples};

/// Rows and columns of SSIM's window.
const WINDOW: usize = 11;
/// Its half.
const REACH: usize = WINDOW / 2;

/// The distances between two pictures of one size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Measures {
    /// Whether every sample is the same.
    pub(crate) identical: bool,
    /// Peak signal-to-noise ratio over red, green and blue, in dB; infinite for identical pictures.
    pub(crate) psnr_rgb: f64,
    /// The same over luma.
    pub(crate) psnr_y: f64,
    /// Mean of the three channels' structural similarity; `None` where a side is below 11 pixels.
    pub(crate) ssim_rgb: Option<f64>,
    /// Structural similarity of luma.
    pub(crate) ssim_y: Option<f64>,
}

/// Luma of BT.601 in studio range, 16 to 235, as the super-resolution literature measures it.
fn luma(r: f64, g: f64, b: f64) -> f64 {
    16.0 + (65.481 * r + 128.553 * g + 24.966 * b) / 255.0
}

/// Measures `a` against `b`, which have the same size. Opacity is not looked at.
pub(crate) fn measure(a: &Picture, b: &Picture) -> Measures {
    debug_assert_eq!((a.width, a.height), (b.width, b.height));
    let (width, height) = (a.width as usize, a.height as usize);
    let mut ssim: [Ssim; 4] = std::array::from_fn(|_| Ssim::new(width));
    let mut rows = [[const { Vec::new() }; 4], [const { Vec::new() }; 4]];
    let (mut rgb_error, mut y_error) = (0.0, 0.0);
    for y in 0..height {
        planes(&a.rgb, y, width, &mut rows[0]);
        planes(&b.rgb, y, width, &mut rows[1]);
        let [ra, rb] = &rows;
        for c in 0..4 {
            let squared: f64 = ra[c].iter().zip(&rb[c]).map(|(p, q)| (p - q) * (p - q)).sum();
            if c < 3 {
                rgb_error += squared;
            } else {
                y_error += squared;
            }
            ssim[c].row(&ra[c], &rb[c]);
        }
    }
    let pixels = (width * height) as f64;
    let psnr = |mse: f64| 10.0 * (255.0 * 255.0 / mse).log10();
    let [r, g, b, y] = ssim.map(|s| s.mean());
    Measures {
        identical: rgb_error == 0.0,
        psnr_rgb: psnr(rgb_error / (3.0 * pixels)),
        psnr_y: psnr(y_error / pixels),
        ssim_rgb: r.zip(g).zip(b).map(|((r, g), b)| (r + g + b) / 3.0),
        ssim_y: y,
    }
}

/// Row `y` as four planes: red, green, blue, luma.
fn planes(samples: &Samples, y: usize, width: usize, out: &mut [Vec<f64>; 4]) {
    out.iter_mut().for_each(Vec::clear);
    for x in 0..width {
        let at = (y * width + x) * 3;
        let [r, g, b] = std::array::from_fn(|c| samples.on_255(at + c));
        for (plane, v) in out.iter_mut().zip([r, g, b, luma(r, g, b)]) {
            plane.push(v);
        }
    }
}

/// Structural similarity (Wang et al. 2004, eq. 13) of one plane, fed row by row: Gaussian window of 11 × 11
/// with σ 1.5, K₁ 0.01, K₂ 0.03, biased moments, windows inside the picture only. scikit-image's
/// `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)` is the same.
struct Ssim {
    weights: [f64; WINDOW],
    /// Of each of the last [`WINDOW`] rows, as a ring: the horizontally weighted moments of a, b, a², b², ab.
    ring: Vec<[Vec<f64>; 5]>,
    rows: usize,
    sum: f64,
    count: u64,
}

impl Ssim {
    fn new(width: usize) -> Self {
        let mut weights: [f64; WINDOW] = std::array::from_fn(|i| {
            let d = i as f64 - REACH as f64;
            (-d * d / (2.0 * 1.5 * 1.5)).exp()
        });
        let total: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= total);
        let columns = (width + 1).saturating_sub(WINDOW);
        let row = || std::array::from_fn(|_| vec![0.0; columns]);
        Self { weights, ring: (0..WINDOW).map(|_| row()).collect(), rows: 0, sum: 0.0, count: 0 }
    }

    fn row(&mut self, a: &[f64], b: &[f64]) {
        let at = self.rows % WINDOW;
        let columns = self.ring[at][0].len();
        for x in 0..columns {
            let mut m = [0.0; 5];
            for (i, w) in self.weights.iter().enumerate() {
                let (p, q) = (a[x + i], b[x + i]);
                for (m, v) in m.iter_mut().zip([p, q, p * p, q * q, p * q]) {
                    *m += w * v;
                }
            }
            for (plane, m) in self.ring[at].iter_mut().zip(m) {
                plane[x] = m;
            }
        }
        self.rows += 1;
        if self.rows >= WINDOW {
            for x in 0..columns {
                // The oldest row is the one that the next would replace.
                let moments: [f64; 5] = std::array::from_fn(|k| {
                    (0..WINDOW)
                        .map(|i| self.weights[i] * self.ring[(self.rows + i) % WINDOW][k][x])
                        .sum()
                });
                self.sum += similarity(moments);
                self.count += 1;
            }
        }
    }

    fn mean(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

fn similarity([ma, mb, aa, bb, ab]: [f64; 5]) -> f64 {
    const C1: f64 = (0.01 * 255.0) * (0.01 * 255.0);
    const C2: f64 = (0.03 * 255.0) * (0.03 * 255.0);
    let (va, vb, cov) = (aa - ma * ma, bb - mb * mb, ab - ma * mb);
    ((2.0 * ma * mb + C1) * (2.0 * cov + C2)) / ((ma * ma + mb * mb + C1) * (va + vb + C2))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two pictures whose numbers scikit-image 0.26 was asked for; see the script beside the expectations.
    fn pair(width: u32, height: u32) -> (Picture, Picture) {
        let picture = |k: u32, amount: u32| {
            let mut rgb = Vec::new();
            for y in 0..height {
                for x in 0..width {
                    for c in 0..3 {
                        let base = (x * 7 + y * 5 + c * 40 + x * y / 9) % 230;
                        let noise = (x * 31 + y * 17 + c * 11 + x * y * k) % amount;
                        rgb.push((base + noise) as u8);
                    }
                }
            }
            Picture { width, height, rgb: Samples::Eight(rgb), opacity: None, icc: None }
        };
        (picture(3, 5), picture(7, 23))
    }

    #[test]
    fn scikit_image_agrees() {
        // import numpy as np; from skimage.metrics import *
        // y, x, c = np.mgrid[0:37, 0:53, 0:3]
        // f = lambda k, n: ((x*7+y*5+c*40+x*y//9) % 230 + (x*31+y*17+c*11+x*y*k) % n).astype(np.uint8)
        // Y = lambda p: 16 + (p.astype(float) @ [65.481, 128.553, 24.966]) / 255
        // s = dict(data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        // a, b = f(3, 5), f(7, 23)
        // peak_signal_noise_ratio(a, b), peak_signal_noise_ratio(Y(a), Y(b), data_range=255),
        // structural_similarity(a, b, channel_axis=2, **s), structural_similarity(Y(a), Y(b), **s)
        let (a, b) = pair(53, 37);
        let m = measure(&a, &b);
        assert!(!m.identical);
        let close = |found: f64, expected: f64| {
            assert!((found - expected).abs() < 1e-9, "{found} {expected}");
        };
        close(m.psnr_rgb, 26.958524589028446);
        close(m.psnr_y, 29.68436370674473);
        close(m.ssim_rgb.unwrap(), 0.9560128460413648);
        close(m.ssim_y.unwrap(), 0.9845906986776455);
    }

    #[test]
    fn a_picture_equals_itself_at_any_depth() {
        let (a, _) = pair(20, 11);
        let Samples::Eight(v) = &a.rgb else { panic!("eight bits were written") };
        let deep = Picture {
            rgb: Samples::Sixteen(v.iter().map(|&v| u16::from(v) * 257).collect()),
            ..a.clone()
        };
        let m = measure(&a, &deep);
        assert!(m.identical);
        assert_eq!(m.psnr_y, f64::INFINITY);
        assert!((m.ssim_rgb.unwrap() - 1.0).abs() < 1e-12);
        let (small, other) = pair(10, 40);
        assert_eq!(measure(&small, &other).ssim_y, None, "no window fits");
    }
}
