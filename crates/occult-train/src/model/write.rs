//! A trained model back to a directory that transformers and Occult load.

use std::path::Path;

use occult_model::hf::ExpertLayout;
use occult_model::{ModelError, ParameterKind, StoredDtype};

use crate::error::{Result, TrainError};
use crate::model::{MoeModel, gather};

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
        let comm = self.ranks.comm();
        if comm.world_size() == 1 {
            return Ok(mine);
        }
        let ids: Vec<u32> = self.model().experts_of(layer).iter().map(|&e| e as u32).collect();
        let all: Vec<u32> = (0..self.model().spec().moe.router.num_experts as u32).collect();
        gather::experts(&**comm, name, (&ids, &mine), &all)
    }
}
