use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::{CrossEntropy, SummedLoss, Targets, log_sum_exp};
use crate::linear::{LinearDims, linear, linear_bwd_w, linear_bwd_x};
use crate::ops::shared::Shared;
use crate::ops::sink::GradSink;
use crate::ops::tensor::{core, cpu, f32s, gradient, matrix, with_f32};
use crate::{Matrix, Threads};

/// Logits that exist at a time (or 32 rows, if that is more).
const LOGITS: usize = 1 << 23;

pub(super) fn apply(
    threads: &Threads,
    hidden: &Tensor,
    w_out: &Tensor,
    targets: &[u32],
    options: CrossEntropy,
    sink: Option<&GradSink>,
) -> Result<SummedLoss> {
    let (vocab, d) = w_out.dims2()?;
    if hidden.dims().last() != Some(&d) {
        bail!("cross-entropy: hidden {:?}, output weight {:?}", hidden.dims(), w_out.dims());
    }
    if vocab == 0 || d == 0 {
        bail!("cross-entropy: an empty output weight");
    }
    let targets = Targets::new(targets, hidden.elem_count() / d, vocab, options)?;
    let count = targets.counted.len();
    let wants = Wants { hidden: hidden.track_op(), weight: sink.is_some() || w_out.track_op() };
    let op = Op { threads: threads.clone(), targets, wants, sink: sink.cloned(), kept: Mutex::new(None) };
    let loss = hidden.contiguous()?.apply_op2(&w_out.contiguous()?, op)?;
    Ok(SummedLoss { loss, count })
}

/// Which gradients are wanted.
#[derive(Clone, Copy)]
struct Wants {
    hidden: bool,
    weight: bool,
}

struct Op {
    threads: Threads,
    targets: Targets,
    wants: Wants,
    sink: Option<GradSink>,
    kept: Mutex<Option<Gradients>>,
}

/// Of the loss itself: `[T, D]` and `[V, D]`, empty if not wanted.
struct Gradients {
    hidden: Vec<f32>,
    weight: Vec<f32>,
}

impl Op {
    /// The loss and its gradients, some rows at a time.
    fn compute(&self, hidden: &[f32], w: Matrix<'_>, d: usize, wants: Wants) -> Result<(f32, Gradients)> {
        let vocab = w.len() / d;
        let chunk = (LOGITS / vocab).max(32).min(self.targets.counted.len().max(1));
        let mut of_hidden = vec![0.0; if wants.hidden { hidden.len() } else { 0 }];
        let mut of_weight = vec![0.0; if wants.weight { w.len() } else { 0 }];
        let (mut x, mut dx) = (vec![0.0; chunk * d], vec![0.0; if wants.hidden { chunk * d } else { 0 }]);
        let mut logits = vec![0.0; chunk * vocab];
        let mut losses = vec![0.0; chunk];
        let mut loss = 0f64;
        for counted in self.targets.counted.chunks(chunk) {
            let m = counted.len();
            let dims = LinearDims { rows: m, out: vocab, inner: d };
            let (x, logits) = (&mut x[..m * d], &mut logits[..m * vocab]);
            for (x, &(row, _)) in x.chunks_exact_mut(d).zip(counted) {
                x.copy_from_slice(&hidden[row * d..][..d]);
            }
            linear(&self.threads, dims, x, w, logits).map_err(core)?;
            self.rows(counted, logits, &mut losses[..m], wants.hidden || wants.weight);
            loss += losses[..m].iter().sum::<f64>();
            if wants.weight {
                linear_bwd_w(&self.threads, dims, logits, x, &mut of_weight).map_err(core)?;
            }
            if wants.hidden {
                linear_bwd_x(&self.threads, dims, logits, w, &mut dx[..m * d]).map_err(core)?;
                for (dx, &(row, _)) in dx.chunks_exact(d).zip(counted) {
                    of_hidden[row * d..][..d].copy_from_slice(dx);
                }
            }
        }
        Ok((loss as f32, Gradients { hidden: of_hidden, weight: of_weight }))
    }

    /// Losses of some rows; their logits become gradients if these are wanted.
    fn rows(&self, counted: &[(usize, usize)], logits: &mut [f32], losses: &mut [f64], differentiate: bool) {
        let vocab = logits.len() / losses.len().max(1);
        let logits = Shared::new(logits);
        self.threads.for_each_chunk(losses, 1, |row, loss| {
            // SAFETY: each row of logits belongs to one task.
            let logits = unsafe { logits.part(row * vocab, vocab) };
            let (target, lse) = (counted[row].1, log_sum_exp(logits));
            loss[0] = self.targets.loss(logits, target, lse);
            if differentiate {
                self.targets.differentiate(logits, target, lse, 1.0);
            }
        });
    }
}

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        "linear-cross-entropy"
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        hidden_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, d) = w_layout.shape().dims2()?;
        let (hidden, w) = (f32s(hidden, hidden_layout, "hidden")?, matrix(w, w_layout, "the output weight")?);
        let (loss, gradients) = self.compute(hidden, w, d, self.wants)?;
        if self.wants.hidden || self.wants.weight {
            *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(gradients);
        }
        Ok((CpuStorage::F32(vec![loss]), ().into()))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        w: &Tensor,
        _loss: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let factor = grad.to_scalar::<f32>()?;
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut gradients = match kept {
            Some(gradients) => gradients,
            // A second backward pass through the same graph.
            None => with_f32(hidden, "hidden", |x| {
                let (storage, layout) = w.storage_and_layout();
                let matrix = matrix(cpu(&storage, "the output weight")?, layout, "the output weight")?;
                Ok(self.compute(x, matrix, w.dims2()?.1, self.wants)?.1)
            })?,
        };
        if factor != 1.0 {
            gradients.hidden.iter_mut().chain(&mut gradients.weight).for_each(|g| *g *= factor);
        }
        let to_hidden = self.wants.hidden.then(|| gradient(gradients.hidden, hidden.shape(), hidden.dtype()));
        let to_weight = match &self.sink {
            Some(sink) => {
                sink.add(w.elem_count(), |sum| {
                    sum.iter_mut().zip(&gradients.weight).for_each(|(sum, g)| *sum += g);
                });
                None
            }
            None => self.wants.weight.then(|| gradient(gradients.weight, w.shape(), w.dtype())),
        };
        Ok((to_hidden.transpose()?, to_weight.transpose()?))
    }
}
