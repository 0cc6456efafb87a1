//! The pruning of one token.

use super::{Budget, PruneSpec, PruneStats, RouterRule, Rule, rank_set::RankSet, rules};
use crate::{ExpertId, LayerPlacement, Rank, ReplicaChooser, Routing, Topology};

/// Prunes token by token; everything but the arguments of `prune` is working memory for one token.
pub(super) struct Pruner<'a> {
    placement: &'a LayerPlacement,
    rule: Rule<'a>,
    budget: Budget,
    router: &'a RouterRule,
    before: Visits<'a>,
    after: Visits<'a>,
    allowed: RankSet<'a>,
    /// Probability and selection score of every expert, `[E]`.
    p: Vec<f64>,
    scores: Vec<f64>,
    /// What the rule's search for ranks adds up: `p`, or `p` squared; `[E]`.
    worth: Vec<f64>,
    /// The router's choice by descending score, `[K]`.
    router_ids: Vec<ExpertId>,
    reachable: Vec<ExpertId>,
    chosen: Vec<ExpertId>,
    is_chosen: Vec<bool>,
    chosen_p: Vec<f64>,
    /// Weights of the router's choice, `[K]`.
    router_weights: Vec<f32>,
}

impl<'a> Pruner<'a> {
    pub(super) fn new(
        routing: &Routing<'_>,
        placement: &'a LayerPlacement,
        topology: Topology,
        PruneSpec { rule, budget, router }: PruneSpec<'a>,
    ) -> Self {
        let (num_experts, top_k) = (routing.num_experts(), routing.top_k());
        Self {
            placement,
            rule,
            budget,
            router,
            before: Visits::new(placement, topology, top_k),
            after: Visits::new(placement, topology, top_k),
            allowed: RankSet::new(placement),
            p: vec![0.0; num_experts],
            scores: vec![0.0; num_experts],
            worth: vec![0.0; num_experts],
            router_ids: Vec::with_capacity(top_k),
            reachable: Vec::with_capacity(num_experts),
            chosen: Vec::with_capacity(top_k),
            is_chosen: vec![false; num_experts],
            chosen_p: vec![0.0; top_k],
            router_weights: vec![0.0; top_k],
        }
    }

    /// Prunes one row in place and adds its figures to `stats`.
    pub(super) fn token(
        &mut self,
        logits: &[f32],
        occurrences: u64,
        ids: &mut [ExpertId],
        weights: Option<&mut [f32]>,
        stats: &mut PruneStats,
    ) {
        self.router.probabilities(logits, &mut self.p);
        self.router.selection_scores(logits, &self.p, &mut self.scores);
        self.router_ids.clear();
        self.router_ids.extend_from_slice(ids);
        rules::sort_by_score(&mut self.router_ids, &self.scores);

        let visits = self.before.count(ids, occurrences);
        let (mut replaced, mut extended) = (0, false);
        if self.find_allowed(logits, visits) {
            extended = self.extend(ids.len());
            self.choose();
            replaced = self.chosen.iter().filter(|id| !self.router_ids.contains(id)).count();
        }
        let original_mass = mass(&self.p, &self.router_ids);
        let (mut kept_mass, mut new_mass) = (original_mass, original_mass);
        if replaced > 0 {
            let kept = self.router_ids.iter().filter(|id| self.chosen.contains(id));
            kept_mass = mass(&self.p, kept);
            new_mass = mass(&self.p, &self.chosen);
            ids.copy_from_slice(&self.chosen);
            if let Some(weights) = weights {
                self.router.weights(logits, &self.p, ids, &mut self.chosen_p, weights);
            }
        }
        let n = occurrences as f64;
        stats.merge(&PruneStats {
            tokens: occurrences,
            touched_tokens: occurrences * u64::from(replaced > 0),
            pairs: occurrences * ids.len() as u64,
            replaced_experts: occurrences * replaced as u64,
            extended_tokens: occurrences * u64::from(extended),
            copies_before: occurrences * visits as u64,
            copies_after: occurrences * self.after.count(ids, occurrences) as u64,
            original_mass: n * original_mass,
            kept_mass: n * kept_mass,
            new_mass: n * new_mass,
        });
    }

    /// Fills `allowed`; false when the token keeps its experts. `visits` is how many ranks they need.
    fn find_allowed(&mut self, logits: &[f32], visits: usize) -> bool {
        let max_ranks = self.budget.max_ranks();
        let first = match self.budget {
            Budget::Fixed { .. } => max_ranks,
            Budget::Adaptive { .. } => 1,
            Budget::Bounded { .. } => {
                let (ids, p) = (&self.router_ids, &mut self.chosen_p);
                self.router.weights(logits, &self.p, ids, p, &mut self.router_weights);
                1
            }
        };
        match self.rule {
            Rule::LeastError => self.worth.iter_mut().zip(&self.p).for_each(|(w, p)| *w = p * p),
            _ => self.worth.copy_from_slice(&self.p),
        }
        for num_ranks in first..=max_ranks {
            if visits <= num_ranks {
                return false;
            }
            match self.rule {
                Rule::RouterScore | Rule::Similarity(_) => {
                    self.allowed.walk(&self.router_ids, &self.worth, num_ranks);
                }
                Rule::BestMass | Rule::LeastError => {
                    self.allowed.best_mass(&self.router_ids, &self.worth, num_ranks);
                }
            }
            if self.is_enough() {
                break;
            }
        }
        true
    }

    /// Whether the token needs no more than the ranks in `allowed`.
    fn is_enough(&self) -> bool {
        match self.budget {
            Budget::Fixed { .. } => true,
            Budget::Adaptive { share, .. } => {
                self.allowed.mass(&self.router_ids, &self.p) >= share * mass(&self.p, &self.router_ids)
            }
            Budget::Bounded { error, .. } => {
                let weighted = self.router_ids.iter().zip(&self.router_weights);
                let lost = weighted.filter(|(id, _)| !self.allowed.reaches(**id));
                lost.map(|(_, &w)| f64::from(w) * f64::from(w)).sum::<f64>() <= error * error
            }
        }
    }

    /// Lists the reachable experts, after allowing more ranks where they are fewer than `K`. Returns whether that went
    /// beyond the budget.
    fn extend(&mut self, top_k: usize) -> bool {
        loop {
            let all = 0..self.p.len() as ExpertId;
            self.reachable.clear();
            self.reachable.extend(all.filter(|&e| self.allowed.reaches(e)));
            let next = self.router_ids.iter().copied().find(|&e| !self.allowed.reaches(e));
            match next {
                Some(next) if self.reachable.len() < top_k => {
                    self.allowed.insert(self.placement.first_rank_of(next));
                }
                // When all of the token's own experts are reachable, there are K.
                _ => return self.allowed.len() > self.budget.max_ranks(),
            }
        }
    }

    /// Writes the `K` experts of the rule to `chosen`, in descending score.
    fn choose(&mut self) {
        let top_k = self.router_ids.len();
        self.chosen.clear();
        if !matches!(self.rule, Rule::RouterScore) {
            self.chosen.extend(self.router_ids.iter().filter(|&&id| self.allowed.reaches(id)));
        }
        self.chosen.iter().for_each(|&id| self.is_chosen[usize::from(id)] = true);
        match self.rule {
            Rule::RouterScore | Rule::BestMass | Rule::LeastError => {
                self.reachable.retain(|&id| !self.is_chosen[usize::from(id)]);
                let missing = top_k - self.chosen.len();
                rules::keep_best(&mut self.reachable, &self.scores, missing);
                self.chosen.extend_from_slice(&self.reachable);
            }
            Rule::Similarity(table) => {
                for &id in self.router_ids.iter().filter(|&&id| !self.allowed.reaches(id)) {
                    if let Some(like) = rules::most_similar(table.row(id), &self.reachable, &self.is_chosen) {
                        self.is_chosen[usize::from(like)] = true;
                        self.chosen.push(like);
                    }
                }
            }
        }
        self.chosen.iter().for_each(|&id| self.is_chosen[usize::from(id)] = false);
        rules::sort_by_score(&mut self.chosen, &self.scores);
    }
}

fn mass<'i>(p: &[f64], ids: impl IntoIterator<Item = &'i ExpertId>) -> f64 {
    ids.into_iter().map(|&id| p[usize::from(id)]).sum()
}

/// Counts the ranks that tokens visit.
struct Visits<'a> {
    chooser: ReplicaChooser<'a>,
    ranks: Vec<Rank>,
}

impl<'a> Visits<'a> {
    fn new(placement: &'a LayerPlacement, topology: Topology, top_k: usize) -> Self {
        Self { chooser: ReplicaChooser::new(placement, topology), ranks: vec![0; top_k] }
    }

    fn count(&mut self, ids: &[ExpertId], occurrences: u64) -> usize {
        self.chooser.assign(ids, occurrences, &mut self.ranks);
        self.ranks.sort_unstable();
        self.ranks.chunk_by(|a, b| a == b).count()
    }
}
