//! How fast the collaboration graph falls apart: the paper's figure 3.
//!
//! With `P = counts / max`, keep the edges of at least some strength and count the connected sub-graphs that remain. A
//! graph that breaks into many parts at a low threshold has groups of experts that hardly meet: it can be placed well.

use crate::{CoActivation, PlanError, Result};

/// The graph at one threshold.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SubgraphPoint {
    /// An edge is kept when `P >= threshold` and `P > 0`.
    pub threshold: f64,
    /// Connected sub-graphs, experts without a kept edge included, `1..=E`.
    pub num_subgraphs: usize,
    /// Those that are one expert alone.
    pub num_alone: usize,
    /// Experts in the largest.
    pub largest: usize,
}

/// The whole curve, exactly: one point for every distinct threshold at which it changes, from the strongest edge down
/// (Kruskal's algorithm: only the `E - 1` or fewer edges of the maximum spanning forest can change it). A point holds from
/// its threshold down to the next one; above the first (`P > 1`) every expert is alone. Empty when nothing is co-active.
pub fn breakpoints(graph: &CoActivation) -> Vec<SubgraphPoint> {
    let (num_experts, max) = (graph.num_experts(), graph.max());
    let mut edges: Vec<(u64, usize, usize)> = Vec::new();
    for i in 0..num_experts {
        edges.extend((i + 1..num_experts).map(|j| (graph.get(i, j), i, j)).filter(|e| e.0 > 0));
    }
    edges.sort_unstable_by(|a, b| b.cmp(a));
    let mut parts = Parts::alone(num_experts);
    let mut points: Vec<SubgraphPoint> = Vec::new();
    let mut last_count = None;
    for (count, i, j) in edges {
        if parts.join(i, j) {
            // Edges of equal strength arrive together.
            if last_count == Some(count) {
                points.pop();
            }
            last_count = Some(count);
            points.push(parts.point(count as f64 / max as f64));
        }
    }
    points
}

/// The curve at `num_thresholds` evenly spaced thresholds from 0 to 1, at least 2.
pub fn subgraph_curve(graph: &CoActivation, num_thresholds: usize) -> Result<Vec<SubgraphPoint>> {
    if !(2..=MAX_THRESHOLDS).contains(&num_thresholds) {
        let expected = format!("2 to {MAX_THRESHOLDS}");
        return Err(PlanError::range("number of thresholds", expected, num_thresholds));
    }
    let points = breakpoints(graph);
    let alone = Parts::alone(graph.num_experts()).point(0.0);
    let at = |threshold: f64| {
        // Thresholds of the breakpoints descend; the last one that is still at least this one holds.
        let reached = points.partition_point(|p| p.threshold >= threshold);
        let point = reached.checked_sub(1).map_or(alone, |i| points[i]);
        SubgraphPoint { threshold, ..point }
    };
    Ok((0..num_thresholds).map(|i| at(i as f64 / (num_thresholds - 1) as f64)).collect())
}

/// Most thresholds of [`subgraph_curve`].
pub const MAX_THRESHOLDS: usize = 1 << 20;

/// Disjoint sets of experts (union by size).
struct Parts {
    parent: Vec<usize>,
    size: Vec<usize>,
    num: usize,
    alone: usize,
    largest: usize,
}

impl Parts {
    fn alone(n: usize) -> Self {
        Self { parent: (0..n).collect(), size: vec![1; n], num: n, alone: n, largest: n.min(1) }
    }

    fn root(&mut self, mut i: usize) -> usize {
        while self.parent[i] != i {
            self.parent[i] = self.parent[self.parent[i]];
            i = self.parent[i];
        }
        i
    }

    /// Whether the two were apart.
    fn join(&mut self, i: usize, j: usize) -> bool {
        let (i, j) = (self.root(i), self.root(j));
        if i == j {
            return false;
        }
        let (small, big) = if self.size[i] <= self.size[j] { (i, j) } else { (j, i) };
        self.alone -= [small, big].into_iter().filter(|&p| self.size[p] == 1).count();
        self.parent[small] = big;
        self.size[big] += self.size[small];
        self.num -= 1;
        self.largest = self.largest.max(self.size[big]);
        true
    }

    fn point(&self, threshold: f64) -> SubgraphPoint {
        SubgraphPoint { threshold, num_subgraphs: self.num, num_alone: self.alone, largest: self.largest }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn symmetric(n: usize, upper: &[u64]) -> CoActivation {
        let mut counts = vec![0; n * n];
        let mut next = upper.iter();
        for i in 0..n {
            for j in i + 1..n {
                let c = *next.next().unwrap();
                (counts[i * n + j], counts[j * n + i]) = (c, c);
            }
        }
        CoActivation::from_counts(n, counts).unwrap()
    }

    /// Flood fill at one threshold.
    fn slow(graph: &CoActivation, threshold: f64) -> SubgraphPoint {
        let n = graph.num_experts();
        let kept = |i: usize, j: usize| {
            let count = graph.get(i, j);
            count > 0 && count as f64 / graph.max() as f64 >= threshold
        };
        let mut sizes = Vec::new();
        let mut seen = vec![false; n];
        for start in 0..n {
            if seen[start] {
                continue;
            }
            seen[start] = true;
            let mut part = vec![start];
            let mut next = 0;
            while next < part.len() {
                for (j, seen) in seen.iter_mut().enumerate() {
                    if !*seen && kept(part[next], j) {
                        *seen = true;
                        part.push(j);
                    }
                }
                next += 1;
            }
            sizes.push(part.len());
        }
        SubgraphPoint {
            threshold,
            num_subgraphs: sizes.len(),
            num_alone: sizes.iter().filter(|&&s| s == 1).count(),
            largest: sizes.into_iter().max().unwrap_or(0),
        }
    }

    proptest! {
        #[test]
        fn same_as_flood_fill(
            n in 0usize..10,
            upper in prop::collection::vec(prop_oneof![Just(0u64), 0u64..20], 45),
            num_thresholds in 2usize..30,
        ) {
            let graph = symmetric(n, &upper);
            let curve = subgraph_curve(&graph, num_thresholds).unwrap();
            prop_assert_eq!((curve[0].threshold, curve[num_thresholds - 1].threshold), (0.0, 1.0));
            for point in curve {
                prop_assert_eq!(point, slow(&graph, point.threshold));
            }
            let points = breakpoints(&graph);
            for (i, point) in points.iter().enumerate() {
                prop_assert_eq!(*point, slow(&graph, point.threshold));
                // It is a breakpoint: just above, there are more sub-graphs.
                prop_assert!(slow(&graph, point.threshold * (1.0 + 1e-9)).num_subgraphs > point.num_subgraphs);
                prop_assert!(i == 0 || points[i - 1].threshold > point.threshold);
            }
        }
    }

    /// A triangle 0-1-2 (10, 6, 6), 3 tied to 2 by 1, 4 alone.
    #[test]
    fn golden_example() {
        let graph = symmetric(5, &[10, 6, 0, 0, 6, 0, 0, 1, 0, 0]);
        let seen: Vec<_> = breakpoints(&graph)
            .iter()
            .map(|p| (p.threshold, p.num_subgraphs, p.num_alone, p.largest))
            .collect();
        assert_eq!(seen, [(1.0, 4, 3, 2), (0.6, 3, 2, 3), (0.1, 2, 1, 4)]);
        let curve = subgraph_curve(&graph, 3).unwrap();
        assert_eq!(curve.iter().map(|p| p.num_subgraphs).collect::<Vec<_>>(), [2, 3, 4]);
        assert!(subgraph_curve(&graph, 1).is_err());
        assert!(subgraph_curve(&graph, usize::MAX).is_err());
    }
}
