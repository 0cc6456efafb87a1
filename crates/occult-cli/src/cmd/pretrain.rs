//! `occult pretrain`

use anyhow::Result;

use crate::train_args::PretrainArgs;
use crate::training::{Start, run as train};

pub(super) fn run(args: &PretrainArgs) -> Result<()> {
    train(Start::Random(&args.config), &args.train)
}
