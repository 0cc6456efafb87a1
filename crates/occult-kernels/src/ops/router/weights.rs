use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use crate::ops::tensor::{f32s, gradient, with_f32};

/// The id of no expert: a place that pruning left empty. Its weight is 0.
pub const ABSENT: u32 = u32::MAX;

/// Added to the sum that weights are divided by, so that scores that are all 0 give 0; too small to change another sum.
const TINY: f32 = 1e-20;

/// From the scores of the chosen experts to their weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TopkWeights {
    /// K: experts of a token.
    pub top_k: usize,
    /// Whether the weights of a token are divided by their sum.
    pub norm_topk: bool,
    /// Factor on the weights.
    pub scale: f32,
}

/// Weights `[T, K]` of the experts `expert_ids` `[T, K]` (any choice, or [`ABSENT`]) by `scores` `[T, E]` f32.
///
/// # Errors
/// Ids outside E, another number of ids than T K, other dtypes or devices.
pub fn routing_weights(scores: &Tensor, expert_ids: &[u32], how: TopkWeights) -> Result<Tensor> {
    let (tokens, experts) = scores.dims2()?;
    if tokens.checked_mul(how.top_k) != Some(expert_ids.len()) {
        bail!("router: {} ids for {tokens} tokens of {} experts", expert_ids.len(), how.top_k);
    }
    if let Some(id) = expert_ids.iter().find(|&&id| id != ABSENT && id as usize >= experts) {
        bail!("router: expert {id} of {experts}");
    }
    scores.contiguous()?.apply_op1(Op { ids: expert_ids.into(), how })
}

struct Op {
    ids: Arc<[u32]>,
    how: TopkWeights,
}

impl Op {
    /// Ids and scores of each token.
    fn tokens<'a>(
        &'a self,
        scores: &'a [f32],
        experts: usize,
    ) -> impl Iterator<Item = (&'a [u32], &'a [f32])> {
        self.ids.chunks_exact(self.how.top_k.max(1)).zip(scores.chunks_exact(experts.max(1)))
    }

    /// What the scores of a token are multiplied with.
    fn factor(&self, ids: &[u32], scores: &[f32]) -> f32 {
        if !self.how.norm_topk {
            return self.how.scale;
        }
        let sum: f32 = ids.iter().map(|&id| of(scores, id)).sum();
        self.how.scale / (sum + TINY)
    }
}

fn of(scores: &[f32], id: u32) -> f32 {
    if id == ABSENT { 0.0 } else { scores[id as usize] }
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "routing-weights"
    }

    fn cpu_fwd(&self, scores: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (tokens, experts) = layout.shape().dims2()?;
        let scores = f32s(scores, layout, "scores")?;
        let mut out = Vec::with_capacity(self.ids.len());
        for (ids, scores) in self.tokens(scores, experts) {
            let factor = self.factor(ids, scores);
            out.extend(ids.iter().map(|&id| of(scores, id) * factor));
        }
        Ok((CpuStorage::F32(out), (tokens, self.how.top_k).into()))
    }

    /// Without normalisation `ds = scale dw`; with it, `ds = scale / sum (dw - <dw, s> / sum)`.
    fn bwd(&self, scores: &Tensor, _w: &Tensor, dw: &Tensor) -> Result<Option<Tensor>> {
        let (_, experts) = scores.dims2()?;
        let dw = dw.contiguous()?;
        let mut out = vec![0f32; scores.elem_count()];
        with_f32(scores, "scores", |scores| {
            with_f32(&dw, "the gradient", |dw| {
                let dw = dw.chunks_exact(self.how.top_k.max(1));
                let out = out.chunks_exact_mut(experts.max(1));
                for (((ids, scores), dw), out) in self.tokens(scores, experts).zip(dw).zip(out) {
                    let factor = self.factor(ids, scores);
                    let sum: f32 = ids.iter().map(|&id| of(scores, id)).sum();
                    let inner: f32 = ids.iter().zip(dw).map(|(&id, dw)| of(scores, id) * dw).sum();
                    let common = if self.how.norm_topk { inner / (sum + TINY) } else { 0.0 };
                    for (&id, dw) in ids.iter().zip(dw).filter(|(id, _)| **id != ABSENT) {
                        out[id as usize] += factor * (dw - common);
                    }
                }
                Ok(())
            })
        })?;
        Ok(Some(gradient(out, scores.shape(), scores.dtype())?))
    }
}
