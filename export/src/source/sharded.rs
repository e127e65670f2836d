//! A checkpoint split over several files by an index that names each tensor's file.

use super::{SourceError, SourceErrorKind, TensorInfo, WeightSource, open};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

/// More shards than any latent diffusion model has.
const MAX_SHARDS: usize = 256;

/// Several weight files that act as one.
pub struct ShardedSource {
    path: PathBuf,
    shards: Vec<Box<dyn WeightSource>>,
    /// Which shard holds a tensor.
    owner: BTreeMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl ShardedSource {
    /// Opens the shards an index file names; they must lie in its folder.
    ///
    /// # Errors
    /// [`SourceError`] where the index or a shard cannot be read, or they contradict each other.
    pub fn open(index: &Path) -> Result<Self, SourceError> {
        let fail = |why: String| SourceError::new(index, SourceErrorKind::Index { why });
        let text = std::fs::read(index).map_err(|error| {
            SourceError::new(index, SourceErrorKind::Io { action: "read", error })
        })?;
        let Index { weight_map } =
            serde_json::from_slice(&text).map_err(|e| fail(e.to_string()))?;
        let folder = index.parent().unwrap_or(Path::new("."));
        let mut files: Vec<String> = Vec::new();
        let mut shards: Vec<Box<dyn WeightSource>> = Vec::new();
        let mut owner = BTreeMap::new();
        for (tensor, file) in weight_map {
            let shard = match files.iter().position(|f| *f == file) {
                Some(at) => at,
                None => {
                    let mut parts = Path::new(&file).components();
                    let plain =
                        matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
                    if !plain || files.len() == MAX_SHARDS {
                        return Err(fail(format!("it names the file {file:?}")));
                    }
                    shards.push(open(&folder.join(&file))?);
                    files.push(file.clone());
                    files.len() - 1
                }
            };
            if shards[shard].info(&tensor).is_none() {
                return Err(fail(format!("{tensor} is not in {file}, where it should be")));
            }
            owner.insert(tensor, shard);
        }
        Ok(Self { path: index.to_owned(), shards, owner })
    }
}

impl WeightSource for ShardedSource {
    fn path(&self) -> &Path {
        &self.path
    }

    fn files(&self) -> Vec<PathBuf> {
        self.shards.iter().flat_map(|s| s.files()).collect()
    }

    fn names(&self) -> Vec<&str> {
        self.owner.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.owner.get(name).and_then(|&shard| self.shards[shard].info(name))
    }

    fn read_f32(&self, name: &str, out: &mut Vec<f32>) -> Result<(), SourceError> {
        match self.owner.get(name) {
            Some(&shard) => self.shards[shard].read_f32(name, out),
            None => {
                let kind = SourceErrorKind::NoSuchTensor { name: name.to_owned() };
                Err(SourceError::new(&self.path, kind))
            }
        }
    }
}
