//! One picture made by both models, one over the other, and their difference.

use super::html::{base64, escape};
use latile_calibration::compare::Example;
use std::fmt::Write;

/// How many times the difference is enlarged.
pub(crate) const DIFFERENCE: i16 = 8;

/// A picture as PNG files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pictures {
    /// What the float model made.
    pub float: Vec<u8>,
    /// What the int8 model made.
    pub int8: Vec<u8>,
    /// Eight times their difference, around grey.
    pub difference: Vec<u8>,
}

impl Pictures {
    /// The pictures of `example`; `png` encodes width, height and 8-bit RGB samples.
    ///
    /// # Errors
    /// What `png` says.
    pub fn new<E>(
        example: &Example,
        mut png: impl FnMut(u32, u32, &[u8]) -> Result<Vec<u8>, E>,
    ) -> Result<Self, E> {
        // Invariant: a calibration's pictures are at most some thousand pixels wide.
        let (w, h) = (example.width as u32, example.height as u32);
        let difference: Vec<u8> = example
            .float
            .iter()
            .zip(&example.int8)
            .map(|(&a, &b)| (128 + DIFFERENCE * (i16::from(b) - i16::from(a))).clamp(0, 255) as u8)
            .collect();
        Ok(Self {
            float: png(w, h, &example.float)?,
            int8: png(w, h, &example.int8)?,
            difference: png(w, h, &difference)?,
        })
    }
}

pub(super) fn write(page: &mut String, pictures: &Pictures, example: &Example) {
    let image = |class: &str, what: &str, png: &[u8]| {
        format!(
            "<img class=\"{class}\" alt=\"{what}\" width=\"{}\" height=\"{}\" src=\"data:image/png;base64,{}\">",
            example.width,
            example.height,
            base64(png)
        )
    };
    let _ = writeln!(
        page,
        "<h2>Before and after</h2>\n<p class=\"note\">{}, {} × {}: the float model's result to the left of the line, the int8 model's to its right. Paired PSNR {:.2} dB.</p>",
        escape(&example.name),
        example.width,
        example.height,
        example.psnr_db
    );
    let _ = writeln!(
        page,
        "<div class=\"pair\">\n{}\n{}\n</div>\n<p><label>float <input id=\"line\" type=\"range\" min=\"0\" max=\"100\" value=\"50\"> int8</label></p>",
        image("under", "result of the float model", &pictures.float),
        image("over", "result of the int8 model", &pictures.int8),
    );
    page.push_str(
        "<script>\n(function(){var line=document.getElementById('line'),over=document.querySelector('.pair .over');\nfunction cut(){over.style.clipPath='inset(0 0 0 '+line.value+'%)';}\nline.addEventListener('input',cut);cut();})();\n</script>\n",
    );
    let _ = writeln!(
        page,
        "<h2>Difference × {DIFFERENCE}</h2>\n<p class=\"note\">int8 minus float, times {DIFFERENCE}, around mid-grey.</p>\n<div class=\"pair\">{}</div>",
        image("under", "difference of the two results", &pictures.difference),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    #[test]
    fn the_difference_is_enlarged_around_grey() {
        let example = Example {
            name: "a".into(),
            width: 2,
            height: 1,
            psnr_db: 30.0,
            float: vec![10, 20, 30, 0, 255, 128],
            int8: vec![10, 21, 28, 255, 0, 128],
        };
        let raw = |w: u32, h: u32, rgb: &[u8]| {
            assert_eq!((w, h), (2, 1));
            Ok::<_, Infallible>(rgb.to_vec())
        };
        let Ok(p) = Pictures::new(&example, raw);
        assert_eq!(p.difference, [128, 136, 112, 255, 0, 128]);
        assert_eq!((p.float, p.int8), (example.float, example.int8));
    }
}
