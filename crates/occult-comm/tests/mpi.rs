//! The conformance suite over MPI: processes started by `mpirun`, or by what `OCCULT_MPIRUN` names.
//! Ignored by default because an MPI launcher is not everywhere; `./check` runs them.
#![cfg(feature = "mpi")]

use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

/// One MPI program at a time: the machine may have two cores.
static TURN: Mutex<()> = Mutex::new(());

fn launcher() -> String {
    std::env::var("OCCULT_MPIRUN").unwrap_or_else(|_| "mpirun".into())
}

fn is_open_mpi() -> bool {
    let version = Command::new(launcher()).arg("--version").output().expect("the MPI launcher starts");
    String::from_utf8_lossy(&version.stdout).contains("Open MPI")
}

/// Runs the suite's rank program; killed after a minute.
fn launch(num_ranks: usize, what: &str) -> Output {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut command = Command::new("timeout");
    command.args(["-k", "3", "60", &launcher()]);
    if is_open_mpi() {
        command.arg("--oversubscribe");
        // Containers of build machines run as root.
        command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    }
    command.env("RUST_BACKTRACE", "0");
    let ranks = num_ranks.to_string();
    command.args(["-n", &ranks, env!("CARGO_BIN_EXE_occult-comm-conformance"), what, &ranks]);
    command.output().expect("`timeout` starts")
}

fn text(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    format!("{}\n{out}\n{err}", output.status)
}

fn conforms(num_ranks: usize) {
    let output = launch(num_ranks, "cases");
    let text = text(&output);
    assert!(output.status.success(), "{num_ranks} ranks: {text}");
    for rank in 0..num_ranks {
        assert!(text.contains(&format!("rank {rank}: conforms")), "{num_ranks} ranks: {text}");
    }
}

/// All ranks but the last must name it and the operation, and the program must fail.
fn fault_is_named(fault: &str) {
    let num_ranks = 3;
    let output = launch(num_ranks, fault);
    let text = text(&output);
    assert!(!output.status.success(), "{text}");
    assert_ne!(output.status.code(), Some(124), "hung: {text}");
    assert_eq!(
        (text.matches(" named: ").count(), text.matches(" unnamed: ").count()),
        (num_ranks - 1, 0),
        "{text}"
    );
}

/// Open MPI's launcher warns the survivors, and they say what they waited for. MPICH's kills them at once, and is then
/// the only one who can report.
fn kill_is_named() {
    if is_open_mpi() {
        return fault_is_named("killed");
    }
    let output = launch(3, "killed");
    let text = text(&output);
    assert!(!output.status.success() && output.status.code() != Some(124), "{text}");
    assert!(text.contains("Killed (signal 9)"), "{text}");
}

macro_rules! tests {
    ($($name:ident: $call:expr;)*) => {
        $(
            #[test]
            #[ignore = "needs an MPI launcher"]
            fn $name() {
                $call;
            }
        )*
    };
}

tests! {
    mpi_1_conforms: conforms(1);
    mpi_2_conform: conforms(2);
    mpi_3_conform: conforms(3);
    mpi_4_conform: conforms(4);
    mpi_8_conform: conforms(8);
    an_error_is_named: fault_is_named("error");
    a_panic_is_named: fault_is_named("panic");
    an_abort_is_named: fault_is_named("abort");
    missing_memory_is_named: fault_is_named("memory");
    an_error_with_groups_is_named: fault_is_named("error-with-groups");
    wrong_counts_are_named: fault_is_named("counts");
    more_than_the_bound_is_named: fault_is_named("more-than-the-bound");
    a_wrong_order_is_named: fault_is_named("order");
    a_skipped_operation_is_named: fault_is_named("skipped");
    another_name_is_named: fault_is_named("name");
    different_lengths_are_named: fault_is_named("lengths");
    different_long_lengths_are_named: fault_is_named("long-lengths");
    an_early_leave_is_named: fault_is_named("early-leave");
    an_absent_rank_is_named: fault_is_named("absence");
    polling_an_early_leave_is_named: fault_is_named("polled-early-leave");
    polling_an_absent_rank_is_named: fault_is_named("polled-absence");
    polling_ends_when_told_to_stop: fault_is_named("polled-termination");
    a_stopped_process_is_named: fault_is_named("stopped");
    a_process_stopped_amid_data_is_named: fault_is_named("stopped-amid-data");
    a_killed_process_is_named: kill_is_named();
}
