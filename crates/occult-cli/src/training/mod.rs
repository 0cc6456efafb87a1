//! What `pretrain` and `tune` share: data, options, the loop with its bar, the output directory.

mod data;
mod output;
mod run;

pub(crate) use run::{Start, run};
