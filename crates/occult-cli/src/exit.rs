//! Exit codes: what a script can tell apart.

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

/// Exit code of an error.
pub(crate) fn code(error: &anyhow::Error) -> u8 {
    if error.is::<Usage>() {
        return 2;
    }
    let infeasible = error.chain().any(|cause| match cause.downcast_ref::<PlanError>() {
        Some(PlanError::InLayer { source, .. }) => matches!(**source, PlanError::Infeasible(_)),
        other => matches!(other, Some(PlanError::Infeasible(_))),
    });
    if infeasible { 3 } else { 1 }
}

/// The error and its causes on one line. Many of our errors quote their cause, which is not said again.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut message = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if cause.starts_with(&message) {
            message = cause;
        } else if !message.ends_with(&cause) {
            message = format!("{message}: {cause}");
        }
    }
    message
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

    #[test]
    fn a_cause_is_said_once() {
        let range = || PlanError::range("max_ranks", "at least 1", 0);
        let plan = FormatError::plan("p.safetensors", 2, 0, range());
        let error = anyhow::Error::from(plan).context("p.safetensors");
        assert_eq!(message(&error), "p.safetensors: layer 2: max_ranks is 0, expected at least 1");
        let error = anyhow::Error::from(range()).context("a.st: layer 1");
        assert_eq!(message(&error), "a.st: layer 1: max_ranks is 0, expected at least 1");
    }

    #[test]
    fn infeasible_has_a_code_of_its_own() {
        let infeasible = PlanError::Infeasible("why".to_owned()).in_layer(3);
        assert_eq!(code(&anyhow::Error::from(infeasible).context("x")), 3);
        assert_eq!(code(&anyhow::Error::from(PlanError::NoTokens)), 1);
    }
}
