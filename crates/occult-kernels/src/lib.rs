//! The arithmetic of expert-parallel MoE layers: sparse matmuls and the dense operations they share a core with.
