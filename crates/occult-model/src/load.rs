//! From a directory to a [`Decoder`].

use std::path::Path;
use std::sync::OnceLock;

use candle_core::Tensor;
use occult_kernels::Threads;

use crate::build::{Source, build};
use crate::decoder::Decoder;
use crate::error::{ModelError, Result};
use crate::hf::{Checkpoint, ExpertLayout, Matrix, Names, read_spec};
use crate::layers::MatrixParameter;
use crate::moe::{ExpertWeights, LocalExperts, MoeLayer, Router};
use crate::spec::ModelSpec;
use crate::weight::{StoredDtype, Weight};

/// Makes the routed part of one MoE layer from the files and the layer's number.
pub type MakeMoeLayer<'a> = dyn FnMut(&ModelFiles, usize) -> Result<Box<dyn MoeLayer>> + 'a;

/// How weights are read.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Format in which weights are held; as stored when `None`: then they stay in the mapped file. Arithmetic is f32.
    pub dtype: Option<StoredDtype>,
    /// What loading and the model may use; as many threads as there are cores when `None`.
    pub threads: Option<Threads>,
}

/// A model directory whose headers have been checked against its configuration. Weights are read when they are asked for.
#[derive(Debug)]
pub struct ModelFiles {
    spec: ModelSpec,
    checkpoint: Checkpoint,
    names: Names,
    options: LoadOptions,
    threads: OnceLock<Threads>,
    /// One `[E]` per MoE layer.
    selection_bias: Option<Vec<Vec<f32>>>,
}

impl ModelFiles {
    /// Reads config.json and the headers of the weights, and checks that every tensor is there with its shape.
    pub fn open(dir: &Path, options: LoadOptions) -> Result<Self> {
        let spec = read_spec(dir)?;
        let checkpoint = Checkpoint::open(dir)?;
        let names = Names::detect(&spec, &checkpoint);
        names.check(&spec, &checkpoint)?;
        Ok(Self { spec, checkpoint, names, options, threads: OnceLock::new(), selection_bias: None })
    }

    /// The same model with a bias on its routers' choices, `[E]` for every MoE layer, which no checkpoint format of the
    /// supported families holds. Errors when it is for another model.
    pub fn with_selection_bias(self, bias: Vec<Vec<f32>>) -> Result<Self> {
        let (layers, experts) = (self.spec.num_moe_layers(), self.spec.moe.router.num_experts);
        let good = |b: &Vec<f32>| b.len() == experts && b.iter().all(|v| v.is_finite());
        if bias.len() != layers || !bias.iter().all(good) {
            return Err(ModelError::request(format!(
                "the selection bias: expected {experts} finite numbers for each of {layers} MoE layers"
            )));
        }
        Ok(Self { selection_bias: Some(bias), ..self })
    }

    /// The bias on the routers' choices, if the model has one.
    pub fn selection_bias(&self) -> Option<&[Vec<f32>]> {
        self.selection_bias.as_deref()
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The tensors.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Their names.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// What loading and the model may use.
    pub fn threads(&self) -> &Threads {
        self.threads.get_or_init(|| {
            let cores = || std::thread::available_parallelism().map_or(1, usize::from);
            self.options.threads.clone().unwrap_or_else(|| Threads::new(cores()))
        })
    }

    /// A tensor, checked to be finite, in the format asked for.
    pub(crate) fn weight(&self, name: &str) -> Result<Weight> {
        let weight = self.checkpoint.weight(name)?;
        weight.check_finite()?;
        match self.options.dtype {
            Some(dtype) => weight.cast(dtype),
            None => Ok(weight),
        }
    }

    /// The router of a layer.
    pub fn router(&self, layer: usize) -> Result<Router> {
        let weight = self.weight(&self.names.router(layer))?;
        let router = Router::new(self.threads(), self.spec.moe.router, layer, &weight)?;
        let moe_layer = self.spec.moe_layers().position(|l| l == layer);
        match self.selection_bias.as_ref().zip(moe_layer).and_then(|(bias, at)| bias.get(at)) {
            Some(bias) => router.with_selection_bias(bias),
            None => Ok(router),
        }
    }

    /// The weights of these experts of a layer, in the given order; nothing of the other experts is read.
    pub fn experts(&self, layer: usize, experts: &[usize]) -> Result<Vec<ExpertWeights>> {
        let n = self.spec.moe.router.num_experts;
        if let Some(e) = experts.iter().find(|&&e| e >= n) {
            return Err(ModelError::request(format!("expert {e}, the layer has {n}")));
        }
        match self.names.layout {
            ExpertLayout::PerExpert => {
                let one = |&e: &usize| {
                    let matrix = |m| self.weight(&self.names.expert(layer, e, m));
                    Ok(ExpertWeights {
                        gate: matrix(Matrix::Gate)?,
                        up: matrix(Matrix::Up)?,
                        down: matrix(Matrix::Down)?,
                    })
                };
                map_parallel(self.threads(), experts, one)
            }
            ExpertLayout::Fused => {
                let (gate_up, down) = self.names.fused(layer);
                let (gate_up, down) = (self.checkpoint.weight(&gate_up)?, self.checkpoint.weight(&down)?);
                let (d, f) = (self.spec.hidden_size, self.spec.moe.expert_size);
                let cut = |from: &Weight, e: usize, rows: (usize, usize)| {
                    let slab = from.slab_rows(e, rows.0, rows.1);
                    let slab =
                        slab.ok_or_else(|| ModelError::request(format!("{}: no slab {e}", from.name())))?;
                    slab.check_finite()?;
                    self.options.dtype.map_or(Ok(slab.clone()), |dtype| slab.cast(dtype))
                };
                let one = |&e: &usize| {
                    Ok(ExpertWeights {
                        gate: cut(&gate_up, e, (0, f))?,
                        up: cut(&gate_up, e, (f, 2 * f))?,
                        down: cut(&down, e, (0, d))?,
                    })
                };
                map_parallel(self.threads(), experts, one)
            }
        }
    }

    /// The model with all experts in this process.
    pub fn load(&self) -> Result<Decoder> {
        let all: Vec<usize> = (0..self.spec.moe.router.num_experts).collect();
        self.load_with(&mut |files, layer| {
            let (router, experts) = (files.router(layer)?, files.experts(layer, &all)?);
            Ok(Box::new(LocalExperts::new(files.threads(), router, experts)?))
        })
    }

    /// The model with MoE layers made by `moe`, which is called with each MoE layer's number and reads what it needs.
    pub fn load_with(&self, moe: &mut MakeMoeLayer<'_>) -> Result<Decoder> {
        build(self, &mut |layer| moe(self, layer))
    }
}

impl Source for ModelFiles {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn names(&self) -> &Names {
        &self.names
    }

    fn threads(&self) -> &Threads {
        self.threads()
    }

    fn matrix(&self, name: &str) -> Result<MatrixParameter> {
        Ok(MatrixParameter::Stored(self.weight(name)?))
    }

    fn vector(&self, name: &str) -> Result<Tensor> {
        self.weight(name)?.tensor_f32()
    }
}

/// `f` of every item, in the items' order, on several threads.
fn map_parallel<T: Sync, R: Send>(
    threads: &Threads,
    items: &[T],
    f: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let mut results: Vec<Option<Result<R>>> = Vec::new();
    results.resize_with(items.len(), || None);
    threads.for_each_chunk(&mut results, 1, |i, result| result[0] = Some(f(&items[i])));
    results.into_iter().flatten().collect()
}
