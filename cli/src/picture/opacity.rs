//! Enlarges an opacity channel. No network has seen one, so it is interpolated.

use super::Samples;
use image::imageops::{FilterType, resize};
use image::{ImageBuffer, Luma};

/// `samples`, one channel of `from` (width, height), at `to`: bicubic (Keys 1981, a = −½).
///
/// Returns `None` where `samples` does not have the size of `from`.
pub(crate) fn enlarge(samples: Samples, from: (u32, u32), to: (u32, u32)) -> Option<Samples> {
    let filter = FilterType::CatmullRom;
    Some(match samples {
        Samples::Eight(v) => {
            let plane = ImageBuffer::<Luma<u8>, _>::from_raw(from.0, from.1, v)?;
            Samples::Eight(resize(&plane, to.0, to.1, filter).into_raw())
        }
        Samples::Sixteen(v) => {
            let plane = ImageBuffer::<Luma<u16>, _>::from_raw(from.0, from.1, v)?;
            Samples::Sixteen(resize(&plane, to.0, to.1, filter).into_raw())
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edge_stays_where_it_was() {
        let rows = 3;
        let plane: Vec<u8> = (0..rows).flat_map(|_| [0, 0, 0, 255, 255, 255]).collect();
        let Some(Samples::Eight(out)) = enlarge(Samples::Eight(plane), (6, rows), (24, rows * 4))
        else {
            panic!("another depth");
        };
        assert_eq!(out.len(), 24 * 12);
        for row in out.chunks(24) {
            assert!(row[..8].iter().all(|&v| v == 0));
            assert!(row[16..].iter().all(|&v| v == 255));
            assert!(row[11] < 128 && row[12] > 127, "{row:?}");
            assert_eq!(u16::from(row[11]) + u16::from(row[12]), 255);
        }
    }
}
