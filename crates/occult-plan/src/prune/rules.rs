//! Orders and choices of experts that the rules share.

use std::cmp::Ordering;

use crate::ExpertId;

/// Larger score first, then the lower id.
pub(super) fn by_score(scores: &[f64], a: ExpertId, b: ExpertId) -> Ordering {
    scores[usize::from(b)].total_cmp(&scores[usize::from(a)]).then(a.cmp(&b))
}

/// Sorts experts by [`by_score`].
pub(super) fn sort_by_score(ids: &mut [ExpertId], scores: &[f64]) {
    ids.sort_unstable_by(|&a, &b| by_score(scores, a, b));
}

/// Keeps the `n` experts that are first by [`by_score`], in any order.
pub(super) fn keep_best(ids: &mut Vec<ExpertId>, scores: &[f64], n: usize) {
    if n < ids.len() {
        if n > 0 {
            ids.select_nth_unstable_by(n - 1, |&a, &b| by_score(scores, a, b));
        }
        ids.truncate(n);
    }
}

/// The expert of `ids` (ascending) with the largest similarity that is not chosen yet; the lowest of equal ones.
pub(super) fn most_similar(similarity: &[f32], ids: &[ExpertId], is_chosen: &[bool]) -> Option<ExpertId> {
    let free = ids.iter().copied().filter(|&id| !is_chosen[usize::from(id)]);
    // `max_by` keeps the last of equal elements, hence the reversed order.
    free.rev().max_by(|&a, &b| similarity[usize::from(a)].total_cmp(&similarity[usize::from(b)]))
}
