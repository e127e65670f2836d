//! A JSON config whose every key is either understood, known to be harmless, or refused.

use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The largest config that is read; real ones have a few kilobytes (with `trained_betas`, some dozens).
const MAX_BYTES: u64 = 4 << 20;

/// A config that cannot be used, and why.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}: {error}; a diffusers folder has this file", path.display())]
    Io {
        /// The config.
        path: PathBuf,
        /// The system's reason.
        #[source]
        error: std::io::Error,
    },
    /// The file is not a JSON object.
    #[error("{}: not a JSON object: {why}", path.display())]
    Json {
        /// The config.
        path: PathBuf,
        /// What the parser says.
        why: String,
    },
    /// A key is needed and absent.
    #[error("{}: {key} is missing", path.display())]
    MissingKey {
        /// The config.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// A value that latile cannot honour.
    #[error("{}: {key} is {value}; supported: {supported}", path.display())]
    Unsupported {
        /// The config.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value as JSON.
        value: String,
        /// What would be honoured.
        supported: String,
    },
    /// A key of unknown meaning: the result could differ by it.
    #[error(
        "{}: {key} (= {value}) is not an option latile knows, and it could change the result; remove it if it does not",
        path.display()
    )]
    UnknownKey {
        /// The config.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value as JSON.
        value: String,
    },
}

/// A config being read; it remembers which keys were asked for.
#[derive(Debug)]
pub(super) struct Options {
    path: PathBuf,
    map: Map<String, Value>,
    asked: RefCell<BTreeSet<String>>,
}

/// A value as JSON, short enough for a message.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(100) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

impl Options {
    pub(super) fn read(path: &Path) -> Result<Self, ConfigError> {
        let io = |error| ConfigError::Io { path: path.to_owned(), error };
        if std::fs::metadata(path).map_err(io)?.len() > MAX_BYTES {
            let why = format!("it has more than {MAX_BYTES} bytes");
            return Err(ConfigError::Json { path: path.to_owned(), why });
        }
        let bytes = std::fs::read(path).map_err(io)?;
        let map = serde_json::from_slice(&bytes)
            .map_err(|e| ConfigError::Json { path: path.to_owned(), why: e.to_string() })?;
        Ok(Self { path: path.to_owned(), map, asked: RefCell::default() })
    }

    /// The value of `key` unless absent or null.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.asked.borrow_mut().insert(key.to_owned());
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Whether `key` stands there, even as null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    pub(super) fn unsupported(&self, key: &str, supported: impl Into<String>) -> ConfigError {
        ConfigError::Unsupported {
            path: self.path.clone(),
            key: key.to_owned(),
            value: self.map.get(key).map_or("absent".into(), shown),
            supported: supported.into(),
        }
    }

    pub(super) fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, ConfigError> {
        let missing = || ConfigError::MissingKey { path: self.path.clone(), key: key.to_owned() };
        value.ok_or_else(missing)
    }

    fn convert<T>(
        &self,
        key: &str,
        supported: &str,
        f: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => f(v).map(Some).ok_or_else(|| self.unsupported(key, supported)),
        }
    }

    pub(super) fn u32(&self, key: &str) -> Result<Option<u32>, ConfigError> {
        self.convert(key, "a whole number", |v| v.as_u64().and_then(|v| u32::try_from(v).ok()))
    }

    pub(super) fn f64(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.convert(key, "a number", Value::as_f64)
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.convert(key, "true or false", Value::as_bool)
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, ConfigError> {
        self.get(key).map_or(Ok(None), |v| {
            v.as_str().map(Some).ok_or_else(|| self.unsupported(key, "a text"))
        })
    }

    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<String>>, ConfigError> {
        self.convert(key, "a list of texts", |v| {
            v.as_array()?.iter().map(|v| v.as_str().map(str::to_owned)).collect()
        })
    }

    pub(super) fn u32s(&self, key: &str) -> Result<Option<Vec<u32>>, ConfigError> {
        self.convert(key, "a list of whole numbers", |v| {
            v.as_array()?.iter().map(|v| v.as_u64().and_then(|v| u32::try_from(v).ok())).collect()
        })
    }

    pub(super) fn f64s(&self, key: &str) -> Result<Option<Vec<f64>>, ConfigError> {
        self.convert(key, "a list of numbers", |v| {
            v.as_array()?.iter().map(Value::as_f64).collect()
        })
    }

    /// Refuses `key` unless absent, null or one of `allowed`.
    pub(super) fn only(&self, key: &str, allowed: &[Value]) -> Result<(), ConfigError> {
        match self.get(key) {
            Some(v) if !allowed.contains(v) => {
                let list: Vec<String> = std::iter::once("null".to_owned())
                    .chain(allowed.iter().map(Value::to_string))
                    .collect();
                Err(self.unsupported(key, list.join(", ")))
            }
            _ => Ok(()),
        }
    }

    /// Refuses keys that were neither asked for nor `harmless`. Keys that begin with an underscore are
    /// diffusers' own bookkeeping.
    pub(super) fn finish(self, harmless: &[&str]) -> Result<(), ConfigError> {
        let asked = self.asked.into_inner();
        let unknown = self.map.iter().find(|(k, _)| {
            !(asked.contains(*k) || harmless.contains(&k.as_str()) || k.starts_with('_'))
        });
        match unknown {
            None => Ok(()),
            Some((key, value)) => Err(ConfigError::UnknownKey {
                path: self.path,
                key: key.clone(),
                value: shown(value),
            }),
        }
    }
}
