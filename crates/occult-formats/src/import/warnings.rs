//! Which figures a profile cannot give, said at import rather than found out later.

use crate::Profile;

/// One sentence for each kind of missing data.
pub(crate) fn not_computable(profile: &Profile) -> Vec<String> {
    let layers = 0..profile.num_layers();
    let all = |has: &dyn Fn(usize) -> bool| layers.clone().all(has);
    let mut warnings = Vec::new();
    if !all(&|l| profile.has_counts(l)) {
        warnings.push(
            "only the order of collaborators is known: no figure can be computed (loads, intra/inter ratio, copies per \
             token, placement search, pruning); the order can be inspected"
                .to_owned(),
        );
    } else if !all(&|l| profile.num_rows(l).is_some()) {
        let mut missing =
            "only counts are known, not which experts a token chose together: copies per token, traffic, \
                           placement search and pruning cannot be computed"
                .to_owned();
        if all(&|l| profile.has_coactivation(l)) {
            missing
                .push_str("; loads and the intra/inter ratio can, and the methods greedy and eplb can place");
        } else {
            missing.push_str(", nor the intra/inter ratio; loads can, and the method eplb can place");
        }
        warnings.push(missing);
    } else {
        if !all(&|l| profile.has_weights(l) || profile.has_scores(l)) {
            warnings
                .push("there are no routing weights: retained routing mass cannot be computed".to_owned());
        }
        if !all(&|l| profile.has_scores(l)) {
            warnings.push(
                "there are no router logits of all experts: pruning rules that replace experts (router-score, \
                 similarity, best-mass) cannot be run"
                    .to_owned(),
            );
        }
    }
    warnings
}
