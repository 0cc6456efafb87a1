//! What `pretrain` and `tune` share: data, options, the loop with its bar, the output directory.

mod data;
mod output;
mod report;
mod run;

pub(crate) use report::read as read_for_report;
pub(crate) use run::{Start, run};
