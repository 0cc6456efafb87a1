//! Writing checkpoints.
