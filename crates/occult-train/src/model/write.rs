//! A trained model back to a directory that transformers and Occult load.

use std::path::Path;

use occult_comm::Buffer;
use occult_model::hf::ExpertLayout;
use occult_model::{ModelError, ParameterKind, StoredDtype};

use crate::error::{Result, TrainError};
use crate::model::MoeModel;

impl MoeModel {
    /// Writes `model.safetensors` into the directory `to`, on all ranks together: rank 0 writes, the others send it their
    /// experts, one tensor at a time. LoRA is merged.
    pub fn write(&self, to: &Path, layout: ExpertLayout, dtype: StoredDtype) -> Result<()> {
        let failed = |e: ModelError| TrainError::model("writing the model", e);
        if self.ranks.comm().rank() != 0 {
            return self.model().iter().try_for_each(|p| self.values(p.name()).map(|_| ()));
        }
        let mut wrong = None;
        let written = self.model().write_with(to, layout, dtype, &mut |name| {
            self.values(name).map_err(|e| {
                let message = e.to_string();
                wrong = Some(e);
                ModelError::Request(message)
            })
        });
        wrong.map_or(written.map_err(failed), Err)
    }

    /// The values of a parameter, of experts those of all ranks in the order of their ids. Collective.
    fn values(&self, name: &str) -> Result<Vec<f32>> {
        let p = self.model().get(name).ok_or_else(|| TrainError::request(format!("no parameter {name}")))?;
        let mine = p.var().flatten_all().and_then(|t| t.to_vec1::<f32>());
        let mine = mine.map_err(|e| TrainError::model("reading weights", e))?;
        let ParameterKind::Experts { layer } = p.kind() else { return Ok(mine) };
        let Some(moe_layer) = self.model().spec().moe_layers().position(|l| l == layer) else {
            return Err(TrainError::request(format!("layer {layer} has no experts")));
        };
        let comm = self.ranks.comm();
        if comm.world_size() == 1 {
            return Ok(mine);
        }
        let parts = comm.all_gather("experts of a layer", Buffer::from_slice(&mine));
        let parts = parts.map_err(|e| TrainError::model("gathering experts", e))?;
        let placement = self.ranks.computed(moe_layer)?;
        let each: usize = p.var().dims().iter().skip(1).product();
        let mut all = vec![0f32; placement.num_experts() * each];
        for (rank, part) in parts.iter().enumerate() {
            let ids = placement.experts_of(rank as occult_plan::Rank);
            let values = part.try_as_slice::<f32>().filter(|v| v.len() == ids.len() * each);
            let values = values.ok_or_else(|| {
                TrainError::request(format!("{name}: {} bytes of rank {rank}", part.len_bytes()))
            })?;
            for (&e, values) in ids.iter().zip(values.chunks_exact(each.max(1))) {
                all[usize::from(e) * each..][..each].copy_from_slice(values);
            }
        }
        Ok(all)
    }
}
