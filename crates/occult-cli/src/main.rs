//! The `occult` command.

fn main() -> std::process::ExitCode {
    occult_cli::main()
}
