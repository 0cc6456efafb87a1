//! What `pretrain` and `tune` share: data, options, the loop with its bar, the output directory.

mod data;
mod output;
mod placement;
mod report;
mod run;
mod waiting;

pub(crate) use report::read as read_for_report;
pub(crate) use run::{Start, run};
