//! The differentiable forward pass: packed sequences in, loss and routing out.

mod recompute;

use candle_core::{DType, Device, Tensor};
use occult_kernels::ops::{self, CrossEntropy};
use occult_plan::RoutingBuf;

use crate::decoder::Decoder;
use crate::error::{ModelError, Result};
use crate::hf::BalanceLoss;
use crate::layers::{MatrixParameter, View};

/// A target that is not learned.
pub const IGNORE: u32 = u32::MAX;

/// `B` packed sequences of `L` tokens.
///
/// A sequence holds one or several texts, each a *segment*: positions restart and attention stays inside it.
#[derive(Debug, Clone, Copy)]
pub struct TrainBatch<'a> {
    /// `B`.
    pub num_sequences: usize,
    /// `[B, L]` inputs.
    pub tokens: &'a [u32],
    /// `[B, L]` what follows each input; [`IGNORE`] where nothing is learned.
    pub targets: &'a [u32],
    /// `[B, L]` number of the segment within the sequence, in runs; `None`: every sequence is one text.
    pub segments: Option<&'a [u32]>,
}

/// What a training step begins its backward pass from.
#[derive(Debug, Clone)]
pub struct TrainOutput {
    /// Sum of the cross entropies of the learned targets, scalar f32. Not a mean, so that batches and ranks add up.
    pub loss: Tensor,
    /// Learned targets.
    pub num_targets: usize,
    /// `[B * L, E]` router logits of every MoE layer, differentiable: what auxiliary losses are made from.
    pub router_logits: Vec<Tensor>,
    /// The decisions of every MoE layer.
    pub routing: Vec<RoutingBuf>,
}

/// How often experts were chosen, by how many tokens: of one batch, or added up over the ranks that compute at once.
#[derive(Debug, Clone, PartialEq)]
pub struct BalanceCounts {
    /// `[L, E]`: tokens of each expert of each MoE layer.
    pub choices: Vec<f64>,
    /// Tokens that count.
    pub tokens: f64,
    /// Sequences with such tokens.
    pub sequences: f64,
}

impl TrainOutput {
    /// The counts of this batch. `num_sequences`: `B` of the batch. `is_token` `[B * L]`: rows that count (not padding), all
    /// when `None`.
    pub fn balance_counts(&self, num_sequences: usize, is_token: Option<&[bool]>) -> Result<BalanceCounts> {
        let mut choices = vec![];
        for routing in &self.routing {
            let (ids, k) = (ids(routing), routing.top_k);
            choices.extend(ops::router::expert_counts(&ids, k, routing.num_experts, is_token)?);
        }
        let rows = self.routing.first().map_or(0, |r| r.expert_ids.len() / r.top_k.max(1));
        let of = |mask: &[bool]| mask.iter().filter(|t| **t).count();
        let tokens = is_token.map_or(rows, of) as f64;
        let each = (rows / num_sequences.max(1)).max(1);
        let counts = |mask: &[bool]| mask.chunks(each).filter(|part| part.contains(&true)).count();
        Ok(BalanceCounts { choices, tokens, sequences: is_token.map_or(num_sequences, counts) as f64 })
    }

    /// The loss that keeps experts evenly used, scalar f32, not yet multiplied by its coefficient: a mean over tokens.
    pub fn balance_loss(
        &self,
        kind: BalanceLoss,
        num_sequences: usize,
        is_token: Option<&[bool]>,
    ) -> Result<Tensor> {
        let own = self.balance_counts(num_sequences, is_token)?;
        self.balance_loss_part(kind, num_sequences, is_token, &own, &own)
    }

    /// What this batch adds to the [`balance_loss`](Self::balance_loss) of all ranks' batches as if they were one: `own`
    /// counts this batch, `all` every rank's. How often experts were chosen has no gradient, so that the gradients of the
    /// parts add up to that of the loss.
    pub fn balance_loss_part(
        &self,
        kind: BalanceLoss,
        num_sequences: usize,
        is_token: Option<&[bool]>,
        own: &BalanceCounts,
        all: &BalanceCounts,
    ) -> Result<Tensor> {
        let mut scores = Vec::with_capacity(self.router_logits.len());
        for logits in &self.router_logits {
            scores.push(ops::router::router_scores(logits, ops::router::Scoring::Softmax)?);
        }
        let (layers, k) = (scores.len(), self.routing.first().map_or(1, |r| r.top_k));
        let experts = (all.choices.len() / layers.max(1)).max(1);
        if kind == BalanceLoss::AllLayers {
            let mut counts = vec![0.0; experts];
            for of_layer in all.choices.chunks_exact(experts) {
                counts.iter_mut().zip(of_layer).for_each(|(sum, n)| *sum += n);
            }
            let total = all.tokens * layers as f64;
            return Ok(ops::router::load_balancing_part(&scores, &counts, total, is_token)?);
        }
        let mut sum = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        for ((scores, routing), counts) in
            scores.iter().zip(&self.routing).zip(all.choices.chunks_exact(experts))
        {
            let of_layer = match kind {
                BalanceLoss::Sequences => {
                    let ids = ids(routing);
                    let mean = ops::router::sequence_balance_loss(scores, &ids, k, num_sequences, is_token)?;
                    (mean * (own.sequences / all.sequences.max(1.0)))?
                }
                _ => {
                    let scores = std::slice::from_ref(scores);
                    (ops::router::load_balancing_part(scores, counts, all.tokens, is_token)? / k as f64)?
                }
            };
            sum = (sum + of_layer)?;
        }
        Ok(sum)
    }
}

fn ids(routing: &RoutingBuf) -> Vec<u32> {
    routing.expert_ids.iter().map(|&id| u32::from(id)).collect()
}

/// How [`Decoder::forward_train`] runs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TrainOptions {
    /// Keep only the input of every layer and compute the layer again in the backward pass.
    pub recompute: bool,
    /// Factor on the squared log of the softmax's sum over the vocabulary; 0 for none.
    pub z_loss: f32,
}

impl Decoder {
    /// Computes the loss of a batch. After `backward()` of it (with auxiliary losses added), call
    /// [`ModelParameters::accumulate`](crate::ModelParameters::accumulate) with the gradients.
    pub fn forward_train(&self, batch: TrainBatch<'_>, options: TrainOptions) -> Result<TrainOutput> {
        let (b, t, view, positions) = self.place_texts(batch)?;
        if let Some(ranks) = &self.ranks {
            ranks.begin(b * t)?;
        }
        let rotation = self.rope.at(&positions, b)?;
        let mut x = self.embedding.rows(batch.tokens)?.reshape((b, t, self.spec.hidden_size))?;
        let (mut router_logits, mut routing) = (Vec::new(), Vec::new());
        for layer in &self.layers {
            let (y, routed) = if options.recompute {
                recompute::forward(layer, &x, &rotation, &view, self.parameters.as_ref())?
            } else {
                layer.forward(&x, &rotation, &view, None)?
            };
            x = y;
            if let Some(routed) = routed {
                router_logits.push(routed.logits);
                routing.push(routed.routing);
            }
        }
        let hidden = self.norm.forward(&x)?.flatten_to(1)?;
        let how = CrossEntropy { ignore: Some(IGNORE), z_loss: options.z_loss };
        let summed = match self.output.weight() {
            MatrixParameter::Variable { tensor, sink: Some(sink) } => {
                ops::linear_cross_entropy_into(&self.threads, &hidden, tensor, batch.targets, how, sink)?
            }
            MatrixParameter::Variable { tensor, sink: None } => {
                ops::linear_cross_entropy(&self.threads, &hidden, tensor, batch.targets, how)?
            }
            MatrixParameter::Stored(_) => {
                ops::cross_entropy(&self.threads, &self.output.forward(&hidden)?, batch.targets, how)?
            }
        };
        Ok(TrainOutput { loss: summed.loss, num_targets: summed.count, router_logits, routing })
    }

    /// `B`, `L`, what queries see, and the position of every token.
    fn place_texts(&self, batch: TrainBatch<'_>) -> Result<(usize, usize, View, Vec<usize>)> {
        let (b, n) = (batch.num_sequences, batch.tokens.len());
        let fits = b > 0 && n > 0 && n.is_multiple_of(b) && batch.targets.len() == n;
        if !fits || batch.segments.is_some_and(|s| s.len() != n) {
            let message = format!(
                "{b} sequences of {n} tokens in all, {} targets, {:?} segment numbers",
                batch.targets.len(),
                batch.segments.map(<[u32]>::len)
            );
            return Err(ModelError::request(message));
        }
        let vocab = self.spec.vocab_size;
        let outside = |id: &&u32| **id as usize >= vocab;
        let target = batch.targets.iter().filter(|&&id| id != IGNORE).find(outside);
        if let Some(id) = batch.tokens.iter().find(outside).or(target) {
            return Err(ModelError::request(format!("token id {id} is outside the vocabulary of {vocab}")));
        }
        let t = n / b;
        let mut starts = vec![0u32; n];
        if let Some(segments) = batch.segments {
            for (starts, segments) in starts.chunks_exact_mut(t).zip(segments.chunks_exact(t)) {
                for i in 1..t {
                    starts[i] = if segments[i] == segments[i - 1] { starts[i - 1] } else { i as u32 };
                }
            }
        }
        let positions: Vec<usize> = starts.iter().enumerate().map(|(i, &s)| i % t - s as usize).collect();
        let longest = positions.iter().max().map_or(0, |p| p + 1);
        if longest > self.spec.context_len {
            let message =
                format!("{longest} tokens are more than the model's context of {}", self.spec.context_len);
            return Err(ModelError::request(message));
        }
        let starts = batch.segments.is_some().then(|| starts.into());
        Ok((b, t, View { past: 0, padding: None, window: None, starts }, positions))
    }
}
