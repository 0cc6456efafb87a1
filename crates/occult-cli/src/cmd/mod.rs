//! One file per command.

mod demo;
mod export;
mod import;
mod inspect;
mod place;
mod prune;
mod report;
mod stats;
mod traffic;

use anyhow::Result;

use crate::args::Command;

/// Carries out a command.
pub(crate) fn run(command: Command) -> Result<()> {
    match command {
        Command::Demo(args) => demo::run(&args),
        Command::Import(args) => import::run(&args),
        Command::Stats(args) => stats::run(&args),
        Command::Traffic(args) => traffic::run(&args),
        Command::Place(args) => place::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Prune(args) => prune::run(&args),
        Command::Report(args) => report::run(&args),
    }
}
