//! Equal random groups: the placement that knows nothing, for comparison.

use super::contiguous::{all_experts, deal};
use crate::{LayerPlacement, Result};
use rand_core::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;

/// Shuffles the experts (Fisher-Yates over PCG64-MCG, seeded with `seed`) and deals them out in shares that differ by at
/// most one, larger shares first. The same seed gives the same placement on every machine. Layers need different seeds to
/// differ. Errors unless `1 <= num_ranks <= num_experts`.
pub fn place(num_experts: usize, num_ranks: usize, seed: u64) -> Result<LayerPlacement> {
    let mut experts = all_experts(num_experts)?;
    let mut rng = Pcg64Mcg::seed_from_u64(seed);
    for last in (1..experts.len()).rev() {
        experts.swap(last, below(&mut rng, last as u64 + 1) as usize);
    }
    deal(&experts, num_ranks)
}

/// A uniform number in `0..bound`, `bound > 0`: the high half of a product, with the draws that would bias it refused.
fn below(rng: &mut impl Rng, bound: u64) -> u64 {
    let refused = bound.wrapping_neg() % bound;
    loop {
        let product = u128::from(rng.next_u64()) * u128::from(bound);
        if product as u64 >= refused {
            return (product >> 64) as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_fixes_the_placement() {
        let golden = place(8, 3, 1).unwrap();
        assert_eq!(golden, place(8, 3, 1).unwrap());
        assert_ne!(golden, place(8, 3, 2).unwrap());
        let sizes: Vec<usize> = (0..3).map(|r| golden.experts_of(r).len()).collect();
        assert_eq!(sizes, [3, 3, 2]);
    }

    #[test]
    fn every_expert_meets_every_rank_about_equally_often() {
        let mut seen = [[0u32; 3]; 6];
        for seed in 0..3_000 {
            for (e, r) in place(6, 3, seed).unwrap().expert_ranks().unwrap().into_iter().enumerate() {
                seen[e][usize::from(r)] += 1;
            }
        }
        // 1000 expected each, standard deviation 26.
        assert!(seen.iter().flatten().all(|n| (850..1150).contains(n)), "{seen:?}");
    }

    #[test]
    fn more_ranks_than_experts_are_refused() {
        assert!(place(3, 4, 0).is_err());
    }
}
