//! Trains MoE language models: data, losses, optimisers, schedules, checkpoints.
