//! Progress bars on standard error; nothing when it is not a terminal.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar that counts `total` of `what`.
pub(crate) fn bar(total: u64, what: &str) -> ProgressBar {
    let bar = hidden_unless_terminal(total);
    let template = "{msg} [{bar:32}] {pos}/{len}  {elapsed} elapsed, {eta} left";
    bar.set_style(ProgressStyle::with_template(template).expect("a valid template").progress_chars("=> "));
    bar.set_message(what.to_owned());
    bar
}

/// A bar over the steps of a training run that goes on after `from` steps.
pub(crate) fn training(steps: u64, from: u64) -> ProgressBar {
    let bar = hidden_unless_terminal(steps);
    let template = "step {pos}/{len} [{bar:24}] {msg}  {elapsed} elapsed, {eta} left";
    bar.set_style(ProgressStyle::with_template(template).expect("a valid template").progress_chars("=> "));
    bar.set_position(from);
    bar.reset_eta();
    bar
}

/// A bar that counts bytes; its length is set as it becomes known.
pub(crate) fn bytes(what: &str) -> ProgressBar {
    let bar = hidden_unless_terminal(0);
    let template = "{msg} [{bar:32}] {bytes}/{total_bytes}  {bytes_per_sec}, {eta} left";
    bar.set_style(ProgressStyle::with_template(template).expect("a valid template").progress_chars("=> "));
    bar.set_message(what.to_owned());
    bar
}

/// Moves a bar to what is done of a total.
pub(crate) fn follow(bar: &ProgressBar) -> impl FnMut(u64, u64) + '_ {
    |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    }
}

fn hidden_unless_terminal(total: u64) -> ProgressBar {
    if std::io::stderr().is_terminal() {
        ProgressBar::new(total)
    } else {
        ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden())
    }
}

/// Something whose length is not known.
pub(crate) fn spinner(what: &str) -> ProgressBar {
    let bar = hidden_unless_terminal(0);
    bar.set_style(ProgressStyle::with_template("{spinner} {msg}  {elapsed}").expect("a valid template"));
    bar.set_message(what.to_owned());
    bar.enable_steady_tick(std::time::Duration::from_millis(100));
    bar
}
