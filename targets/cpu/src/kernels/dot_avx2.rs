//! AVX2 and AVX-VNNI: integer dot products of up to 6 pixels by one panel.
//!
//! With AVX-VNNI, the registers are used as by the kernels for floating point: 12 accumulators,
//! two of B, two of broadcast A.
//!
//! AVX2 alone has `vpmaddubsw`, which multiplies unsigned by signed bytes and adds neighbours
//! in 16 bits, saturating: 2 * 255 * 127 does not fit. So the activations are signed, a - 128,
//! and their signs move to the weights, `|a| * (sign(a) * w)`: no sum exceeds 2 * 128 * 127 =
//! 32512, nothing saturates, and the weights, never -128, have a negation. `vpmaddwd` by ones
//! then adds neighbours in 32 bits. That is 10 instructions for a pixel and a panel, where
//! widening both operands to 16 bits takes 11 and 6 more for the weights. 8 accumulators; ones
//! in ymm10, products in ymm11, B in ymm12 and ymm13, a and |a| in ymm14 and ymm15.

use std::arch::asm;

use super::dot::{DotFn, DotTile};
use super::frame_avx2::avx2_tiles;

/// Pixels of the largest tile with AVX-VNNI.
pub(crate) const VNNI_ROWS: usize = 6;
/// Pixels of the largest tile without.
pub(crate) const SIGNED_ROWS: usize = 4;

/// The steps of the two kernels.
macro_rules! ops {
    (weights $t:tt $k:literal) => {
        concat!(
            "vmovdqu ymm12, ymmword ptr [rax + 64*",
            $k,
            "]\n",
            "vmovdqu ymm13, ymmword ptr [rax + 64*",
            $k,
            " + 32]"
        )
    };
    (setup vnni) => {
        ""
    };
    (pixel vnni $addr:literal $r:literal $c0:literal $c1:literal $k:literal) => {
        concat!(
            "vpbroadcastd ymm",
            $r,
            ", dword ptr [",
            $addr,
            " + 4*",
            $k,
            "]\n",
            "{{vex}} vpdpbusd ymm",
            $c0,
            ", ymm",
            $r,
            ", ymm12\n",
            "{{vex}} vpdpbusd ymm",
            $c1,
            ", ymm",
            $r,
            ", ymm13"
        )
    };
    (setup signed) => {
        "vpcmpeqw ymm10, ymm10, ymm10\nvpsrlw ymm10, ymm10, 15"
    };
    (pixel signed $addr:literal $r:literal $c0:literal $c1:literal $k:literal) => {
        concat!(
            "vpbroadcastd ymm14, dword ptr [",
            $addr,
            " + 4*",
            $k,
            "]\n",
            "vpabsb ymm15, ymm14\n",
            "vpsignb ymm11, ymm12, ymm14\n",
            "vpmaddubsw ymm11, ymm15, ymm11\n",
            "vpmaddwd ymm11, ymm11, ymm10\n",
            "vpaddd ymm",
            $c0,
            ", ymm",
            $c0,
            ", ymm11\n",
            "vpsignb ymm14, ymm13, ymm14\n",
            "vpmaddubsw ymm14, ymm15, ymm14\n",
            "vpmaddwd ymm14, ymm14, ymm10\n",
            "vpaddd ymm",
            $c1,
            ", ymm",
            $c1,
            ", ymm14"
        )
    };
    (advance $t:tt $n:literal) => {
        concat!("add rax, 64*", $n)
    };
}

avx2_tiles!(tiles_vnni, "avx2,avxvnni", DotTile, 6, ops, vnni);
avx2_tiles!(tiles_signed, "avx2", DotTile, 4, ops, signed);

pub(crate) static VNNI: [&[DotFn]; 1] = [&tiles_vnni::TABLE];
pub(crate) static SIGNED: [&[DotFn]; 1] = [&tiles_signed::TABLE];
