//! `occult bench exchange`, `layer` and `step`: modes of expert parallelism side by side in one run.
//!
//! Modes take turns step by step, every second round in reverse order, so that what else happens on the machine hits all
//! of them alike; the median of the slowest rank's times counts. Before that the same run measures the machine with
//! small probes on other tokens ([`machine`]), and the cost model predicts every mode from these ([`predict`]).

pub(crate) mod args;
pub(crate) mod exchange;
mod experts;
pub(crate) mod layer;
mod machine;
mod measure;
mod predict;
mod random;
mod report;
mod rounds;
mod routing;
mod setting;
pub(crate) mod step;
