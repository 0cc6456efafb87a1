//! Another placement while a run goes on: when the routers have moved away from the one it began with.
//!
//! Before a checkpoint is written a placement is searched for what the routers chose in the step, on every second block of its
//! tokens, and compared with the present one on the others. If it saves enough:
//!
//! 1. every rank makes the model for it beside the present one, which stays as it is, and gets its experts' weights from the
//!    ranks that have them;
//! 2. the logits of both are compared (`self_check`), and all ranks come to one answer;
//! 3. only then all of them switch, with the optimiser's moments. If not, they go on as before, with a warning.
//!
//! The checkpoint is written after that and names the placement in force, where a run that is resumed there or later goes on.

use std::collections::BTreeMap;
use std::fmt;

use occult_comm::Buffer;
use occult_plan::placement::search::{self, SearchOptions};
use occult_plan::{ExpertId, LayerPlacement, Rank, RoutingBuf};

use super::in_place::in_place;
use super::{MoeModel, Slot, figures::Counts, gather};
use crate::checkpoint::Kind;
use crate::error::{Result, TrainError};
use crate::model::ranks::ExpertRanks;
use crate::optim::Moments;
use crate::trainer::{ParameterInfo, TrainableModel};

/// Tokens in a row that are searched or held out together: neighbours route alike.
const BLOCK: usize = 32;

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
    /// as it was made first, with other ranks; what is trained then comes from the present model. `max_ranks`: the limit that the
    /// run comes to, which the placement must allow.
    pub fn new(
        share: f64,
        max_ranks: Option<usize>,
        remake: impl Fn(ExpertRanks) -> Result<MoeModel> + 'static,
    ) -> Self {
        Self { share, max_ranks, remake: Box::new(remake) }
    }
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

    /// Searches a placement for the step's routing, and goes on with it where it saves enough and the model stays the same
    /// (collective). Otherwise everything is as before; a placement that fails the check is a warning.
    pub(super) fn look_for_placement(
        &mut self,
        moments: &mut [Moments],
        figures: &mut BTreeMap<String, f64>,
    ) -> Result<Option<String>> {
        let Some((share, max_ranks)) = self.replacement.as_ref().map(|r| (r.share, r.max_ranks)) else {
            return Ok(None);
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
                let Some((values, ranks)) = found.split_first_chunk::<2>() else { return Ok(None) };
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
        let wanted = copies[1] <= copies[0] * (1.0 - share) && allowed;
        figures.insert("replaced".into(), 0.0);
        if !wanted {
            return Ok(None);
        }
        match self.moved(layers)? {
            Err(reason) => Ok(Some(format!("the placement found is not taken, experts stay: {reason}"))),
            Ok(new) => {
                self.switch(new, moments)?;
                self.reference = Some((copies[1] * 1e6).round() / 1e6);
                figures.insert("replaced".into(), 1.0);
                Ok(None)
            }
        }
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

    /// Goes on with the placement of a checkpoint whose weights are there, where it is another one (collective). A warning
    /// where that one fails the check: the run then goes on with the placement that it was begun with.
    pub(super) fn restore_placement(&mut self, moments: &mut [Moments]) -> Result<Option<String>> {
        let Some(saved) = self.saved_placement.take() else { return Ok(None) };
        if saved == table(self.ranks.layers()) {
            return Ok(None);
        }
        let experts = self.parameters.spec().moe.router.num_experts;
        if saved.len() != self.ranks.layers().len() || saved.iter().any(|l| l.len() != experts) {
            return Err(TrainError::request("the checkpoint's placement is for another model".to_owned()));
        }
        let num_ranks = self.ranks.topology().num_ranks();
        let layers = saved.iter().map(|ranks| placed(num_ranks, ranks)).collect::<Result<_>>()?;
        match self.moved(layers)? {
            Err(reason) => {
                // Drift was measured from the placement that is not taken.
                self.reference = self.ranks.promised_copies();
                Ok(Some(format!(
                    "the checkpoint's placement is not taken, experts stay where the run began: {reason}"
                )))
            }
            Ok(new) => self.switch(new, moments).map(|()| None),
        }
    }

    /// The model with its experts where `layers` say, and everything else as it is now; or why it cannot be made, or does not
    /// compute the same. One answer on all ranks (collective); this model is not touched.
    fn moved(&self, layers: Vec<LayerPlacement>) -> Result<Result<MoeModel, String>> {
        let Some(replacement) = &self.replacement else {
            return Err(TrainError::request(
                "the checkpoint has a placement that the run came to later: replacing must be allowed"
                    .to_owned(),
            ));
        };
        let made = (replacement.remake)(self.ranks.with_layers(layers)).and_then(|new| self.begin_move(new));
        if let Some(reason) = self.any_error(made.as_ref().err())? {
            return Ok(Err(reason));
        }
        let mut new = made?;
        new.take_weights(self)?;
        Ok(match self.differs_from(&new)? {
            Some(reason) => Err(reason),
            None => Ok(new),
        })
    }

    /// Gives `new` what does not depend on where experts live; errors unless it has the same parameters.
    fn begin_move(&self, mut new: MoeModel) -> Result<MoeModel> {
        let each = |info: &ParameterInfo| match info.kind {
            Kind::Experts(_) => info.shape.get(1..).map(<[_]>::to_vec),
            Kind::Replicated => Some(info.shape.clone()),
        };
        let mut pairs = self.infos.iter().zip(&new.infos);
        if self.infos.len() != new.infos.len()
            || pairs.any(|(a, b)| a.name != b.name || each(a) != each(b) || a.lr_scale != b.lr_scale)
        {
            return Err(TrainError::request("the model made for it has other parameters".to_owned()));
        }
        new.bias.clone_from(&self.bias);
        (new.limit, new.reference, new.replaced) = (self.limit, self.reference, true);
        new.build()?;
        Ok(new)
    }

    /// What went wrong on the first rank where something did (collective).
    fn any_error(&self, mine: Option<&TrainError>) -> Result<Option<String>> {
        let message = mine.map(ToString::to_string).unwrap_or_default();
        let all = self.ranks.comm().all_gather("making a model", Buffer::from_slice(message.as_bytes()));
        let all = all.map_err(|e| TrainError::model("making a model", e))?;
        let mut errors = all.iter().enumerate().filter(|(_, message)| !message.as_bytes().is_empty());
        Ok(errors.next().map(|(rank, m)| format!("rank {rank}: {}", String::from_utf8_lossy(m.as_bytes()))))
    }

    /// Takes over all trained weights of `old`, which may be those of other ranks' experts there (collective).
    fn take_weights(&mut self, old: &MoeModel) -> Result<()> {
        for i in 0..self.slots.len() {
            let values = old.values_for(self, i, &old.weights(i)?)?;
            let take = |to: &mut [f32]| {
                let (found, expected) = (values.len(), to.len());
                if found != expected {
                    return Err(TrainError::request(format!("{found} values for {expected} weights")));
                }
                to.copy_from_slice(&values);
                Ok(())
            };
            match self.slots[i] {
                Slot::Whole { parameter, .. } => {
                    in_place(self.parameter(parameter).var().as_tensor(), &mut |w| take(w))?;
                }
                Slot::Factor { adapter, is_b } => {
                    take(self.adapters[adapter].factor_and_gradient(is_b).0)?;
                }
            }
        }
        self.merge()
    }

    /// `mine`, values of this model's parameter `index`, as this rank has them in `new` (collective).
    fn values_for(&self, new: &MoeModel, index: usize, mine: &[f32]) -> Result<Vec<f32>> {
        match (&self.infos[index].kind, &new.infos[index].kind) {
            (Kind::Experts(ids), Kind::Experts(wanted)) => {
                gather::experts(&**self.ranks.comm(), &self.infos[index].name, (ids, mine), wanted)
            }
            _ => Ok(mine.to_vec()),
        }
    }

    /// Switches to a model that has been checked, with its moments (collective). Only a rank's end can stop it on the way,
    /// and that ends the run.
    fn switch(&mut self, mut new: MoeModel, moments: &mut [Moments]) -> Result<()> {
        for (i, of) in moments.iter_mut().enumerate() {
            for values in [&mut of.mean, &mut of.square] {
                *values = self.values_for(&new, i, values)?;
            }
        }
        new.replacement = self.replacement.take();
        *self = new;
        Ok(())
    }
}

fn placed(num_ranks: usize, ranks: &[Rank]) -> Result<LayerPlacement> {
    LayerPlacement::from_expert_ranks(num_ranks, ranks).map_err(|e| TrainError::model("placing experts", e))
}
