//! Rows from each source to each destination.

/// A table of rows, `[num_sources, num_destinations]`: exact counts, or, where only the destinations are known and every
/// source is equally likely, their expectation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairRows {
    num_sources: usize,
    num_destinations: usize,
    /// All sources are alike: `counts` is the sum over them, `[num_destinations]`. Otherwise `[sources, destinations]`.
    alike: bool,
    counts: Vec<u64>,
}

impl PairRows {
    pub(super) fn zero(num_sources: usize, num_destinations: usize, alike: bool) -> Self {
        let tables = if alike { 1 } else { num_sources };
        Self { num_sources, num_destinations, alike, counts: vec![0; tables * num_destinations] }
    }

    /// Counts of one source, to add to; of all sources together where they are alike.
    pub(super) fn row_mut(&mut self, source: usize) -> &mut [u64] {
        let start = if self.alike { 0 } else { source * self.num_destinations };
        &mut self.counts[start..start + self.num_destinations]
    }

    /// The same rows with sources joined: source `s` becomes `of(s)`. Joined sources must be equally many in each group.
    pub(crate) fn fold_sources(&self, of: impl Fn(usize) -> usize, num_sources: usize) -> Self {
        let mut folded = Self::zero(num_sources, self.num_destinations, self.alike);
        if self.alike {
            folded.counts.clone_from(&self.counts);
        } else {
            for (source, row) in self.counts.chunks_exact(self.num_destinations).enumerate() {
                for (sum, n) in folded.row_mut(of(source)).iter_mut().zip(row) {
                    *sum += n;
                }
            }
        }
        folded
    }

    /// The same rows with each `size` consecutive destinations joined into one.
    pub(crate) fn fold_destinations(&self, size: usize) -> Self {
        let counts = self.counts.chunks_exact(size).map(|group| group.iter().sum()).collect();
        Self { num_destinations: self.num_destinations / size, counts, ..*self }
    }

    /// Number of sources.
    pub fn num_sources(&self) -> usize {
        self.num_sources
    }

    /// Number of destinations.
    pub fn num_destinations(&self) -> usize {
        self.num_destinations
    }

    /// Whether the values are counts of what was recorded rather than expectations over home ranks.
    pub fn is_exact(&self) -> bool {
        !self.alike
    }

    /// Rows from a source to a destination. Panics when either does not exist.
    pub fn get(&self, source: usize, destination: usize) -> f64 {
        assert!(source < self.num_sources && destination < self.num_destinations, "no such pair");
        if self.alike {
            self.counts[destination] as f64 / self.num_sources as f64
        } else {
            self.counts[source * self.num_destinations + destination] as f64
        }
    }

    /// All values, row-major.
    pub fn to_vec(&self) -> Vec<f64> {
        let pairs = (0..self.num_sources).flat_map(|s| (0..self.num_destinations).map(move |d| (s, d)));
        pairs.map(|(s, d)| self.get(s, d)).collect()
    }

    /// Sum of all values: always a count.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Sum of the values that leave: those whose source is not at home at the destination. `home(s)` is the destination
    /// at which source `s` is at home.
    pub fn remote_total(&self, home: impl Fn(usize) -> usize) -> f64 {
        if self.alike {
            // Every source has the same row; what stays is one value of it, for each source.
            let stays: u64 = (0..self.num_sources).map(|s| self.counts[home(s)]).sum();
            // One division of two integers, so that the whole is rounded once.
            let all = u128::from(self.total()) * self.num_sources as u128;
            (all - u128::from(stays)) as f64 / self.num_sources as f64
        } else {
            let stays: u64 =
                (0..self.num_sources).map(|s| self.counts[s * self.num_destinations + home(s)]).sum();
            (self.total() - stays) as f64
        }
    }
}
