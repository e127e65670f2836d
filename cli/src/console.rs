//! Results on stdout, remarks on stderr, and how numbers and foreign names are put into words.

use crate::exit::FileError;
use serde::Serialize;
use std::io::{ErrorKind, Write};

/// Writes `text` and a line end to stdout.
///
/// # Errors
/// [`FileError`] where stdout cannot take it; a reader that has gone away, as `head` does, is no error.
pub(crate) fn say(text: &str) -> Result<(), FileError> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(FileError { action: "write", path: "standard output".into(), source: e })
        }
        _ => Ok(()),
    }
}

/// Writes `report` to stdout as one line of JSON.
///
/// # Errors
/// As [`say`], or where the report cannot be JSON.
pub(crate) fn say_json(report: &impl Serialize) -> anyhow::Result<()> {
    Ok(say(&serde_json::to_string(report)?)?)
}

/// Writes a remark to stderr. A closed stderr is no reason to fail.
pub(crate) fn remark(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// `name` as it can be shown on a terminal: control characters, which a file may hold to deceive, escaped.
pub(crate) fn plain(name: &str) -> String {
    name.chars()
        .flat_map(|c| {
            let escape = c.is_control();
            let shown = (!escape).then_some(c);
            shown.into_iter().chain(escape.then(|| c.escape_default()).into_iter().flatten())
        })
        .collect()
}

/// `26.1 MB`: decimal, as disks and downloads count.
pub(crate) fn bytes(n: u64) -> String {
    scaled(n as f64, &["B", "kB", "MB", "GB", "TB"])
}

/// `113.6 M`.
pub(crate) fn count(n: u64) -> String {
    scaled(n as f64, &["", "k", "M", "G", "T"]).trim_end().to_owned()
}

fn scaled(mut x: f64, units: &[&str]) -> String {
    let mut i = 0;
    while x >= 999.95 && i + 1 < units.len() {
        x /= 1000.0;
        i += 1;
    }
    if i == 0 { format!("{x:.0} {}", units[0]) } else { format!("{x:.1} {}", units[i]) }
}

/// A logger to stderr. `LATILE_LOG` is `error`, `warn` (as without it), `info`, `debug` or `trace`.
struct Log;

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target().starts_with("latile")
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = record.level().as_str().to_lowercase();
            remark(&format!("{level}: {}", record.args()));
        }
    }

    fn flush(&self) {}
}

/// Sends the libraries' log to stderr.
///
/// # Errors
/// Where `LATILE_LOG` names no level.
pub(crate) fn start_log() -> Result<(), crate::exit::UsageError> {
    let level = match std::env::var("LATILE_LOG") {
        Err(_) => log::LevelFilter::Warn,
        Ok(v) => v.parse().map_err(|_| {
            crate::exit::UsageError(format!(
                "LATILE_LOG is {v:?}; it can be off, error, warn, info, debug or trace"
            ))
        })?,
    };
    // The only logger of the process: setting it cannot fail.
    if log::set_logger(&Log).is_ok() {
        log::set_max_level(level);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_words() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(24_123_456), "24.1 MB");
        assert_eq!(count(113_600_000), "113.6 M");
        assert_eq!(count(12), "12");
        assert_eq!(count(999_960), "1.0 M");
    }

    #[test]
    fn names_cannot_move_the_cursor() {
        assert_eq!(plain("ok é\u{1b}[2J\n"), "ok é\\u{1b}[2J\\n");
    }
}
