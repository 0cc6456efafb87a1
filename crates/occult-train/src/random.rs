//! Random numbers that are functions of a key: no hidden state, so that a run resumes exactly.

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits in which every input bit reaches every
/// output bit.
pub fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A key from several numbers; the order matters.
pub fn key(parts: &[u64]) -> u64 {
    parts.iter().fold(0x5851_f42d_4c95_7f2d, |k, &p| mix(k ^ mix(p)))
}

/// FNV-1a of bytes, then mixed: a stable 64-bit hash (not against adversaries).
pub fn hash_bytes(bytes: &[u8]) -> u64 {
    mix(bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)))
}

/// Uniform in [0, 1) with 53 bits.
pub fn unit(x: u64) -> f64 {
    (x >> 11) as f64 / (1u64 << 53) as f64
}

/// A pseudo-random order of 0..n that is computed entry by entry: a Feistel network over the next even power of two,
/// walked until it lands inside (at most about four rounds on average). No table, so a position in it is one number.
#[derive(Debug, Clone, Copy)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    key: u64,
}

impl Permutation {
    /// The order of `n` things for a key.
    pub fn new(n: u64, key: u64) -> Self {
        let bits = (64 - n.saturating_sub(1).leading_zeros()).max(2);
        Self { n, half_bits: bits.div_ceil(2), key }
    }

    /// Which thing comes at place `at`; `None` from `n` on.
    pub fn at(&self, at: u64) -> Option<u64> {
        if at >= self.n {
            return None;
        }
        let mask = (1u64 << self.half_bits) - 1;
        let mut x = at;
        loop {
            let (mut left, mut right) = (x >> self.half_bits, x & mask);
            for round in 0..6 {
                (left, right) = (right, left ^ (mix(self.key ^ mix(right ^ (round << 56))) & mask));
            }
            x = (left << self.half_bits) | right;
            if x < self.n {
                return Some(x);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_permutation_holds_every_entry_once(n in 0u64..3000, key: u64) {
            let order = Permutation::new(n, key);
            let mut seen: Vec<u64> = (0..n).filter_map(|i| order.at(i)).collect();
            seen.sort_unstable();
            prop_assert!(seen.into_iter().eq(0..n));
            prop_assert_eq!(order.at(n), None);
        }
    }

    #[test]
    fn orders_differ_by_key_and_are_not_the_identity() {
        let of = |key| (0..500).filter_map(|i| Permutation::new(500, key).at(i)).collect::<Vec<_>>();
        let (a, b) = (of(1), of(2));
        let fixed = a.iter().zip(0u64..).filter(|(x, i)| *x == i).count();
        assert!(fixed < 10, "{fixed} entries stay in place");
        assert!(a.iter().zip(&b).filter(|(x, y)| x == y).count() < 10);
        assert_eq!(a, of(1));
    }

    #[test]
    fn keys_depend_on_order_and_units_are_spread() {
        assert_ne!(key(&[1, 2]), key(&[2, 1]));
        assert_ne!(hash_bytes(b"ab"), hash_bytes(b"ba"));
        let mean = (0..10_000).map(|i| unit(mix(i))).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
    }
}
