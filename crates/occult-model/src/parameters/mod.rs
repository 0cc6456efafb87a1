//! The parameters of a model as variables: what a trainer reads, changes and writes back.

mod initial;
mod write;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use occult_kernels::Threads;
use occult_kernels::ops::GradSink;

use crate::build::{Source, build};
use crate::decoder::Decoder;
use crate::error::{ModelError, Result};
use crate::hf::{ExpertLayout, Names, Role, TensorInfo};
use crate::layers::{Linear, MatrixParameter};
use crate::load::ModelFiles;
use crate::moe::{LocalExperts, MoeLayer, Router, StackedExperts};
use crate::spec::ModelSpec;

/// What a parameter is: who holds it, and what a trainer may want to treat apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParameterKind {
    /// The embedding table, also the output layer where they are tied. Replicated.
    Embedding,
    /// The output layer. Replicated.
    Output,
    /// Weight of a norm. Replicated.
    Norm,
    /// Any other bias. Replicated.
    Bias,
    /// A router. Replicated.
    Router {
        /// The model's layer.
        layer: usize,
    },
    /// Gate and up matrices `[e, 2F, D]`, or down matrices `[e, D, F]`, of the routed experts this rank holds.
    Experts {
        /// The model's layer.
        layer: usize,
    },
    /// The gate of a shared expert, `[1, D]`. Replicated.
    SharedGate,
    /// Any other matrix: projections of attention, dense MLPs, shared experts. Replicated.
    Matrix,
}

impl ParameterKind {
    /// Whether every rank has the same values (gradients are added over ranks); otherwise each has its own experts.
    pub fn is_replicated(self) -> bool {
        !matches!(self, ParameterKind::Experts { .. })
    }
}

/// One parameter, f32.
#[derive(Debug)]
pub struct Parameter {
    name: String,
    kind: ParameterKind,
    var: Var,
    trained: bool,
    /// Gradients that operations write by themselves.
    sink: GradSink,
    /// Gradients taken from gradient stores.
    stored: Mutex<Option<Tensor>>,
}

impl Parameter {
    /// Name in a checkpoint; of experts, that of the stacked tensor of a layer.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is.
    pub fn kind(&self) -> ParameterKind {
        self.kind
    }

    /// The variable. Setting it changes what decoders made from these parameters compute.
    pub fn var(&self) -> &Var {
        &self.var
    }

    /// Whether it gets gradients.
    pub fn is_trained(&self) -> bool {
        self.trained
    }

    /// Takes the gradient that backward passes have added up since the last call, f32; `None` when none came by.
    pub fn take_gradient(&self) -> Result<Option<Gradient>> {
        let stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner).take();
        let sunk = self.sink.take(self.var.shape())?;
        Ok(match (stored, sunk) {
            (Some(a), Some(b)) => Some((a + b)?),
            (a, b) => a.or(b),
        })
    }

    /// The tensor that layers compute with: frozen parameters lead to no gradient.
    fn tensor(&self) -> Tensor {
        if self.trained { self.var.as_tensor().clone() } else { self.var.as_detached_tensor() }
    }

    fn sink(&self) -> Option<GradSink> {
        self.trained.then(|| self.sink.clone())
    }
}

/// A gradient of the shape of its parameter.
pub type Gradient = Tensor;

/// All parameters that one rank holds. Clones share them.
#[derive(Debug, Clone)]
pub struct ModelParameters {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    spec: ModelSpec,
    names: Names,
    threads: Threads,
    /// Ids of the experts that are held of every layer, ascending; by the model's layer number.
    experts: Vec<Vec<usize>>,
    list: Vec<Parameter>,
    index: BTreeMap<String, usize>,
}

/// Makes the MoE layer of a number from the parameters.
pub type MakeTrainableMoe<'a> = dyn FnMut(&ModelParameters, usize) -> Result<Box<dyn MoeLayer>> + 'a;

impl ModelParameters {
    /// Reads a checkpoint, widened to f32. `trained` chooses by name and kind.
    ///
    /// `experts`: ids of the experts that this rank holds of a layer, ascending; all when `None`. Nothing of the others is
    /// read.
    pub fn read(
        files: &ModelFiles,
        experts: Option<&dyn Fn(usize) -> Vec<usize>>,
        trained: &dyn Fn(&str, ParameterKind) -> bool,
    ) -> Result<Self> {
        Self::make(files.spec(), files.threads(), experts, trained, &mut |info, held| {
            let tensor =
                |values: Vec<f32>, shape: &[usize]| Ok(Tensor::from_vec(values, shape, &Device::Cpu)?);
            let (gate_up, layer) = match info.role {
                Role::FusedGateUp { layer } => (true, layer),
                Role::FusedDown { layer } => (false, layer),
                // A mixtral router has another name beside experts one by one.
                Role::Router { layer } => return files.weight(&files.names().router(layer))?.tensor_f32(),
                _ => return files.weight(&info.name)?.tensor_f32(),
            };
            let mut values = Vec::with_capacity(info.shape.iter().product());
            for &expert in held {
                let e = files.experts(layer, &[expert])?.swap_remove(0);
                for weight in if gate_up { vec![&e.gate, &e.up] } else { vec![&e.down] } {
                    values.extend(weight.to_f32());
                }
            }
            tensor(values, &info.shape)
        })
    }

    /// Random values as the released code begins pretraining with: matrices and the embedding normal with deviation
    /// `initializer_range` (0.02 in most configurations), norms one, biases zero. Every parameter, and every expert, has
    /// a stream of its own, so that the values do not depend on which experts a rank holds.
    pub fn random(
        spec: &ModelSpec,
        threads: &Threads,
        seed: u64,
        initializer_range: f64,
        experts: Option<&dyn Fn(usize) -> Vec<usize>>,
        trained: &dyn Fn(&str, ParameterKind) -> bool,
    ) -> Result<Self> {
        Self::make(spec, threads, experts, trained, &mut |info, held| {
            let values = initial::values(info, held, kind(info), seed, initializer_range);
            Ok(Tensor::from_vec(values, info.shape.as_slice(), &Device::Cpu)?)
        })
    }

    fn make(
        spec: &ModelSpec,
        threads: &Threads,
        experts: Option<&dyn Fn(usize) -> Vec<usize>>,
        trained: &dyn Fn(&str, ParameterKind) -> bool,
        values: &mut dyn FnMut(&TensorInfo, &[usize]) -> Result<Tensor>,
    ) -> Result<Self> {
        let names = Names::new(spec.family, ExpertLayout::Fused);
        let all: Vec<usize> = (0..spec.moe.router.num_experts).collect();
        let held: Vec<Vec<usize>> =
            (0..spec.layers.len()).map(|layer| experts.map_or_else(|| all.clone(), |e| e(layer))).collect();
        let mut list = Vec::new();
        for mut info in names.tensors(spec) {
            let kind = kind(&info);
            let held: &[usize] = match kind {
                ParameterKind::Experts { layer } => &held[layer],
                _ => &[],
            };
            if held.windows(2).any(|w| w[0] >= w[1]) {
                return Err(ModelError::request("experts of a rank: ids must ascend".to_owned()));
            }
            if !kind.is_replicated() {
                info.shape[0] = held.len();
            }
            let var = Var::from_tensor(&values(&info, held)?)?;
            let trained = trained(&info.name, kind);
            list.push(Parameter {
                name: info.name,
                kind,
                var,
                trained,
                sink: GradSink::new(),
                stored: Mutex::new(None),
            });
        }
        let index = list.iter().enumerate().map(|(i, p)| (p.name.clone(), i)).collect();
        let (spec, threads) = (spec.clone(), threads.clone());
        Ok(Self { shared: Arc::new(Shared { spec, names, threads, experts: held, list, index }) })
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.shared.spec
    }

    /// Ids of the experts that are held of a layer, ascending.
    pub fn experts_of(&self, layer: usize) -> &[usize] {
        self.shared.experts.get(layer).map_or(&[], Vec::as_slice)
    }

    /// All parameters, layer after layer.
    pub fn iter(&self) -> std::slice::Iter<'_, Parameter> {
        self.shared.list.iter()
    }

    /// A parameter by its name.
    pub fn get(&self, name: &str) -> Option<&Parameter> {
        self.shared.index.get(name).map(|&i| &self.shared.list[i])
    }

    fn named(&self, name: &str) -> Result<&Parameter> {
        self.get(name).ok_or_else(|| ModelError::request(format!("the model has no parameter {name}")))
    }

    /// Adds the gradients of one backward pass to those that [`Parameter::take_gradient`] will give. Gradients of matrices
    /// and experts have got there by themselves; those of norms, biases and embeddings come with the store.
    pub fn accumulate(&self, grads: &GradStore) -> Result<()> {
        for parameter in self.iter().filter(|p| p.trained) {
            let Some(new) = grads.get(&parameter.var) else { continue };
            let mut stored = parameter.stored.lock().unwrap_or_else(PoisonError::into_inner);
            *stored = Some(match stored.take() {
                Some(old) => (old + new)?,
                None => new.clone(),
            });
        }
        Ok(())
    }

    /// The router of a layer.
    pub fn router(&self, layer: usize) -> Result<Router> {
        let linear =
            Linear::from_parts(&self.shared.threads, self.matrix(&self.shared.names.router(layer))?, None);
        Router::from_linear(self.shared.spec.moe.router, layer, linear)
    }

    /// The held experts of a layer.
    pub fn experts(&self, layer: usize) -> Result<StackedExperts> {
        let (up, down) = self.shared.names.fused(layer);
        let (up, down) = (self.named(&up)?, self.named(&down)?);
        let sinks = up.sink().zip(down.sink()).map(|(a, b)| [a, b]);
        Ok(StackedExperts { w_up: up.tensor(), w_down: down.tensor(), sinks })
    }

    /// The model on these parameters, all experts in this process.
    pub fn decoder(&self) -> Result<Decoder> {
        self.decoder_with(&mut |parameters, layer| {
            let (router, experts) = (parameters.router(layer)?, parameters.experts(layer)?);
            Ok(Box::new(LocalExperts::stacked(&parameters.shared.threads, router, experts)?))
        })
    }

    /// The model with MoE layers made by `moe` from each MoE layer's number.
    pub fn decoder_with(&self, moe: &mut MakeTrainableMoe<'_>) -> Result<Decoder> {
        let decoder = build(self, &mut |layer| moe(self, layer))?;
        Ok(Decoder { parameters: Some(self.clone()), ..decoder })
    }
}

impl Source for ModelParameters {
    fn spec(&self) -> &ModelSpec {
        &self.shared.spec
    }

    fn names(&self) -> &Names {
        &self.shared.names
    }

    fn threads(&self) -> &Threads {
        &self.shared.threads
    }

    fn matrix(&self, name: &str) -> Result<MatrixParameter> {
        let parameter = self.named(name)?;
        Ok(MatrixParameter::Variable { tensor: parameter.tensor(), sink: parameter.sink() })
    }

    fn vector(&self, name: &str) -> Result<Tensor> {
        Ok(self.named(name)?.tensor())
    }
}

fn kind(info: &TensorInfo) -> ParameterKind {
    match info.role {
        Role::Router { layer } => ParameterKind::Router { layer },
        Role::FusedGateUp { layer } | Role::FusedDown { layer } | Role::Expert { layer, .. } => {
            ParameterKind::Experts { layer }
        }
        Role::Other if info.name.starts_with("model.embed_tokens.") => ParameterKind::Embedding,
        Role::Other if info.name.starts_with("lm_head.") => ParameterKind::Output,
        Role::Other if info.name.ends_with(".bias") => ParameterKind::Bias,
        Role::Other if info.shape.len() == 1 => ParameterKind::Norm,
        Role::Other if info.shape[0] == 1 => ParameterKind::SharedGate,
        Role::Other => ParameterKind::Matrix,
    }
}
