use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use super::{Targets, log_sum_exp};
use crate::Threads;
use crate::ops::tensor::{f32s, gradient, with_f32};

pub(super) struct Op {
    threads: Threads,
    targets: Targets,
    /// Of each row that counts.
    log_sums: OnceLock<Vec<f32>>,
}

impl Op {
    pub(super) fn new(threads: &Threads, targets: Targets) -> Self {
        Self { threads: threads.clone(), targets, log_sums: OnceLock::new() }
    }
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let vocab = layout.dims().last().copied().unwrap_or(0);
        let logits = f32s(logits, layout, "logits")?;
        let row = |row: usize| &logits[row * vocab..][..vocab];
        let mut log_sums = vec![0.0; self.targets.counted.len()];
        self.threads.for_each_chunk(&mut log_sums, 8, |chunk, log_sums| {
            for (log_sum, &(at, _)) in log_sums.iter_mut().zip(&self.targets.counted[chunk * 8..]) {
                *log_sum = log_sum_exp(row(at));
            }
        });
        let each = self.targets.counted.iter().zip(&log_sums);
        let loss: f64 = each.map(|(&(at, target), &lse)| self.targets.loss(row(at), target, lse)).sum();
        // An operation runs forward once.
        let _ = self.log_sums.set(log_sums);
        Ok((CpuStorage::F32(vec![loss as f32]), ().into()))
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let Some(log_sums) = self.log_sums.get() else { bail!("cross-entropy: backward without forward") };
        let factor = grad.to_scalar::<f32>()?;
        let vocab = logits.dims().last().copied().unwrap_or(0);
        let mut out = vec![0.0; logits.elem_count()];
        with_f32(logits, "logits", |logits| {
            self.threads.for_each_chunk(&mut out, vocab, |row, out| {
                if let Ok(at) = self.targets.counted.binary_search_by_key(&row, |&(row, _)| row) {
                    out.copy_from_slice(&logits[row * vocab..][..vocab]);
                    self.targets.differentiate(out, self.targets.counted[at].1, log_sums[at], factor);
                }
            });
            Ok(())
        })?;
        Ok(Some(gradient(out, logits.shape(), logits.dtype())?))
    }
}
