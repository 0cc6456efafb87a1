//! Models whose experts live on several ranks: attention, embeddings and output on every rank for its own sequences, each
//! expert where the placement says.
//!
//! All ranks run the same forward passes together: who has no tokens in one takes part with none ([`Decoder::idle`]),
//! and [`Decoder::attend`] goes on doing so until nobody has any. What every rank has is agreed once per pass.

mod passes;
mod replace;
mod spread;

pub(crate) use passes::for_each_pass;
pub use replace::{MAX_PLACEMENT_DIFFERENCE, Replaced, logit_difference};
pub use spread::Spread;

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use occult_comm::{Buffer, CommError, Communicator};
use occult_moe::{MoeError, Step};

use crate::decoder::Decoder;
use crate::error::{ModelError, Result};
use crate::layer::Ffn;

/// The ranks that run a model together, and the step they are in.
#[derive(Debug)]
pub struct Ranks {
    comm: Arc<dyn Communicator>,
    step: Mutex<Option<Arc<Step>>>,
}

impl Ranks {
    /// All ranks of a communicator.
    pub fn new(comm: Arc<dyn Communicator>) -> Arc<Self> {
        Arc::new(Self { comm, step: Mutex::new(None) })
    }

    /// How they talk.
    pub fn comm(&self) -> &Arc<dyn Communicator> {
        &self.comm
    }

    /// Begins a forward pass in which this rank has so many tokens (collective).
    pub(crate) fn begin(&self, num_tokens: usize) -> Result<Arc<Step>> {
        let failed = |error: MoeError| ModelError::Ranks(error.to_string());
        let step = Arc::new(Step::agree(&*self.comm, num_tokens).map_err(failed)?);
        *self.step.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&step));
        Ok(step)
    }

    /// The pass that was begun last.
    pub(crate) fn step(&self) -> Option<Arc<Step>> {
        self.step.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Everybody's bytes, ranks ascending (collective).
    ///
    /// # Errors
    /// That a rank failed or did not come.
    pub fn gather(&self, what: &'static str, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let buffer = Buffer::try_from_slice(mine)?;
        Ok(self.comm.all_gather(what, buffer)?.iter().map(|b| b.as_bytes().to_vec()).collect())
    }
}

impl From<CommError> for ModelError {
    fn from(error: CommError) -> Self {
        ModelError::Ranks(error.to_string())
    }
}

impl Decoder {
    /// The ranks that it runs on, when its experts are spread.
    pub fn ranks(&self) -> Option<&Arc<Ranks>> {
        self.ranks.as_ref()
    }

    /// Declares forward passes collective over `ranks`: its MoE layers must be [`ParallelExperts`](crate::ParallelExperts)
    /// over the same communicator.
    pub fn with_ranks(self, ranks: Arc<Ranks>) -> Self {
        Self { ranks: Some(ranks), ..self }
    }

    /// Whether this rank is the one that reports: rank 0, or the only one.
    pub fn is_first_rank(&self) -> bool {
        self.ranks.as_ref().is_none_or(|r| r.comm.rank() == 0)
    }

    /// Takes part in one forward pass without tokens of its own (collective). False, and nothing ran, when no rank has any.
    ///
    /// # Errors
    /// Those of a rank that failed.
    pub fn idle(&self) -> Result<bool> {
        let Some(ranks) = &self.ranks else { return Ok(false) };
        if ranks.begin(0)?.max_tokens() == 0 {
            return Ok(false);
        }
        let nothing = Tensor::zeros((0, self.spec.hidden_size), DType::F32, &Device::Cpu)?;
        for layer in &self.layers {
            if let Ffn::Moe { routed, .. } = &layer.ffn {
                routed.forward(&nothing, None)?;
            }
        }
        Ok(true)
    }

    /// Takes part in the other ranks' forward passes until no rank has tokens (collective): what every rank calls at the
    /// end of work that is not equally long everywhere.
    ///
    /// # Errors
    /// Those of [`idle`](Self::idle).
    pub fn attend(&self) -> Result<()> {
        while self.idle()? {}
        Ok(())
    }
}
