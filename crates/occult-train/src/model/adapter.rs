//! Low-rank updates trained through the full gradient of the matrices they change.
//!
//! The model computes with W = W0 + s B A, so dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T. Whatever computes the layer (also
//! experts on other ranks) knows nothing of A and B. It saves the moments and the checkpoint of W, not its gradient.

use candle_core::Tensor;
use occult_model::Parameter;

use crate::checkpoint::Kind;
use crate::error::{Result, TrainError};
use crate::lora::Lora;
use crate::trainer::ParameterInfo;

/// A and B of a parameter `[e, out, in]` (e = 1 for a plain matrix), one pair per expert.
#[derive(Debug)]
pub(super) struct Adapter {
    pub(super) parameter: usize,
    base: Vec<f32>,
    scale: f32,
    /// e, out, in, r.
    dims: [usize; 4],
    /// A `[e, r, in]` and B `[e, out, r]`.
    factors: [Vec<f32>; 2],
    gradients: [Vec<f32>; 2],
}

impl Adapter {
    pub(super) fn new(
        parameter: usize,
        p: &Parameter,
        info: &ParameterInfo,
        lora: Lora,
        seed: u64,
    ) -> Result<Self> {
        let (e, out, inputs) = match *info.shape.as_slice() {
            [out, inputs] => (1, out, inputs),
            [e, out, inputs] => (e, out, inputs),
            _ => return Err(TrainError::request(format!("LoRA for {} {:?}", info.name, info.shape))),
        };
        let base = p.var().flatten_all().and_then(|t| t.to_vec1());
        let base = base.map_err(|e| TrainError::model("reading weights", e))?;
        let mut factors = [vec![], vec![]];
        for slice in 0..e {
            let name = match &info.kind {
                Kind::Experts(ids) => format!("{}.{}", info.name, ids[slice]),
                Kind::Replicated => info.name.clone(),
            };
            let pair = lora.init(&name, out, inputs, seed)?;
            factors[0].extend(pair.a);
            factors[1].extend(pair.b);
        }
        let gradients = [vec![0.0; factors[0].len()], vec![0.0; factors[1].len()]];
        let dims = [e, out, inputs, lora.rank];
        Ok(Self { parameter, base, scale: lora.scale() as f32, dims, factors, gradients })
    }

    /// What the trainer knows of A or B of the parameter `of`.
    pub(super) fn info(&self, of: &ParameterInfo, is_b: bool) -> ParameterInfo {
        let [e, out, inputs, r] = self.dims;
        let matrix = if is_b { [out, r] } else { [r, inputs] };
        let shape = if of.shape.len() == 3 { vec![e, matrix[0], matrix[1]] } else { matrix.to_vec() };
        let name = format!("{}.lora_{}", of.name, if is_b { "B" } else { "A" });
        ParameterInfo { name, shape, kind: of.kind.clone(), decays: false, lr_scale: of.lr_scale }
    }

    pub(super) fn factor(&self, is_b: bool) -> &[f32] {
        &self.factors[usize::from(is_b)]
    }

    pub(super) fn factor_and_gradient(&mut self, is_b: bool) -> (&mut [f32], &mut [f32]) {
        let i = usize::from(is_b);
        (&mut self.factors[i], &mut self.gradients[i])
    }

    /// From the gradient of W to those of A and B. Sums ascend.
    pub(super) fn differentiate(&mut self, gradient: &Tensor) -> Result<()> {
        let dw: Vec<f32> = gradient
            .flatten_all()
            .and_then(|t| t.to_vec1())
            .map_err(|e| TrainError::model("reading a gradient", e))?;
        let [_, out, inputs, r] = self.dims;
        let [da, db] = &mut self.gradients;
        da.fill(0.0);
        let slices = dw.chunks_exact(out * inputs).zip(
            self.factors[0]
                .chunks_exact(r * inputs)
                .zip(self.factors[1].chunks_exact(out * r))
                .zip(da.chunks_exact_mut(r * inputs).zip(db.chunks_exact_mut(out * r))),
        );
        for (dw, ((a, b), (da, db))) in slices {
            let rows = dw.chunks_exact(inputs).zip(b.chunks_exact(r).zip(db.chunks_exact_mut(r)));
            for (dw, (b, db)) in rows {
                let of_rank = a.chunks_exact(inputs).zip(da.chunks_exact_mut(inputs)).zip(b.iter().zip(db));
                for ((a, da), (&b, db)) in of_rank {
                    *db = self.scale * dw.iter().zip(a).map(|(g, a)| g * a).sum::<f32>();
                    da.iter_mut().zip(dw).for_each(|(d, g)| *d += self.scale * b * g);
                }
            }
        }
        Ok(())
    }

    /// W0 + s B A.
    pub(super) fn merge_into(&self, weights: &mut [f32]) {
        let [_, out, inputs, r] = self.dims;
        weights.copy_from_slice(&self.base);
        let slices = weights
            .chunks_exact_mut(out * inputs)
            .zip(self.factors[0].chunks_exact(r * inputs).zip(self.factors[1].chunks_exact(out * r)));
        for (weights, (a, b)) in slices {
            for (row, b) in weights.chunks_exact_mut(inputs).zip(b.chunks_exact(r)) {
                for (a, &b) in a.chunks_exact(inputs).zip(b) {
                    row.iter_mut().zip(a).for_each(|(w, a)| *w += self.scale * b * a);
                }
            }
        }
    }
}
