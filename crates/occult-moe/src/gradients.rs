//! Gradients of replicated parameters, added over ranks in a few large calls instead of one per parameter.

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use occult_comm::Communicator;
use occult_plan::{ExpertId, LayerPlacement, Rank};

use crate::error::{MoeError, Result, check_len};
use crate::tensor::with_f32;

/// Values that travel in one call: 16 MiB of f32.
pub const BUCKET_VALUES: usize = 4 << 20;

/// Adds the gradients of parameters that every rank holds, in rank order: the same bits on every rank. Experts' gradients
/// stay on their rank; those of replicated experts are for [`all_reduce_replicas`].
///
/// `vars` must be the same list on every rank. One that has no gradient here counts as zeros. `scale` multiplies the sum
/// (one over the number of tokens, for a mean over all ranks' tokens).
///
/// # Errors
/// Failures of the communicator; gradients that are not f32 on CPU.
pub fn all_reduce_gradients(
    comm: &dyn Communicator,
    vars: &[&Var],
    grads: &mut GradStore,
    scale: f32,
) -> Result<()> {
    let mut start = 0;
    while start < vars.len() {
        let (mut end, mut size) = (start, 0);
        while end < vars.len() && (end == start || size + vars[end].elem_count() <= BUCKET_VALUES) {
            size += vars[end].elem_count();
            end += 1;
        }
        reduce_bucket(comm, &vars[start..end], grads, scale, size)?;
        start = end;
    }
    Ok(())
}

/// Adds the gradients of experts that live on several ranks, in rank order, so that replicas stay the same bits.
///
/// `grads`: of this rank's experts, stacked, `size` values each, ascending by id. Experts that live on one rank keep
/// theirs; where there are no others, nothing travels.
///
/// # Errors
/// Failures of the communicator; another number of values.
pub fn all_reduce_replicas(
    comm: &dyn Communicator,
    placement: &LayerPlacement,
    size: usize,
    grads: &mut [f32],
) -> Result<()> {
    let local = placement.experts_of(comm.rank() as Rank);
    check_len("gradients of this rank's experts", local.len() * size, grads.len())?;
    let replicated: Vec<ExpertId> =
        (0..placement.num_experts() as ExpertId).filter(|&e| placement.ranks_of(e).len() > 1).collect();
    for bucket in replicated.chunks((BUCKET_VALUES / size.max(1)).max(1)) {
        let mut sums = vec![0.0; bucket.len() * size];
        let held =
            || bucket.iter().enumerate().filter_map(|(at, e)| Some((at, local.binary_search(e).ok()?)));
        for (at, i) in held() {
            sums[at * size..][..size].copy_from_slice(&grads[i * size..][..size]);
        }
        comm.all_reduce_sum("gradients of replicated experts", &mut sums)?;
        for (at, i) in held() {
            grads[i * size..][..size].copy_from_slice(&sums[at * size..][..size]);
        }
    }
    Ok(())
}

fn reduce_bucket(
    comm: &dyn Communicator,
    vars: &[&Var],
    grads: &mut GradStore,
    scale: f32,
    size: usize,
) -> Result<()> {
    let mut bucket = Vec::with_capacity(size);
    for var in vars {
        match grads.get(var.as_tensor()) {
            None => bucket.resize(bucket.len() + var.elem_count(), 0.0),
            Some(grad) if grad.shape() != var.shape() => {
                let (expected, found) = (format!("{:?}", var.shape()), format!("{:?}", grad.shape()));
                return Err(MoeError::argument("gradient", expected, found));
            }
            Some(grad) => with_f32(&grad.contiguous()?, |values| {
                bucket.extend_from_slice(values);
                Ok(())
            })?,
        }
    }
    comm.all_reduce_sum("gradients of replicated parameters", &mut bucket)?;
    let mut rest = &mut bucket[..];
    for var in vars {
        let (values, after) = rest.split_at_mut(var.elem_count());
        values.iter_mut().for_each(|v| *v *= scale);
        grads.insert(var.as_tensor(), Tensor::from_slice(values, var.shape(), &Device::Cpu)?);
        rest = after;
    }
    Ok(())
}
