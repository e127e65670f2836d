//! AVX-512: up to 14 pixels by one or two panels.
//!
//! 28 accumulators, two registers of B and two of broadcast A use all 32 registers.

use std::arch::asm;

use super::frame_avx512::avx512_tiles;
use super::matmul::{Tile, TileFn};

/// Pixels of the largest tile.
pub(crate) const ROWS: usize = 14;

/// One k of the panels into zmm28 and zmm29, by element type, and one k of one pixel.
macro_rules! ops {
    (setup $t:tt) => {
        ""
    };
    (weights one f32 $k:literal) => {
        concat!("vmovups zmm28, zmmword ptr [rax + 64*", $k, "]")
    };
    (weights two f32 $k:literal) => {
        concat!(
            "vmovups zmm28, zmmword ptr [rax + 64*",
            $k,
            "]\n",
            "vmovups zmm29, zmmword ptr [rax + rcx + 64*",
            $k,
            "]"
        )
    };
    (weights one f16 $k:literal) => {
        concat!("vcvtph2ps zmm28, ymmword ptr [rax + 32*", $k, "]")
    };
    (weights two f16 $k:literal) => {
        concat!(
            "vcvtph2ps zmm28, ymmword ptr [rax + 32*",
            $k,
            "]\n",
            "vcvtph2ps zmm29, ymmword ptr [rax + rcx + 32*",
            $k,
            "]"
        )
    };
    (pixel one $t:tt $addr:literal $r:literal $c0:literal $c1:literal $k:literal) => {
        concat!("vfmadd231ps zmm", $c0, ", zmm28, dword ptr [", $addr, " + 4*", $k, "]{{1to16}}")
    };
    (pixel two $t:tt $addr:literal $r:literal $c0:literal $c1:literal $k:literal) => {
        concat!(
            "vbroadcastss zmm",
            $r,
            ", dword ptr [",
            $addr,
            " + 4*",
            $k,
            "]\n",
            "vfmadd231ps zmm",
            $c0,
            ", zmm28, zmm",
            $r,
            "\n",
            "vfmadd231ps zmm",
            $c1,
            ", zmm29, zmm",
            $r
        )
    };
    (advance f32 $n:literal) => {
        concat!("add rax, 64*", $n)
    };
    (advance f16 $n:literal) => {
        concat!("add rax, 32*", $n)
    };
}

avx512_tiles!(one_f32, "avx512f", Tile, 14, one, ops, f32);
avx512_tiles!(two_f32, "avx512f", Tile, 14, two, ops, f32);
avx512_tiles!(one_f16, "avx512f", Tile, 14, one, ops, f16);
avx512_tiles!(two_f16, "avx512f", Tile, 14, two, ops, f16);

pub(crate) static F32: [&[TileFn]; 2] = [&one_f32::TABLE, &two_f32::TABLE];
pub(crate) static F16: [&[TileFn]; 2] = [&one_f16::TABLE, &two_f16::TABLE];
