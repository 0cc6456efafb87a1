//! Parameters back to a model directory that other programs load.

use std::path::Path;

use super::ModelParameters;
use crate::error::{ModelError, Result};
use crate::hf::write::PlacedFile;
use crate::hf::{ExpertLayout, Matrix, Names, Role, SINGLE};
use crate::weight::{StoredDtype, Weight};

impl ModelParameters {
    /// Writes `model.safetensors` with the released names into the directory `to`, where it appears when it is complete. All
    /// experts must be held; the configuration and the tokenizer are the caller's to put beside it.
    pub fn write(&self, to: &Path, layout: ExpertLayout, dtype: StoredDtype) -> Result<()> {
        let all = self.spec().moe.router.num_experts;
        if let Some(layer) = self.spec().moe_layers().find(|&l| self.experts_of(l).len() != all) {
            let held = self.experts_of(layer).len();
            return Err(ModelError::request(format!("{held} of {all} experts of layer {layer} are here")));
        }
        self.write_with(to, layout, dtype, &mut |name| self.values(name))
    }

    /// The same with values `[elements]` by the parameter's name from `fetch`, which may gather them from other ranks:
    /// it is called for every parameter, in the order of [`iter`](Self::iter), with all experts of a layer at once.
    pub fn write_with(
        &self,
        to: &Path,
        layout: ExpertLayout,
        dtype: StoredDtype,
        fetch: &mut dyn FnMut(&str) -> Result<Vec<f32>>,
    ) -> Result<()> {
        let (spec, names) = (self.spec(), Names::new(self.spec().family, layout));
        let (d, f) = (spec.hidden_size, spec.moe.expert_size);
        let places = names.tensors(spec).into_iter().map(|t| (t.name, t.shape)).collect();
        let mut file = PlacedFile::create(&to.join(SINGLE), Some("{\"format\":\"pt\"}"), dtype, places)?;
        for info in Names::new(spec.family, ExpertLayout::Fused).tensors(spec) {
            let values = fetch(&info.name)?;
            let whole = Weight::from_f32(&info.name, &values, info.shape.clone(), dtype)?;
            drop(values);
            let mut cut = |e: usize, from: usize, to: usize, name: String| {
                let part = whole.slab_rows(e, from, to);
                file.put(&name, &part.ok_or_else(|| ModelError::request(format!("{name}: no expert {e}")))?)
            };
            match (info.role, layout) {
                (Role::FusedGateUp { layer }, ExpertLayout::PerExpert) => {
                    for e in 0..info.shape[0] {
                        cut(e, 0, f, names.expert(layer, e, Matrix::Gate))?;
                        cut(e, f, 2 * f, names.expert(layer, e, Matrix::Up))?;
                    }
                }
                (Role::FusedDown { layer }, ExpertLayout::PerExpert) => {
                    for e in 0..info.shape[0] {
                        cut(e, 0, d, names.expert(layer, e, Matrix::Down))?;
                    }
                }
                (Role::Router { layer }, _) => file.put(&names.router(layer), &whole)?,
                _ => file.put(&info.name, &whole)?,
            }
        }
        file.finish()
    }

    /// The values of a parameter.
    fn values(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.named(name)?.var().flatten_all()?.to_vec1()?)
    }
}
