//! Exit codes: what a script can tell apart.

use std::process::ExitCode;

use occult_formats::FormatError;
use occult_plan::PlanError;

/// Options that each make sense but not together, or not on this command line: exit code 2, as clap's own errors.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Shown under `--help`. Code 2 (wrong usage) is clap's, and that of [`Usage`].
pub(crate) const HELP: &str = "Exit codes:\n  0  done\n  1  a file is not what it should be, or something cannot be read, \
                               written or computed\n  2  wrong usage\n  3  no placement within the limits was found";

/// An error with its causes in one line. Many errors already say their cause: it is not said again.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Exit code of an error.
pub(crate) fn code(error: &anyhow::Error) -> ExitCode {
    if error.is::<Usage>() {
        return ExitCode::from(2);
    }
    let infeasible = error.chain().any(|cause| match cause.downcast_ref::<PlanError>() {
        Some(PlanError::InLayer { source, .. }) => matches!(**source, PlanError::Infeasible(_)),
        other => matches!(other, Some(PlanError::Infeasible(_))),
    });
    ExitCode::from(if infeasible { 3 } else { 1 })
}

/// Whether the reader of our output went away (`occult ... | head`).
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let io = match cause.downcast_ref::<FormatError>() {
            Some(FormatError::Io { source, .. }) => Some(source),
            _ => cause.downcast_ref::<std::io::Error>(),
        };
        io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    #[test]
    fn causes_are_said_once() {
        let layer = Err::<(), _>(PlanError::NoTokens.in_layer(3)).context("a.safetensors").unwrap_err();
        assert_eq!(message(&layer), "a.safetensors: layer 3: there are no tokens");
        assert_eq!(message(&PlanError::NoTokens.into()), "there are no tokens");
    }
}
