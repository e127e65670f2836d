//! A checkpoint understood but not yet written: components, recipes for their weights, and the manifest's rest.

use crate::arch::{AutoencoderArch, UnetArch};
use crate::compvis::{self, CompvisCheckpoint, Ema, Hints, NameMap};
use crate::diffusers::{DiffusersFolder, former_name};
use crate::source::{self, WeightSource};
use crate::tensors::{Part, Recipe};
use crate::{ExportError, ExportOptions, build};
use latile_runtime::format::{LatentSpec, Role, SchedulerSpec, Task, TimestepProjection};
use latile_runtime::graph::{Graph, WeightSpec};
use latile_runtime::tensor::DType;
use std::collections::BTreeSet;
use std::path::Path;

/// One network, ready to be written.
pub(crate) struct Component {
    pub(crate) role: Role,
    pub(crate) multiple: u32,
    pub(crate) timestep: Option<TimestepProjection>,
    pub(crate) graph: Graph,
    /// One for each of `graph.weights`.
    pub(crate) recipes: Vec<Recipe>,
}

/// A checkpoint understood.
pub(crate) struct Model {
    /// `diffusers`, `compvis`, `onnx`.
    pub(crate) origin: &'static str,
    pub(crate) sources: Vec<Box<dyn WeightSource>>,
    pub(crate) components: Vec<Component>,
    pub(crate) task: Task,
    pub(crate) latent: Option<LatentSpec>,
    pub(crate) scheduler: Option<SchedulerSpec>,
    pub(crate) license: Option<String>,
    pub(crate) notes: Vec<String>,
}

/// Where a component's weights are: source, names to try, and the part.
type Lookup<'a> = dyn Fn(&WeightSpec) -> (usize, Vec<String>, Part) + 'a;

impl Model {
    /// Reads a diffusers folder or a CompVis checkpoint, whichever `path` is.
    pub(crate) fn open(path: &Path, options: &ExportOptions) -> Result<Self, ExportError> {
        let meta = std::fs::metadata(path)
            .map_err(|error| ExportError::Checkpoint { path: path.to_owned(), error })?;
        if meta.is_dir() { Self::diffusers(path, options) } else { Self::compvis(path, options) }
    }

    fn diffusers(path: &Path, options: &ExportOptions) -> Result<Self, ExportError> {
        let folder = DiffusersFolder::open(path)?;
        let (unet, unet_weights) = folder.unet;
        let (autoencoder, autoencoder_weights) = folder.autoencoder;
        let arch = |error, weights: &dyn WeightSource| ExportError::Arch {
            path: weights.path().parent().unwrap_or(path).join("config.json"),
            error,
        };
        unet.check().map_err(|e| arch(e, &*unet_weights))?;
        autoencoder.arch.check().map_err(|e| arch(e, &*autoencoder_weights))?;
        let mut model = Self::empty("diffusers", vec![unet_weights, autoencoder_weights]);
        model.license = folder.license;
        model.notes.extend(folder.scheduler.note);
        model.scheduler = Some(folder.scheduler.spec);
        let (scale, shift) =
            if folder.scaled_latents { (autoencoder.scale, autoencoder.shift) } else { (1.0, 0.0) };
        model.latent = Some(latent(&autoencoder.arch, scale, shift));
        if folder.class == "LDMSuperResolutionPipeline" {
            model.task = task(&unet, &autoencoder.arch, &mut model.notes);
        }
        let names = |source: usize| {
            move |spec: &WeightSpec| {
                let former = former_name(&spec.name);
                (source, std::iter::once(spec.name.clone()).chain(former).collect(), Part::Whole)
            }
        };
        model.add_unet(&unet, options.precision.dtype(), &names(0))?;
        model.add_autoencoder(&autoencoder.arch, options, &names(1))?;
        model.note_unused();
        Ok(model)
    }

    fn compvis(path: &Path, options: &ExportOptions) -> Result<Self, ExportError> {
        let source = source::open(path)?;
        let mut hints = options.hints;
        let mut notes = Vec::new();
        if let Some(config) = compvis::config_beside(path) {
            notes.push(format!("read {} beside the checkpoint", config.display()));
            hints = hints.or(Hints::read(&config)?);
        }
        let checkpoint = CompvisCheckpoint::read(&*source, &hints, options.ema)?;
        if let Some(name) = compvis::unused(&*source, &checkpoint) {
            return Err(ExportError::Layout {
                path: path.to_owned(),
                why: format!(
                    "tensor {name} has no place in the network that the other tensors describe"
                ),
            });
        }
        let conditioned = source.names().iter().any(|n| n.starts_with("cond_stage_model."));
        let mut model = Self::empty("compvis", vec![source]);
        model.notes = notes;
        model.notes.extend(checkpoint.notes);
        model.scheduler = checkpoint.scheduler;
        let (autoencoder, autoencoder_names) = &checkpoint.autoencoder;
        model.latent = Some(latent(autoencoder, checkpoint.scale, 0.0));
        let lookup = |names: &NameMap| {
            let names = names.clone();
            move |spec: &WeightSpec| match names.get(&spec.name) {
                Some((name, part)) => (0, vec![name.clone()], part.clone()),
                // The graph is built from the same description as the names.
                None => (0, vec![spec.name.clone()], Part::Whole),
            }
        };
        if let Some((unet, names)) = &checkpoint.unet {
            if conditioned {
                model
                    .notes
                    .push("its conditioning stage (cond_stage_model) is left out".to_owned());
            } else {
                model.task = task(unet, autoencoder, &mut model.notes);
            }
            model.add_unet(unet, options.precision.dtype(), &lookup(names))?;
        }
        model.add_autoencoder(autoencoder, options, &lookup(autoencoder_names))?;
        Ok(model)
    }

    pub(crate) fn empty(origin: &'static str, sources: Vec<Box<dyn WeightSource>>) -> Self {
        Self {
            origin,
            sources,
            components: Vec::new(),
            task: Task::Components,
            latent: None,
            scheduler: None,
            license: None,
            notes: Vec::new(),
        }
    }

    fn add_unet(
        &mut self,
        arch: &UnetArch,
        packed: DType,
        lookup: &Lookup<'_>,
    ) -> Result<(), ExportError> {
        let graph = build::unet(arch, packed);
        self.add(Role::Unet, arch.multiple(), Some(arch.time), graph, lookup)
    }

    fn add_autoencoder(
        &mut self,
        arch: &AutoencoderArch,
        options: &ExportOptions,
        lookup: &Lookup<'_>,
    ) -> Result<(), ExportError> {
        let packed = options.precision.dtype();
        self.add(Role::Decoder, 1, None, build::decoder(arch, packed), lookup)?;
        if options.encoder {
            self.add(Role::Encoder, arch.multiple(), None, build::encoder(arch, packed), lookup)?;
        }
        Ok(())
    }

    fn add(
        &mut self,
        role: Role,
        multiple: u32,
        timestep: Option<TimestepProjection>,
        graph: Graph,
        lookup: &Lookup<'_>,
    ) -> Result<(), ExportError> {
        let recipe = |spec: &WeightSpec| {
            let (source, names, part) = lookup(spec);
            Recipe::find(&self.sources, source, &names, part, spec, role.name())
        };
        let recipes = graph.weights.iter().map(recipe).collect::<Result<_, _>>()?;
        self.components.push(Component { role, multiple, timestep, graph, recipes });
        Ok(())
    }

    /// Notes tensors that no component reads; those of an encoder that was not asked for are no news.
    fn note_unused(&mut self) {
        let encoder = self.components.iter().any(|c| c.role == Role::Encoder);
        for (i, source) in self.sources.iter().enumerate() {
            let used: BTreeSet<&str> = self
                .components
                .iter()
                .flat_map(|c| &c.recipes)
                .filter(|r| r.source == i)
                .map(|r| r.tensor.as_str())
                .collect();
            let skipped =
                |n: &str| !encoder && (n.starts_with("encoder.") || n.starts_with("quant_conv."));
            let unused: Vec<&str> =
                source.names().into_iter().filter(|n| !used.contains(n) && !skipped(n)).collect();
            if let Some(first) = unused.first() {
                self.notes.push(format!(
                    "{}: {} tensors are not used, {first} first",
                    source.path().display(),
                    unused.len()
                ));
            }
        }
    }
}

/// Super-resolution where the U-Net takes a latent and a picture on the same grid and gives a latent.
fn task(unet: &UnetArch, autoencoder: &AutoencoderArch, notes: &mut Vec<String>) -> Task {
    let latent = autoencoder.latent_dim();
    if unet.out_channels == latent && unet.in_channels == latent + autoencoder.in_channels {
        return Task::SuperResolution;
    }
    notes.push(format!(
        "the U-Net takes {} channels and gives {}, the latent has {latent}: not super-resolution by concatenation; \
         the components can be run one by one",
        unet.in_channels, unet.out_channels
    ));
    Task::Components
}

fn latent(arch: &AutoencoderArch, scale: f32, shift: f32) -> LatentSpec {
    LatentSpec { channels: arch.latent_dim(), factor: arch.factor(), scale, shift }
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            precision: latile_runtime::format::Precision::F32,
            overwrite: false,
            encoder: true,
            name: None,
            license: None,
            steps: None,
            eta: None,
            consistency: None,
            quantization: None,
            ema: Ema::default(),
            hints: Hints::default(),
        }
    }
}
