//! Exact change of the number of token copies when experts move between groups, in constant time.
//!
//! A *group* is a rank, or a node in the level above. For the sets `s` (weight `w`) and `phi(s, g)` members of `s` in
//! group `g`, the copies are `sum_s w * |{g : phi(s, g) > 0}|`. Three tables make any single change O(1):
//! - `alone[e]`: weight of the sets where `e` is the only member in its group: saved when `e` leaves;
//! - `absent[e][g]`: weight of the sets of `e` with no member in `g`: paid when `e` arrives;
//! - `alone_with[a][b]`: the part of `alone[a]` in sets that also hold `b`: corrects a swap of `a` and `b`, which
//!   leaves the sets that hold both as they are.
//!
//! A move updates them by walking the sets of the moved expert: O(sets * K).

use super::hypergraph::Hypergraph;

pub(super) struct Level<'h> {
    graph: &'h Hypergraph,
    num_groups: usize,
    /// `[E]`
    group_of: Vec<u16>,
    /// `[sets, G]`
    phi: Vec<u8>,
    /// `[E]`
    alone: Vec<i64>,
    /// `[E, G]`
    absent: Vec<i64>,
    /// `[E, E]`
    alone_with: Vec<i64>,
    copies: i64,
}

impl<'h> Level<'h> {
    /// Tables of an assignment `[E]` of experts to `num_groups` groups. `K` is at most 255.
    pub(super) fn new(graph: &'h Hypergraph, num_groups: usize, group_of: Vec<u16>) -> Self {
        let e = graph.num_experts();
        let mut this = Self {
            graph,
            num_groups,
            group_of,
            phi: vec![0; graph.num_sets() * num_groups],
            alone: vec![0; e],
            absent: vec![0; e * num_groups],
            alone_with: vec![0; e * e],
            copies: 0,
        };
        for s in 0..graph.num_sets() {
            let (members, w) = (graph.set(s), graph.weight(s));
            let phi = &mut this.phi[s * num_groups..(s + 1) * num_groups];
            for &m in members {
                phi[usize::from(this.group_of[usize::from(m)])] += 1;
            }
            for (g, &n) in phi.iter().enumerate() {
                if n > 0 {
                    this.copies += w;
                } else {
                    for &m in members {
                        this.absent[usize::from(m) * num_groups + g] += w;
                    }
                }
            }
            for &m in members {
                let m = usize::from(m);
                if phi[usize::from(this.group_of[m])] == 1 {
                    this.alone[m] += w;
                    for &other in members {
                        this.alone_with[m * e + usize::from(other)] += w;
                    }
                }
            }
        }
        this
    }

    /// `sum_s w * |groups of s|`: copies per token times tokens.
    pub(super) fn copies(&self) -> i64 {
        self.copies
    }

    pub(super) fn group_of(&self, expert: usize) -> usize {
        usize::from(self.group_of[expert])
    }

    /// Change of [`copies`](Self::copies) if `expert` went to another group.
    #[inline]
    pub(super) fn move_delta(&self, expert: usize, to: usize) -> i64 {
        self.absent[expert * self.num_groups + to] - self.alone[expert]
    }

    /// Change of [`copies`](Self::copies) if two experts of different groups changed places.
    #[inline]
    pub(super) fn swap_delta(&self, a: usize, b: usize) -> i64 {
        let e = self.graph.num_experts();
        self.move_delta(a, self.group_of(b))
            + self.move_delta(b, self.group_of(a))
            + self.alone_with[a * e + b]
            + self.alone_with[b * e + a]
    }

    /// Moves an expert to another group and updates every table.
    pub(super) fn apply_move(&mut self, expert: usize, to: usize) {
        let from = self.group_of(expert);
        debug_assert_ne!(from, to);
        self.copies += self.move_delta(expert, to);
        self.group_of[expert] = to as u16;
        let (g, e) = (self.num_groups, self.graph.num_experts());
        for &s in self.graph.sets_of(expert) {
            let s = s as usize;
            let (members, w) = (self.graph.set(s), self.graph.weight(s));
            let (n_from, n_to) = (self.phi[s * g + from], self.phi[s * g + to]);
            self.phi[s * g + from] = n_from - 1;
            self.phi[s * g + to] = n_to + 1;
            if n_from == 1 {
                for &m in members {
                    self.absent[usize::from(m) * g + from] += w;
                }
            }
            if n_to == 0 {
                for &m in members {
                    self.absent[usize::from(m) * g + to] -= w;
                }
            }
            let mut set_alone = |who: usize, w: i64| {
                self.alone[who] += w;
                let row = &mut self.alone_with[who * e..(who + 1) * e];
                for &m in members {
                    row[usize::from(m)] += w;
                }
            };
            match (n_from == 1, n_to == 0) {
                (true, false) => set_alone(expert, -w),
                (false, true) => set_alone(expert, w),
                _ => {}
            }
            let only_other = |group: usize| {
                members
                    .iter()
                    .map(|&m| usize::from(m))
                    .find(|&m| m != expert && usize::from(self.group_of[m]) == group)
                    .expect("phi counts one more member in this group")
            };
            if n_from == 2 {
                set_alone(only_other(from), w);
            }
            if n_to == 1 {
                set_alone(only_other(to), -w);
            }
        }
    }
}
