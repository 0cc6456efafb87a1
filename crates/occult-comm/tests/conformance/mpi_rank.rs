//! One rank of the conformance suite over MPI: `occult-comm-conformance cases 4`, or the name of a fault and the number of
//! ranks.
//! Prints a verdict per rank; exits with 0 when all cases pass, with 3 after a fault.

mod cases;
mod faults;

use std::io::Write as _;
use std::process::Command;
use std::time::Duration;

use cases::CASES;
use faults::{FAULTS, Fault, WHAT, names_the_culprit};
use occult_comm::{
    Buffer, CommError, Communicator, Expect, MpiOptions, RankError, end_mpi, leave_mpi, run_mpi,
};

/// Faults that only processes can have.
const PROCESS_FAULTS: &[Fault] = &[
    Fault { name: "killed", silent: true, run: |comm, culprit| signal(comm, culprit, "KILL") },
    Fault { name: "stopped", silent: true, run: |comm, culprit| signal(comm, culprit, "STOP") },
];

fn main() {
    let name = std::env::args().nth(1).unwrap_or_default();
    if name == "cases" {
        return run_cases();
    }
    let Some(fault) = FAULTS.iter().chain(PROCESS_FAULTS).find(|fault| fault.name == name) else {
        eprintln!("no fault `{name}`");
        std::process::exit(2);
    };
    let culprit =
        std::env::args().nth(2).and_then(|num_ranks| num_ranks.parse::<usize>().ok()).unwrap_or(1) - 1;
    let mut rank = None;
    let limit = Duration::from_secs(if fault.silent { 2 } else { 3600 });
    let result = run_mpi(&MpiOptions { limit }, |comm| {
        rank = Some(comm.rank());
        (fault.run)(&*comm, comm.rank() == culprit)
    });
    let verdict = match &result {
        _ if rank == Some(culprit) => "culprit",
        // The others were so fast that this one learned of the fault before its body ran.
        Err(RankError::NotStarted(error)) if error.contains(&format!("rank {culprit}")) => "named",
        Err(error) if names_the_culprit(&error.to_string(), culprit) => "named",
        _ => "unnamed",
    };
    say(&format!(
        "rank {}: {verdict}: {}",
        rank.map_or("?".into(), |rank| rank.to_string()),
        describe(&result)
    ));
    leave_mpi(3, Duration::from_secs(1));
}

fn run_cases() {
    let mut rank = 0;
    let result = run_mpi(&MpiOptions { limit: Duration::from_secs(60) }, |comm| {
        rank = comm.rank();
        for case in CASES {
            (case.run)(&*comm).map_err(|error| format!("`{}`: {error}", case.name))?;
        }
        say(&format!("rank {rank}: conforms"));
        Ok::<_, String>(())
    });
    if result.is_err() {
        say(&format!("rank {rank}: {}", describe(&result)));
        leave_mpi(1, Duration::from_secs(1));
    }
    end_mpi(0);
}

fn describe<E: std::fmt::Display>(result: &Result<(), RankError<E>>) -> String {
    result.as_ref().map_or_else(ToString::to_string, |()| "no error".into())
}

/// One write per line, so that lines of several ranks do not mix.
fn say(line: &str) {
    let _ = std::io::stdout().write_all(format!("{line}\n").as_bytes());
}

fn signal(comm: &dyn Communicator, culprit: bool, signal: &str) -> Result<(), CommError> {
    let bytes = vec![100; comm.world_size()];
    let exchange = |what| {
        let buffer = Buffer::zeroed::<u8>(100 * comm.world_size());
        comm.exchange(what, buffer, &bytes, Expect::Bytes(bytes.clone())).map(drop)
    };
    exchange("first")?;
    if culprit {
        let _ = Command::new("kill").args([&format!("-{signal}"), &std::process::id().to_string()]).status();
    }
    exchange(WHAT)
}
