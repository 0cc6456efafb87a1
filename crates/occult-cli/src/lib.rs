//! The `occult` command: arguments become requests (`args`), requests are carried out (`cmd`), results are printed as
//! tables or JSON, and reports are rendered ([`report`]). Threads, clocks and terminals live here and nowhere below.
#![forbid(unsafe_code)]

mod args;
mod bench;
mod bundled;
mod cmd;
mod compare;
mod domains;
mod exit;
mod inputs;
mod measuring;
mod model;
mod model_args;
mod output;
mod overlap;
mod parallel;
mod placing;
mod progress;
mod pruning;
pub mod report;
mod sent;
mod setup;
mod spreading;
mod tokens;
mod train_args;
mod training;
mod visits;
mod world;

use std::process::ExitCode;

use clap::Parser;

/// Parses the command line, runs the command, prints an error as one line with its causes, and maps it to an exit code.
pub fn main() -> ExitCode {
    let cli = args::Cli::parse();
    let code = match cmd::run(cli.command) {
        Ok(()) => 0,
        Err(error) if exit::is_broken_pipe(&error) => 0,
        Err(error) => {
            eprintln!("occult: {}", exit::message(&error));
            exit::code(&error)
        }
    };
    #[cfg(feature = "mpi")]
    occult_comm::end_mpi(code.into());
    ExitCode::from(code)
}
