//! One file per command.

mod bench;
mod convert;
mod demo;
mod eval;
mod export;
mod generate;
mod import;
mod inspect;
mod logits;
mod permute;
mod place;
mod pretrain;
mod profile;
mod prune;
mod report;
mod stats;
mod traffic;
mod tune;

use anyhow::Result;

use crate::args::Command;

/// Carries out a command.
pub(crate) fn run(command: Command) -> Result<()> {
    match command {
        Command::Demo(args) => demo::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Import(args) => import::run(&args),
        Command::Stats(args) => stats::run(&args),
        Command::Traffic(args) => traffic::run(&args),
        Command::Place(args) => place::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Prune(args) => prune::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Profile(args) => profile::run(&args),
        Command::Logits(args) => logits::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Permute(args) => permute::run(&args),
        Command::Pretrain(args) => pretrain::run(&args),
        Command::Tune(args) => tune::run(&args),
    }
}
