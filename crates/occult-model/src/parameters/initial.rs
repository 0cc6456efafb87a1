//! Random values to begin pretraining with.

use rand_core::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::ParameterKind;
use crate::hf::TensorInfo;

/// Values of a parameter; of experts, those of the ids `held`.
pub(super) fn values(
    info: &TensorInfo,
    held: &[usize],
    kind: ParameterKind,
    seed: u64,
    deviation: f64,
) -> Vec<f32> {
    let n: usize = info.shape.iter().product();
    match kind {
        ParameterKind::Norm => vec![1.0; n],
        ParameterKind::Bias => vec![0.0; n],
        ParameterKind::Experts { .. } => {
            let each = n / held.len().max(1);
            held.iter()
                .flat_map(|&expert| Normal::new(seed, &info.name, expert as u64).take(each, deviation))
                .collect()
        }
        _ => Normal::new(seed, &info.name, 0).take(n, deviation),
    }
}

/// Normal values of one stream.
struct Normal(Pcg64Mcg);

impl Normal {
    fn new(seed: u64, name: &str, stream: u64) -> Self {
        // FNV-1a over what names the stream.
        let bytes = name.bytes().chain(seed.to_le_bytes()).chain(stream.to_le_bytes());
        let hash =
            bytes.fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        Self(Pcg64Mcg::seed_from_u64(hash))
    }

    /// In (0, 1].
    fn uniform(&mut self) -> f64 {
        ((self.0.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Box and Muller's transform, two values at a time.
    fn take(mut self, n: usize, deviation: f64) -> Vec<f32> {
        let mut out = Vec::with_capacity(n + 1);
        while out.len() < n {
            let (radius, angle) =
                ((-2.0 * self.uniform().ln()).sqrt() * deviation, std::f64::consts::TAU * self.uniform());
            out.extend([(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]);
        }
        out.truncate(n);
        out
    }
}
