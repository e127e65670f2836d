//! The list of all kernels, which dispatch, tests and benches share.
//!
//! A kernel that is not in [`MATMUL`] or [`DOT`] does not exist: [`matmul`] and [`dot`] choose
//! from them, the tests compare every row with the reference, and the benches time every row.

use crate::isa::{Isa, Level};
use crate::kernels::dot::{self, ArrangeFn, DotFn};
use crate::kernels::matmul::{self, TileFn};

#[cfg(target_arch = "x86_64")]
use crate::kernels::{dot_avx2, dot_avx512, matmul_avx2, matmul_avx512};
#[cfg(target_arch = "aarch64")]
use crate::kernels::{dot_dotprod, dot_i8mm, dot_neon, matmul_neon};

/// The element type of stored weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
}

/// One row of the registry: a family of matrix micro-kernels.
#[derive(Debug)]
pub struct MatmulKernel {
    /// `<architecture>-<activation><weight>-<instruction set>`.
    pub name: &'static str,
    /// The instruction set that it needs.
    pub isa: Isa,
    /// The element type of B.
    pub weights: WeightType,
    /// Pixels of the largest tile.
    pub rows: usize,
    /// Panels of sixteen output channels of the largest tile.
    pub panels: usize,
    /// Whether B is better widened to `f32` once for a stretch of K than in every tile: where
    /// conversion instructions would compete with the multiply-adds.
    pub widen: bool,
    /// The micro-kernels, `tiles[panels - 1][rows - 1]`.
    pub tiles: &'static [&'static [TileFn]],
}

/// Every matrix kernel compiled for this architecture.
pub static MATMUL: &[MatmulKernel] = &[
    MatmulKernel {
        name: "generic-f32f32-scalar",
        isa: Isa::Scalar,
        weights: WeightType::F32,
        rows: matmul::SCALAR_ROWS,
        panels: 1,
        widen: false,
        tiles: &matmul::SCALAR_F32,
    },
    MatmulKernel {
        name: "generic-f32f16-scalar",
        isa: Isa::Scalar,
        weights: WeightType::F16,
        rows: matmul::SCALAR_ROWS,
        panels: 1,
        widen: true,
        tiles: &matmul::SCALAR_F16,
    },
    #[cfg(target_arch = "x86_64")]
    MatmulKernel {
        name: "x86_64-f32f32-avx2",
        isa: Isa::Avx2,
        weights: WeightType::F32,
        rows: matmul_avx2::ROWS,
        panels: 1,
        widen: false,
        tiles: &matmul_avx2::F32,
    },
    #[cfg(target_arch = "x86_64")]
    MatmulKernel {
        name: "x86_64-f32f16-avx2",
        isa: Isa::Avx2,
        weights: WeightType::F16,
        rows: matmul_avx2::ROWS,
        panels: 1,
        widen: false,
        tiles: &matmul_avx2::F16,
    },
    #[cfg(target_arch = "x86_64")]
    MatmulKernel {
        name: "x86_64-f32f32-avx512",
        isa: Isa::Avx512,
        weights: WeightType::F32,
        rows: matmul_avx512::ROWS,
        panels: 2,
        widen: false,
        tiles: &matmul_avx512::F32,
    },
    #[cfg(target_arch = "x86_64")]
    MatmulKernel {
        name: "x86_64-f32f16-avx512",
        isa: Isa::Avx512,
        weights: WeightType::F16,
        rows: matmul_avx512::ROWS,
        panels: 2,
        widen: false,
        tiles: &matmul_avx512::F16,
    },
    #[cfg(target_arch = "aarch64")]
    MatmulKernel {
        name: "aarch64-f32f32-neon",
        isa: Isa::Neon,
        weights: WeightType::F32,
        rows: matmul_neon::ROWS,
        panels: 1,
        widen: false,
        tiles: &matmul_neon::F32,
    },
    #[cfg(target_arch = "aarch64")]
    MatmulKernel {
        name: "aarch64-f32f16-neon",
        isa: Isa::Neon,
        weights: WeightType::F16,
        rows: matmul_neon::ROWS,
        panels: 1,
        widen: true,
        tiles: &matmul_neon::F16,
    },
];

/// One row of the registry: a family of integer matrix micro-kernels.
#[derive(Debug)]
pub struct DotKernel {
    /// `<architecture>-<activation><weight>-<instruction set>`.
    pub name: &'static str,
    /// The instruction set that it needs.
    pub isa: Isa,
    /// Whether the activation's bytes are q - 128 as `i8`, not q as `u8`: the caller adds
    /// 128 times the sum of a channel's weights to its result.
    pub signed: bool,
    /// Pixels of the largest tile.
    pub rows: usize,
    /// Panels of sixteen output channels of the largest tile.
    pub panels: usize,
    /// What must be done to a panel's weights before `tiles` can read them, once for a stretch
    /// of K and all its tiles; `None` where they are read as stored.
    pub arrange: Option<ArrangeFn>,
    /// The micro-kernels, `tiles[panels - 1][rows - 1]`.
    pub tiles: &'static [&'static [DotFn]],
}

/// Every integer matrix kernel compiled for this architecture.
pub static DOT: &[DotKernel] = &[
    DotKernel {
        name: "generic-u8i8-scalar",
        isa: Isa::Scalar,
        signed: false,
        rows: dot::SCALAR_ROWS,
        panels: 1,
        arrange: None,
        tiles: &dot::SCALAR,
    },
    #[cfg(target_arch = "x86_64")]
    DotKernel {
        name: "x86_64-i8i8-avx2",
        isa: Isa::Avx2,
        signed: true,
        rows: dot_avx2::SIGNED_ROWS,
        panels: 1,
        arrange: None,
        tiles: &dot_avx2::SIGNED,
    },
    #[cfg(target_arch = "x86_64")]
    DotKernel {
        name: "x86_64-u8i8-avxvnni",
        isa: Isa::AvxVnni,
        signed: false,
        rows: dot_avx2::VNNI_ROWS,
        panels: 1,
        arrange: None,
        tiles: &dot_avx2::VNNI,
    },
    #[cfg(target_arch = "x86_64")]
    DotKernel {
        name: "x86_64-u8i8-avx512",
        isa: Isa::Avx512,
        signed: false,
        rows: dot_avx512::WIDEN_ROWS,
        panels: 2,
        arrange: None,
        tiles: &dot_avx512::WIDEN,
    },
    #[cfg(target_arch = "x86_64")]
    DotKernel {
        name: "x86_64-u8i8-avx512vnni",
        isa: Isa::Avx512Vnni,
        signed: false,
        rows: dot_avx512::VNNI_ROWS,
        panels: 2,
        arrange: None,
        tiles: &dot_avx512::VNNI,
    },
    #[cfg(target_arch = "aarch64")]
    DotKernel {
        name: "aarch64-i8i8-neon",
        isa: Isa::Neon,
        signed: true,
        rows: dot_neon::ROWS,
        panels: 1,
        arrange: None,
        tiles: &dot_neon::TILES,
    },
    #[cfg(target_arch = "aarch64")]
    DotKernel {
        name: "aarch64-i8i8-dotprod",
        isa: Isa::DotProd,
        signed: true,
        rows: dot_dotprod::ROWS,
        panels: 1,
        arrange: None,
        tiles: &dot_dotprod::TILES,
    },
    #[cfg(target_arch = "aarch64")]
    DotKernel {
        name: "aarch64-i8i8-i8mm",
        isa: Isa::I8mm,
        signed: true,
        rows: dot_i8mm::ROWS,
        panels: 1,
        arrange: Some(dot_i8mm::arrange),
        tiles: &dot_i8mm::TILES,
    },
];

/// The integer matrix kernel of an instruction set.
pub fn dot(level: Level) -> &'static DotKernel {
    DOT.iter()
        .find(|k| k.isa == level.isa())
        .expect("a level exists only for this architecture, all of which have a row")
}

/// The matrix kernel of an instruction set and a weight type.
pub fn matmul(level: Level, weights: WeightType) -> &'static MatmulKernel {
    MATMUL
        .iter()
        .find(|k| k.isa == level.isa().float_base() && k.weights == weights)
        .expect("a level exists only for this architecture, whose rows the table holds in pairs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_has_its_rows() {
        for level in Level::available() {
            for weights in [WeightType::F32, WeightType::F16] {
                let kernel = matmul(level, weights);
                assert_eq!(kernel.isa, level.isa().float_base());
                assert_eq!(kernel.weights, weights);
                assert_eq!(kernel.tiles.len(), kernel.panels);
                assert!(kernel.tiles.iter().all(|t| t.len() == kernel.rows));
                assert!(kernel.name.ends_with(kernel.isa.name()));
            }
            let kernel = dot(level);
            assert_eq!(kernel.isa, level.isa());
            assert_eq!(kernel.tiles.len(), kernel.panels);
            assert!(kernel.tiles.iter().all(|t| t.len() == kernel.rows));
            assert!(kernel.name.ends_with(&format!("-{}", level.isa())));
            assert_eq!(kernel.signed, kernel.name.contains("-i8i8-"));
        }
    }
}
