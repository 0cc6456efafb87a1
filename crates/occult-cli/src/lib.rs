//! What the `occult` command is made of; the binary only calls it.
#![forbid(unsafe_code)]

pub mod report;
