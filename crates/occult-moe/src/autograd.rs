//! Steps 5 to 7 of [the layer](crate::layer) as autograd sees them: op by op, or all parts of the tokens in one op.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;
use occult_kernels::ops::{merging_smm, merging_smm_into, scattering_smm, scattering_smm_into};

use crate::error::Result;
use crate::exchange::{DispatchHandle, DispatchInFlight, Returning};
use crate::layer::{ExpertParallelLayer, ExpertTensors};
use crate::ops::Link;
use crate::tensor::with_f32;
use crate::timers::Phase;

/// Parts of the tokens, their dispatches under way.
pub(crate) type Parts<'a> = Vec<(Range<usize>, DispatchInFlight<'a>)>;

impl ExpertParallelLayer {
    /// Four ops per part: dispatch, scattering SMM, merging SMM, combine. Exchanges of the forward pass run beside compute,
    /// those of the backward pass do not: autograd wants each op's gradient before it goes on.
    pub(crate) fn op_by_op(
        &self,
        x: &Tensor,
        weights: &Tensor,
        experts: ExpertTensors<'_>,
        parts: Parts<'_>,
    ) -> Result<Tensor> {
        let num_parts = parts.len();
        let (mut combines, mut ops) = (Returning::default(), Vec::with_capacity(num_parts));
        for (part, dispatch) in parts {
            let (received, handle) = dispatch.finish()?;
            combines.pass_on()?;
            let part_of = |t: &Tensor| match num_parts {
                1 => Ok(t.clone()),
                _ => t.narrow(0, part.start, part.len()),
            };
            let link = Link::new(handle.path(), x.dim(1)?);
            let received = link.dispatch(&part_of(x)?, &part_of(weights)?, received)?;
            let outputs = self.experts(&link, &received, &handle, experts)?;
            combines.push_combine(with_f32(&outputs, |y| Ok(handle.start_combine(y)))??);
            ops.push((link, outputs));
        }
        combines.pass_on()?;
        let mut y = Vec::with_capacity(num_parts);
        for ((link, outputs), combine) in ops.into_iter().zip(combines) {
            let mut rows = Vec::new();
            combine.finish_into(&mut rows)?;
            y.push(link.combine(&outputs, rows)?);
        }
        Ok(if y.len() == 1 { y.swap_remove(0) } else { Tensor::cat(&y, 0)? })
    }

    /// Steps 5 and 6: the received rows `[R, D]` to the sums of their experts' outputs `[R, D]`.
    fn experts(
        &self,
        link: &Link,
        rows: &Tensor,
        handle: &DispatchHandle,
        experts: ExpertTensors<'_>,
    ) -> Result<Tensor> {
        let (expanded, sparse) = self.timers.time(Phase::Plan, || self.expand(handle))?;
        let (expanded, sparse) = (Arc::new(expanded), Arc::new(sparse));
        let row_weights = link.row_weights(rows, &expanded)?;
        let (threads, w_up, w_down) = (&self.threads, experts.w_up, experts.w_down);
        self.timers.time(Phase::Compute, || {
            Ok(match experts.sinks {
                None => {
                    let pre = scattering_smm(threads, &sparse, rows, w_up)?;
                    merging_smm(threads, &sparse, &pre, w_down, &row_weights)?
                }
                Some([up, down]) => {
                    let pre = scattering_smm_into(threads, &sparse, rows, w_up, up)?;
                    merging_smm_into(threads, &sparse, &pre, w_down, &row_weights, down)?
                }
            })
        })
    }
}
