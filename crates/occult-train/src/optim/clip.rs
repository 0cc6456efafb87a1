//! Clipping by the global norm: the square root of the sum of squares over all parameters of all ranks.
//!
//! Replicated parameters have the same gradient on every rank and count once; the shards of expert parameters add over ranks:
//! norm^2 = replicated (this rank) + sum over ranks of sharded.

/// Sum of squares in f64, in an order that depends on the length alone.
pub fn squared_norm(values: &[f32]) -> f64 {
    // Eight lanes: the compiler may keep them in one register, and the order is stated.
    let mut lanes = [0f64; 8];
    let chunks = values.chunks_exact(8);
    let rest: f64 = chunks.remainder().iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*v) * f64::from(*v);
        }
    }
    lanes.iter().sum::<f64>() + rest
}

/// What to do with the gradients of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Clip {
    /// Multiply them by `scale`, at most 1.
    Scale {
        /// The norm before.
        norm: f64,
        /// The factor.
        scale: f32,
    },
    /// They hold NaN or infinities: the step must not be taken.
    NotFinite,
}

/// Judges the squares' sum of all gradients. `max_norm` of `None` never scales.
pub fn clip(squared: f64, max_norm: Option<f64>) -> Clip {
    if !squared.is_finite() {
        return Clip::NotFinite;
    }
    let norm = squared.sqrt();
    let scale = match max_norm {
        Some(max) if norm > max => (max / norm) as f32,
        _ => 1.0,
    };
    Clip::Scale { norm, scale }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn shards_add_up(values in prop::collection::vec(-1e3f32..1e3, 0..100), cut in 0usize..100) {
            let cut = cut.min(values.len());
            let plain: f64 = values.iter().map(|v| f64::from(*v).powi(2)).sum();
            let parts = squared_norm(&values[..cut]) + squared_norm(&values[cut..]);
            prop_assert!((parts - plain).abs() <= 1e-12 * plain);
            prop_assert!((squared_norm(&values) - plain).abs() <= 1e-12 * plain);
        }
    }

    #[test]
    fn large_norms_are_scaled_and_broken_ones_refused() {
        assert_eq!(clip(25.0, Some(1.0)), Clip::Scale { norm: 5.0, scale: 0.2 });
        assert_eq!(clip(25.0, Some(6.0)), Clip::Scale { norm: 5.0, scale: 1.0 });
        assert_eq!(clip(25.0, None), Clip::Scale { norm: 5.0, scale: 1.0 });
        assert_eq!(clip(squared_norm(&[1.0, f32::NAN]), Some(1.0)), Clip::NotFinite);
        assert_eq!(clip(squared_norm(&[f32::INFINITY]), None), Clip::NotFinite);
        // Squares of the largest f32 do not overflow in f64.
        assert!(matches!(clip(squared_norm(&[f32::MAX; 9]), Some(1.0)), Clip::Scale { .. }));
    }
}
