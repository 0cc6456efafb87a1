//! Scaled dot-product attention without the score matrix.
//!
//! Tiles of up to 64 query rows by 64 keys; inside a tile queries lie along the lanes, so keys and values are read
//! where they are (a cache may be a view) and maxima and sums over keys are vertical. The softmax is the running one of
//! Milakov and Gimelshein (2018), backward recomputes the probabilities from the log-sum-exp as in Dao et al.,
//! "FlashAttention" (2022). One or few query rows per key head (decode) stream keys and values once, in chunks of the
//! sequence that are merged in order. No result depends on the number of threads.

mod backward;
mod blocked;
mod reference;
mod stream;
#[cfg(test)]
mod tests;
mod tile;

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};

pub use reference::attention as reference;

use super::tensor::{Rows4, cpu, gradient, rows_contiguous, with_f32};
use crate::Threads;

/// What a query sees, and how scores are scaled.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionShape {
    /// Factor on the scores, usually `1 / sqrt(d_k)`.
    pub scale: f32,
    /// Query `t` is at position `past + t` and sees no later key.
    pub causal: bool,
    /// Keys before the first query; 0 unless causal.
    pub past: usize,
    /// `[B]`: keys at the start of each sequence that are padding, which nobody sees; a query that is itself padding
    /// sees its own key, so that its row stays a number. `None`: no padding.
    pub padding: Option<Arc<[usize]>>,
    /// A query sees at most this many keys, its own included; causal only.
    pub window: Option<usize>,
    /// `[B, S]`: for a query at each position, the first key it sees (where its text begins in a packed sequence);
    /// causal only. `None`: no such limit.
    pub starts: Option<Arc<[u32]>>,
}

impl AttentionShape {
    /// Causal, without padding or window.
    #[must_use]
    pub fn causal(scale: f32, past: usize) -> Self {
        Self { scale, causal: true, past, padding: None, window: None, starts: None }
    }

    /// Keys `first .. end` that query `t` of sequence `b` sees, of `s`.
    fn range(&self, b: usize, t: usize, s: usize) -> (usize, usize) {
        let padding = self.padding.as_ref().and_then(|p| p.get(b).copied()).unwrap_or(0);
        if !self.causal {
            return (padding.min(s), s);
        }
        let position = self.past + t;
        let start =
            self.starts.as_ref().and_then(|from| from.get(b * s + position)).map_or(0, |&from| from as usize);
        let first = padding.max(start).max(self.window.map_or(0, |w| (position + 1).saturating_sub(w)));
        (first.min(position), position + 1)
    }
}

/// `softmax(scale q kᵀ) v`, masked as `shape` says.
///
/// `q` `[B, H, T, d_k]`, `k` `[B, Hkv, S, d_k]`, `v` `[B, Hkv, S, d_v]`, all f32; query head `i` uses key head
/// `i / (H / Hkv)`. Result `[B, T, H * d_v]`, heads side by side as the output projection wants them. The inputs may be
/// views (of a cache, or transposed) with a contiguous last dimension. Kept for backward: the result and a log-sum-exp
/// per query row.
///
/// # Errors
/// Shapes that do not fit each other or `shape`, other dtypes or devices.
pub fn attention(
    threads: &Threads,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
) -> Result<Tensor> {
    let keep = q.track_op() || k.track_op() || v.track_op();
    let op = Attention { threads: threads.clone(), shape: shape.clone(), keep, log_sums: OnceLock::new() };
    rows_contiguous(q)?.apply_op3(&rows_contiguous(k)?, &rows_contiguous(v)?, op)
}

struct Attention {
    threads: Threads,
    shape: AttentionShape,
    /// Whether backward can come.
    keep: bool,
    /// `[B, Hkv, H / Hkv * T]`: log of the sum of exponentials of each query row.
    log_sums: OnceLock<Vec<f32>>,
}

/// The inputs with their sizes.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    q: Rows4<'a>,
    k: Rows4<'a>,
    v: Rows4<'a>,
    shape: &'a AttentionShape,
    batch: usize,
    kv_heads: usize,
    /// Query heads of one key head.
    group: usize,
    /// T
    queries: usize,
    /// S
    keys: usize,
    dk: usize,
    dv: usize,
}

impl<'a> Inputs<'a> {
    fn new(q: Rows4<'a>, k: Rows4<'a>, v: Rows4<'a>, shape: &'a AttentionShape) -> Result<Self> {
        let ([b, h, t, dk], [_, hkv, s, _], [.., dv]) = (q.dims, k.dims, v.dims);
        if k.dims != [b, hkv, s, dk] || v.dims != [b, hkv, s, dv] || hkv == 0 || h % hkv != 0 {
            bail!("attention: q {:?}, k {:?}, v {:?}", q.dims, k.dims, v.dims);
        }
        if shape.causal && shape.past.checked_add(t).is_none_or(|end| end > s) {
            bail!("attention: {t} queries after {} positions, {s} keys", shape.past);
        }
        if !shape.causal && (shape.past > 0 || shape.window.is_some() || shape.starts.is_some()) {
            bail!("attention: a past, a window or starts without causality");
        }
        if dk == 0 || dv == 0 {
            bail!("attention: rows of no values");
        }
        if shape.window == Some(0) {
            bail!("attention: a window of no keys");
        }
        if shape.starts.as_ref().is_some_and(|from| from.len() != b * s) {
            bail!("attention: starts for {b} sequences of {s}, not one each");
        }
        if shape.padding.as_ref().is_some_and(|p| p.len() != b) {
            bail!("attention: padding of {:?} for {b} sequences", shape.padding);
        }
        let (group, queries) = (h / hkv, t);
        Ok(Self { q, k, v, shape, batch: b, kv_heads: hkv, group, queries, keys: s, dk, dv })
    }

    /// Query rows of one key head: the heads of the group one after the other.
    fn rows(&self) -> usize {
        self.group * self.queries
    }

    /// Head and position of a query row of a key head.
    fn head_and_query(&self, kv_head: usize, row: usize) -> (usize, usize) {
        (kv_head * self.group + row / self.queries, row % self.queries)
    }

    /// Where a query row is in the result.
    fn result_at(&self, b: usize, kv_head: usize, row: usize) -> usize {
        let (head, t) = self.head_and_query(kv_head, row);
        ((b * self.queries + t) * self.kv_heads * self.group + head) * self.dv
    }

    /// `out` `[B, T, H * d_v]`, `log_sums` `[B, Hkv, rows]`.
    fn forward(&self, threads: &Threads, out: &mut [f32], log_sums: &mut [f32]) {
        if out.is_empty() && log_sums.is_empty() {
            return;
        }
        // From about this many rows on, a tile of 16 lanes does less work than a dot product per row and key.
        if self.rows() <= 4 {
            stream::forward(threads, self, out, log_sums);
        } else {
            blocked::forward(threads, self, out, log_sums);
        }
    }
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, k, v) =
            (Rows4::new(q, q_layout, "q")?, Rows4::new(k, k_layout, "k")?, Rows4::new(v, v_layout, "v")?);
        let inputs = Inputs::new(q, k, v, &self.shape)?;
        let (b, t, width) = (inputs.batch, inputs.queries, inputs.kv_heads * inputs.group * inputs.dv);
        let mut out = vec![0.0; b * t * width];
        let mut log_sums = vec![0.0; b * inputs.kv_heads * inputs.rows()];
        inputs.forward(&self.threads, &mut out, &mut log_sums);
        if self.keep {
            // An operation runs forward once.
            let _ = self.log_sums.set(log_sums);
        }
        Ok((CpuStorage::F32(out), (b, t, width).into()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        d_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(log_sums) = self.log_sums.get() else { bail!("attention: backward without forward") };
        let d_out = d_out.contiguous()?;
        let ((qs, ql), (ks, kl), (vs, vl)) =
            (q.storage_and_layout(), k.storage_and_layout(), v.storage_and_layout());
        let inputs = Inputs::new(
            Rows4::new(cpu(&qs, "q")?, ql, "q")?,
            Rows4::new(cpu(&ks, "k")?, kl, "k")?,
            Rows4::new(cpu(&vs, "v")?, vl, "v")?,
            &self.shape,
        )?;
        let mut dq = vec![0.0; q.elem_count()];
        let mut dk = vec![0.0; k.elem_count()];
        let mut dv = vec![0.0; v.elem_count()];
        with_f32(out, "the result", |out| {
            with_f32(&d_out, "the gradient", |d_out| {
                let given = backward::Given { out, d_out, log_sums };
                backward::backward(&self.threads, &inputs, given, &mut dq, &mut dk, &mut dv);
                Ok(())
            })
        })?;
        let give = |t: &Tensor, values: Vec<f32>| {
            t.track_op().then(|| gradient(values, t.shape(), DType::F32)).transpose()
        };
        Ok((give(q, dq)?, give(k, dk)?, give(v, dv)?))
    }
}
