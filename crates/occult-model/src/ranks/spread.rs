//! From model files to a decoder with this rank's experts.

use std::sync::Arc;

use occult_kernels::smm::ExpertDims;
use occult_moe::{ExpertParallelLayer, LayerOptions, PruneRule};
use occult_plan::{Placement, SimilarityTable};

use super::Ranks;
use crate::decoder::Decoder;
use crate::error::{ModelError, Result};
use crate::load::ModelFiles;
use crate::moe::{MoeLayer, ParallelExperts};

/// Where experts live and how their layers run.
#[derive(Debug, Clone)]
pub struct Spread {
    /// Of every MoE layer, first to last.
    pub placement: Placement,
    /// The same for all layers.
    pub options: LayerOptions,
    /// For pruning by similarity: the table of every MoE layer, in the place of the rule in `options`. Empty: as these say.
    pub similarity: Vec<Arc<SimilarityTable>>,
}

impl Spread {
    /// One placement, and every layer as `options` say.
    pub fn new(placement: Placement, options: LayerOptions) -> Self {
        Self { placement, options, similarity: Vec::new() }
    }

    /// How MoE layer `i` runs.
    fn options_of(&self, i: usize) -> LayerOptions {
        let mut options = self.options.clone();
        if let (Some(pruning), Some(table)) = (&mut options.pruning, self.similarity.get(i)) {
            pruning.rule = PruneRule::Similarity(Arc::clone(table));
        }
        options
    }

    /// Errors unless the placement is for the model's layers and experts and for so many ranks.
    fn check(&self, files: &ModelFiles, num_ranks: usize) -> Result<()> {
        let (spec, placement) = (files.spec(), &self.placement);
        let expected = (spec.num_moe_layers(), spec.moe.router.num_experts, num_ranks);
        let found = (placement.layers().len(), placement.num_experts(), placement.topology().num_ranks());
        if expected == found {
            let tables = self.similarity.len();
            return match tables == 0 || tables == expected.0 {
                true => Ok(()),
                false => Err(ModelError::request(format!(
                    "{tables} tables of similar experts for {} MoE layers",
                    expected.0
                ))),
            };
        }
        let words = |(l, e, w)| format!("{l} MoE layers of {e} experts on {w} ranks");
        Err(ModelError::request(format!(
            "the placement: expected {}, found {}",
            words(expected),
            words(found)
        )))
    }
}

impl ModelFiles {
    /// The model with the experts that `spread` gives to this rank; nothing of the others is read. Forward passes are
    /// collective over `ranks`.
    ///
    /// # Errors
    /// A placement for another model or another number of ranks; those of [`load`](Self::load).
    pub fn load_spread(&self, ranks: &Arc<Ranks>, spread: &Spread) -> Result<Decoder> {
        spread.check(self, ranks.comm().world_size())?;
        let (hidden, intermediate) = (self.spec().hidden_size, self.spec().moe.expert_size);
        let dims = ExpertDims { hidden, intermediate };
        let mut placements = spread.placement.layers().iter().enumerate();
        let decoder = self.load_with(&mut |files, number| {
            let router = files.router(number)?;
            let failed = |source| ModelError::Moe { layer: number, source };
            let (i, placement) =
                placements.next().ok_or_else(|| ModelError::request("more MoE layers than placements"))?;
            let (comm, rule) = (Arc::clone(ranks.comm()), router.rule().clone());
            let (options, threads) = (spread.options_of(i), files.threads().clone());
            let layer = ExpertParallelLayer::new(comm, rule, placement.clone(), options, threads);
            let layer = layer.map_err(failed)?;
            let held: Vec<usize> = layer.local_experts().iter().map(|&e| usize::from(e)).collect();
            let experts = files.experts(number, &held)?;
            let experts = ParallelExperts::new(layer, router, dims, experts)?.with_ranks(Arc::clone(ranks));
            Ok(Box::new(experts) as Box<dyn MoeLayer>)
        })?;
        Ok(decoder.with_ranks(Arc::clone(ranks)))
    }
}
