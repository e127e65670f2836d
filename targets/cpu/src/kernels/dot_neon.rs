//! Arm without dot products: up to 2 pixels by one panel, in assembly.
//!
//! A group of a pixel is repeated in all lanes of a register and multiplied with the same group
//! of two output channels at a time (`smull`), then the next group onto it (`smlal`): two
//! products of -128..=127 and -127..=127 stay within 16 bits. `sadalp` adds the pairs of
//! sixteen-bit sums to the accumulators, which so hold two partial sums of each channel, joined
//! at the end: three instructions for 16 products. 16 accumulators, two rows of B, two
//! groups of A for each pixel and four registers of sixteen-bit sums are all 32 registers.
//!
//! Registers, beside the frame's: x5 and x6 pixels, v0-v15 accumulators, v16-v23 B, v24-v27 A,
//! v28-v31 sixteen-bit sums.

use std::arch::asm;

use super::dot::{DotFn, DotTile};
use super::frame_neon::{neon_store, neon_sums, neon_tile, neon_zero};

/// Pixels of the largest tile.
pub(crate) const ROWS: usize = 2;

/// Four channels of all pixels: `$b0` of one group, and `$b1` of the next where there is one.
macro_rules! quad {
    ($b0:literal $(, $b1:literal)?; $(($a0:literal, $a1:literal, $s0:literal, $s1:literal,
        $c0:literal, $c1:literal))*) => {
        concat!(
            $("smull v", $s0, ".8h, v", $b0, ".8b, v", $a0, ".8b\n",
            "smull2 v", $s1, ".8h, v", $b0, ".16b, v", $a0, ".16b\n",)*
            quad!(@second $($b1)?; $($a1, $s0, $s1;)*),
            $("sadalp v", $c0, ".4s, v", $s0, ".8h\n",
            "sadalp v", $c1, ".4s, v", $s1, ".8h\n",)*
        )
    };
    (@second; $($rest:tt)*) => { "" };
    (@second $b1:literal; $($a1:literal, $s0:literal, $s1:literal;)*) => {
        concat!(
            $("smlal v", $s0, ".8h, v", $b1, ".8b, v", $a1, ".8b\n",
            "smlal2 v", $s1, ".8h, v", $b1, ".16b, v", $a1, ".16b\n",)*
        )
    };
}

/// Two groups.
macro_rules! pair {
    ($(($x:literal, $prev:literal, $a0:literal, $a1:literal, $s0:literal, $s1:literal,
        $c0:literal, $c1:literal, $c2:literal, $c3:literal,
        $c4:literal, $c5:literal, $c6:literal, $c7:literal))*) => {
        concat!(
            "ld1 {{v16.16b-v19.16b}}, [x2], #64\n",
            $("ld2r {{v", $a0, ".4s, v", $a1, ".4s}}, [x", $x, "], #8\n",)*
            "ld1 {{v20.16b-v23.16b}}, [x2], #64\n",
            quad!("16", "20"; $(($a0, $a1, $s0, $s1, $c0, $c1))*),
            quad!("17", "21"; $(($a0, $a1, $s0, $s1, $c2, $c3))*),
            quad!("18", "22"; $(($a0, $a1, $s0, $s1, $c4, $c5))*),
            quad!("19", "23"; $(($a0, $a1, $s0, $s1, $c6, $c7))*),
        )
    };
}

/// One group, the last of an odd run.
macro_rules! single {
    ($(($x:literal, $prev:literal, $a0:literal, $a1:literal, $s0:literal, $s1:literal,
        $c0:literal, $c1:literal, $c2:literal, $c3:literal,
        $c4:literal, $c5:literal, $c6:literal, $c7:literal))*) => {
        concat!(
            "ld1 {{v16.16b-v19.16b}}, [x2], #64\n",
            $("ld1r {{v", $a0, ".4s}}, [x", $x, "], #4\n",)*
            quad!("16"; $(($a0, $a1, $s0, $s1, $c0, $c1))*),
            quad!("17"; $(($a0, $a1, $s0, $s1, $c2, $c3))*),
            quad!("18"; $(($a0, $a1, $s0, $s1, $c4, $c5))*),
            quad!("19"; $(($a0, $a1, $s0, $s1, $c6, $c7))*),
        )
    };
}

/// One micro-kernel.
macro_rules! tile {
    ($name:ident, $(($x:literal, $prev:literal, $a0:literal, $a1:literal, $s0:literal, $s1:literal,
        $c0:literal, $c1:literal, $c2:literal, $c3:literal,
        $c4:literal, $c5:literal, $c6:literal, $c7:literal))*) => {
        neon_tile!(
            $name,
            "neon",
            DotTile,
            "8",
            start: concat!($(neon_zero!($c0 $c1 $c2 $c3 $c4 $c5 $c6 $c7),)*),
            pixels: concat!($("add x", $x, ", x", $prev, ", x1\n",)*),
            main: concat!(
                pair!($(($x, $prev, $a0, $a1, $s0, $s1, $c0, $c1, $c2, $c3, $c4, $c5, $c6, $c7))*),
                pair!($(($x, $prev, $a0, $a1, $s0, $s1, $c0, $c1, $c2, $c3, $c4, $c5, $c6, $c7))*),
                pair!($(($x, $prev, $a0, $a1, $s0, $s1, $c0, $c1, $c2, $c3, $c4, $c5, $c6, $c7))*),
                pair!($(($x, $prev, $a0, $a1, $s0, $s1, $c0, $c1, $c2, $c3, $c4, $c5, $c6, $c7))*),
            ),
            rest: concat!(
                "subs x11, x11, #2\n",
                "b.lo 35f\n",
                "34:\n",
                pair!($(($x, $prev, $a0, $a1, $s0, $s1, $c0, $c1, $c2, $c3, $c4, $c5, $c6, $c7))*),
                "subs x11, x11, #2\n",
                "b.hs 34b\n",
                "35:\n",
                "tbz x11, #0, 38f\n",
                single!($(($x, $prev, $a0, $a1, $s0, $s1, $c0, $c1, $c2, $c3, $c4, $c5, $c6, $c7))*),
            ),
            end: concat!(
                neon_sums!(),
                $("addp v16.4s, v", $c0, ".4s, v", $c1, ".4s\n",
                "addp v17.4s, v", $c2, ".4s, v", $c3, ".4s\n",
                "addp v18.4s, v", $c4, ".4s, v", $c5, ".4s\n",
                "addp v19.4s, v", $c6, ".4s, v", $c7, ".4s\n",
                neon_store!(),)*
            ),
        );
    };
}

tile!(t1, ("5", "14", "24", "25", "28", "29", "0", "1", "2", "3", "4", "5", "6", "7"));
tile!(
    t2,
    ("5", "14", "24", "25", "28", "29", "0", "1", "2", "3", "4", "5", "6", "7")(
        "6", "5", "26", "27", "30", "31", "8", "9", "10", "11", "12", "13", "14", "15"
    )
);

pub(crate) static TILES: [&[DotFn]; 1] = [&[t1, t2]];
