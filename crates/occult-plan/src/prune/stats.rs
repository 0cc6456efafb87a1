//! What pruning did to the routing.

/// Sums over tokens (a row counts as often as it occurs), so that chunks and layers add up with [`PruneStats::merge`].
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PruneStats {
    /// Tokens.
    pub tokens: u64,
    /// Tokens whose experts changed.
    pub touched_tokens: u64,
    /// (token, expert) pairs, `tokens * K`.
    pub pairs: u64,
    /// (token, expert) pairs whose expert is not among the token's experts any more.
    pub replaced_experts: u64,
    /// Tokens that were allowed more than `max_ranks` ranks because fewer hold less than `K` experts.
    pub extended_tokens: u64,
    /// Token copies before: ranks visited, summed over tokens.
    pub copies_before: u64,
    /// Token copies after.
    pub copies_after: u64,
    /// Probability of the experts that the router chose.
    pub original_mass: f64,
    /// Probability of those of them that are still chosen.
    pub kept_mass: f64,
    /// Probability of the experts that are chosen now.
    pub new_mass: f64,
}

impl PruneStats {
    /// Adds the sums of other tokens.
    pub fn merge(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.touched_tokens += other.touched_tokens;
        self.pairs += other.pairs;
        self.replaced_experts += other.replaced_experts;
        self.extended_tokens += other.extended_tokens;
        self.copies_before += other.copies_before;
        self.copies_after += other.copies_after;
        self.original_mass += other.original_mass;
        self.kept_mass += other.kept_mass;
        self.new_mass += other.new_mass;
    }

    /// `C_T` of the router's choice; 0 without tokens.
    pub fn copies_per_token_before(&self) -> f64 {
        ratio(self.copies_before as f64, self.tokens as f64, 0.0)
    }

    /// `C_T` of the pruned routing; 0 without tokens.
    pub fn copies_per_token_after(&self) -> f64 {
        ratio(self.copies_after as f64, self.tokens as f64, 0.0)
    }

    /// Share of the chosen experts' probability that is kept, 0 to 1; 1 without tokens.
    pub fn retained_mass(&self) -> f64 {
        ratio(self.kept_mass, self.original_mass, 1.0)
    }

    /// Probability of the experts chosen now over that of the router's choice; 1 without tokens.
    pub fn relative_mass(&self) -> f64 {
        ratio(self.new_mass, self.original_mass, 1.0)
    }
}

fn ratio(a: f64, b: f64, without: f64) -> f64 {
    if b > 0.0 { a / b } else { without }
}
