//! `occult tune`

use anyhow::Result;

use crate::train_args::TuneArgs;
use crate::training::{Start, run as train};

pub(super) fn run(args: &TuneArgs) -> Result<()> {
    train(Start::Model(&args.model), &args.train)
}
