//! One suite for all backends: here one rank alone and threads; `tests/mpi.rs` runs the same over processes.

mod cases;
mod faults;

use std::time::Duration;

use cases::{CASES, Case};
use faults::{FAULTS, names_the_culprit};
use occult_comm::{CommError, Communicator, Metered, RankError, SoloComm, ThreadOptions, run_threads};

fn options(seconds: u64) -> ThreadOptions {
    ThreadOptions { limit: Duration::from_secs(seconds), ..ThreadOptions::default() }
}

fn conforms(num_ranks: usize) {
    conform(num_ranks, |case, comm| (case.run)(&*comm));
}

fn conform(num_ranks: usize, run: impl Fn(&Case, Box<dyn Communicator>) -> Result<(), CommError> + Sync) {
    for case in CASES {
        let results = run_threads(num_ranks, &options(60), |comm| run(case, comm));
        if let Err((rank, error)) = results.all() {
            panic!("`{}` with {num_ranks} ranks, rank {rank}: {error}", case.name);
        }
    }
}

#[test]
fn one_rank_alone_conforms() {
    for case in CASES {
        (case.run)(&SoloComm::new()).unwrap_or_else(|error| panic!("`{}`: {error}", case.name));
    }
}

#[test]
fn threads_1_conform() {
    conforms(1);
}

#[test]
fn threads_2_conform() {
    conforms(2);
}

#[test]
fn threads_3_conform() {
    conforms(3);
}

#[test]
fn threads_4_conform() {
    conforms(4);
}

#[test]
fn threads_8_conform() {
    conforms(8);
}

#[test]
fn what_counts_conforms() {
    for num_ranks in [1, 3] {
        conform(num_ranks, |case, comm| (case.run)(&Metered::new(comm)));
    }
}

#[test]
fn the_fault_of_one_thread_is_named_by_all() {
    for fault in FAULTS {
        for num_ranks in [2, 3, 4, 8] {
            let culprit = num_ranks - 1;
            // Faults that are not silent must be found without the deadline.
            let limit = if fault.silent { 1 } else { 3600 };
            let results =
                run_threads(num_ranks, &options(limit), |comm| (fault.run)(&*comm, comm.rank() == culprit));
            for (rank, result) in results.results.iter().take(culprit).enumerate() {
                let error = match result {
                    Err(RankError::Failed(error)) => error.to_string(),
                    other => panic!("`{}`: rank {rank} of {num_ranks}: {other:?}", fault.name),
                };
                assert!(
                    names_the_culprit(&error, culprit),
                    "`{}`: rank {rank} of {num_ranks}: {error}",
                    fault.name
                );
            }
        }
    }
}

#[test]
fn the_cause_is_told_apart_from_its_consequences() {
    let results = run_threads(4, &options(3600), |comm| {
        assert!(comm.rank() != 2, "meant to panic");
        comm.barrier("a barrier")
    });
    assert_eq!(results.first_failure, Some(2));
    for rank in [0, 1, 3] {
        let expected =
            CommError::Peer { what: "a barrier", rank: 2, reason: "panicked: meant to panic".into() };
        assert_eq!(results.results[rank], Err(RankError::Failed(expected)));
    }
    assert_eq!(results.all(), Err((2, RankError::Panicked("meant to panic".into()))));
}

#[test]
fn one_rank_alone_checks_its_counts_and_its_abort() {
    use occult_comm::{Buffer, Expect};
    let comm = SoloComm::new();
    let start = |expect| comm.start_exchange("rows", Buffer::zeroed::<u8>(5), &[5], expect).map(drop);
    assert!(matches!(start(Expect::Bytes(vec![4])), Err(CommError::Mismatch { peer: 0, .. })));
    assert!(matches!(start(Expect::AtMost(vec![4])), Err(CommError::Mismatch { peer: 0, .. })));
    comm.abort("enough");
    assert!(matches!(comm.barrier("rows"), Err(CommError::Peer { rank: 0, .. })));
}
