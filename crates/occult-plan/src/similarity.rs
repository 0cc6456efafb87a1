//! How alike two experts are to the router: the table that the pruning rule `similarity` replaces by.
//!
//! `similarity[i][j] = (sum_t l_ti * l_tj)^2 / (sum_t l_ti^2 * sum_t l_tj^2)`, the squared cosine of the router-logit
//! columns of experts `i` and `j` over all profiled tokens `t`.

use crate::placement::check_order;
use crate::{ExpertId, PlanError, Result, Routing};

/// Side of a tile of products that is summed in registers.
const TILE: usize = 4;
/// Tokens that are packed and then summed at a time.
const CHUNK: usize = 128;

type Tile = [[f64; TILE]; TILE];

/// Sums products of router logits over any number of chunks of tokens: one pass, memory `[E, E]`.
///
/// Every sum is taken in f64, token after token, so the table is the same bit for bit however the tokens are cut into
/// chunks (a product of two f32 is exact in f64; only additions round, always in the same order).
#[derive(Debug, Clone)]
pub struct SimilarityAccumulator {
    num_experts: usize,
    /// Sums of products, one tile per pair of panels `a <= b`; a panel is `TILE` experts.
    tiles: Vec<Tile>,
    /// A chunk of logits, panel after panel, `[panels][CHUNK][TILE]`; `scaled` is times the row's occurrences.
    plain: Vec<[f64; TILE]>,
    scaled: Vec<[f64; TILE]>,
}

impl SimilarityAccumulator {
    /// No tokens yet.
    pub fn new(num_experts: usize) -> Self {
        let panels = num_experts.div_ceil(TILE);
        let packed = vec![[0.0; TILE]; panels * CHUNK];
        let tiles = vec![Tile::default(); panels * (panels + 1) / 2];
        Self { num_experts, tiles, plain: packed.clone(), scaled: packed }
    }

    /// Adds tokens. Needs their scores to be router logits of all experts, `[T, E]`; a row counts as often as it occurs.
    pub fn add(&mut self, routing: &Routing<'_>) -> Result<()> {
        let e = self.num_experts;
        if routing.num_experts() != e {
            let (expected, found) = (e, routing.num_experts());
            return Err(PlanError::Shape { what: "experts of the similarity table", expected, found });
        }
        let Some(scores) = routing.scores() else {
            let (what, missing) = ("the similarity table", "router logits of all experts (scores [T, E])");
            return Err(PlanError::Missing { what, missing });
        };
        for (i, logits) in scores.chunks(CHUNK * e).enumerate() {
            let tokens = logits.len() / e;
            self.pack(logits, |token| routing.occurrences(i * CHUNK + token) as f64);
            self.sum(tokens);
        }
        Ok(())
    }

    fn pack(&mut self, logits: &[f32], occurrences: impl Fn(usize) -> f64) {
        for (token, logits) in logits.chunks_exact(self.num_experts).enumerate() {
            let n = occurrences(token);
            for (panel, logits) in logits.chunks(TILE).enumerate() {
                for (i, &logit) in logits.iter().enumerate() {
                    self.plain[panel * CHUNK + token][i] = f64::from(logit);
                    self.scaled[panel * CHUNK + token][i] = f64::from(logit) * n;
                }
            }
        }
    }

    fn sum(&mut self, tokens: usize) {
        let panels = || self.plain.chunks_exact(CHUNK).map(|panel| &panel[..tokens]);
        let mut tiles = self.tiles.iter_mut();
        for (a, left) in self.scaled.chunks_exact(CHUNK).map(|panel| &panel[..tokens]).enumerate() {
            for (right, tile) in panels().skip(a).zip(&mut tiles) {
                let mut sums = *tile;
                for (x, y) in left.iter().zip(right) {
                    for (sums, x) in sums.iter_mut().zip(x) {
                        for (sum, y) in sums.iter_mut().zip(y) {
                            *sum += x * y;
                        }
                    }
                }
                *tile = sums;
            }
        }
    }

    /// Sum of products of two experts' logits.
    fn product(&self, i: usize, j: usize) -> f64 {
        let (i, j) = (i.min(j), i.max(j));
        let (a, b) = (i / TILE, j / TILE);
        let panels = self.num_experts.div_ceil(TILE);
        // Row `a` of the upper triangle starts after rows of panels, panels - 1, ... tiles.
        let start = a * panels - a * a.saturating_sub(1) / 2;
        self.tiles[start + b - a][i % TILE][j % TILE]
    }

    /// The table of what was added so far. An expert whose logits are all zero (or with no tokens: every expert) has
    /// similarity 0 to all, itself included.
    pub fn finish(&self) -> SimilarityTable {
        let e = self.num_experts;
        let mut values = vec![0.0; e * e];
        for i in 0..e {
            for j in 0..=i {
                let (dot, norms) = (self.product(i, j), self.product(i, i) * self.product(j, j));
                if norms > 0.0 {
                    let squared_cosine = (dot * dot / norms).min(1.0) as f32;
                    values[i * e + j] = squared_cosine;
                    values[j * e + i] = squared_cosine;
                }
            }
        }
        SimilarityTable { num_experts: e, values }
    }
}

/// Squared cosines of the router-logit columns of every two experts of a layer, `[E, E]`, symmetric, 0 to 1.
#[derive(Debug, Clone, PartialEq)]
pub struct SimilarityTable {
    num_experts: usize,
    values: Vec<f32>,
}

impl SimilarityTable {
    /// From values `[E, E]` that were computed before, each from 0 to 1.
    pub fn from_values(num_experts: usize, values: Vec<f32>) -> Result<Self> {
        let (expected, found) = (num_experts * num_experts, values.len());
        if found != expected {
            return Err(PlanError::Shape { what: "similarity table [E, E]", expected, found });
        }
        match values.iter().position(|v| !(0.0..=1.0).contains(v)) {
            Some(at) => {
                let (i, j) = (at / num_experts, at % num_experts);
                Err(PlanError::range("similarity", "0 to 1", format!("{} at [{i}, {j}]", values[at])))
            }
            None => Ok(Self { num_experts, values }),
        }
    }

    /// `E`.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Similarity of two experts. Panics when there is no such expert.
    pub fn get(&self, i: ExpertId, j: ExpertId) -> f32 {
        self.row(i)[usize::from(j)]
    }

    /// `[E]` similarity of one expert to every expert. Panics when there is no such expert.
    pub fn row(&self, expert: ExpertId) -> &[f32] {
        let e = usize::from(expert);
        &self.values[e * self.num_experts..(e + 1) * self.num_experts]
    }

    /// The same table of experts that got other ids: `order[new]` is the old id, every old id once.
    pub fn renumbered(&self, order: &[ExpertId]) -> Result<Self> {
        check_order(order, self.num_experts)?;
        let values = order.iter().flat_map(|&i| order.iter().map(move |&j| self.get(i, j))).collect();
        Ok(Self { num_experts: self.num_experts, values })
    }

    /// All values, `[E, E]` row-major.
    pub fn as_slice(&self) -> &[f32] {
        &self.values
    }
}
