//! Auxiliary losses. None of them is multiplied by its coefficient yet.

use candle_core::{D, Device, Result, Tensor, bail};

use super::ABSENT;

/// How often each of E experts was chosen by the tokens that count (`mask` `[T]`, all if `None`): ids `[T, K]`.
///
/// # Errors
/// Ids outside E.
pub fn expert_counts(
    expert_ids: &[u32],
    top_k: usize,
    num_experts: usize,
    mask: Option<&[bool]>,
) -> Result<Vec<f64>> {
    let mut counts = vec![0.0; num_experts];
    for (token, ids) in expert_ids.chunks_exact(top_k).enumerate() {
        if mask.is_some_and(|mask| !mask[token]) {
            continue;
        }
        for &id in ids.iter().filter(|&&id| id != ABSENT) {
            let Some(count) = counts.get_mut(id as usize) else {
                bail!("balance loss: expert {id} of {num_experts}");
            };
            *count += 1.0;
        }
    }
    Ok(counts)
}

fn check(scores: &Tensor, ids: &[u32], top_k: usize, mask: Option<&[bool]>) -> Result<(usize, usize)> {
    let (tokens, experts) = scores.dims2()?;
    if top_k == 0 || tokens * top_k != ids.len() || mask.is_some_and(|mask| mask.len() != tokens) {
        bail!(
            "balance loss: {} ids of {top_k} each and a mask {:?} for {tokens} tokens",
            ids.len(),
            mask.map(<[bool]>::len)
        );
    }
    Ok((tokens, experts))
}

/// `[T, 1]` with 1 for the tokens that count.
fn column(mask: &[bool]) -> Result<Tensor> {
    let values: Vec<f32> = mask.iter().map(|&m| f32::from(u8::from(m))).collect();
    Tensor::from_vec(values, (mask.len(), 1), &Device::Cpu)
}

fn zero() -> Result<Tensor> {
    Tensor::new(0f32, &Device::Cpu)
}

/// The loss of Switch Transformers over all layers together, as transformers' `load_balancing_loss_func` (Mixtral,
/// OLMoE, Qwen-MoE): `E sum_e f_e P_e`, with `f_e` the times that expert e was chosen per token and `P_e` its mean
/// softmax score, both over the tokens of all layers.
///
/// `scores` and `expert_ids`: `[T, E]` and `[T, K]` of each layer; `mask` `[T]`: the tokens that count, all if `None`.
/// 0 if none counts. Gradients go through `P`. K for even use of all experts.
///
/// # Errors
/// Shapes that do not fit, ids outside E.
pub fn load_balancing_loss(
    scores: &[Tensor],
    expert_ids: &[&[u32]],
    top_k: usize,
    mask: Option<&[bool]>,
) -> Result<Tensor> {
    if scores.len() != expert_ids.len() {
        bail!("balance loss: scores of {} layers, ids of {}", scores.len(), expert_ids.len());
    }
    let (mut total, mut counts) = (0.0, Vec::new());
    for (scores, ids) in scores.iter().zip(expert_ids) {
        let (tokens, experts) = check(scores, ids, top_k, mask)?;
        let of_layer = expert_counts(ids, top_k, experts, mask)?;
        if counts.is_empty() {
            counts = vec![0.0; experts];
        }
        if counts.len() != experts {
            bail!("balance loss: layers of {} and {experts} experts", counts.len());
        }
        counts.iter_mut().zip(of_layer).for_each(|(sum, n)| *sum += n);
        total += mask.map_or(tokens, |mask| mask.iter().filter(|&&m| m).count()) as f64;
    }
    load_balancing_part(scores, &counts, total, mask)
}

/// What these tokens add to [`load_balancing_loss`] of more tokens, of which they are a part: those of other ranks and
/// theirs together chose expert e `counts[e]` times and are `total` in number, every layer counted by itself. The parts of all
/// tokens add up to the loss.
///
/// # Errors
/// Shapes that do not fit.
pub fn load_balancing_part(
    scores: &[Tensor],
    counts: &[f64],
    total: f64,
    mask: Option<&[bool]>,
) -> Result<Tensor> {
    if total == 0.0 {
        return zero();
    }
    // E f_e / total: what a score of expert e is multiplied with.
    let experts = counts.len();
    let factors: Vec<f32> = counts.iter().map(|n| (experts as f64 * n / total / total) as f32).collect();
    let factors = Tensor::from_vec(factors, (1, experts), &Device::Cpu)?;
    let mut loss = zero()?;
    for scores in scores {
        let weighted = scores.broadcast_mul(&factors)?;
        let weighted = match mask {
            Some(mask) => weighted.broadcast_mul(&column(mask)?)?,
            None => weighted,
        };
        loss = (loss + weighted.sum_all()?)?;
    }
    Ok(loss)
}

/// DeepSeek's expert-level loss of one layer (`seq_aux` off): `sum_e f_e P_e` with `f_e` E times the share of all choices
/// that fell on expert e. 1 for even use of all experts; arguments as of [`load_balancing_loss`].
///
/// # Errors
/// As [`load_balancing_loss`].
pub fn expert_balance_loss(
    scores: &Tensor,
    expert_ids: &[u32],
    top_k: usize,
    mask: Option<&[bool]>,
) -> Result<Tensor> {
    load_balancing_loss(std::slice::from_ref(scores), &[expert_ids], top_k, mask)? / top_k.max(1) as f64
}

/// DeepSeek's sequence-wise loss of one layer (`seq_aux`): [`expert_balance_loss`] of every sequence, and their mean.
///
/// `scores` `[B T, E]`, `expert_ids` `[B T, K]`, `mask` `[B T]`: the tokens that count. Sequences of which no token
/// counts are left out of the mean.
///
/// # Errors
/// As [`load_balancing_loss`], and a number of tokens that is no multiple of `batch`.
pub fn sequence_balance_loss(
    scores: &Tensor,
    expert_ids: &[u32],
    top_k: usize,
    batch: usize,
    mask: Option<&[bool]>,
) -> Result<Tensor> {
    let (tokens, experts) = check(scores, expert_ids, top_k, mask)?;
    if batch == 0 || tokens % batch != 0 {
        bail!("balance loss: {tokens} tokens in {batch} sequences");
    }
    let len = tokens / batch;
    // Of each token, what its scores are multiplied with.
    let mut factors = vec![0f32; tokens * experts];
    let mut sequences = 0;
    for b in 0..batch {
        let own = b * len..(b + 1) * len;
        let mask = mask.map(|mask| &mask[own.clone()]);
        let counted = mask.map_or(len, |mask| mask.iter().filter(|&&m| m).count()) as f64;
        if counted == 0.0 {
            continue;
        }
        sequences += 1;
        let counts = expert_counts(&expert_ids[own.start * top_k..own.end * top_k], top_k, experts, mask)?;
        for token in own.clone().filter(|t| mask.is_none_or(|mask| mask[t - own.start])) {
            for (f, n) in factors[token * experts..][..experts].iter_mut().zip(&counts) {
                *f = (experts as f64 * n / (counted * top_k as f64) / counted) as f32;
            }
        }
    }
    if sequences == 0 {
        return zero();
    }
    (scores * Tensor::from_vec(factors, (tokens, experts), &Device::Cpu)?)?.sum_all()? / f64::from(sequences)
}

/// Mean over tokens of `log(sum of exp(logits))²` (Zoph et al., "ST-MoE", 2022): keeps router logits small.
///
/// `logits` `[T, E]`, `mask` `[T]`: the tokens that count. 0 if none counts.
///
/// # Errors
/// Shapes that do not fit.
pub fn router_z_loss(logits: &Tensor, mask: Option<&[bool]>) -> Result<Tensor> {
    let (tokens, _) = logits.dims2()?;
    if mask.is_some_and(|mask| mask.len() != tokens) {
        bail!("router z-loss: a mask of another number of tokens than {tokens}");
    }
    let counted = mask.map_or(tokens, |mask| mask.iter().filter(|&&m| m).count());
    if counted == 0 {
        return zero();
    }
    let squares = logits.log_sum_exp(D::Minus1)?.sqr()?;
    let squares = match mask {
        Some(mask) => (squares * column(mask)?.squeeze(1)?)?,
        None => squares,
    };
    squares.sum_all()? / counted as f64
}
