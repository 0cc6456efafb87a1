//! The matrix that defines a BRIM. Slow and mostly empty: for tests and for looking at.

use super::Brim;

/// `[groups, sources]` target rows, -1 where a source has no copy in a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DenseBrim {
    num_groups: usize,
    num_sources: usize,
    target: Vec<i32>,
}

impl DenseBrim {
    /// The definition: groups outermost, sources innermost, a running counter where the source uses the group.
    pub fn new(num_groups: usize, num_sources: usize, uses: impl Fn(usize, usize) -> bool) -> Self {
        let (mut target, mut counter) = (Vec::new(), 0);
        for group in 0..num_groups {
            for source in 0..num_sources {
                if uses(group, source) {
                    target.push(counter);
                    counter += 1;
                } else {
                    target.push(-1);
                }
            }
        }
        Self { num_groups, num_sources, target }
    }

    /// Number of groups: ranks, or local experts.
    pub fn num_groups(&self) -> usize {
        self.num_groups
    }

    /// Number of source rows.
    pub fn num_sources(&self) -> usize {
        self.num_sources
    }

    /// All target rows, `[groups, sources]` row-major, -1 where absent.
    pub fn as_slice(&self) -> &[i32] {
        &self.target
    }

    /// `[sources]` target rows of one group.
    pub fn row(&self, group: usize) -> &[i32] {
        &self.target[group * self.num_sources..(group + 1) * self.num_sources]
    }

    /// The condensed form, read off the matrix entry by entry.
    pub fn condense(&self) -> Brim {
        let mut brim = Brim { group_offsets: vec![0], merge_offsets: vec![0], ..Brim::default() };
        for group in 0..self.num_groups {
            let sources = (0..self.num_sources).filter(|&s| self.row(group)[s] >= 0);
            brim.scatter_idx.extend(sources.map(|s| s as u32));
            brim.group_offsets.push(brim.scatter_idx.len() as u32);
        }
        for source in 0..self.num_sources {
            let targets = (0..self.num_groups).map(|g| self.row(g)[source]).filter(|&t| t >= 0);
            brim.merge_idx.extend(targets.map(|t| t as u32));
            brim.merge_offsets.push(brim.merge_idx.len() as u32);
        }
        brim
    }
}

impl Brim {
    /// The matrix of this BRIM, from its scatter direction.
    pub fn to_dense(&self) -> DenseBrim {
        let (num_groups, num_sources) = (self.num_groups(), self.num_sources());
        let mut target = vec![-1; num_groups * num_sources];
        for group in 0..num_groups {
            for row in self.group(group) {
                target[group * num_sources + self.scatter_idx[row] as usize] = row as i32;
            }
        }
        DenseBrim { num_groups, num_sources, target }
    }
}
