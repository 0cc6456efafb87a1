//! Placement that keeps the routing groups of a group-limited router whole, for permuting a checkpoint.
//!
//! Such a router first picks groups of consecutive experts, so a permuted checkpoint gives the same model only when groups
//! move as blocks and experts inside their group. Then either a rank holds whole groups, or a group fills whole ranks.

use super::hypergraph::Hypergraph;
use super::state::Limits;
use super::{Problem, SearchOptions, best_of_restarts};
use crate::{PlanError, Rank, Result, Topology};

/// Rank of each expert; every rank gets equally many.
pub(super) fn place(
    graph: &Hypergraph,
    problem: &Problem,
    num_groups: usize,
    options: &SearchOptions,
    keep_going: &mut dyn FnMut() -> bool,
) -> Result<Vec<Rank>> {
    let (e, w) = (graph.num_experts(), problem.topology.num_ranks());
    if num_groups == 0 || !e.is_multiple_of(num_groups) {
        let expected = format!("a divisor of {e} experts");
        return Err(PlanError::range("number of routing groups", expected, num_groups));
    }
    let group_size = e / num_groups;
    let group_of = |expert: usize| expert / group_size;
    let contracted = graph.contract(&Vec::from_iter((0..e).map(|x| Some(group_of(x) as u16))), num_groups);
    if num_groups.is_multiple_of(w) {
        let limits = Limits { max_experts: num_groups / w, ..problem.limits };
        let problem = Problem { limits, ..*problem };
        let ranks = best_of_restarts(&contracted, &problem, options, keep_going, &mut Vec::new());
        return Ok((0..e).map(|x| ranks[group_of(x)]).collect());
    }
    let (group_ranks, node_ranks) = (w / num_groups, problem.topology.ranks_per_node());
    let aligned = node_ranks.is_multiple_of(group_ranks) || group_ranks.is_multiple_of(node_ranks);
    if !w.is_multiple_of(num_groups) || !e.is_multiple_of(w) || !aligned {
        let expected =
            format!("whole groups on a rank or whole ranks and nodes of a group ({num_groups} groups)");
        let found = format!("{w} ranks on {} nodes", problem.topology.num_nodes());
        return Err(PlanError::range("number of ranks", expected, found));
    }
    // Which block of ranks each group gets matters only for nodes that hold several groups.
    let group_block: Vec<usize> = if node_ranks > group_ranks && problem.topology.num_nodes() > 1 {
        let groups_per_node = node_ranks / group_ranks;
        let limits = Limits { max_experts: groups_per_node, ..problem.node_limits(1.0) };
        let nodes = Problem { topology: Topology::flat(problem.topology.num_nodes())?, limits, ..*problem };
        let node_of = best_of_restarts(&contracted, &nodes, options, keep_going, &mut Vec::new());
        let mut order: Vec<usize> = (0..num_groups).collect();
        order.sort_by_key(|&g| (node_of[g], g));
        let mut block = vec![0; num_groups];
        order.iter().enumerate().for_each(|(i, &g)| block[g] = i);
        block
    } else {
        (0..num_groups).collect()
    };
    let mut ranks = vec![0; e];
    for (g, block) in group_block.into_iter().enumerate() {
        let inside = (0..e).map(|x| (group_of(x) == g).then(|| (x % group_size) as u16));
        let inside = graph.contract(&Vec::from_iter(inside), group_size);
        if inside.num_sets() == 0 {
            (0..group_size)
                .for_each(|x| ranks[g * group_size + x] = (block * group_ranks + x * w / e) as Rank);
            continue;
        }
        let nodes = (group_ranks / node_ranks).max(1);
        let limits = Limits { max_experts: e / w, ..problem.limits };
        let inner = Problem { topology: Topology::new(group_ranks, nodes)?, limits, ..*problem };
        let local = best_of_restarts(&inside, &inner, options, keep_going, &mut Vec::new());
        for (x, r) in local.into_iter().enumerate() {
            ranks[g * group_size + x] = (block * group_ranks) as Rank + r;
        }
    }
    Ok(ranks)
}
