//! One expert-parallel MoE layer: route, prune, plan, exchange, compute, combine - forward and backward.
