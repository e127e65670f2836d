//! Writes a model as a stream: one weight after the other, then the manifest, then the header.

use super::header::{HEADER_LEN, Header, MAX_MANIFEST, PAGE};
use super::{ComponentSpec, Manifest, Role, TimestepProjection, WeightPlace};
use crate::graph::Graph;
use crate::tensor::ALIGN;
use std::io::{self, Seek, SeekFrom, Write};

/// Why a model could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The file could not be written.
    #[error("cannot write the model: {0}")]
    Io(#[from] io::Error),
    /// The caller wrote something that its own graph does not describe.
    #[error("cannot write the model: {0}")]
    Inconsistent(String),
}

/// Writes one model to `out`, which must be empty and at its start.
///
/// Call [`Writer::begin`] for a component, [`Writer::weight`] for each of its weights in order, the same
/// for further components, and [`Writer::finish`]. Holds one weight's checksum at a time, never its bytes.
#[derive(Debug)]
pub struct Writer<W: Write + Seek> {
    out: W,
    /// Bytes of weights written.
    at: u64,
    components: Vec<ComponentSpec>,
    /// The last weight's place, open until its padding is known.
    open: Option<(u64, u32)>,
}

impl<W: Write + Seek> Writer<W> {
    /// Starts a model.
    ///
    /// # Errors
    /// [`WriteError::Io`].
    pub fn new(mut out: W) -> Result<Self, WriteError> {
        out.write_all(&[0u8; PAGE as usize])?;
        Ok(Self { out, at: 0, components: Vec::new(), open: None })
    }

    /// Starts a component whose weights follow.
    ///
    /// # Errors
    /// [`WriteError::Inconsistent`] where the graph is not sound or the last component is not complete.
    pub fn begin(
        &mut self,
        role: Role,
        multiple: u32,
        timestep: Option<TimestepProjection>,
        timestep_groups: &[u32],
        graph: Graph,
    ) -> Result<(), WriteError> {
        self.complete()?;
        graph.validate().map_err(|e| WriteError::Inconsistent(format!("{role}: {e}")))?;
        let places = Vec::with_capacity(graph.weights.len());
        self.components.push(ComponentSpec {
            role,
            multiple,
            timestep,
            timestep_groups: timestep_groups.to_vec(),
            graph,
            places,
        });
        Ok(())
    }

    /// Writes the next weight of the component: exactly its `stored_bytes`, as its layout says.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn weight(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let Some(c) = self.components.last() else {
            return Err(WriteError::Inconsistent("a weight before any component".to_owned()));
        };
        let next = c.places.len() + usize::from(self.open.is_some());
        let Some(spec) = c.graph.weights.get(next) else {
            return Err(WriteError::Inconsistent(format!("more weights than {} has", c.role)));
        };
        if spec.stored_bytes() != Some(bytes.len()) {
            let why = format!(
                "{} takes {:?} bytes, {} given",
                spec.name,
                spec.stored_bytes(),
                bytes.len()
            );
            return Err(WriteError::Inconsistent(why));
        }
        let align = if bytes.len() as u64 >= PAGE { PAGE } else { ALIGN as u64 };
        self.close(align)?;
        self.open = Some((self.at, crc32c::crc32c(bytes)));
        self.out.write_all(bytes)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Pads the last weight so that the next can begin at a multiple of `align`, and records its place.
    fn close(&mut self, align: u64) -> Result<(), WriteError> {
        let padding = self.at.next_multiple_of(align) - self.at;
        let zeros = vec![0u8; padding as usize];
        if let Some((offset, crc)) = self.open.take() {
            self.out.write_all(&zeros)?;
            self.at += padding;
            let crc32c = crc32c::crc32c_append(crc, &zeros);
            let place = WeightPlace { offset, extent: self.at - offset, crc32c };
            if let Some(c) =
                self.components.iter_mut().rev().find(|c| c.places.len() < c.graph.weights.len())
            {
                c.places.push(place);
            }
        }
        Ok(())
    }

    fn complete(&mut self) -> Result<(), WriteError> {
        // The next component may begin with a large weight; a page boundary suits any.
        self.close(PAGE)?;
        if let Some(c) = self.components.last()
            && c.places.len() != c.graph.weights.len()
        {
            let why =
                format!("{} has {} of {} weights", c.role, c.places.len(), c.graph.weights.len());
            return Err(WriteError::Inconsistent(why));
        }
        Ok(())
    }

    /// Writes manifest and header and returns the file, flushed but not synced. The components of
    /// `manifest` are replaced by those written.
    ///
    /// # Errors
    /// [`WriteError`].
    pub fn finish(mut self, mut manifest: Manifest) -> Result<W, WriteError> {
        self.complete()?;
        manifest.components = std::mem::take(&mut self.components);
        let text = serde_json::to_vec(&manifest)
            .map_err(|e| WriteError::Inconsistent(format!("the manifest: {e}")))?;
        if text.len() as u64 > MAX_MANIFEST {
            return Err(WriteError::Inconsistent(format!("a manifest of {} bytes", text.len())));
        }
        self.out.write_all(&text)?;
        let header = Header {
            version: manifest.version(),
            weights_len: self.at,
            manifest_len: text.len() as u64,
            manifest_crc: crc32c::crc32c(&text),
        };
        self.out.seek(SeekFrom::Start(0))?;
        let bytes: [u8; HEADER_LEN] = header.to_bytes();
        self.out.write_all(&bytes)?;
        self.out.flush()?;
        Ok(self.out)
    }
}
