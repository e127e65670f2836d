//! `latile compare`: how near one picture is to another.

use crate::console::{remark, say, say_json};
use crate::exit::{QualityError, UsageError};
use crate::picture::{self, Measures, PictureError};
use argh::FromArgs;
use std::path::PathBuf;

/// Measures picture B against picture A: PSNR over RGB and over luma, SSIM.
#[derive(FromArgs, Debug)]
#[argh(
    subcommand,
    name = "compare",
    help_triggers("-h", "--help"),
    note = "Luma is that of BT.601 in studio range. SSIM has an 11x11 Gaussian window with sigma 1.5,\nas scikit-image's. Opacity is not looked at."
)]
pub(crate) struct Args {
    /// the picture that is right
    #[argh(positional, arg_name = "A")]
    pub(crate) a: PathBuf,

    /// the picture that is measured
    #[argh(positional, arg_name = "B")]
    pub(crate) b: PathBuf,

    /// fail with exit code 7 where the PSNR over RGB is below this many dB
    #[argh(option, arg_name = "db")]
    pub(crate) min_psnr: Option<f64>,

    /// print one JSON object
    #[argh(switch)]
    pub(crate) json: bool,
}

/// What `--json` prints. JSON knows no infinity: identical pictures have no PSNR.
#[derive(serde::Serialize)]
struct Report {
    width: u32,
    height: u32,
    identical: bool,
    psnr_rgb_db: Option<f64>,
    psnr_y_db: Option<f64>,
    ssim_rgb: Option<f64>,
    ssim_y: Option<f64>,
}

/// Measures and prints.
///
/// # Errors
/// Pictures that cannot be read, are refused, or differ in size; [`QualityError`] below `--min-psnr`.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    if args.min_psnr.is_some_and(|db| !db.is_finite()) {
        return Err(UsageError("--min-psnr is a number of dB, such as 30".to_owned()).into());
    }
    let a = picture::read(&args.a)?;
    let b = picture::read(&args.b)?;
    if (a.width, a.height) != (b.width, b.height) {
        return Err(PictureError::Refused {
            path: args.b.clone(),
            why: format!(
                "it has {}x{} pixels, {} has {}x{}; only pictures of one size can be compared",
                b.width,
                b.height,
                args.a.display(),
                a.width,
                a.height
            ),
        }
        .into());
    }
    if a.opacity != b.opacity {
        remark("latile: the pictures differ in opacity, which is not measured");
    }
    let m = picture::measure(&a, &b);
    if args.json {
        let finite = |v: f64| v.is_finite().then_some(v);
        say_json(&Report {
            width: a.width,
            height: a.height,
            identical: m.identical,
            psnr_rgb_db: finite(m.psnr_rgb),
            psnr_y_db: finite(m.psnr_y),
            ssim_rgb: m.ssim_rgb,
            ssim_y: m.ssim_y,
        })?;
    } else {
        say(&describe(&m))?;
    }
    match args.min_psnr {
        Some(least) if m.psnr_rgb < least => Err(QualityError(format!(
            "PSNR of {} is {:.2} dB, below the {least} dB asked for",
            args.b.display(),
            m.psnr_rgb
        ))
        .into()),
        _ => Ok(()),
    }
}

fn describe(m: &Measures) -> String {
    let ssim = |v: Option<f64>| {
        v.map_or("none, a side is below 11 pixels".to_owned(), |v| format!("{v:.4}"))
    };
    let head = if m.identical {
        "identical".to_owned()
    } else {
        format!("PSNR  RGB {:.2} dB, luma {:.2} dB", m.psnr_rgb, m.psnr_y)
    };
    format!("{head}\nSSIM  RGB {}, luma {}", ssim(m.ssim_rgb), ssim(m.ssim_y))
}
