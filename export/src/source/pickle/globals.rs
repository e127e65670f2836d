//! Which Python globals a weight file may name.

use super::SourceDtype;

/// What a global means to the reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Global {
    /// `collections.OrderedDict`, `dict`: a mapping.
    Dict,
    /// `torch._utils._rebuild_tensor_v2` and its forerunner: storage, offset, size, stride, …
    RebuildTensor,
    /// `torch._utils._rebuild_tensor_v3`: as v2 with the element type as the last but one argument.
    RebuildTensorV3,
    /// `torch._utils._rebuild_parameter`: a tensor, wrapped.
    RebuildParameter,
    /// `torch._tensor._rebuild_from_type_v2`: another rebuild function and its arguments.
    RebuildFromType,
    /// `torch.FloatStorage` and its siblings.
    Storage(SourceDtype),
    /// `torch.storage.UntypedStorage`: bytes.
    UntypedStorage,
    /// `torch.float32` and its siblings.
    Dtype(SourceDtype),
    /// `torch.Size`: a tuple.
    Size,
    /// Known and harmless, of no use here: whatever it would build stays opaque.
    Inert,
}

/// Looks a global up; `None` refuses the file.
#[must_use]
pub fn classify(module: &str, name: &str) -> Option<Global> {
    Some(match (module, name) {
        ("collections", "OrderedDict") | ("builtins" | "__builtin__", "dict") => Global::Dict,
        ("torch._utils", "_rebuild_tensor_v2" | "_rebuild_tensor") => Global::RebuildTensor,
        ("torch._utils", "_rebuild_tensor_v3") => Global::RebuildTensorV3,
        ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
            Global::RebuildParameter
        }
        ("torch._tensor", "_rebuild_from_type_v2") => Global::RebuildFromType,
        ("torch", "Size") => Global::Size,
        ("torch.storage", "UntypedStorage") | ("torch", "UntypedStorage") => Global::UntypedStorage,
        ("torch" | "torch.cuda", _) if name.ends_with("Storage") => {
            Global::Storage(storage_dtype(name)?)
        }
        ("torch", _) => match torch_dtype(name) {
            Some(dtype) => Global::Dtype(dtype),
            None if matches!(name, "device" | "Tensor" | "Generator") => Global::Inert,
            None => return None,
        },
        _ if inert(module, name) => Global::Inert,
        _ => return None,
    })
}

fn storage_dtype(name: &str) -> Option<SourceDtype> {
    Some(match name {
        "DoubleStorage" => SourceDtype::F64,
        "FloatStorage" => SourceDtype::F32,
        "HalfStorage" => SourceDtype::F16,
        "BFloat16Storage" => SourceDtype::BF16,
        "LongStorage"
        | "IntStorage"
        | "ShortStorage"
        | "CharStorage"
        | "ByteStorage"
        | "BoolStorage"
        | "ComplexFloatStorage"
        | "ComplexDoubleStorage"
        | "QInt8Storage"
        | "QUInt8Storage"
        | "QInt32Storage" => SourceDtype::Other(name.trim_end_matches("Storage").to_lowercase()),
        _ => return None,
    })
}

fn torch_dtype(name: &str) -> Option<SourceDtype> {
    Some(match name {
        "float64" | "double" => SourceDtype::F64,
        "float32" | "float" => SourceDtype::F32,
        "float16" | "half" => SourceDtype::F16,
        "bfloat16" => SourceDtype::BF16,
        "int64" | "int32" | "int16" | "int8" | "uint8" | "uint16" | "uint32" | "uint64"
        | "bool" | "complex64" | "complex128" | "float8_e4m3fn" | "float8_e5m2" => {
            SourceDtype::Other(name.to_owned())
        }
        _ => return None,
    })
}

/// Classes of frameworks whose state honest checkpoints carry.
const INERT_PACKAGES: [&str; 9] = [
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "omegaconf",
    "torch.optim",
    "ldm",
    "taming",
    "__main__",
];

fn inert(module: &str, name: &str) -> bool {
    let within = |package: &&str| {
        module.strip_prefix(*package).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    // A dotted name reaches through a module's attributes (`sys.modules`, say): only plain ones are known.
    if name.contains('.') {
        return false;
    }
    if INERT_PACKAGES.iter().any(within) {
        return true;
    }
    match module {
        "builtins" | "__builtin__" => matches!(
            name,
            "set"
                | "frozenset"
                | "list"
                | "tuple"
                | "int"
                | "float"
                | "bool"
                | "str"
                | "bytes"
                | "bytearray"
                | "complex"
                | "slice"
                | "range"
                | "object"
                | "long"
                | "unicode"
        ),
        "collections" => matches!(name, "defaultdict" | "deque" | "Counter"),
        "argparse" => name == "Namespace",
        "types" => name == "SimpleNamespace",
        "typing" => name == "Any",
        "copyreg" | "copy_reg" => name == "_reconstructor",
        "_codecs" => name == "encode",
        "pathlib" | "pathlib._local" => matches!(
            name,
            "Path" | "PosixPath" | "WindowsPath" | "PurePath" | "PurePosixPath" | "PureWindowsPath"
        ),
        "datetime" => matches!(name, "datetime" | "date" | "time" | "timedelta" | "timezone"),
        "decimal" => name == "Decimal",
        "uuid" => name == "UUID",
        "torch.nn.parameter" => name == "Parameter",
        "numpy" => {
            matches!(name, "dtype" | "ndarray" | "bool_" | "bool" | "float_" | "int_" | "str_")
                || ["float", "int", "uint", "complex"].iter().any(|p| {
                    name.strip_prefix(p).is_some_and(|bits| {
                        !bits.is_empty() && bits.bytes().all(|b| b.is_ascii_digit())
                    })
                })
        }
        "numpy.core.multiarray" | "numpy._core.multiarray" => {
            matches!(name, "_reconstruct" | "scalar")
        }
        "numpy.dtypes" => name.ends_with("DType"),
        _ => false,
    }
}
