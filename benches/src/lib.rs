//! Benchmarks of latile's kernels.
//!
//! Lives here: the reader of `shapes/*.txt`, so that what is timed is data, and the operands of what
//! is timed. The benchmarks themselves are in `benches/`, side-by-side runs with other engines in `peers/`, results with their machine and
//! command in `record/`. Nothing here decides whether a test passes.
#![forbid(unsafe_code)]

use latile_cpu::steps::conv::ConvShape;

pub mod case;

/// Threads to time with: `LATILE_BENCH_THREADS`, or 1.
pub fn threads() -> usize {
    std::env::var("LATILE_BENCH_THREADS").ok().and_then(|t| t.parse().ok()).unwrap_or(1)
}

/// What is wrong with a shapes file.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "line {line}: {why}; a line is: name height width channels outputs kernel stride no|yes|phases"
)]
pub struct ShapeFileError {
    /// Line, from 1.
    pub line: usize,
    /// What was found.
    pub why: String,
}

/// The convolutions of `shapes/conv.txt`, with their names.
///
/// # Errors
/// [`ShapeFileError`] where the file that was built in is malformed.
pub fn conv_shapes() -> Result<Vec<(String, ConvShape)>, ShapeFileError> {
    parse_conv(include_str!("../shapes/conv.txt"))
}

fn parse_conv(text: &str) -> Result<Vec<(String, ConvShape)>, ShapeFileError> {
    let mut shapes = Vec::new();
    for (i, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let bad = |why: String| ShapeFileError { line: i + 1, why };
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [name, numbers @ .., upsample] = fields.as_slice() else {
            return Err(bad(format!("{} fields", fields.len())));
        };
        let numbers = numbers
            .iter()
            .map(|n| n.parse().map_err(|_| bad(format!("{n} is no number"))))
            .collect::<Result<Vec<usize>, _>>()?;
        let [h, w, c, n, kernel, stride] = numbers[..] else {
            return Err(bad(format!("{} numbers", numbers.len())));
        };
        let plain = ConvShape { stride: [stride; 2], ..ConvShape::same(h, w, c, n, kernel) };
        let shape = match (*upsample, [kernel, stride]) {
            ("yes", _) => ConvShape { upsample: true, ..plain },
            ("no", _) => plain,
            ("phases", [3, 1]) => ConvShape::doubling(h, w, c, n),
            ("phases", _) => return Err(bad("phases of another convolution than 3 1".to_owned())),
            (other, _) => return Err(bad(format!("{other} is none of no, yes and phases"))),
        };
        shapes.push(((*name).to_owned(), shape));
    }
    Ok(shapes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shapes_are_read() {
        let shapes = conv_shapes().unwrap();
        assert!(shapes.len() > 10);
        let (name, shape) = &shapes[0];
        assert_eq!(name, "unet-64-160-160");
        assert_eq!(shape.macs(), 64 * 64 * 160 * 160 * 9);
    }

    #[test]
    fn every_shape_runs_in_all_numbers() {
        use latile_cpu::{isa::Level, pool::Pool};
        let pool = Pool::new(2).unwrap();
        for (_, shape) in conv_shapes().unwrap() {
            let small = ConvShape { h: 4, w: 4, c: shape.c.min(20), n: shape.n.min(40), ..shape };
            for numbers in case::Numbers::ALL {
                let mut case = case::ConvCase::new(small, numbers, Level::best(), 2).unwrap();
                case.run(&pool).unwrap();
            }
        }
    }

    #[test]
    fn a_bad_line_is_named() {
        assert!(parse_conv("a 1 2 3 4 5 1 phases").unwrap_err().why.contains("phases"));
        assert_eq!(parse_conv("# x\na 1 2 3 4 3 1 maybe").unwrap_err().line, 2);
        assert!(parse_conv("a 1 2 3 4 3 x no").unwrap_err().why.contains("x is no number"));
        assert!(parse_conv("a 1 no").is_err());
    }
}
