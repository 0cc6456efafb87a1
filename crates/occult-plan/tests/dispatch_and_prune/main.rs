//! Dispatch plans, BRIM and collaboration pruning against slow, obvious definitions.

mod brim;
mod dispatch;
mod layer;
mod prune;
mod prune_reference;
mod similarity;
mod support;
