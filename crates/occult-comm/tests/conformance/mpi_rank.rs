//! One rank of the conformance suite over MPI: `occult-comm-conformance cases 4`, or the name of a fault and the number of
//! ranks.
//! Prints a verdict per rank; exits with 0 when all cases pass, with 3 after a fault.

mod cases;
mod faults;

use std::io::Write as _;
use std::process::Command;
use std::time::Duration;

use cases::CASES;
use faults::{FAULTS, Fault, WHAT, names_the_culprit, poll, stay_away};
use occult_comm::{
    Buffer, CommError, Communicator, Expect, MpiOptions, RankError, end_mpi, leave_mpi, run_mpi,
};

/// Faults that only processes can have.
const PROCESS_FAULTS: &[Fault] = &[
    Fault { name: "killed", silent: true, run: |comm, culprit| signalled(comm, culprit, "KILL", 100) },
    Fault { name: "stopped", silent: true, run: |comm, culprit| signalled(comm, culprit, "STOP", 100) },
    Fault {
        name: "stopped-amid-data",
        silent: true,
        run: |comm, culprit| signalled(comm, culprit, "STOP", 2_000_000),
    },
    Fault { name: "polled-termination", silent: false, run: polled_termination },
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

/// The culprit gets a signal before an exchange in which so many bytes go to each rank.
fn signalled(comm: &dyn Communicator, culprit: bool, name: &str, len: usize) -> Result<(), CommError> {
    let exchange = |what, len: usize| {
        let bytes = vec![len; comm.world_size()];
        let buffer = Buffer::zeroed::<u8>(len * comm.world_size());
        comm.exchange(what, buffer, &bytes, Expect::Bytes(bytes.clone())).map(drop)
    };
    exchange("first", 100)?;
    if culprit {
        signal(name);
    }
    exchange(WHAT, len)
}

/// The ranks that look for the culprit's part are told to end.
fn polled_termination(comm: &dyn Communicator, culprit: bool) -> Result<(), CommError> {
    let group = comm.split("those who look", usize::from(culprit))?;
    if culprit {
        stay_away(comm);
    }
    poll(comm, || {
        // The parts of the others have come before they meet: only the culprit's is missing.
        group.barrier("begun")?;
        signal("TERM");
        Ok(())
    })
}

fn signal(name: &str) {
    let _ = Command::new("kill").args([&format!("-{name}"), &std::process::id().to_string()]).status();
}
