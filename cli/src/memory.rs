//! What the process has taken from the system.

/// The largest resident set the process has had, in bytes, mapped pages included (`VmHWM`); `None` where
/// the system does not tell.
pub(crate) fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    #[test]
    fn the_peak_grows_with_what_is_touched() {
        let before = super::peak_rss_bytes().unwrap();
        let block = vec![1u8; before as usize + (8 << 20)];
        std::hint::black_box(&block);
        assert!(super::peak_rss_bytes().unwrap() >= before + (8 << 20));
    }
}
