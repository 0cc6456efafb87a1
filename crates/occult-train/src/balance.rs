//! Load balancing without a loss: a bias per expert that only takes part in the choice (Wang et al., "Auxiliary-Loss-Free Load
//! Balancing Strategy for Mixture-of-Experts", algorithm 1; used by DeepSeek-V3).

use crate::error::{Result, TrainError};

/// After a step: experts that got fewer tokens than the mean rise by `rate`, those that got more fall by it. `tokens_per_expert`
/// \[E\] counts all ranks together, `bias` \[E\]. Errors when lengths differ.
pub fn update_bias(bias: &mut [f32], tokens_per_expert: &[u64], rate: f32) -> Result<()> {
    if bias.len() != tokens_per_expert.len() {
        let (b, c) = (bias.len(), tokens_per_expert.len());
        return Err(TrainError::request(format!("{b} biases, {c} expert counts")));
    }
    let total: u128 = tokens_per_expert.iter().map(|c| u128::from(*c)).sum();
    let experts = bias.len() as u128;
    for (b, &count) in bias.iter_mut().zip(tokens_per_expert) {
        // count against total / experts, in integers: no rounding decides.
        match (u128::from(count) * experts).cmp(&total) {
            std::cmp::Ordering::Less => *b += rate,
            std::cmp::Ordering::Greater => *b -= rate,
            std::cmp::Ordering::Equal => {}
        }
    }
    Ok(())
}

/// Balancedness: mean over maximum load, 1 when equal, 1 / E when one expert has all. `None` without tokens.
pub fn balancedness(tokens_per_expert: &[u64]) -> Option<f64> {
    let max = *tokens_per_expert.iter().max()?;
    let total: u64 = tokens_per_expert.iter().sum();
    (max > 0).then(|| total as f64 / tokens_per_expert.len() as f64 / max as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_moves_against_the_load() {
        let mut bias = [0.0, 1.0, -1.0, 0.5];
        update_bias(&mut bias, &[9, 2, 4, 5], 0.25).unwrap();
        assert_eq!(bias, [-0.25, 1.25, -0.75, 0.5]);
        assert!(update_bias(&mut bias, &[1], 0.25).is_err());
        assert_eq!(balancedness(&[9, 2, 4, 5]), Some(5.0 / 9.0));
        assert_eq!(balancedness(&[0, 0]), None);
        assert_eq!(balancedness(&[]), None);
    }

    /// A skewed router whose top-1 is taken with the bias: the load must become even.
    #[test]
    fn it_balances_a_skewed_router() {
        use crate::random::{key, unit};
        let mut bias = [0f32; 4];
        let mut load = [0u64; 4];
        for step in 0..400 {
            load = [0; 4];
            for token in 0..256 {
                let score =
                    |e: usize| unit(key(&[step, token, e as u64])) as f32 + [0.6, 0.0, 0.3, 0.1][e] + bias[e];
                let best = (0..4).max_by(|a, b| score(*a).total_cmp(&score(*b))).unwrap();
                load[best] += 1;
            }
            update_bias(&mut bias, &load, 0.005).unwrap();
        }
        assert!(balancedness(&load).unwrap() > 0.8, "{load:?}");
    }
}
