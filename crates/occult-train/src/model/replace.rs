//! Another placement while a run goes on: when the routers have moved away from the one it began with.
//!
//! At a checkpoint a placement is searched for what the routers chose in the step before, on every second block of its tokens,
//! and compared with the present one on the others. A run that is resumed there or later comes to the same placement without
//! any of this: the checkpoint names it.

use std::collections::BTreeMap;
use std::fmt;

use occult_comm::Buffer;
use occult_model::{Batch as Tokens, Decoder, Logits, MAX_PLACEMENT_DIFFERENCE};
use occult_plan::placement::search::{self, SearchOptions};
use occult_plan::{ExpertId, LayerPlacement, Rank, RoutingBuf};

use super::{MoeModel, decoder, failed, figures::Counts};
use crate::error::{Result, TrainError};
use crate::model::ranks::ExpertRanks;
use crate::random::{key, mix};

/// Tokens in a row that are searched or held out together: neighbours route alike.
const BLOCK: usize = 32;
/// Short texts for the self-check. Rounding decides a router's choice now and then, in one of them.
const TEXTS: usize = 8;
const TEXT_LEN: usize = 8;

type Remake = dyn Fn(ExpertRanks) -> Result<MoeModel>;

/// When another placement is taken, and how the model is made for it.
pub struct Replacement {
    share: f64,
    max_ranks: Option<usize>,
    remake: Box<Remake>,
}

impl fmt::Debug for Replacement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Replacement {{ share: {} }}", self.share)
    }
}

impl Replacement {
    /// Takes a placement that saves at least `share` of the copies per token on held-out routing. `remake` makes the model
    /// as it was made first, with other ranks; what is trained then comes from the checkpoint. `max_ranks`: the limit that the
    /// run comes to, which the placement must allow.
    pub fn new(
        share: f64,
        max_ranks: Option<usize>,
        remake: impl Fn(ExpertRanks) -> Result<MoeModel> + 'static,
    ) -> Self {
        Self { share, max_ranks, remake: Box::new(remake) }
    }
}

/// A placement that the model is about to get.
#[derive(Debug)]
pub(super) struct Next {
    pub(super) layers: Vec<LayerPlacement>,
    /// Logits of the self-check's texts before.
    before: Vec<Vec<f32>>,
}

/// Experts' ranks of every layer: what a checkpoint says of a placement.
pub(super) fn table(layers: &[LayerPlacement]) -> Vec<Vec<Rank>> {
    let ranks = |l: &LayerPlacement| (0..l.num_experts()).map(|e| l.first_rank_of(e as ExpertId)).collect();
    layers.iter().map(ranks).collect()
}

impl MoeModel {
    /// Lets the model look for another placement at checkpoints.
    pub fn with_replacement(self, replacement: Replacement) -> Self {
        Self { replacement: Some(replacement), ..self }
    }

    /// Whether the placement is another one than the run was begun with.
    pub fn was_replaced(&self) -> bool {
        self.replaced
    }

    /// Searches a placement for the step's routing (collective), and takes note of it where it saves enough.
    pub(super) fn look_for_placement(&mut self, figures: &mut BTreeMap<String, f64>) -> Result<()> {
        let Some((share, max_ranks)) = self.replacement.as_ref().map(|r| (r.share, r.max_ranks)) else {
            return Ok(());
        };
        let (num_layers, world) = (self.sample.len(), self.ranks.comm().world_size());
        let (mut layers, mut copies) = (Vec::with_capacity(num_layers), [0.0, 0.0]);
        // As many layers at a time as there are ranks, so that nobody waits longer than one search takes.
        for first in (0..num_layers).step_by(world) {
            let mut mine = vec![];
            for layer in first..(first + world).min(num_layers) {
                let [seen, held_out] = self.gather(layer)?;
                if layer - first == self.ranks.comm().rank() {
                    mine = self.search(layer, &seen, &held_out)?;
                }
            }
            let all = self.ranks.comm().all_gather("placements of layers", Buffer::from_slice(&mine));
            let all = all.map_err(|e| TrainError::model("gathering placements", e))?;
            for found in all.iter().take(num_layers - first) {
                let found = found.try_as_slice::<f64>().unwrap_or_default();
                let Some((values, ranks)) = found.split_first_chunk::<2>() else { return Ok(()) };
                copies = [copies[0] + values[0], copies[1] + values[1]];
                let ranks: Vec<Rank> = ranks.iter().map(|r| *r as Rank).collect();
                layers.push(placed(self.ranks.topology().num_ranks(), &ranks)?);
            }
        }
        let copies = copies.map(|c| c / num_layers.max(1) as f64);
        figures.insert("C_T_held_out".into(), copies[0]);
        figures.insert("C_T_searched".into(), copies[1]);
        let router = self.parameters.spec().moe.router;
        let ranks = self.ranks.with_layers(layers.clone());
        let allowed = max_ranks.is_none_or(|max| ranks.check_limit(max, &router).is_ok());
        let taken = copies[1] <= copies[0] * (1.0 - share) && allowed;
        figures.insert("replaced".into(), f64::from(u8::from(taken)));
        if taken {
            self.reference = Some((copies[1] * 1e6).round() / 1e6);
            self.next = Some(Next { layers, before: vec![] });
        }
        Ok(())
    }

    /// What all ranks' tokens of the step chose in a layer: the searched and the held-out half.
    fn gather(&self, layer: usize) -> Result<[RoutingBuf; 2]> {
        let mine = Buffer::from_slice(&self.sample[layer]);
        let all = self.ranks.comm().all_gather("routing of the step", mine);
        let all = all.map_err(|e| TrainError::model("gathering routing", e))?;
        let router = self.parameters.spec().moe.router;
        let mut halves = [vec![], vec![]];
        for ids in all.iter().filter_map(|b| b.try_as_slice::<ExpertId>()) {
            for (i, block) in ids.chunks(BLOCK * router.top_k).enumerate() {
                halves[i % 2].extend_from_slice(block);
            }
        }
        Ok(halves.map(|expert_ids| RoutingBuf {
            num_experts: router.num_experts,
            top_k: router.top_k,
            expert_ids,
            weights: None,
            scores: None,
            occurrences: None,
        }))
    }

    /// Copies per held-out token now and with the placement found, then the rank of every expert; nothing when the step had
    /// too few tokens.
    fn search(&self, layer: usize, seen: &RoutingBuf, held_out: &RoutingBuf) -> Result<Vec<f64>> {
        if seen.expert_ids.is_empty() || held_out.expert_ids.is_empty() {
            return Ok(vec![]);
        }
        let wrong = |e| TrainError::model("searching a placement", e);
        let now = self.ranks.layer(layer)?;
        // Those of `occult place`, and no rank gets more experts than the fullest has now.
        let most = (0..now.num_ranks()).map(|r| now.experts_of(r as Rank).len()).max();
        let options = SearchOptions {
            load_cap: 1.1,
            relax_cap: true,
            max_experts_per_rank: most,
            ..SearchOptions::default()
        };
        let routing = seen.view().map_err(wrong)?;
        let found = search::place(&routing, self.ranks.topology(), &options, &mut || true).map_err(wrong)?;
        let copies = |placement: &LayerPlacement| -> Result<f64> {
            let counts = Counts::of(&held_out.expert_ids, held_out, placement, None)?;
            Ok(counts.visits as f64 / counts.tokens.max(1) as f64)
        };
        let mut out = vec![copies(now)?, copies(&found.placement)?];
        out.extend(table(&[found.placement])[0].iter().map(|r| f64::from(*r)));
        Ok(out)
    }

    /// Takes note of the placement of a checkpoint, where it is another one.
    pub(super) fn restore_placement(&mut self, extra: &serde_json::Value) -> Result<()> {
        let saved = serde_json::from_value::<Option<Vec<Vec<Rank>>>>(extra["placement"].clone());
        let Ok(Some(saved)) = saved else { return Ok(()) };
        if saved == table(self.ranks.layers()) {
            return Ok(());
        }
        let experts = self.parameters.spec().moe.router.num_experts;
        if saved.len() != self.ranks.layers().len() || saved.iter().any(|l| l.len() != experts) {
            return Err(TrainError::request("the checkpoint's placement is for another model".to_owned()));
        }
        let num_ranks = self.ranks.topology().num_ranks();
        let layers = saved.iter().map(|ranks| placed(num_ranks, ranks)).collect::<Result<_>>()?;
        self.next = Some(Next { layers, before: vec![] });
        Ok(())
    }

    /// Makes the model again with the noted placement; its weights are then those it was made with.
    pub(super) fn remake_placed(&mut self) -> Result<bool> {
        let Some(mut next) = self.next.take() else { return Ok(false) };
        let Some(replacement) = self.replacement.take() else {
            return Err(TrainError::request(
                "the checkpoint has a placement that the run came to later: replacing must be allowed"
                    .to_owned(),
            ));
        };
        next.before = self.probe()?;
        let mut new = (replacement.remake)(self.ranks.with_layers(next.layers.clone()))?;
        new.replacement = Some(replacement);
        new.bias = self.bias.take();
        (new.limit, new.reference) = (self.limit, self.reference);
        new.replaced = true;
        new.next = Some(next);
        *self = new;
        self.build()?;
        Ok(true)
    }

    /// After the weights have come from the checkpoint: compares logits with those before, on every rank. An error of one is
    /// one of all.
    pub(super) fn check_remade(&mut self) -> Result<()> {
        let Some(next) = self.next.take() else { return Ok(()) };
        let after = self.probe()?;
        let worst = next.before.iter().zip(&after).map(|(a, b)| difference(a, b));
        let mut wrong = [worst.filter(|d| d.is_nan() || *d > MAX_PLACEMENT_DIFFERENCE).count() as f64];
        let sum = self.ranks.comm().all_reduce_sum_f64("logits that differ", &mut wrong);
        sum.map_err(|e| TrainError::model("comparing logits", e))?;
        let texts = (TEXTS * self.ranks.comm().world_size()) as f64;
        // A router's choice that rounding decides changes one text.
        if wrong[0] * TEXTS as f64 > texts {
            return Err(TrainError::request(format!(
                "logits of {} of {texts} texts differ by more than {MAX_PLACEMENT_DIFFERENCE:.0e} of their range with the new placement",
                wrong[0]
            )));
        }
        Ok(())
    }

    /// Logits of a few texts of random tokens, without a limit.
    fn probe(&self) -> Result<Vec<Vec<f32>>> {
        let Self { parameters, threads, ranks, bias, choices, .. } = self;
        let model: Decoder = decoder(parameters, threads, ranks, None, bias.as_deref(), choices)?;
        let spec = parameters.spec();
        let len = TEXT_LEN.min(spec.context_len);
        let logits = |text: usize| {
            let id = |i: usize| {
                let seed = key(&[ranks.comm().rank() as u64, text as u64, i as u64]);
                (mix(seed) % spec.vocab_size as u64) as u32
            };
            let tokens: Vec<u32> = (0..len).map(id).collect();
            let batch = Tokens::single(&tokens).map_err(failed("a batch for the self-check"))?;
            let logits = model.forward(&batch, None, Logits::All, None).map_err(failed("self-check"))?;
            let values = logits.flatten_all().and_then(|t| t.to_vec1::<f32>());
            values.map_err(|e| TrainError::model("self-check", e))
        };
        (0..TEXTS).map(logits).collect()
    }
}

fn placed(num_ranks: usize, ranks: &[Rank]) -> Result<LayerPlacement> {
    LayerPlacement::from_expert_ranks(num_ranks, ranks).map_err(|e| TrainError::model("placing experts", e))
}

/// Largest difference, as a share of the range of `old`.
fn difference(old: &[f32], new: &[f32]) -> f32 {
    let (low, high) = old.iter().fold((f32::MAX, f32::MIN), |(l, h), &v| (l.min(v), h.max(v)));
    // f32::max would lose a NaN.
    let worst = old.iter().zip(new).map(|(a, b)| (a - b).abs());
    let worst = worst.fold(0f32, |w, d| if d > w || d.is_nan() { d } else { w });
    worst / (high - low).max(f32::MIN_POSITIVE)
}
