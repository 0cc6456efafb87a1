//! The `occult` command.

/// Threads of candle's own pool, which it reads when it first computes.
const CANDLE_THREADS: &str = "CANDLE_NUM_THREADS";

fn main() -> std::process::ExitCode {
    // Ranks and kernels have threads of their own. candle's would spin beside them: with 4 ranks on 2 cores they take
    // two fifths of a training step.
    if std::env::var_os(CANDLE_THREADS).is_none() {
        // SAFETY: no other thread exists yet that could read or write the environment.
        unsafe { std::env::set_var(CANDLE_THREADS, "1") };
    }
    occult_cli::main()
}
