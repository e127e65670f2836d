//! How far long work is, with its rate and the time left, on stderr.
//!
//! Silent for the first second, so that short work says nothing. On a terminal one line is redrawn; elsewhere
//! a plain line is written now and then, so that a log stays short. Results never go through here.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Silence before the first line.
const PATIENCE: Duration = Duration::from_secs(1);
/// Least time between two plain lines.
const PLAIN_EVERY: Duration = Duration::from_secs(10);

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Multiply-accumulates.
    Macs,
    /// Bytes.
    #[cfg(feature = "export")]
    Bytes,
    /// Repetitions.
    Runs,
}

/// Progress of one piece of work.
#[derive(Debug)]
pub(crate) struct Progress {
    label: String,
    unit: Unit,
    start: Instant,
    /// What was done before the clock started, where work goes on that was begun earlier.
    before: Option<u64>,
    view: View,
}

#[derive(Debug)]
enum View {
    Terminal(ProgressBar),
    Plain { last: Option<Instant> },
}

impl Progress {
    /// Starts the clock.
    pub(crate) fn new(label: impl Into<String>, unit: Unit) -> Self {
        let view = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
            if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:24}] {msg}") {
                bar.set_style(style.progress_chars("=> "));
            }
            View::Terminal(bar)
        } else {
            View::Plain { last: None }
        };
        Self { label: label.into(), unit, start: Instant::now(), before: None, view }
    }

    /// Says that `done` of `total` are done, and what comes next.
    pub(crate) fn at(&mut self, done: u64, total: u64, next: &str) {
        let before = *self.before.get_or_insert(done);
        let elapsed = self.start.elapsed();
        if elapsed < PATIENCE {
            return;
        }
        let text = describe(before, done, total, elapsed, self.unit);
        let text = if next.is_empty() { text } else { format!("{next}, {text}") };
        match &mut self.view {
            View::Terminal(bar) => {
                bar.set_message(text);
                bar.set_length(total);
                bar.set_position(done);
                if bar.is_hidden() {
                    bar.set_prefix(self.label.clone());
                    bar.set_draw_target(ProgressDrawTarget::stderr());
                    bar.tick();
                }
            }
            // The result says that all is done.
            View::Plain { .. } if done == total => {}
            View::Plain { last } => {
                let now = Instant::now();
                if last.is_none_or(|t| now.duration_since(t) >= PLAIN_EVERY) {
                    *last = Some(now);
                    // Progress is a courtesy: a closed stderr must not end the work.
                    let _ = writeln!(std::io::stderr(), "{}: {text}", self.label);
                }
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let View::Terminal(bar) = &self.view {
            bar.finish_and_clear();
        }
    }
}

/// How fast frames pass, on stderr, a line now and then. Allocates nothing.
#[derive(Debug)]
pub(crate) struct Pace {
    since: Instant,
    frames: u64,
    every: Duration,
}

impl Pace {
    /// Starts the clock.
    pub(crate) fn new() -> Self {
        Self { since: Instant::now(), frames: 0, every: PATIENCE }
    }

    /// Says that `frames` have passed; the rate is that since the line before.
    pub(crate) fn at(&mut self, frames: u64) {
        let elapsed = self.since.elapsed();
        if elapsed < self.every {
            return;
        }
        let rate = (frames - self.frames) as f64 / elapsed.as_secs_f64();
        let _ = writeln!(std::io::stderr(), "upscale: {frames} frames, {rate:.2} frames/s");
        *self = Self { since: Instant::now(), frames, every: PLAIN_EVERY };
    }
}

/// `30 %, 41.2 GMAC/s, 9 s left`.
fn describe(before: u64, done: u64, total: u64, elapsed: Duration, unit: Unit) -> String {
    let seconds = elapsed.as_secs_f64();
    let percent = 100.0 * done as f64 / total.max(1) as f64;
    if done <= before || seconds <= 0.0 {
        return format!("{percent:.0} %");
    }
    let rate = (done - before) as f64 / seconds;
    let left = total.saturating_sub(done) as f64 / rate;
    let pace = match unit {
        Unit::Macs => format!("{:.1} GMAC/s", rate / 1e9),
        #[cfg(feature = "export")]
        Unit::Bytes => format!("{:.1} MB/s", rate / 1e6),
        Unit::Runs if rate >= 1.0 => format!("{rate:.1} runs/s"),
        Unit::Runs => format!("{:.1} s a run", 1.0 / rate),
    };
    format!("{percent:.0} %, {pace}, {} left", duration(left))
}

/// `9 s`, `2 min 05 s`, `3 h 20 min`.
fn duration(seconds: f64) -> String {
    let s = seconds.ceil().min(9e15) as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} min", s / 3600, s / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_time_left() {
        let t = |done, ms, unit| describe(0, done, 40, Duration::from_millis(ms), unit);
        assert_eq!(t(0, 2000, Unit::Runs), "0 %");
        assert_eq!(t(10, 5000, Unit::Runs), "25 %, 2.0 runs/s, 15 s left");
        assert_eq!(t(1, 4000, Unit::Runs), "2 %, 4.0 s a run, 2 min 36 s left");
        assert_eq!(t(40, 4000, Unit::Runs), "100 %, 10.0 runs/s, 0 s left");
        let gigas = describe(0, 3_000_000_000, 6_000_000_000, Duration::from_secs(2), Unit::Macs);
        assert_eq!(gigas, "50 %, 1.5 GMAC/s, 2 s left");
        let resumed = |done| describe(20, done, 40, Duration::from_secs(5), Unit::Runs);
        assert_eq!(resumed(20), "50 %");
        assert_eq!(resumed(30), "75 %, 2.0 runs/s, 5 s left");
        assert_eq!(duration(7260.0), "2 h 01 min");
    }
}
