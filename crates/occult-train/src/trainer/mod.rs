//! The loop: batches to gradients to weights, with checkpoints, a log and a way to stop.
//!
//! One step, the same on every rank:
//! 1. read this rank's sequences; agree on the number of learned targets of all ranks;
//! 2. for each micro-batch the model adds gradients of (sum of cross-entropies) / (all targets);
//! 3. gradients of replicated parameters are summed over ranks; expert gradients are whole already;
//! 4. the global norm decides: clip, skip, or stop as diverged;
//! 5. AdamW changes the weights in place.
//!
//! The mean is over targets, so the result does not depend on how sequences fall into micro-batches and ranks (beyond rounding).

mod guard;
mod model;
mod run;

pub use guard::{Guard, Losses};
pub use model::{BatchReport, Group, ParameterInfo, Solo, TrainableModel, Visitor};
pub use run::{Options, Outcome, Trainer, Validation};
