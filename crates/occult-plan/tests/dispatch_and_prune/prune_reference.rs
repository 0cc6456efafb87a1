//! Collaboration pruning of one token by its definition: sets, sorts and every subset. No replica is chosen, no memory
//! reused, nothing skipped.

use std::collections::BTreeSet;

use occult_plan::{Budget, LayerPlacement, RouterRule, Rule, Scoring};

pub(crate) type Ranks = BTreeSet<u16>;

pub(crate) struct Token<'a> {
    pub(crate) placement: &'a LayerPlacement,
    pub(crate) logits: &'a [f32],
    pub(crate) ids: &'a [u16],
    pub(crate) router: &'a RouterRule,
}

impl Token<'_> {
    pub(crate) fn probability(&self, id: u16) -> f64 {
        let exp = |l: f32| f64::from(l).exp();
        let logit = self.logits[usize::from(id)];
        match self.router.scoring {
            Scoring::Softmax => exp(logit) / self.logits.iter().map(|&l| exp(l)).sum::<f64>(),
            Scoring::Sigmoid => 1.0 / (1.0 + exp(-logit)),
        }
    }

    fn score(&self, id: u16) -> f64 {
        match &self.router.selection_bias {
            Some(bias) => self.probability(id) + f64::from(bias[usize::from(id)]),
            None => f64::from(self.logits[usize::from(id)]),
        }
    }

    fn by_score(&self, ids: impl IntoIterator<Item = u16>) -> Vec<u16> {
        let mut ids: Vec<u16> = ids.into_iter().collect();
        ids.sort_by(|&a, &b| self.score(b).partial_cmp(&self.score(a)).unwrap().then(a.cmp(&b)));
        ids
    }

    pub(crate) fn mass(&self, ids: impl IntoIterator<Item = u16>) -> f64 {
        ids.into_iter().map(|id| self.probability(id)).sum()
    }

    fn reachable(&self, ranks: &Ranks, id: u16) -> bool {
        self.placement.ranks_of(id).iter().any(|r| ranks.contains(r))
    }

    /// What probability on a rank counts for.
    fn weight(&self, rank: u16) -> f64 {
        self.placement.rank_weights().map_or(1.0, |weights| f64::from(weights[usize::from(rank)]))
    }

    fn kept(&self, ranks: &Ranks) -> Vec<u16> {
        self.by_score(self.ids.iter().copied().filter(|&id| self.reachable(ranks, id)))
    }

    /// Every set of `size` ranks, lower ranks first.
    fn subsets(&self, size: usize) -> Vec<Ranks> {
        let all = self.placement.num_ranks() as u16;
        let mut subsets: Vec<Ranks> = (0..1u32 << all)
            .filter(|bits| bits.count_ones() as usize == size)
            .map(|bits| (0..all).filter(|r| bits >> r & 1 == 1).collect())
            .collect();
        subsets.sort_unstable();
        subsets
    }

    /// The fewest ranks that reach all of `ids`.
    pub(crate) fn visits(&self, ids: &[u16]) -> usize {
        let reach = |ranks: &Ranks| ids.iter().all(|&id| self.reachable(ranks, id));
        (0..=self.placement.num_ranks()).find(|&n| self.subsets(n).iter().any(reach)).unwrap()
    }

    fn walk(&self, max_ranks: usize) -> Ranks {
        let mut ranks = Ranks::new();
        for id in self.by_score(self.ids.iter().copied()) {
            if ranks.len() < max_ranks && !self.reachable(&ranks, id) {
                let gain = |rank: u16| {
                    let new = self.by_score(self.ids.iter().copied().filter(|&id| {
                        self.placement.ranks_of(id).contains(&rank) && !self.reachable(&ranks, id)
                    }));
                    self.weight(rank) * self.mass(new)
                };
                let mut holders = self.placement.ranks_of(id).to_vec();
                holders.sort_by(|&a, &b| gain(b).partial_cmp(&gain(a)).unwrap().then(a.cmp(&b)));
                ranks.insert(holders[0]);
            }
        }
        ranks
    }

    /// The ranks that keep the largest sum of probabilities to this power, each times the best weight of a rank that reaches
    /// it. Only the sum of the result is defined where several sets keep as much.
    fn heaviest(&self, max_ranks: usize, power: i32) -> Ranks {
        let weight = |ranks: &Ranks, id| {
            let reached = self.placement.ranks_of(id).iter().filter(|r| ranks.contains(r));
            reached.map(|&rank| self.weight(rank)).fold(0.0, f64::max)
        };
        let worth = |ranks: &Ranks| {
            let kept = self.kept(ranks).into_iter();
            kept.map(|id| weight(ranks, id) * self.probability(id).powi(power)).sum::<f64>()
        };
        let mut best = Ranks::new();
        for ranks in self.subsets(max_ranks) {
            if worth(&ranks) > worth(&best) {
                best = ranks;
            }
        }
        // Ranks that reach none of the token's experts are no use.
        best.retain(|r| self.ids.iter().any(|&id| self.placement.ranks_of(id).contains(r)));
        best
    }

    /// The allowed ranks before any extension, or `None` when the token is left alone.
    pub(crate) fn allowed(&self, rule: Rule<'_>, budget: Budget) -> Option<Ranks> {
        let search = |n| match rule {
            Rule::RouterScore | Rule::Similarity(_) => self.walk(n),
            Rule::BestMass => self.heaviest(n, 1),
            Rule::LeastError => self.heaviest(n, 2),
        };
        let visits = self.visits(self.ids);
        let fewest =
            |enough: &dyn Fn(&Ranks) -> bool| (1..visits).find(|&n| enough(&search(n))).unwrap_or(visits);
        match budget {
            Budget::Fixed { max_ranks } => (visits > max_ranks).then(|| search(max_ranks)),
            Budget::Adaptive { max_ranks, share } => {
                let total = self.mass(self.by_score(self.ids.iter().copied()));
                let num_ranks = fewest(&|ranks| self.mass(self.kept(ranks)) >= share * total).min(max_ranks);
                (visits > num_ranks).then(|| search(num_ranks))
            }
            Budget::Bounded { max_ranks, error } => {
                let weights = self.weights(self.ids);
                let num_ranks = fewest(&|ranks| {
                    let lost = self.ids.iter().zip(&weights).filter(|(id, _)| !self.reachable(ranks, **id));
                    lost.map(|(_, w)| w * w).sum::<f64>().sqrt() <= error
                });
                let num_ranks = num_ranks.min(max_ranks);
                (visits > num_ranks).then(|| search(num_ranks))
            }
        }
    }

    pub(crate) fn extend(&self, mut ranks: Ranks) -> Ranks {
        let all = || 0..self.logits.len() as u16;
        while all().filter(|&e| self.reachable(&ranks, e)).count() < self.ids.len() {
            let own = self.by_score(self.ids.iter().copied());
            let next = own.into_iter().find(|&e| !self.reachable(&ranks, e));
            ranks.insert(self.placement.ranks_of(next.unwrap())[0]);
        }
        ranks
    }

    /// The `K` experts chosen from `ranks`, by descending score.
    pub(crate) fn choose(&self, rule: Rule<'_>, ranks: &Ranks) -> Vec<u16> {
        let k = self.ids.len();
        let reachable = self.by_score((0..self.logits.len() as u16).filter(|&e| self.reachable(ranks, e)));
        let mut chosen = match rule {
            Rule::RouterScore => Vec::new(),
            _ => self.kept(ranks),
        };
        if let Rule::Similarity(table) = rule {
            for outside in self.by_score(self.ids.iter().copied().filter(|&id| !self.reachable(ranks, id))) {
                let mut free: Vec<u16> = reachable.iter().copied().filter(|e| !chosen.contains(e)).collect();
                free.sort_by(|&a, &b| {
                    table.get(outside, b).partial_cmp(&table.get(outside, a)).unwrap().then(a.cmp(&b))
                });
                chosen.push(free[0]);
            }
        }
        for e in reachable {
            if chosen.len() < k && !chosen.contains(&e) {
                chosen.push(e);
            }
        }
        self.by_score(chosen)
    }

    pub(crate) fn weights(&self, ids: &[u16]) -> Vec<f64> {
        let sum = if self.router.norm_topk_prob { self.mass(ids.iter().copied()) } else { 1.0 };
        let factor = f64::from(self.router.routed_scaling_factor);
        ids.iter().map(|&id| factor * self.probability(id) / sum).collect()
    }
}
