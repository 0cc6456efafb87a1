//! What the loop needs of a model and of the other ranks.

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::checkpoint::Kind;
use crate::data::Batch;
use crate::error::{Result, TrainError};
use crate::optim::Moments;

/// A parameter that is trained.
#[derive(Debug, Clone, PartialEq)]
pub struct ParameterInfo {
    /// Its name, the same on every rank that has it.
    pub name: String,
    /// Its shape; [e, ...] for experts.
    pub shape: Vec<usize>,
    /// Whether every rank has it, or which experts' slices this rank has.
    pub kind: Kind,
    /// Whether weight decay applies (mostly not to norms and biases).
    pub decays: bool,
    /// Its learning rate is the schedule's times this.
    pub lr_scale: f64,
}

/// What a model says about a micro-batch.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct BatchReport {
    /// Sum of the cross-entropies of the learned targets, in nats, not scaled.
    pub loss_sum: f64,
    /// Other figures of this rank; the same names on every rank.
    pub figures: BTreeMap<String, f64>,
    /// Tokens behind these figures: what they count by where batches and ranks are averaged. 0 for a batch of none.
    pub weight: f64,
}

/// Sees a parameter: its index, master weights and gradient.
pub type Visitor<'a> = dyn FnMut(usize, &mut [f32], &mut [f32]) -> Result<()> + 'a;

/// A model that the loop can train. Every method that takes `&mut self` is called on all ranks at the same time, with the same
/// parameters in the same order.
pub trait TrainableModel {
    /// A text that tells this model's architecture from others (not its weights, and the same for any number of ranks).
    fn identity(&self) -> String;
    /// What is trained, without what is frozen. Never changes, but for which experts a rank has: see
    /// [`at_checkpoint`](Self::at_checkpoint).
    fn parameters(&self) -> &[ParameterInfo];
    /// The f32 master weights of a parameter.
    fn weights(&self, index: usize) -> Result<Cow<'_, [f32]>>;
    /// Calls `each(index, master weights, gradient)` for every parameter, ascending; both may be changed in place, and the
    /// model computes with the changed weights from then on.
    fn visit(&mut self, each: &mut Visitor<'_>) -> Result<()>;
    /// Sets all gradients to zero.
    fn clear_gradients(&mut self) -> Result<()>;
    /// Adds the gradients of `scale` times the sum of cross-entropies (and, weighted alike, of the auxiliary losses). The
    /// batch can be empty; ranks call it equally often. Gradients of experts must hold the contributions of all ranks'
    /// tokens, those of replicated parameters only this rank's.
    fn loss_and_gradients(&mut self, batch: &Batch, scale: f64) -> Result<BatchReport>;
    /// The sum of the cross-entropies of a batch, which can be empty; no gradients.
    fn loss(&mut self, batch: &Batch) -> Result<f64> {
        let _ = batch;
        Err(TrainError::request("this model has no loss without gradients"))
    }
    /// Before a step, counted from 0: the most ranks of a token, where there is a limit.
    fn begin_step(&mut self, step: u64, limit: Option<usize>) -> Result<()> {
        let _ = (step, limit);
        Ok(())
    }
    /// Adds to the figures of a step, which are means over batches and ranks, what follows from them.
    fn complete(&mut self, figures: &mut BTreeMap<String, f64>) {
        let _ = figures;
    }
    /// After the weights have changed: balancing biases and the like.
    fn end_step(&mut self) -> Result<()> {
        Ok(())
    }
    /// After a step at whose end a checkpoint is written, and before that: whatever the model changes there. Adds to the
    /// figures of the step. Its parameters can be other experts' than before: it moves their `moments`, one per parameter,
    /// with them. `Some`: a warning, the same on every rank.
    fn at_checkpoint(
        &mut self,
        moments: &mut [Moments],
        figures: &mut BTreeMap<String, f64>,
    ) -> Result<Option<String>> {
        let _ = (moments, figures);
        Ok(None)
    }
    /// After [`restore_extra`](Self::restore_extra) and the weights of a checkpoint: whatever the model changes because of
    /// them, as [`at_checkpoint`](Self::at_checkpoint) does.
    fn restored(&mut self, moments: &mut [Moments]) -> Result<Option<String>> {
        let _ = moments;
        Ok(None)
    }
    /// What else must be saved, the same on every rank.
    fn extra(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
    /// Takes up what was saved.
    fn restore_extra(&mut self, extra: &serde_json::Value) -> Result<()> {
        let _ = extra;
        Ok(())
    }
}

/// The ranks that train together. Every call is collective; sums add ranks in ascending order and give every rank the same bits.
pub trait Group {
    /// This rank.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn world_size(&self) -> usize;
    /// Element-wise sum over ranks.
    fn sum_f32(&self, values: &mut [f32]) -> Result<()>;
    /// Element-wise sum over ranks.
    fn sum_f64(&self, values: &mut [f64]) -> Result<()>;
}

/// One rank.
#[derive(Debug, Clone, Copy, Default)]
pub struct Solo;

impl Group for Solo {
    fn rank(&self) -> usize {
        0
    }
    fn world_size(&self) -> usize {
        1
    }
    fn sum_f32(&self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }
    fn sum_f64(&self, _: &mut [f64]) -> Result<()> {
        Ok(())
    }
}
