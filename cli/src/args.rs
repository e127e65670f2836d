//! The command line as a whole. Each command's own arguments stand with the command.

use crate::command::{bench, compare, devices, inspect, plan, run, upscale};
use argh::{EarlyExit, FromArgs};
use std::ffi::OsString;

#[cfg(feature = "export")]
use crate::command::{calibrate, export};

/// Makes pictures four times as large with latent diffusion models, tile by tile, within little memory.
#[derive(FromArgs, Debug)]
#[argh(
    help_triggers("-h", "--help"),
    example = "{command_name} upscale photo.jpg photo-4x.png\n{command_name} export ldm-folder -o ldm.latile --precision f16\n{command_name} upscale photo.jpg photo-4x.png --model ldm.latile --steps 15",
    note = "Results go to stdout, everything else to stderr. LATILE_ISA=scalar|avx2|avxvnni|avx512|avx512vnni|neon|dotprod|i8mm\nlimits the instruction set, LATILE_LOG=error|warn|info|debug sets what is logged.",
    error_code(0, "done; the output is in place"),
    error_code(1, "failure without a code of its own"),
    error_code(2, "the command line is wrong"),
    error_code(3, "a picture is refused: damaged, too large, or not a picture"),
    error_code(4, "a model or checkpoint is refused: damaged, unsupported, or not one"),
    error_code(5, "the memory, or what --memory allows, does not suffice"),
    error_code(6, "a file cannot be read or written, or exists and --overwrite is not given"),
    error_code(7, "compare: the quality asked for is not reached"),
    error_code(8, "a resume file is refused: of another run, damaged, or not one"),
    error_code(130, "interrupted; no output was written, of a stream of frames whole ones only"),
    error_code(141, "whoever read the frames has closed the pipe; nothing is said")
)]
struct Latile {
    /// print the version
    #[argh(switch, short = 'V')]
    version: bool,

    #[argh(subcommand)]
    command: Option<Command>,
}

/// What to do.
#[derive(FromArgs, Debug)]
#[argh(subcommand)]
// There is one of it, for as long as the program runs.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Command {
    Upscale(upscale::Args),
    Plan(plan::Args),
    #[cfg(feature = "export")]
    Calibrate(calibrate::Args),
    #[cfg(feature = "export")]
    Export(export::Args),
    Inspect(inspect::Args),
    Run(run::Args),
    Bench(bench::Args),
    Compare(compare::Args),
    Devices(devices::Args),
}

/// What the command line comes to.
#[derive(Debug)]
pub(crate) enum Parsed {
    /// A command.
    Run(Box<Command>),
    /// Something asked for, such as help: text for stdout.
    Show(String),
    /// A mistake: text for stderr.
    Wrong(String),
}

/// Reads the command line, the program's name first.
pub(crate) fn parse(args: impl Iterator<Item = OsString>) -> Parsed {
    let mut words = Vec::new();
    for arg in args.skip(1) {
        match arg.into_string() {
            Ok(word) => words.push(word),
            Err(arg) => {
                return Parsed::Wrong(format!(
                    "latile: argument {} is not UTF-8; rename the file, or go to its folder and use a name that is",
                    arg.display()
                ));
            }
        }
    }
    let words = split_equals(words);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match Latile::from_args(&["latile"], &words) {
        Ok(Latile { version: true, .. }) => Parsed::Show(version()),
        Ok(Latile { command: Some(command), .. }) => Parsed::Run(Box::new(command)),
        Ok(Latile { command: None, .. }) => {
            Parsed::Wrong("latile: no command is given; see latile --help".to_owned())
        }
        Err(EarlyExit { output, status: Ok(()) }) => Parsed::Show(output),
        Err(EarlyExit { output, .. }) => {
            let help = match words.first() {
                Some(word) if !word.starts_with('-') => format!("latile {word} --help"),
                _ => "latile --help".to_owned(),
            };
            Parsed::Wrong(format!("latile: {}\nSee {help}.", output.trim_end()))
        }
    }
}

fn version() -> String {
    format!("latile {}", env!("CARGO_PKG_VERSION"))
}

/// What a lone `-`, standard input or output, is to the parser, which would take it for an option. No system
/// has such a file.
pub(crate) const STANDARD: &str = "/dev/-";

/// `--name=value` as `--name value` and `-` as [`STANDARD`], up to a `--`: the parser knows only those.
fn split_equals(words: Vec<String>) -> Vec<String> {
    let mut out = Vec::with_capacity(words.len());
    let mut options = true;
    for word in words {
        options &= word != "--";
        match word.split_once('=') {
            _ if options && word == "-" => out.push(STANDARD.to_owned()),
            Some((name, value)) if options && name.starts_with("--") => {
                out.extend([name.to_owned(), value.to_owned()]);
            }
            _ => out.push(word),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_line(line: &str) -> Parsed {
        parse(line.split(' ').map(OsString::from))
    }

    #[test]
    fn options_take_either_form() {
        for line in [
            "latile upscale a.png b.png --steps 7 --eta 0.5",
            "latile upscale --steps=7 a.png --eta=0.5 b.png",
        ] {
            let Parsed::Run(command) = parse_line(line) else { panic!("{line}") };
            let Command::Upscale(args) = *command else { panic!("{line}") };
            assert_eq!((args.steps, args.eta), (Some(7), Some(0.5)));
            assert_eq!(args.output.to_str(), Some("b.png"));
        }
    }

    #[test]
    fn a_dash_is_a_file() {
        let Parsed::Run(command) = parse_line("latile upscale - - --frames 8x6") else {
            panic!("it is read")
        };
        let Command::Upscale(args) = *command else { panic!("upscale") };
        assert_eq!([args.input.to_str(), args.output.to_str()], [Some(STANDARD); 2]);
        assert_eq!(args.frames.map(|f| (f.width, f.height)), Some((8, 6)));
    }

    #[test]
    fn help_is_shown_and_mistakes_are_wrong() {
        for line in
            ["latile --help", "latile -h", "latile upscale --help", "latile --version", "latile -V"]
        {
            assert!(matches!(parse_line(line), Parsed::Show(_)), "{line}");
        }
        for line in [
            "latile",
            "latile nonsense",
            "latile upscale a.png",
            "latile upscale a.png b.png --steps many",
            "latile upscale a.png b.png c.png",
            "latile bench m --component nose --latent 8x8",
        ] {
            assert!(matches!(parse_line(line), Parsed::Wrong(_)), "{line}");
        }
    }

    #[test]
    fn help_lists_every_exit_code() {
        let Parsed::Show(text) = parse_line("latile --help") else { panic!("help") };
        for code in ["0", "1", "2", "3", "4", "5", "6", "7", "8", "130", "141"] {
            assert!(
                text.lines().any(|l| l.split_whitespace().next() == Some(code)),
                "{code} in {text}"
            );
        }
    }
}
