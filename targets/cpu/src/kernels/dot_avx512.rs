//! AVX-512: integer dot products of up to 14 pixels by one or two panels.
//!
//! With VNNI, a step is one instruction for a pixel and a panel; the registers are used as by
//! the kernels for floating point: 28 accumulators, two of B, two of broadcast A. Of two panels, what
//! lies 4 KiB ahead is asked for: a small map's weights come from memory (benches/record).
//!
//! Without, bytes are widened to 16 bits and multiplied in pairs by `vpmaddwd`, whose sums fit
//! 32 bits: the bytes at even places of a group (0 and 2) by those of the weights, then the odd
//! ones. (`vpmaddubsw` would add two products in 16 bits and saturate: 2 * 255 * 127 does not
//! fit.) 24 accumulators; the even and the odd weights of two panels in zmm24-zmm27, the mask
//! of even bytes in zmm28, a pixel's even and odd bytes in zmm29 and zmm30, products in zmm31.

use std::arch::asm;

use super::dot::{DotFn, DotTile};
use super::frame_avx512::avx512_tiles;

/// Pixels of the largest tile with VNNI.
pub(crate) const VNNI_ROWS: usize = 14;
/// Pixels of the largest tile without.
pub(crate) const WIDEN_ROWS: usize = 12;

/// The even bytes of a panel's group, sign-extended, and the odd ones.
macro_rules! widen {
    ($even:literal, $odd:literal, $addr:literal, $k:literal) => {
        concat!(
            "vpsllw zmm",
            $even,
            ", zmmword ptr [",
            $addr,
            " + 64*",
            $k,
            "], 8\n",
            "vpsraw zmm",
            $odd,
            ", zmmword ptr [",
            $addr,
            " + 64*",
            $k,
            "], 8\n",
            "vpsraw zmm",
            $even,
            ", zmm",
            $even,
            ", 8"
        )
    };
}

/// The even and odd products of one pixel and one panel, through zmm31.
macro_rules! products {
    ($c:literal, $even:literal, $odd:literal) => {
        concat!(
            "vpmaddwd zmm31, zmm29, zmm",
            $even,
            "\n",
            "vpaddd zmm",
            $c,
            ", zmm",
            $c,
            ", zmm31\n",
            "vpmaddwd zmm31, zmm30, zmm",
            $odd,
            "\n",
            "vpaddd zmm",
            $c,
            ", zmm",
            $c,
            ", zmm31"
        )
    };
}

/// The steps of the two kernels.
macro_rules! ops {
    (setup vnni) => {
        ""
    };
    (weights one vnni $k:literal) => {
        concat!("vmovdqu64 zmm28, zmmword ptr [rax + 64*", $k, "]")
    };
    (weights two vnni $k:literal) => {
        concat!(
            "vmovdqu64 zmm28, zmmword ptr [rax + 64*", $k, "]\n",
            "vmovdqu64 zmm29, zmmword ptr [rax + rcx + 64*", $k, "]\n",
            "prefetcht1 byte ptr [rax + 64*", $k, " + 4096]\n",
            "prefetcht1 byte ptr [rax + rcx + 64*", $k, " + 4096]")
    };
    (pixel one vnni $addr:literal $r:literal $c0:literal $c1:literal $k:literal) => {
        concat!(
            "vpbroadcastd zmm", $r, ", dword ptr [", $addr, " + 4*", $k, "]\n",
            "vpdpbusd zmm", $c0, ", zmm", $r, ", zmm28")
    };
    (pixel two vnni $addr:literal $r:literal $c0:literal $c1:literal $k:literal) => {
        concat!(
            "vpbroadcastd zmm", $r, ", dword ptr [", $addr, " + 4*", $k, "]\n",
            "vpdpbusd zmm", $c0, ", zmm", $r, ", zmm28\n",
            "vpdpbusd zmm", $c1, ", zmm", $r, ", zmm29")
    };
    (setup widen) => {
        "vpternlogd zmm28, zmm28, zmm28, 255\nvpsrlw zmm28, zmm28, 8"
    };
    (weights one widen $k:literal) => {
        widen!("24", "25", "rax", $k)
    };
    (weights two widen $k:literal) => {
        concat!(widen!("24", "25", "rax", $k), "\n", widen!("26", "27", "rax + rcx", $k))
    };
    (pixel one widen $addr:literal $r:literal $c0:literal $c1:literal $k:literal) => {
        concat!(ops!(bytes $addr $k), products!($c0, "24", "25"))
    };
    (pixel two widen $addr:literal $r:literal $c0:literal $c1:literal $k:literal) => {
        concat!(
            ops!(bytes $addr $k),
            products!($c0, "24", "25"), "\n",
            products!($c1, "26", "27"))
    };
    (bytes $addr:literal $k:literal) => {
        concat!(
            "vpbroadcastd zmm30, dword ptr [", $addr, " + 4*", $k, "]\n",
            "vpandd zmm29, zmm28, dword ptr [", $addr, " + 4*", $k, "]{{1to16}}\n",
            "vpsrlw zmm30, zmm30, 8\n")
    };
    (advance $t:tt $n:literal) => {
        concat!("add rax, 64*", $n)
    };
}

avx512_tiles!(one_vnni, "avx512f,avx512vnni", DotTile, 14, one, ops, vnni);
avx512_tiles!(two_vnni, "avx512f,avx512vnni", DotTile, 14, two, ops, vnni);
avx512_tiles!(one_widen, "avx512f,avx512bw", DotTile, 12, one, ops, widen);
avx512_tiles!(two_widen, "avx512f,avx512bw", DotTile, 12, two, ops, widen);

pub(crate) static VNNI: [&[DotFn]; 2] = [&one_vnni::TABLE, &two_vnni::TABLE];
pub(crate) static WIDEN: [&[DotFn]; 2] = [&one_widen::TABLE, &two_widen::TABLE];
