//! The tokens of a layer as a hypergraph: experts are vertices, distinct expert sets are weighted edges.

use crate::{ExpertId, PlanError, Result, Routing};

/// Distinct expert sets of a layer, each with the number of tokens that chose it, and the sets of every expert.
#[derive(Debug, Clone)]
pub(super) struct Hypergraph {
    num_experts: usize,
    /// `[sets + 1]` offsets into `members`.
    member_offsets: Vec<u32>,
    /// Ascending ids within a set.
    members: Vec<ExpertId>,
    /// `[sets]` tokens per set.
    weights: Vec<i64>,
    /// `[E + 1]` offsets into `sets_of`.
    set_offsets: Vec<u32>,
    sets_of: Vec<u32>,
    /// `[E]` (token, expert) pairs per expert. Not always the weight of its sets: a vertex may stand for many experts.
    load: Vec<i64>,
    num_tokens: i64,
}

impl Hypergraph {
    /// Merges equal sets. Errors when there is no token, or more than 255 experts per token.
    pub(super) fn new(routing: &Routing<'_>) -> Result<Self> {
        let (num_experts, top_k) = (routing.num_experts(), routing.top_k());
        if top_k > 255 || u32::try_from(routing.expert_ids().len()).is_err() {
            let found = format!("top_k {top_k}, {} ids", routing.expert_ids().len());
            return Err(PlanError::range(
                "routing to search on",
                "top_k up to 255 and up to 2^32 ids",
                found,
            ));
        }
        let mut sorted = routing.expert_ids().to_vec();
        sorted.chunks_exact_mut(top_k).for_each(<[ExpertId]>::sort_unstable);
        let rows = sorted.chunks_exact(top_k).zip((0..).map(|row| routing.occurrences(row)));
        let sets: Vec<(&[ExpertId], i64)> = rows
            .filter(|(_, n)| *n > 0)
            .map(|(ids, n)| (ids, i64::try_from(n).unwrap_or(i64::MAX)))
            .collect();
        if sets.is_empty() {
            return Err(PlanError::NoTokens);
        }
        let graph = Self::from_sets(num_experts, sets);
        Ok(Self { load: graph.degree_weights(), ..graph })
    }

    /// A sample of about `max_sets` sets, each standing for an equal share of the tokens (systematic sampling along the
    /// sorted sets, starting at `offset` of a share): the same hypergraph, coarser.
    pub(super) fn sample(&self, max_sets: usize, offset: f64) -> Self {
        let step = (self.num_tokens / max_sets.max(1) as i64).max(1);
        let mut seen = (step as f64 * offset) as i64;
        let sets = (0..self.num_sets()).filter_map(|s| {
            let hits = (seen + self.weights[s]) / step - seen / step;
            seen += self.weights[s];
            (hits > 0).then(|| (self.set(s), hits * step))
        });
        let sampled = Self::from_sets(self.num_experts, sets.collect());
        let scale = sampled.num_tokens as f64 / self.num_tokens as f64;
        Self { load: self.load.iter().map(|&l| (l as f64 * scale) as i64).collect(), ..sampled }
    }

    /// The same sets, with the load of experts hotter than `max_load` cut to one of the parts of about `part` that replicas
    /// will split it into.
    pub(super) fn with_hot_experts_spread(&self, max_load: i64, part: f64) -> Self {
        let mut this = self.clone();
        for load in this.load.iter_mut().filter(|load| **load > max_load) {
            *load = (*load as f64 / libm::ceil(*load as f64 / part.max(1.0))) as i64;
        }
        this
    }

    /// The hypergraph whose vertices are groups of experts: `group_of` `[E]`, and the load of a group is that of its
    /// experts. Experts with no group (`None`) are left out, and so are sets without any grouped expert.
    pub(super) fn contract(&self, group_of: &[Option<u16>], num_groups: usize) -> Self {
        let mut load = vec![0; num_groups];
        for (e, group) in group_of.iter().enumerate() {
            if let Some(g) = group {
                load[usize::from(*g)] += self.load[e];
            }
        }
        let sets: Vec<Vec<ExpertId>> = (0..self.num_sets())
            .map(|s| {
                let mut groups: Vec<_> =
                    self.set(s).iter().filter_map(|&e| group_of[usize::from(e)]).collect();
                groups.sort_unstable();
                groups.dedup();
                groups
            })
            .collect();
        let sets = sets.iter().map(Vec::as_slice).zip(self.weights.iter().copied());
        Self { load, ..Self::from_sets(num_groups, sets.filter(|(set, _)| !set.is_empty()).collect()) }
    }

    /// From sets of ascending ids; equal ones are merged. Leaves `load` empty.
    fn from_sets(num_experts: usize, mut sets: Vec<(&[ExpertId], i64)>) -> Self {
        sets.sort_unstable_by_key(|&(ids, _)| ids);
        let (mut member_offsets, mut members, mut weights) = (vec![0u32], Vec::new(), Vec::<i64>::new());
        let mut previous: &[ExpertId] = &[];
        for (ids, w) in sets {
            match weights.last_mut() {
                Some(last) if ids == previous => *last += w,
                _ => {
                    members.extend_from_slice(ids);
                    member_offsets.push(members.len() as u32);
                    weights.push(w);
                    previous = ids;
                }
            }
        }
        let mut set_offsets = vec![0u32; num_experts + 1];
        members.iter().for_each(|&e| set_offsets[usize::from(e) + 1] += 1);
        for e in 0..num_experts {
            set_offsets[e + 1] += set_offsets[e];
        }
        let mut next = set_offsets.clone();
        let mut sets_of = vec![0; members.len()];
        for s in 0..weights.len() {
            for &e in &members[member_offsets[s] as usize..member_offsets[s + 1] as usize] {
                sets_of[next[usize::from(e)] as usize] = s as u32;
                next[usize::from(e)] += 1;
            }
        }
        let num_tokens = weights.iter().sum();
        Self {
            num_experts,
            member_offsets,
            members,
            weights,
            set_offsets,
            sets_of,
            load: Vec::new(),
            num_tokens,
        }
    }

    fn degree_weights(&self) -> Vec<i64> {
        let degree = |e| self.sets_of(e).iter().map(|&s| self.weights[s as usize]).sum();
        (0..self.num_experts).map(degree).collect()
    }

    pub(super) fn num_experts(&self) -> usize {
        self.num_experts
    }

    pub(super) fn num_sets(&self) -> usize {
        self.weights.len()
    }

    /// Members of a set, ascending.
    pub(super) fn set(&self, s: usize) -> &[ExpertId] {
        &self.members[self.member_offsets[s] as usize..self.member_offsets[s + 1] as usize]
    }

    /// Tokens that chose a set.
    pub(super) fn weight(&self, s: usize) -> i64 {
        self.weights[s]
    }

    /// Every set with the tokens that chose it.
    pub(super) fn sets(&self) -> impl Iterator<Item = (&[ExpertId], i64)> {
        (0..self.num_sets()).map(|s| (self.set(s), self.weight(s)))
    }

    /// Sets that an expert is in.
    pub(super) fn sets_of(&self, expert: usize) -> &[u32] {
        &self.sets_of[self.set_offsets[expert] as usize..self.set_offsets[expert + 1] as usize]
    }

    /// (token, expert) pairs of a vertex.
    pub(super) fn load(&self, expert: usize) -> i64 {
        self.load[expert]
    }

    /// (token, expert) pairs in all.
    pub(super) fn total_load(&self) -> i64 {
        self.load.iter().sum()
    }

    /// Copies in all when no two experts of a token share a rank: no placement has more.
    pub(super) fn most_copies(&self) -> i64 {
        (0..self.num_sets()).map(|s| self.weight(s) * self.set(s).len() as i64).sum()
    }

    /// Tokens in all.
    pub(super) fn num_tokens(&self) -> i64 {
        self.num_tokens
    }
}
