//! What the process has taken from the system, and `--memory`, what it may take.

use latile_runtime::pipeline::budget::mib;
use latile_runtime::pipeline::{NormScope, Options, Plan, Strategy, Tiling};
use std::path::Path;

const MIB: usize = 1 << 20;
/// What a process takes between the moment of planning and its end that no plan counts: code that runs for
/// the first time, threads' stacks, lowered graphs, the allocator's own.
const ALLOWANCE: usize = 2 * MIB;
/// What the command takes before it runs anything, where the system does not tell: its code, its
/// libraries, and the model's descriptors.
const UNKNOWN_BASE: usize = 12 * MIB;

/// The largest resident set the process has had, in bytes, mapped pages included (`VmHWM`); `None` where
/// the system does not tell.
pub(crate) fn peak_rss_bytes() -> Option<u64> {
    status("VmHWM:")
}

/// The same, where a plan must live with it; 0 where the system does not tell.
pub(crate) fn so_far() -> usize {
    peak_rss_bytes().and_then(|b| usize::try_from(b).ok()).unwrap_or(0)
}

/// A line of the process's status, in bytes.
fn status(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Bytes that the process has whatever it runs: what is resident now, less the `counted` bytes that a plan
/// counts by themselves, and an allowance. In whole MiB, so that it is mostly the same at each start.
pub(crate) fn base_bytes(counted: usize) -> usize {
    let resident = status("VmRSS:").and_then(|b| usize::try_from(b).ok()).unwrap_or(0);
    match resident {
        0 => UNKNOWN_BASE + ALLOWANCE,
        n => (n.saturating_sub(counted) + ALLOWANCE).next_multiple_of(MIB),
    }
}

/// Warns where the latent is to be in a file, and that file would be in memory.
pub(crate) fn warn_of_scratch(plan: &Plan<'_>, options: &Options) {
    let bytes = plan.strategy().map_or(0, |s: &Strategy| s.scratch_bytes);
    let Some(scratch) = options.scratch.as_ref().filter(|_| bytes > 0) else { return };
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let folder = scratch.folder();
    let real = folder.canonicalize().unwrap_or_default();
    if let Some(kind @ ("tmpfs" | "ramfs")) = file_system(&mounts, &real) {
        log::warn!(
            "the latent's file of {} is to be in folder {}, which is memory too ({kind}); name a folder on a disk (--scratch)",
            mib(bytes),
            folder.display()
        );
    }
}

/// The kind of file system that `path`, absolute and without links, is in; `mounts` is as the kernel lists them:
/// the mount's place is the fifth word, its kind the one behind a lone dash. Later ones cover earlier ones.
fn file_system<'m>(mounts: &'m str, path: &Path) -> Option<&'m str> {
    let mount = |line: &'m str| {
        let (mount, rest) = line.split_once(" - ")?;
        let place = mount.split(' ').nth(4)?.replace("\\040", " ");
        Some((place, rest.split(' ').next()?)).filter(|(place, _)| path.starts_with(place))
    };
    mounts.lines().filter_map(mount).max_by_key(|(place, _)| place.len()).map(|(_, kind)| kind)
}

/// Reads `--memory`: `256M`, `1.5G`, `300MiB`, `120MB`, or plain bytes. K, M, G and T are powers of 1024,
/// whatever follows them.
///
/// # Errors
/// What is accepted, for anything else, and for nothing and for more than can be addressed.
pub(crate) fn parse(text: &str) -> Result<usize, String> {
    let help = "give a size above 0 such as 256M, 1.5G, 300MiB or a number of bytes; K, M, G and T are powers of 1024";
    let wrong = || format!("{text:?} is not an amount of memory; {help}");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let (whole, part) = digits.split_once('.').unwrap_or((digits, "0"));
    let number = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    // A fraction of a byte is none, and sixteen digits are more than a fraction of a TiB has.
    if !number(whole) || !number(part) || part.len() > 16 || (shift == 0 && digits.contains('.')) {
        return Err(wrong());
    }
    let whole = whole.parse::<u128>().ok().and_then(|w| w.checked_mul(1 << shift));
    // Invariant: at most sixteen digits, and as many powers of ten.
    let (part, scale) = (part.parse::<u128>().unwrap_or(0), 10u128.pow(part.len() as u32));
    let bytes = whole
        .and_then(|w| w.checked_add((part << shift) / scale))
        .and_then(|b| usize::try_from(b).ok())
        .ok_or_else(|| format!("{text:?} is more memory than can be addressed; {help}"))?;
    if bytes == 0 { Err(format!("{text:?} is no memory at all; {help}")) } else { Ok(bytes) }
}

/// Reads `--tiling`.
///
/// # Errors
/// The names there are.
pub(crate) fn tiling(name: &str) -> Result<Tiling, String> {
    match name {
        "auto" => Ok(Tiling::Auto),
        "exact" => Ok(Tiling::Exact),
        "blend" => Ok(Tiling::Blend),
        _ => Err("a tiling is exact, blend or auto".to_owned()),
    }
}

/// Reads `--norms`.
///
/// # Errors
/// The names there are.
pub(crate) fn norms(name: &str) -> Result<NormScope, String> {
    match name {
        "picture" => Ok(NormScope::Picture),
        "tile" => Ok(NormScope::Tile),
        _ => Err("norms are those of the picture or of the tile".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_of_memory() {
        for (text, bytes) in [
            ("256M", 256 << 20),
            ("256m", 256 << 20),
            ("300MiB", 300 << 20),
            ("120MB", 120 << 20),
            ("1.5G", 3 << 29),
            ("0.5K", 512),
            ("64kib", 64 << 10),
            ("1T", 1 << 40),
            ("1048576", 1 << 20),
            ("77B", 77),
            ("0.1M", 104_857),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_amount_of_memory() {
        for text in [
            "banana",
            "",
            "M",
            "-5M",
            "+5M",
            "5 M",
            "1.5",
            "1,5G",
            "5MM",
            "5P",
            ".5G",
            "5.G",
            "1.2.3G",
            "1e9",
            "0x10",
            "٣M",
            "5µ",
            "NaN",
            "inf",
            "1.00000000000000000M",
        ] {
            let error = parse(text).unwrap_err();
            assert!(
                error.contains("is not an amount") && error.contains("256M"),
                "{text}: {error}"
            );
        }
        for text in ["0", "0M", "0.0G", "0.0001K"] {
            let error = parse(text).unwrap_err();
            assert!(
                error.contains("no memory at all") && error.contains("256M"),
                "{text}: {error}"
            );
        }
        for text in
            ["99999999T", "18446744073709551616", "340282366920938463463374607431768211456G"]
        {
            let error = parse(text).unwrap_err();
            assert!(error.contains("more memory than can be addressed"), "{text}: {error}");
        }
        // More digits than any number here has.
        assert!(parse(&"9".repeat(60)).unwrap_err().contains("more memory than"));
        assert!(tiling("overlap").is_err());
    }

    #[test]
    fn folders_that_are_memory() {
        let mounts = "24 30 0:22 / /proc rw,nosuid - proc proc rw\n\
            30 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw\n\
            31 30 0:26 / /tmp rw master:1 - tmpfs tmpfs rw\n\
            32 31 8:1 / /tmp/my\\040disk rw - xfs /dev/sda1 rw\n";
        let of = |path: &str| file_system(mounts, Path::new(path));
        assert_eq!(of("/home/x"), Some("ext4"));
        assert_eq!(of("/tmp"), Some("tmpfs"));
        assert_eq!(of("/tmp/a/b"), Some("tmpfs"));
        assert_eq!(of("/tmpa"), Some("ext4"));
        assert_eq!(of("/tmp/my disk/a"), Some("xfs"));
        assert_eq!(file_system("", Path::new("/")), None);
        assert_eq!(file_system("nonsense - x\n - \n", Path::new("/")), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_peak_grows_with_what_is_touched() {
        let before = peak_rss_bytes().unwrap();
        let block = vec![1u8; before as usize + (8 << 20)];
        std::hint::black_box(&block);
        assert!(peak_rss_bytes().unwrap() >= before + (8 << 20));
        // What a plan counts by itself is not counted again.
        let (all, rest) = (base_bytes(0), base_bytes(block.len()));
        assert!(all > block.len() && rest < all - (6 << 20), "{all} {rest}");
    }
}
