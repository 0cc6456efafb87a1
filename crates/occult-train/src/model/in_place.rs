//! Values of a tensor changed where they lie.

use std::cell::RefCell;

use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor};

use crate::error::{Result, TrainError};

type Body<'a> = &'a mut dyn FnMut(&mut [f32]) -> Result<()>;

struct Change<'a> {
    body: RefCell<Body<'a>>,
    failed: RefCell<Option<TrainError>>,
}

impl InplaceOp1 for Change<'_> {
    fn name(&self) -> &'static str {
        "change"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let CpuStorage::F32(values) = storage else { candle_core::bail!("master weights are not f32") };
        let Some((from, to)) = layout.contiguous_offsets() else {
            candle_core::bail!("values with gaps cannot be changed in place")
        };
        if let Err(e) = (self.body.borrow_mut())(&mut values[from..to]) {
            *self.failed.borrow_mut() = Some(e);
        }
        Ok(())
    }
}

/// Gives `body` the values of `tensor`, which must be f32 without gaps; everybody who shares them sees the change.
pub(super) fn in_place(tensor: &Tensor, body: Body<'_>) -> Result<()> {
    let change = Change { body: RefCell::new(body), failed: RefCell::new(None) };
    tensor.inplace_op1(&change).map_err(|e| TrainError::model("changing values", e))?;
    change.failed.into_inner().map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn whoever_shares_the_values_sees_the_change_and_errors_come_out() {
        let var = Var::from_vec(vec![1f32, 2.0], 2, &Device::Cpu).unwrap();
        let shared = var.as_detached_tensor();
        in_place(&var, &mut |v| {
            v[1] = 5.0;
            Ok(())
        })
        .unwrap();
        assert_eq!(shared.to_vec1::<f32>().unwrap(), [1.0, 5.0]);
        let error = in_place(&var, &mut |_| Err(TrainError::request("no"))).unwrap_err();
        assert_eq!(error.to_string(), "no");
        let table = Tensor::zeros((2, 2), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(in_place(&table.t().unwrap(), &mut |_| Ok(())).is_err());
    }
}
