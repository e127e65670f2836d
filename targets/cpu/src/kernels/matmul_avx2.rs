//! AVX2 and FMA: up to 6 pixels by one panel.
//!
//! 12 accumulators, two registers of B and two of broadcast A use all 16 registers.

use std::arch::asm;

use super::frame_avx2::avx2_tiles;
use super::matmul::{Tile, TileFn};

/// Pixels of the largest tile.
pub(crate) const ROWS: usize = 6;

/// One k of the panel into ymm12 and ymm13, by element type, and one k of one pixel.
macro_rules! ops {
    (setup $t:tt) => {
        ""
    };
    (weights f32 $k:literal) => {
        concat!(
            "vmovups ymm12, ymmword ptr [rax + 64*",
            $k,
            "]\n",
            "vmovups ymm13, ymmword ptr [rax + 64*",
            $k,
            " + 32]"
        )
    };
    (weights f16 $k:literal) => {
        concat!(
            "vcvtph2ps ymm12, xmmword ptr [rax + 32*",
            $k,
            "]\n",
            "vcvtph2ps ymm13, xmmword ptr [rax + 32*",
            $k,
            " + 16]"
        )
    };
    (pixel $t:tt $addr:literal $r:literal $c0:literal $c1:literal $k:literal) => {
        concat!(
            "vbroadcastss ymm",
            $r,
            ", dword ptr [",
            $addr,
            " + 4*",
            $k,
            "]\n",
            "vfmadd231ps ymm",
            $c0,
            ", ymm12, ymm",
            $r,
            "\n",
            "vfmadd231ps ymm",
            $c1,
            ", ymm13, ymm",
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

avx2_tiles!(tiles_f32, "avx2,fma,f16c", Tile, 6, ops, f32);
avx2_tiles!(tiles_f16, "avx2,fma,f16c", Tile, 6, ops, f16);

pub(crate) static F32: [&[TileFn]; 1] = [&tiles_f32::TABLE];
pub(crate) static F16: [&[TileFn]; 1] = [&tiles_f16::TABLE];
