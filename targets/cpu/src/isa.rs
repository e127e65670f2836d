//! Instruction sets: their names, what this machine supports, and the choice of one.
//!
//! An [`Isa`] is only a name. A [`Level`] is a *token*: it exists only for an instruction set
//! that this machine was found to support, so holding one is the proof that kernels need.
//! Some instruction sets add only integer dot products to another one, their *float base*:
//! everything that computes in floating point, and [`Level::dispatch`], runs as the base does.
//! Nothing here falls back in silence: a mask that names an unknown or unsupported
//! instruction set is an [`IsaError`].

use crate::simd::{Kernel, Scalar, Simd};

#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};

#[cfg(target_arch = "aarch64")]
use crate::simd::Neon;

/// The environment variable that masks the instruction set.
pub const ISA_VARIABLE: &str = "LATILE_ISA";

/// The name of an instruction set that latile has kernels for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Isa {
    /// Portable Rust; the reference that the others are compared with.
    Scalar,
    /// x86-64 AVX2 with FMA and F16C.
    Avx2,
    /// [`Isa::Avx2`] with the 256-bit integer dot products of AVX-VNNI.
    AvxVnni,
    /// x86-64 AVX-512 (F, BW, DQ, VL), with what [`Isa::Avx2`] needs.
    Avx512,
    /// [`Isa::Avx512`] with the 512-bit integer dot products of AVX-512 VNNI.
    Avx512Vnni,
    /// 64-bit Arm Advanced SIMD.
    Neon,
    /// [`Isa::Neon`] with the integer dot products of FEAT_DotProd.
    DotProd,
    /// [`Isa::DotProd`] with the integer matrix products of FEAT_I8MM.
    I8mm,
}

impl Isa {
    /// Every instruction set, slowest first.
    pub const ALL: [Isa; 8] = [
        Isa::Scalar,
        Isa::Avx2,
        Isa::AvxVnni,
        Isa::Avx512,
        Isa::Avx512Vnni,
        Isa::Neon,
        Isa::DotProd,
        Isa::I8mm,
    ];

    /// The lower-case name used in `LATILE_ISA`, kernel names and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avxvnni",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::Neon => "neon",
            Isa::DotProd => "dotprod",
            Isa::I8mm => "i8mm",
        }
    }

    /// The instruction set that this one adds integer dot products to, or itself: whose
    /// kernels compute in floating point.
    pub const fn float_base(self) -> Self {
        match self {
            Isa::Scalar => Isa::Scalar,
            Isa::Avx2 | Isa::AvxVnni => Isa::Avx2,
            Isa::Avx512 | Isa::Avx512Vnni => Isa::Avx512,
            Isa::Neon | Isa::DotProd | Isa::I8mm => Isa::Neon,
        }
    }

    /// The instruction set of that name, if there is one.
    pub fn from_name(name: &str) -> Option<Self> {
        Isa::ALL.into_iter().find(|isa| isa.name() == name)
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Why an instruction set could not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IsaError {
    /// The name is none of latile's.
    #[error(
        "{ISA_VARIABLE}={name}: no such instruction set; use one of {supported}, or unset it to let latile choose"
    )]
    Unknown {
        /// What the variable held.
        name: String,
        /// The names that would work on this machine.
        supported: String,
    },
    /// The name is known, but this machine lacks the instructions.
    #[error(
        "{ISA_VARIABLE}={name}: this processor does not support it; use one of {supported}, or unset it to let latile choose"
    )]
    Unsupported {
        /// The instruction set asked for.
        name: &'static str,
        /// The names that would work on this machine.
        supported: String,
    },
}

/// A supported instruction set: the proof that its kernels may run here.
#[derive(Clone, Copy, Debug)]
pub struct Level {
    /// Found to be supported in whole, not only its float base.
    isa: Isa,
    base: Base,
}

/// The token of a float base.
#[derive(Clone, Copy, Debug)]
enum Base {
    Scalar(Scalar),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
}

/// Whether this machine has what `isa` adds to its float base.
fn adds(isa: Isa) -> bool {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => is_x86_feature_detected!("avxvnni"),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => is_x86_feature_detected!("avx512vnni"),
        #[cfg(target_arch = "aarch64")]
        Isa::DotProd => std::arch::is_aarch64_feature_detected!("dotprod"),
        #[cfg(target_arch = "aarch64")]
        Isa::I8mm => {
            std::arch::is_aarch64_feature_detected!("dotprod")
                && std::arch::is_aarch64_feature_detected!("i8mm")
        }
        _ => isa == isa.float_base(),
    }
}

impl Level {
    /// The portable level, which every machine has.
    pub const fn scalar() -> Self {
        Level { isa: Isa::Scalar, base: Base::Scalar(Scalar::new()) }
    }

    /// The token of `isa`, if this machine supports it.
    pub fn new(isa: Isa) -> Option<Self> {
        let base = match isa.float_base() {
            Isa::Scalar => Base::Scalar(Scalar::new()),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Base::Avx2(Avx2::new()?),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Base::Avx512(Avx512::new()?),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Base::Neon(Neon::new()?),
            _ => return None,
        };
        adds(isa).then_some(Level { isa, base })
    }

    /// Every instruction set of this machine, slowest first; never empty.
    pub fn available() -> Vec<Self> {
        Isa::ALL.into_iter().filter_map(Level::new).collect()
    }

    /// As [`Level::available`], without those that compute in floating point as another of
    /// the list does.
    pub fn float_levels() -> Vec<Self> {
        let own = |isa: &Isa| *isa == isa.float_base();
        Isa::ALL.into_iter().filter(own).filter_map(Level::new).collect()
    }

    /// The fastest instruction set of this machine.
    pub fn best() -> Self {
        Isa::ALL.into_iter().rev().find_map(Level::new).unwrap_or(Level::scalar())
    }

    /// The instruction set named by `mask`, or the fastest where there is no mask.
    ///
    /// # Errors
    /// [`IsaError`] when the mask is not a known name or the machine does not support it.
    pub fn from_mask(mask: Option<&str>) -> Result<Self, IsaError> {
        let Some(name) = mask else {
            return Ok(Level::best());
        };
        let supported = || {
            let names: Vec<_> = Level::available().iter().map(|l| l.isa().name()).collect();
            names.join(", ")
        };
        let isa = Isa::from_name(name)
            .ok_or_else(|| IsaError::Unknown { name: name.to_owned(), supported: supported() })?;
        Level::new(isa)
            .ok_or_else(|| IsaError::Unsupported { name: isa.name(), supported: supported() })
    }

    /// As [`Level::from_mask`], with the mask read from `LATILE_ISA`; an empty value is no mask.
    ///
    /// # Errors
    /// [`IsaError`] when the variable holds something that cannot be used.
    pub fn from_env() -> Result<Self, IsaError> {
        match std::env::var_os(ISA_VARIABLE) {
            None => Level::from_mask(None),
            Some(value) if value.is_empty() => Level::from_mask(None),
            Some(value) => Level::from_mask(Some(&value.to_string_lossy())),
        }
    }

    /// The name of this instruction set.
    pub const fn isa(self) -> Isa {
        self.isa
    }

    /// Runs `kernel` with the features of this instruction set's float base enabled.
    #[inline]
    pub fn dispatch<K: Kernel>(self, kernel: K) -> K::Out {
        match self.base {
            Base::Scalar(s) => s.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Base::Avx2(s) => s.vectorize(kernel),
            #[cfg(target_arch = "x86_64")]
            Base::Avx512(s) => s.vectorize(kernel),
            #[cfg(target_arch = "aarch64")]
            Base::Neon(s) => s.vectorize(kernel),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_obeyed_or_refused() {
        for level in Level::available() {
            let chosen = Level::from_mask(Some(level.isa().name())).unwrap();
            assert_eq!(chosen.isa(), level.isa());
        }
        assert_eq!(Level::from_mask(None).unwrap().isa(), Level::best().isa());
        let unknown = Level::from_mask(Some("sse9")).unwrap_err();
        assert!(matches!(unknown, IsaError::Unknown { .. }), "{unknown}");
        assert!(unknown.to_string().contains("sse9"));
        assert!(unknown.to_string().contains("scalar"));
        let absent = if cfg!(target_arch = "aarch64") { "avx2" } else { "neon" };
        let refused = Level::from_mask(Some(absent)).unwrap_err();
        assert!(matches!(refused, IsaError::Unsupported { .. }), "{refused}");
    }

    #[test]
    fn names_round_trip() {
        for isa in Isa::ALL {
            assert_eq!(Isa::from_name(isa.name()), Some(isa));
        }
        assert_eq!(Isa::from_name("AVX2"), None);
    }

    #[test]
    fn every_level_comes_with_its_float_base() {
        struct Name;
        impl Kernel for Name {
            type Out = Isa;
            #[inline(always)]
            fn run<S: Simd>(self, _: S) -> Isa {
                S::ISA
            }
        }
        let float: Vec<Isa> = Level::float_levels().iter().map(|l| l.isa()).collect();
        for level in Level::available() {
            let base = level.isa().float_base();
            assert_eq!(base.float_base(), base);
            assert_eq!(level.dispatch(Name), base);
            assert!(float.contains(&base));
        }
        assert_eq!(Level::scalar().isa(), Isa::Scalar);
    }
}
