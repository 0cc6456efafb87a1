//! Expanded rows in groups small enough that what lies between the two matmuls stays in the cache.

use std::ops::Range;

use crate::SparseRows;

/// Values of the intermediate result of one group: 8 MiB.
const GROUP_VALUES: usize = 2 << 20;

/// Some expanded rows of one expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) expert: usize,
    /// Expanded rows.
    pub(super) rows: Range<usize>,
    /// Rows of the whole expert.
    pub(super) rows_of_expert: usize,
}

/// A run of pieces, experts ascending, and the expanded rows they cover.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) pieces: Vec<Piece>,
    pub(super) rows: Range<usize>,
}

/// Cuts the expanded rows into groups of about [`GROUP_VALUES`] values at `width` values per row. Depends on the rows
/// and the width only.
pub(super) fn groups(rows: &SparseRows, width: usize) -> Vec<Group> {
    let limit = (GROUP_VALUES / width.max(1)).max(64);
    let mut groups: Vec<Group> = Vec::new();
    for expert in 0..rows.num_experts() {
        let all = rows.expanded_of(expert);
        let num_pieces = all.len().div_ceil(limit);
        for i in 0..num_pieces {
            let part = all.start + i * all.len() / num_pieces..all.start + (i + 1) * all.len() / num_pieces;
            let piece = Piece { expert, rows: part.clone(), rows_of_expert: all.len() };
            match groups.last_mut() {
                Some(group) if part.end - group.rows.start <= limit => {
                    group.rows.end = part.end;
                    group.pieces.push(piece);
                }
                _ => groups.push(Group { rows: part, pieces: vec![piece] }),
            }
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_cover_every_row_once_in_order() {
        let offsets = [0, 3, 3, 203, 210];
        let row_idx = offsets.windows(2).flat_map(|o| 0..o[1] - o[0]).collect();
        let rows = SparseRows::new(200, offsets.to_vec(), row_idx).unwrap();
        let groups = groups(&rows, GROUP_VALUES / 64);
        let covered: Vec<usize> = groups.iter().flat_map(|group| group.rows.clone()).collect();
        assert_eq!(covered, (0..210).collect::<Vec<_>>());
        let of_pieces: Vec<usize> =
            groups.iter().flat_map(|g| g.pieces.iter().flat_map(|p| p.rows.clone())).collect();
        assert_eq!(of_pieces, covered);
        assert!(groups.iter().all(|group| group.rows.len() <= 64));
        let experts: Vec<usize> = groups.iter().flat_map(|g| g.pieces.iter().map(|p| p.expert)).collect();
        assert_eq!(experts, [0, 2, 2, 2, 2, 3]);
    }
}
