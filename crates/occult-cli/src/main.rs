//! The `occult` command.
fn main() {}
