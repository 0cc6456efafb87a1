//! The real model under the trainer: [`MoeModel`] is a decoder with its parameters, the losses and the ranks.

mod adapter;
mod experts;
mod figures;
mod gather;
mod in_place;
mod ranks;
mod replace;
mod self_check;
mod write;

pub use ranks::{CommGroup, ExpertRanks};
pub use replace::Replacement;

use std::borrow::Cow;
use std::collections::BTreeMap;

use candle_core::Tensor;
use occult_model::hf::BalanceLoss;
use occult_model::{
    BalanceCounts, Decoder, ModelError, ModelFiles, ModelParameters, ModelSpec, Parameter, ParameterKind,
    Threads, TrainBatch, TrainOptions, TrainOutput,
};
use occult_plan::{ExpertId, Rank, RoutingBuf};

use crate::balance::update_bias;
use crate::checkpoint::Kind;
use crate::data::{Batch, IGNORE, PADDING};
use crate::error::{Result, TrainError};
use crate::lora::Lora;
use crate::optim::Moments;
use crate::random::hash_bytes;
use crate::trainer::{BatchReport, ParameterInfo, TrainableModel, Visitor};
use adapter::Adapter;
use experts::{Choices, TrainedExperts};
use in_place::in_place;

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scope {
    /// Everything.
    All,
    /// The routed experts; the rest is frozen, as in the paper.
    Experts,
    /// Low-rank updates of attention, shared experts, dense networks and routed experts.
    Lora(Lora),
}

impl Scope {
    fn trains(self, kind: ParameterKind) -> bool {
        match self {
            Scope::All => true,
            Scope::Experts => matches!(kind, ParameterKind::Experts { .. }),
            Scope::Lora(_) => matches!(kind, ParameterKind::Experts { .. } | ParameterKind::Matrix),
        }
    }
}

/// How a model is trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ModelOptions {
    /// What is trained.
    pub scope: Scope,
    /// Which loss keeps experts evenly used.
    pub balance: BalanceLoss,
    /// Its coefficient; 0 for none.
    pub balance_coefficient: f64,
    /// Rate of the bias on the routers' choices, which moves after every step against the load; 0 for none.
    pub balance_bias: f32,
    /// Coefficient of the router's z-loss, a mean over tokens and layers; 0 for none.
    pub router_z_coefficient: f64,
    /// Coefficient of the z-loss of the output's softmax; 0 for none. The reported loss then contains it.
    pub z_coefficient: f32,
    /// Compute layers again in the backward pass instead of keeping their insides.
    pub recompute: bool,
    /// Seed of whatever begins at random.
    pub seed: u64,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            scope: Scope::All,
            balance: BalanceLoss::AllLayers,
            balance_coefficient: 0.01,
            balance_bias: 0.0,
            router_z_coefficient: 0.0,
            z_coefficient: 0.0,
            recompute: false,
            seed: 0,
        }
    }
}

/// Something that has weights, gradients and moments of its own.
#[derive(Debug)]
enum Slot {
    /// A parameter of the model, by its place in the list.
    Whole { parameter: usize, gradient: Option<Tensor> },
    /// A or B of an adapter.
    Factor { adapter: usize, is_b: bool },
}

/// A decoder that can be trained, on one rank of a group.
#[derive(Debug)]
pub struct MoeModel {
    parameters: ModelParameters,
    decoder: Decoder,
    threads: Threads,
    ranks: ExpertRanks,
    options: ModelOptions,
    limit: Option<usize>,
    infos: Vec<ParameterInfo>,
    slots: Vec<Slot>,
    adapters: Vec<Adapter>,
    /// Whether gradients have been taken from the parameters since the last backward pass.
    collected: bool,
    /// What the routers of each MoE layer chose before the limit.
    choices: Vec<Choices>,
    /// What drift is measured from: copies per token without the limit, of the placement's maker or of the first step.
    reference: Option<f64>,
    /// `[E]` of every MoE layer: added to the routers' probabilities for the choice.
    bias: Option<Vec<Vec<f32>>>,
    /// `[E]` of every MoE layer: tokens of this rank's step so far, where a bias follows them.
    load: Vec<Vec<u64>>,
    /// Whether and how another placement is taken.
    replacement: Option<Replacement>,
    replaced: bool,
    /// That of a checkpoint, until its weights are there.
    saved_placement: Option<Vec<Vec<Rank>>>,
    /// Of every MoE layer what this rank's tokens of the step chose, `[T, K]`, where another placement can be taken.
    sample: Vec<Vec<ExpertId>>,
}

fn failed(what: &str) -> impl Fn(ModelError) -> TrainError + '_ {
    move |e| match e {
        ModelError::RouterLogit { .. } => TrainError::NotFinite(e.to_string()),
        e => TrainError::model(what, e),
    }
}

fn kind_of(parameters: &ModelParameters, kind: ParameterKind) -> Kind {
    match kind {
        ParameterKind::Experts { layer } => {
            Kind::Experts(parameters.experts_of(layer).iter().map(|&e| e as u32).collect())
        }
        _ => Kind::Replicated,
    }
}

impl MoeModel {
    /// A model that goes on from a checkpoint's weights; each rank reads its own experts.
    pub fn read(files: &ModelFiles, ranks: ExpertRanks, options: ModelOptions) -> Result<Self> {
        let held = held(files.spec(), &ranks)?;
        let trains = |_: &str, kind| options.scope.trains(kind);
        let parameters = ModelParameters::read(files, Some(&|layer| held[layer].clone()), &trains);
        let parameters = parameters.map_err(failed("reading the model"))?;
        let bias = files.selection_bias().map(<[_]>::to_vec);
        Self::new(parameters, files.threads(), ranks, options, bias)
    }

    /// A model of random weights, the same for any number of ranks. `initializer_range`: their standard deviation.
    pub fn random(
        spec: &ModelSpec,
        threads: &Threads,
        initializer_range: f64,
        ranks: ExpertRanks,
        options: ModelOptions,
    ) -> Result<Self> {
        let held = held(spec, &ranks)?;
        let trains = |_: &str, kind| options.scope.trains(kind);
        let experts: &dyn Fn(usize) -> Vec<usize> = &|layer| held[layer].clone();
        let parameters =
            ModelParameters::random(spec, threads, options.seed, initializer_range, Some(experts), &trains);
        Self::new(parameters.map_err(failed("making the model"))?, threads, ranks, options, None)
    }

    fn new(
        parameters: ModelParameters,
        threads: &Threads,
        ranks: ExpertRanks,
        options: ModelOptions,
        bias: Option<Vec<Vec<f32>>>,
    ) -> Result<Self> {
        let (mut infos, mut slots, mut adapters) = (vec![], vec![], vec![]);
        for (parameter, p) in parameters.iter().enumerate().filter(|(_, p)| p.is_trained()) {
            let (name, shape) = (p.name().to_owned(), p.var().dims().to_vec());
            let kind = kind_of(&parameters, p.kind());
            let decays = !matches!(p.kind(), ParameterKind::Norm | ParameterKind::Bias);
            let info = ParameterInfo { name, shape, kind, decays, lr_scale: 1.0 };
            let Scope::Lora(lora) = options.scope else {
                infos.push(info);
                slots.push(Slot::Whole { parameter, gradient: None });
                continue;
            };
            let adapter = Adapter::new(parameter, p, &info, lora, options.seed)?;
            for is_b in [false, true] {
                infos.push(adapter.info(&info, is_b));
                slots.push(Slot::Factor { adapter: adapters.len(), is_b });
            }
            adapters.push(adapter);
        }
        if infos.is_empty() {
            return Err(TrainError::request("nothing of the model would be trained"));
        }
        let choices: Vec<Choices> = ranks.layers().iter().map(|_| Choices::default()).collect();
        let zeros = vec![vec![0.0; parameters.spec().moe.router.num_experts]; choices.len()];
        let bias = if options.balance_bias > 0.0 { bias.or(Some(zeros)) } else { bias };
        let decoder = decoder(&parameters, threads, &ranks, None, bias.as_deref(), &choices, false)?;
        let (threads, reference) = (threads.clone(), ranks.promised_copies());
        Ok(Self {
            parameters,
            decoder,
            threads,
            ranks,
            options,
            limit: None,
            infos,
            slots,
            adapters,
            collected: false,
            choices,
            reference,
            bias,
            load: vec![],
            replacement: None,
            replaced: false,
            saved_placement: None,
            sample: vec![],
        })
    }

    /// The parameters that this rank holds.
    pub fn model(&self) -> &ModelParameters {
        &self.parameters
    }

    /// The model as it computes now, with the limit.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The ranks.
    pub fn ranks(&self) -> &ExpertRanks {
        &self.ranks
    }

    fn parameter(&self, index: usize) -> &Parameter {
        &self.parameters.iter().as_slice()[index]
    }

    /// Sets the most ranks a token visits; `None` for no limit.
    pub fn set_limit(&mut self, limit: Option<usize>) -> Result<()> {
        if std::mem::replace(&mut self.limit, limit) != limit { self.build() } else { Ok(()) }
    }

    /// The bias on the routers' choices, `[E]` of every MoE layer, if there is one.
    pub fn selection_bias(&self) -> Option<&[Vec<f32>]> {
        self.bias.as_deref()
    }

    /// Puts the layers together again: limit and bias are parts of them.
    fn build(&mut self) -> Result<()> {
        let Self { parameters, threads, ranks, limit, bias, choices, .. } = self;
        self.decoder = decoder(parameters, threads, ranks, *limit, bias.as_deref(), choices, false)?;
        Ok(())
    }

    /// Keeps what the tokens of a batch chose without the limit.
    fn keep_sample(
        &mut self,
        routing: &[RoutingBuf],
        chosen: &[Option<Vec<ExpertId>>],
        is_token: Option<&[bool]>,
    ) {
        if self.replacement.is_none() {
            return;
        }
        self.sample.resize(routing.len(), vec![]);
        for ((sample, routing), chosen) in self.sample.iter_mut().zip(routing).zip(chosen) {
            let ids = chosen.as_ref().unwrap_or(&routing.expert_ids);
            let rows = ids.chunks_exact(routing.top_k.max(1)).enumerate();
            let is_token = |t: usize| is_token.is_none_or(|m| m.get(t).copied().unwrap_or(true));
            rows.filter(|(t, _)| is_token(*t)).for_each(|(_, row)| sample.extend_from_slice(row));
        }
    }

    /// Moves the bias against the load of the step, that of all ranks.
    fn follow_load(&mut self) -> Result<()> {
        let (Some(bias), rate) = (&mut self.bias, self.options.balance_bias) else { return Ok(()) };
        if rate <= 0.0 || self.load.is_empty() {
            return Ok(());
        }
        let mut load: Vec<f64> = self.load.iter().flatten().map(|n| *n as f64).collect();
        let sum = self.ranks.comm().all_reduce_sum_f64("tokens of experts", &mut load);
        sum.map_err(|e| TrainError::model("adding tokens of experts", e))?;
        let experts = self.load[0].len().max(1);
        for (bias, load) in bias.iter_mut().zip(load.chunks_exact(experts)) {
            let load: Vec<u64> = load.iter().map(|n| *n as u64).collect();
            update_bias(bias, &load, rate)?;
        }
        self.build()
    }

    fn forward(&self, batch: &Batch) -> Result<TrainOutput> {
        let batch = TrainBatch {
            num_sequences: batch.num_sequences,
            tokens: &batch.tokens,
            targets: &batch.targets,
            segments: Some(&batch.segments),
        };
        let options = TrainOptions { recompute: self.options.recompute, z_loss: self.options.z_coefficient };
        // What an evaluation, or a backward pass that computed layers again, has left.
        self.choices.iter().for_each(|c| drop(c.take()));
        self.decoder.forward_train(batch, options).map_err(failed("forward pass"))
    }

    /// The loss to go backward from, and the values of its auxiliary parts. Auxiliary losses are means over the tokens that
    /// all ranks compute at once: every rank goes backward from its part, and the parts add up to the loss of one rank that
    /// computes them all.
    fn total_loss(
        &self,
        out: &TrainOutput,
        batch: &Batch,
        is_token: Option<&[bool]>,
        scale: f64,
    ) -> Result<(Tensor, Vec<(&'static str, f64)>)> {
        let tensor = |e: candle_core::Error| TrainError::model("loss", e);
        let mut total = (&out.loss * scale).map_err(tensor)?;
        let mut parts = vec![];
        let ModelOptions { balance, balance_coefficient, router_z_coefficient, .. } = self.options;
        let wanted = balance_coefficient > 0.0 || router_z_coefficient > 0.0;
        if !wanted || out.router_logits.is_empty() {
            return Ok((total, parts));
        }
        let own = out.balance_counts(batch.num_sequences, is_token).map_err(failed("counting choices"))?;
        let (all, num_targets) = self.over_ranks(&own, out.num_targets)?;
        // They count by the share of these batches in the targets of the step.
        let share = num_targets * scale;
        let of_own = if own.tokens > 0.0 { all.tokens / own.tokens } else { 0.0 };
        let mut add = |name, part: Tensor, coefficient: f64| {
            // Figures of ranks are averaged by their tokens.
            parts.push((name, f64::from(part.to_scalar::<f32>()?) * of_own));
            total = (&total + (part * (share * coefficient))?)?;
            Ok::<_, candle_core::Error>(())
        };
        if balance_coefficient > 0.0 {
            let part = out.balance_loss_part(balance, batch.num_sequences, is_token, &own, &all);
            add("aux_loss", part.map_err(failed("balance loss"))?, balance_coefficient).map_err(tensor)?;
        }
        if router_z_coefficient > 0.0 {
            let part = out.router_logits.iter().try_fold(None::<Tensor>, |sum, logits| {
                let loss = occult_model::router_z_loss(logits, is_token)?;
                Ok::<_, candle_core::Error>(Some(match sum {
                    None => loss,
                    Some(sum) => (sum + loss)?,
                }))
            });
            let weight = own.tokens / all.tokens.max(1.0) / out.router_logits.len() as f64;
            if let Some(part) = part.map_err(tensor)? {
                let part = (part * weight).map_err(tensor)?;
                add("router_z_loss", part, router_z_coefficient).map_err(tensor)?;
            }
        }
        Ok((total, parts))
    }

    /// Counts and targets of all ranks' batches. Whole numbers: the sum is exact.
    fn over_ranks(&self, own: &BalanceCounts, num_targets: usize) -> Result<(BalanceCounts, f64)> {
        let mut values = own.choices.clone();
        values.extend([own.tokens, own.sequences, num_targets as f64]);
        let sum = self.ranks.comm().all_reduce_sum_f64("choices of all ranks", &mut values);
        sum.map_err(|e| TrainError::model("adding choices", e))?;
        let rest = values.split_off(own.choices.len());
        Ok((BalanceCounts { choices: values, tokens: rest[0], sequences: rest[1] }, rest[2]))
    }

    /// Takes the gradients of all backward passes since the last time.
    fn collect(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.collected, true) {
            return Ok(());
        }
        let list = self.parameters.iter().as_slice();
        let take = |index: usize| {
            let p = &list[index];
            let gradient = p.take_gradient().map_err(failed("taking a gradient"))?;
            let gradient = match gradient {
                Some(g) => g.contiguous(),
                None => p.var().zeros_like(),
            };
            gradient.map_err(|e| TrainError::model("taking a gradient", e))
        };
        for slot in &mut self.slots {
            if let Slot::Whole { parameter, gradient } = slot {
                *gradient = Some(take(*parameter)?);
            }
        }
        for adapter in &mut self.adapters {
            adapter.differentiate(&take(adapter.parameter)?)?;
        }
        Ok(())
    }

    /// Writes the merged weights of all adapters into the model.
    fn merge(&self) -> Result<()> {
        self.adapters.iter().try_for_each(|a| {
            in_place(self.parameter(a.parameter).var().as_tensor(), &mut |w| {
                a.merge_into(w);
                Ok(())
            })
        })
    }
}

/// Experts of every layer of the model that this rank computes, ascending.
fn held(spec: &ModelSpec, ranks: &ExpertRanks) -> Result<Vec<Vec<usize>>> {
    let (layers, found) = (spec.moe_layers().count(), ranks.layers().len());
    if layers != found {
        let message = format!("a placement of {found} MoE layers, the model has {layers}");
        return Err(TrainError::request(message));
    }
    let mut held = vec![vec![]; spec.layers.len()];
    for (moe_layer, number) in spec.moe_layers().enumerate() {
        let placement = ranks.computed(moe_layer)?;
        if placement.num_experts() != spec.moe.router.num_experts {
            let (found, expected) = (placement.num_experts(), spec.moe.router.num_experts);
            let message = format!("a placement of {found} experts, the model has {expected}");
            return Err(TrainError::request(message));
        }
        let mine = placement.experts_of(ranks.comm().rank() as occult_plan::Rank);
        held[number] = mine.iter().map(|&e| usize::from(e)).collect();
        held[number].sort_unstable();
    }
    Ok(held)
}

fn decoder(
    parameters: &ModelParameters,
    threads: &Threads,
    ranks: &ExpertRanks,
    limit: Option<usize>,
    bias: Option<&[Vec<f32>]>,
    choices: &[Choices],
    forgiving: bool,
) -> Result<Decoder> {
    let unlimited = limit.is_none_or(|n| n >= ranks.topology().num_ranks());
    if ranks.comm().world_size() == 1 && unlimited && bias.is_none() {
        return parameters.decoder().map_err(failed("building the model"));
    }
    let mut moe_layer = 0;
    let mut wrong = None;
    let built = parameters.decoder_with(&mut |parameters, number| {
        let at = moe_layer;
        moe_layer += 1;
        let mut router = parameters.router(number)?;
        if let Some(bias) = bias {
            router = router.with_selection_bias(&bias[at])?;
        }
        match TrainedExperts::new(parameters, (number, at), router, ranks, threads, limit, &choices[at]) {
            Ok(layer) => Ok(Box::new(layer.forgiving(forgiving))),
            Err(e) => {
                let message = e.to_string();
                wrong = Some(e);
                Err(ModelError::Request(message))
            }
        }
    });
    match wrong {
        Some(e) => Err(e),
        None => built.map_err(failed("building the model")),
    }
}

/// A batch that takes part in every collective call and teaches nothing.
fn stand_in() -> Batch {
    Batch {
        num_sequences: 1,
        length: 1,
        tokens: vec![0],
        targets: vec![IGNORE],
        positions: vec![0],
        segments: vec![PADDING],
    }
}

impl TrainableModel for MoeModel {
    fn identity(&self) -> String {
        let spec = self.parameters.spec();
        let what = match self.options.scope {
            Scope::All => "all",
            Scope::Experts => "experts",
            Scope::Lora(_) => "lora",
        };
        let hash = hash_bytes(format!("{spec:?} {:?}", self.options.scope).as_bytes());
        format!("{} {hash:016x}, trained: {what}", spec.family.model_type())
    }

    fn parameters(&self) -> &[ParameterInfo] {
        &self.infos
    }

    fn weights(&self, index: usize) -> Result<Cow<'_, [f32]>> {
        match &self.slots[index] {
            Slot::Factor { adapter, is_b } => Ok(Cow::Borrowed(self.adapters[*adapter].factor(*is_b))),
            Slot::Whole { parameter, .. } => {
                let values = self.parameter(*parameter).var().flatten_all().and_then(|t| t.to_vec1());
                values.map(Cow::Owned).map_err(|e| TrainError::model("reading weights", e))
            }
        }
    }

    fn visit(&mut self, each: &mut Visitor<'_>) -> Result<()> {
        self.collect()?;
        let list = self.parameters.iter().as_slice();
        for (i, slot) in self.slots.iter().enumerate() {
            match slot {
                Slot::Whole { parameter, gradient } => {
                    let Some(gradient) = gradient else { continue };
                    in_place(list[*parameter].var().as_tensor(), &mut |w| {
                        in_place(gradient, &mut |g| each(i, w, g))
                    })?;
                }
                Slot::Factor { adapter, is_b } => {
                    let (w, g) = self.adapters[*adapter].factor_and_gradient(*is_b);
                    each(i, w, g)?;
                }
            }
        }
        self.merge()
    }

    fn clear_gradients(&mut self) -> Result<()> {
        for p in self.parameters.iter().filter(|p| p.is_trained()) {
            p.take_gradient().map_err(failed("clearing gradients"))?;
        }
        for slot in &mut self.slots {
            if let Slot::Whole { gradient, .. } = slot {
                *gradient = None;
            }
        }
        self.collected = false;
        self.load.clear();
        self.sample.clear();
        Ok(())
    }

    fn loss_and_gradients(&mut self, batch: &Batch, scale: f64) -> Result<BatchReport> {
        let empty;
        let batch = if batch.num_sequences == 0 {
            empty = stand_in();
            &empty
        } else {
            batch
        };
        let is_token: Option<Vec<bool>> =
            batch.segments.contains(&PADDING).then(|| batch.segments.iter().map(|&s| s != PADDING).collect());
        let out = self.forward(batch)?;
        let tensor = |e| TrainError::model("loss", e);
        let loss_sum = f64::from(out.loss.to_scalar::<f32>().map_err(tensor)?);
        let (total, parts) = self.total_loss(&out, batch, is_token.as_deref(), scale)?;
        let mut report = BatchReport { loss_sum, ..BatchReport::default() };
        let chosen: Vec<_> = self.choices.iter().map(Choices::take).collect();
        let (ranks, mask) = (&self.ranks, is_token.as_deref());
        let (tokens, load) = figures::routing(&out.routing, &chosen, ranks, mask, &mut report.figures)?;
        report.weight = tokens as f64;
        self.keep_sample(&out.routing, &chosen, mask);
        self.load.resize(load.len(), vec![]);
        for (sum, load) in self.load.iter_mut().zip(load) {
            sum.resize(load.len(), 0);
            sum.iter_mut().zip(load).for_each(|(sum, n)| *sum += n);
        }
        report.figures.extend(parts.into_iter().map(|(name, value)| (name.to_owned(), value)));
        let TrainOutput { loss, router_logits, .. } = out;
        drop((loss, router_logits));
        let grads = total.backward().map_err(|e| TrainError::model("backward pass", e))?;
        self.parameters.accumulate(&grads).map_err(failed("adding gradients"))?;
        self.collected = false;
        Ok(report)
    }

    fn loss(&mut self, batch: &Batch) -> Result<f64> {
        let empty;
        let batch = if batch.num_sequences == 0 {
            empty = stand_in();
            &empty
        } else {
            batch
        };
        let out = self.forward(batch)?;
        out.loss.to_scalar::<f32>().map(f64::from).map_err(|e| TrainError::model("loss", e))
    }

    fn complete(&mut self, figures: &mut BTreeMap<String, f64>) {
        let Some(&now) = figures.get(figures::UNLIMITED) else { return };
        // Six decimals are the same number after a checkpoint's JSON.
        let first = *self.reference.get_or_insert((now * 1e6).round() / 1e6);
        figures.insert(figures::DRIFT.into(), now / first);
    }

    fn extra(&self) -> serde_json::Value {
        // The placement in force, where it is not the one the run began with.
        let placement = self.replaced.then(|| replace::table(self.ranks.layers()));
        serde_json::json!({ "drift_from": self.reference, "selection_bias": self.bias, "placement": placement })
    }

    fn restore_extra(&mut self, extra: &serde_json::Value) -> Result<()> {
        self.reference = extra["drift_from"].as_f64().or(self.reference);
        self.saved_placement = serde_json::from_value(extra["placement"].clone()).unwrap_or_default();
        let Ok(Some(bias)) = serde_json::from_value::<Option<Vec<Vec<f32>>>>(extra["selection_bias"].clone())
        else {
            return Ok(());
        };
        let (layers, experts) = (self.choices.len(), self.parameters.spec().moe.router.num_experts);
        if bias.len() != layers || bias.iter().any(|b| b.len() != experts) {
            let message = format!("the checkpoint's selection bias: expected {layers} layers of {experts}");
            return Err(TrainError::request(message));
        }
        self.bias = Some(bias);
        self.build()
    }

    fn restored(&mut self, moments: &mut [Moments]) -> Result<Option<String>> {
        self.restore_placement(moments)
    }

    fn at_checkpoint(
        &mut self,
        moments: &mut [Moments],
        figures: &mut BTreeMap<String, f64>,
    ) -> Result<Option<String>> {
        self.look_for_placement(moments, figures)
    }

    fn begin_step(&mut self, _: u64, limit: Option<usize>) -> Result<()> {
        self.set_limit(limit)
    }

    fn end_step(&mut self) -> Result<()> {
        for slot in &mut self.slots {
            if let Slot::Whole { gradient, .. } = slot {
                *gradient = None;
            }
        }
        self.follow_load()
    }
}
