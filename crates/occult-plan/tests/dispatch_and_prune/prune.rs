//! Pruning rules against their definitions, and what every rule promises.

use std::collections::BTreeSet;

use occult_plan::{
    Budget, LayerPlacement, PruneSpec, Pruned, RouterRule, RoutingBuf, Rule, Scoring, SimilarityAccumulator,
    SimilarityTable, Topology, prune,
};
use proptest::prelude::*;

use crate::{
    prune_reference::Token,
    support::{Case, expert_ids, placement, shape},
};

/// The rule by its number, because a table cannot travel inside a random [`Rule`].
fn rule(number: usize, table: &SimilarityTable) -> Rule<'_> {
    [Rule::RouterScore, Rule::Similarity(table), Rule::BestMass, Rule::LeastError][number]
}

fn table(case: &Case) -> SimilarityTable {
    let mut accumulator = SimilarityAccumulator::new(case.routing.num_experts);
    accumulator.add(&case.routing()).unwrap();
    accumulator.finish()
}

fn run(case: &Case, rule: Rule<'_>, budget: Budget, router: &RouterRule) -> Pruned {
    let spec = PruneSpec { rule, budget, router };
    prune(&case.routing(), &case.placement, case.topology(), spec).unwrap()
}

fn tokens<'a>(case: &'a Case, router: &'a RouterRule) -> impl Iterator<Item = Token<'a>> {
    let logits = case.routing.scores.as_ref().unwrap().chunks_exact(case.routing.num_experts);
    let ids = case.routing.expert_ids.chunks_exact(case.routing.top_k);
    ids.zip(logits).map(|(ids, logits)| Token { placement: &case.placement, logits, ids, router })
}

/// A layer whose routing has logits and the weights that the router rule gives. Most tokens have the top-k of their
/// logits, as routers do; some have other experts, as group-limited routers do.
fn layer() -> impl Strategy<Value = (Case, RouterRule)> {
    shape().prop_flat_map(|(num_experts, top_k, num_ranks)| {
        let token = (
            prop::collection::vec(-6.0f32..6.0, num_experts),
            prop::option::weighted(0.2, expert_ids(num_experts, top_k)),
            0u32..4,
        );
        let tokens = prop::collection::vec(token, 0..8);
        let rank_weights = prop::option::of(prop::collection::vec(0.1f32..=1.0, num_ranks));
        (placement(num_experts, num_ranks), rank_weights, tokens, router(num_experts)).prop_map(
            move |(placement, rank_weights, tokens, router)| {
                let placement = match rank_weights {
                    Some(weights) => placement.with_rank_weights(weights).unwrap(),
                    None => placement,
                };
                let mut routing =
                    RoutingBuf { num_experts, top_k, weights: Some(vec![]), ..RoutingBuf::default() };
                let (mut scores, mut occurrences) = (Vec::new(), Vec::new());
                for (logits, ids, n) in tokens {
                    let all: Vec<u16> = (0..num_experts as u16).collect();
                    let token = Token { placement: &placement, logits: &logits, ids: &all, router: &router };
                    let every_rank = (0..num_ranks as u16).collect();
                    let mut best = token.choose(Rule::RouterScore, &every_rank);
                    best.truncate(top_k);
                    let ids = ids.unwrap_or(best);
                    let weights = token.weights(&ids).into_iter().map(|w| w as f32);
                    routing.weights.as_mut().unwrap().extend(weights);
                    routing.expert_ids.extend(ids);
                    scores.extend(logits);
                    occurrences.push(n);
                }
                routing.scores = Some(scores);
                routing.occurrences = Some(occurrences);
                (Case { routing, placement }, router)
            },
        )
    })
}

fn router(num_experts: usize) -> impl Strategy<Value = RouterRule> {
    let scoring = prop::sample::select(vec![Scoring::Softmax, Scoring::Sigmoid]);
    let bias = prop::option::weighted(0.3, prop::collection::vec(-0.5f32..0.5, num_experts));
    (scoring, any::<bool>(), 0.5f32..3.0, bias).prop_map(
        |(scoring, norm_topk_prob, factor, selection_bias)| RouterRule {
            scoring,
            norm_topk_prob,
            routed_scaling_factor: factor,
            selection_bias,
        },
    )
}

fn budget() -> impl Strategy<Value = Budget> {
    prop_oneof![
        (1usize..=5).prop_map(|max_ranks| Budget::Fixed { max_ranks }),
        (1usize..=5, 0.05f64..=1.0).prop_map(|(max_ranks, share)| Budget::Adaptive { max_ranks, share }),
        (1usize..=5, 0.01f64..=1.5).prop_map(|(max_ranks, error)| Budget::Bounded { max_ranks, error }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn every_rule_is_its_definition((case, router) in layer(), number in 0usize..4, budget in budget()) {
        let table = table(&case);
        let rule = rule(number, &table);
        let pruned = run(&case, rule, budget, &router);
        let k = case.routing.top_k;
        let (before, after) = (case.routing.weights.as_ref().unwrap(), pruned.routing.weights.as_ref().unwrap());
        let [mut touched, mut replaced, mut extended, mut copies_before, mut copies_after] = [0u64; 5];
        let [mut original_mass, mut kept_mass, mut new_mass] = [0.0; 3];
        for (row, token) in tokens(&case, &router).enumerate() {
            let found = &pruned.routing.expert_ids[row * k..(row + 1) * k];
            let weights = &after[row * k..(row + 1) * k];
            let n = u64::from(case.routing.occurrences.as_ref().unwrap()[row]);

            let allowed = token.allowed(rule, budget);
            let ranks = allowed.map(|ranks| token.extend(ranks));
            let expected = ranks.as_ref().map(|ranks| token.choose(rule, ranks));
            let set = |ids: &[u16]| ids.iter().copied().collect::<BTreeSet<u16>>();
            match expected.filter(|expected| set(expected) != set(token.ids)) {
                Some(expected) => {
                    prop_assert_eq!(found, &expected[..], "row {}", row);
                    for (found, expected) in weights.iter().zip(token.weights(&expected)) {
                        prop_assert!((f64::from(*found) - expected).abs() <= 1e-6 * expected.abs());
                    }
                    touched += n;
                }
                None => {
                    prop_assert_eq!(found, token.ids, "row {} is left alone", row);
                    prop_assert_eq!(weights, &before[row * k..(row + 1) * k]);
                }
            }
            prop_assert_eq!(set(found).len(), k, "distinct experts");
            let max_ranks = budget.max_ranks();
            if ranks.is_some_and(|ranks| ranks.len() > max_ranks) {
                extended += n;
            } else {
                prop_assert!(token.visits(found) <= max_ranks);
            }
            let kept = || found.iter().copied().filter(|id| token.ids.contains(id));
            replaced += n * (k - kept().count()) as u64;
            copies_before += n * token.visits(token.ids) as u64;
            copies_after += n * token.visits(found) as u64;
            original_mass += n as f64 * token.mass(token.ids.iter().copied());
            kept_mass += n as f64 * token.mass(kept());
            new_mass += n as f64 * token.mass(found.iter().copied());
        }
        let stats = pruned.stats;
        prop_assert_eq!(stats.tokens, case.routing.occurrences.iter().flatten().map(|&n| u64::from(n)).sum::<u64>());
        prop_assert_eq!(stats.pairs, stats.tokens * k as u64);
        prop_assert_eq!((stats.touched_tokens, stats.replaced_experts), (touched, replaced));
        prop_assert_eq!(stats.extended_tokens, extended);
        prop_assert_eq!((stats.copies_before, stats.copies_after), (copies_before, copies_after));
        prop_assert!((stats.original_mass - original_mass).abs() < 1e-9);
        prop_assert!((stats.kept_mass - kept_mass).abs() < 1e-9);
        prop_assert!((stats.new_mass - new_mass).abs() < 1e-9);
    }

    #[test]
    fn all_ranks_is_the_same_routing((case, router) in layer(), number in 0usize..4, more in 0usize..2) {
        let table = table(&case);
        let budget = Budget::Fixed { max_ranks: case.placement.num_ranks() + more };
        let pruned = run(&case, rule(number, &table), budget, &router);
        prop_assert_eq!(pruned.routing, RoutingBuf { scores: None, ..case.routing.clone() });
        prop_assert_eq!(pruned.stats.touched_tokens, 0);
        prop_assert_eq!(pruned.stats.retained_mass(), 1.0);
        prop_assert_eq!(pruned.stats.relative_mass(), 1.0);
    }

    #[test]
    fn best_mass_keeps_at_least_what_the_others_keep((case, router) in layer(), max_ranks in 1usize..4) {
        let budget = Budget::Fixed { max_ranks };
        // By mass alone, whatever the ranks weigh.
        let weights = vec![1.0; case.placement.num_ranks()];
        let case = Case { placement: case.placement.clone().with_rank_weights(weights).unwrap(), ..case };
        let best = run(&case, Rule::BestMass, budget, &router).stats;
        let table = table(&case);
        // Router-score may drop a reachable expert of a token whose experts are not its top-k; similarity never does.
        let other = run(&case, Rule::Similarity(&table), budget, &router).stats;
        // A token that needs more ranks gets them by its first choice of ranks, so then nothing is promised.
        if best.extended_tokens == 0 && other.extended_tokens == 0 {
            prop_assert!(best.kept_mass >= other.kept_mass - 1e-12, "{} < {}", best.kept_mass, other.kept_mass);
        }
    }

    #[test]
    fn chunks_of_tokens_add_up((case, router) in layer(), budget in budget()) {
        let whole = run(&case, Rule::BestMass, budget, &router);
        let (mut stats, mut ids) = (occult_plan::PruneStats::default(), Vec::new());
        for row in 0..case.routing.num_tokens() {
            let (k, e) = (case.routing.top_k, case.routing.num_experts);
            let one = RoutingBuf {
                expert_ids: case.routing.expert_ids[row * k..(row + 1) * k].to_vec(),
                weights: None,
                scores: case.routing.scores.as_ref().map(|s| s[row * e..(row + 1) * e].to_vec()),
                occurrences: case.routing.occurrences.as_ref().map(|o| vec![o[row]]),
                ..case.routing.clone()
            };
            let pruned = run(&Case { routing: one, ..case.clone() }, Rule::BestMass, budget, &router);
            prop_assert_eq!(pruned.routing.weights, None, "no weights in, none out");
            stats.merge(&pruned.stats);
            ids.extend(pruned.routing.expert_ids);
        }
        prop_assert_eq!(ids, whole.routing.expert_ids);
        prop_assert_eq!(stats, whole.stats);
    }
}

/// Ranks {0, 1}, {2, 3}, {4, 5}; the token's experts by score: 0, 2, 4 (logits 3.0, 2.9, 2.8).
fn example() -> Case {
    let routing = RoutingBuf {
        num_experts: 6,
        top_k: 3,
        expert_ids: vec![2, 0, 4],
        scores: Some(vec![3.0, 1.0, 2.9, 2.0, 2.8, 0.0]),
        ..RoutingBuf::default()
    };
    Case { routing, placement: LayerPlacement::from_rank_experts(6, &[[0, 1], [2, 3], [4, 5]]).unwrap() }
}

#[test]
fn rules_by_example() {
    let mut table = vec![0.0; 36];
    table[4 * 6 + 1] = 0.8;
    table[4 * 6 + 3] = 0.7;
    table[4 * 6 + 5] = 0.9;
    let table = SimilarityTable::from_values(6, table).unwrap();
    let two = Budget::Fixed { max_ranks: 2 };
    let olmoe = RouterRule::softmax(false);
    // Ranks 0 and 1 are allowed. The best other score is expert 3's; most like expert 4 is expert 5, which is not
    // allowed, then expert 1.
    assert_eq!(run(&example(), Rule::RouterScore, two, &olmoe).routing.expert_ids, [0, 2, 3]);
    assert_eq!(run(&example(), Rule::Similarity(&table), two, &olmoe).routing.expert_ids, [0, 2, 1]);
    // With expert 4 beside expert 2, ranks 1 and 0 keep everything.
    let together = LayerPlacement::from_rank_experts(6, &[&[0][..], &[2, 4], &[1, 3, 5]]).unwrap();
    let together = Case { placement: together, ..example() };
    let untouched = run(&together, Rule::RouterScore, two, &olmoe);
    assert_eq!(untouched.routing.expert_ids, [2, 0, 4], "in the order in which they came");
    // One rank: router-score takes that of expert 0 and is short of experts; best-mass takes rank 1, short of one too.
    let one = Budget::Fixed { max_ranks: 1 };
    let pruned = run(&together, Rule::BestMass, one, &olmoe);
    assert_eq!(pruned.stats.extended_tokens, 1);
    assert_eq!(pruned.routing.expert_ids, [2, 0, 4], "the extension reaches expert 0 again");
}

/// Probabilities .5, .3, .28 (before they sum to one): .3 + .28 is more than .5, .3^2 + .28^2 is less than .5^2.
#[test]
fn least_error_prefers_the_best_expert_to_two_lesser_ones() {
    let routing = RoutingBuf {
        num_experts: 5,
        top_k: 3,
        expert_ids: vec![0, 1, 2],
        scores: Some([0.5f32, 0.3, 0.28, 0.02, 0.01].map(f32::ln).to_vec()),
        ..RoutingBuf::default()
    };
    let placement = LayerPlacement::from_rank_experts(5, &[&[0, 3, 4][..], &[1, 2]]).unwrap();
    let case = Case { routing, placement };
    let router = RouterRule::softmax(true);
    let one = Budget::Fixed { max_ranks: 1 };
    assert_eq!(run(&case, Rule::LeastError, one, &router).routing.expert_ids, [0, 3, 4]);
    let best_mass = run(&case, Rule::BestMass, one, &router).stats;
    assert_eq!(best_mass.extended_tokens, 1, "rank 1 alone is short of an expert");
    // Off rank 0 lie .3 and .28 of 1.08: a weight of .38.
    let copies = |error| {
        let budget = Budget::Bounded { max_ranks: 2, error };
        run(&case, Rule::LeastError, budget, &router).stats.copies_per_token_after()
    };
    assert_eq!((copies(0.39), copies(0.37)), (1.0, 2.0));
}

#[test]
fn best_mass_prefers_two_good_experts_to_the_best_one() {
    let placement = LayerPlacement::from_rank_experts(6, &[&[0, 1][..], &[2, 4, 3], &[5]]).unwrap();
    let case = Case { placement, ..example() };
    let one = Budget::Fixed { max_ranks: 1 };
    let pruned = run(&case, Rule::BestMass, one, &RouterRule::softmax(true));
    assert_eq!(pruned.routing.expert_ids, [2, 4, 3]);
    assert_eq!(pruned.stats.copies_per_token_after(), 1.0);
    let p = [3.0f32, 2.9, 2.8, 2.0].map(|logit| f64::from(logit).exp());
    let expected = (p[1] + p[2]) / (p[0] + p[1] + p[2]);
    assert!((pruned.stats.retained_mass() - expected).abs() < 1e-12);
    let expected = (p[1] + p[2] + p[3]) / (p[0] + p[1] + p[2]);
    assert!((pruned.stats.relative_mass() - expected).abs() < 1e-12);
}

/// Rank 0 holds what all tokens like best; a third of them like it hardly more than rank 1.
#[test]
fn balanced_pruning_moves_those_who_lose_least() {
    let (num_tokens, e) = (90, 6);
    let mut routing = RoutingBuf { num_experts: e, top_k: 2, ..RoutingBuf::default() };
    let mut scores = Vec::new();
    for token in 0..num_tokens {
        // Experts 0 and 2 or 0 and 4, on ranks 0 and 1 or 0 and 2.
        let (other, near) = (if token % 2 == 0 { 2 } else { 4 }, token % 3 == 0);
        let mut row = vec![0.0f32; e];
        (row[0], row[other]) = (3.0 + token as f32 / 1000.0, if near { 2.9 } else { 1.0 });
        routing.expert_ids.extend([0, other as u16]);
        scores.extend(row);
    }
    routing.scores = Some(scores);
    let placement = LayerPlacement::from_rank_experts(e, &[[0, 1], [2, 3], [4, 5]]).unwrap();
    let case = Case { routing, placement };
    let (one, router) = (Budget::Fixed { max_ranks: 1 }, RouterRule::softmax(true));
    let try_with = |rule, load_cap| {
        let spec = PruneSpec { rule, budget: one, router: &router };
        prune::balance(&case.routing(), &case.placement, case.topology(), spec, load_cap)
    };
    let plain = run(&case, Rule::BestMass, one, &router).stats;
    // All on rank 0. At 2.1 the third that hardly minds moves, and nobody else.
    let balanced = try_with(Rule::BestMass, 2.1).unwrap();
    assert_eq!(balanced.load_max_over_mean, 2.0);
    let moved = Case { placement: balanced.placement.clone(), ..case.clone() };
    let pruned = run(&moved, Rule::BestMass, one, &router);
    assert_eq!(pruned.stats, balanced.stats);
    for (token, ids) in pruned.routing.expert_ids.chunks_exact(2).enumerate() {
        let stays = if token % 3 == 0 { [2, 4].contains(&ids[0]) } else { ids[0] == 0 };
        assert!(stays, "token {token}: {ids:?}");
    }
    assert!(balanced.stats.retained_mass() < plain.retained_mass());
    // With a cap that is kept anyway nothing changes; one that cannot be kept is come as near to as can be.
    assert_eq!(try_with(Rule::LeastError, 3.0).unwrap().stats, plain);
    let even = try_with(Rule::BestMass, 1.0).unwrap();
    assert!(even.load_max_over_mean <= 2.0, "{}", even.load_max_over_mean);
    let messages = [(Rule::RouterScore, 1.1), (Rule::BestMass, 0.9), (Rule::BestMass, f64::NAN)];
    let messages = messages.map(|(rule, cap)| try_with(rule, cap).unwrap_err().to_string());
    assert_eq!(messages[0], "the rule that loads ranks evenly is another, expected best-mass or least-error");
    assert_eq!(messages[1], "load cap (max/mean) is 0.9, expected a number from 1");
    assert_eq!(messages[2], "load cap (max/mean) is NaN, expected a number from 1");
    let weights = |weights: &[f32]| case.placement.clone().with_rank_weights(weights.to_vec());
    assert!(weights(&[1.0]).unwrap_err().to_string().contains("expected 3 values, found 1"));
    let error = weights(&[1.0, 0.0, 1.0]).unwrap_err().to_string();
    assert_eq!(error, "weights of the ranks is 0 of rank 1, expected above 0, finite");
}

#[test]
fn an_adaptive_budget_gives_easy_tokens_one_rank() {
    let mut case = example();
    case.routing.expert_ids = vec![0, 2, 0, 2];
    case.routing.top_k = 2;
    // The first token is sure of expert 0, the second is not.
    case.routing.scores = Some(vec![9.0, 1.0, 2.0, 0.0, 0.0, 0.0, 2.1, 1.0, 2.0, 0.0, 0.0, 0.0]);
    let budget = Budget::Adaptive { max_ranks: 2, share: 0.9 };
    for rule in [Rule::RouterScore, Rule::BestMass] {
        let pruned = run(&case, rule, budget, &RouterRule::softmax(false));
        assert_eq!(pruned.routing.expert_ids, [0, 1, 0, 2]);
        assert_eq!((pruned.stats.copies_before, pruned.stats.copies_after), (4, 3));
    }
}

#[test]
fn a_share_that_is_just_met_is_enough() {
    let mut case = example();
    case.routing.expert_ids = vec![0, 2];
    case.routing.top_k = 2;
    case.routing.scores = Some(vec![0.0; 6]);
    let ids = |share| {
        let budget = Budget::Adaptive { max_ranks: 2, share };
        run(&case, Rule::BestMass, budget, &RouterRule::softmax(false)).routing.expert_ids
    };
    assert_eq!(ids(0.5), [0, 1]);
    assert_eq!(ids(0.51), [0, 2]);
}

/// Rank 0 has the two best experts, so a greedy search would start there; ranks 1 and 2 together have four.
#[test]
fn best_mass_of_few_replicas_is_exact() {
    let ranks = [&[1, 2][..], &[0, 1, 5], &[2, 3], &[4]];
    let placement = LayerPlacement::from_rank_experts(6, &ranks).unwrap();
    let routing = RoutingBuf {
        num_experts: 6,
        top_k: 5,
        expert_ids: vec![0, 1, 2, 3, 4],
        scores: Some(vec![1.0, 1.1, 1.1, 0.8, 0.9, 0.5]),
        ..RoutingBuf::default()
    };
    let case = Case { routing, placement };
    let two = Budget::Fixed { max_ranks: 2 };
    let pruned = run(&case, Rule::BestMass, two, &RouterRule::softmax(false));
    assert_eq!(pruned.routing.expert_ids, [1, 2, 0, 3, 5]);
}

/// Too many sets of ranks to try: the greedy search must still keep `1 - 1/e` of the mass of any set; here of the best.
#[test]
fn best_mass_of_many_replicas_keeps_its_bound() {
    let num_ranks = 20;
    // Expert e is on ranks e % 20 and (7 e + 3) % 20; top-16 of 40, 5 ranks: C(20, 5) = 15,504 sets.
    let mut ranks = vec![BTreeSet::new(); num_ranks];
    for e in 0..40u16 {
        ranks[usize::from(e) % num_ranks].insert(e);
        ranks[(7 * usize::from(e) + 3) % num_ranks].insert(e);
    }
    let ranks: Vec<Vec<u16>> = ranks.into_iter().map(|r| r.into_iter().collect()).collect();
    let placement = LayerPlacement::from_rank_experts(40, &ranks).unwrap();
    let logits: Vec<f32> = (0..40).map(|e| (e * 17 % 40) as f32 / 10.0).collect();
    let mut ids: Vec<u16> = (0..40).collect();
    ids.sort_by(|&a, &b| logits[usize::from(b)].total_cmp(&logits[usize::from(a)]));
    ids.truncate(16);

    let mass = |set: u32| -> f64 {
        let reached = ids.iter().filter(|&&id| placement.ranks_of(id).iter().any(|r| set >> r & 1 == 1));
        reached.map(|&id| f64::from(logits[usize::from(id)]).exp()).sum()
    };
    let best = (0..1u32 << num_ranks).filter(|s| s.count_ones() == 5).map(mass).fold(0.0, f64::max);
    let total: f64 = ids.iter().map(|&id| f64::from(logits[usize::from(id)]).exp()).sum();

    let routing = RoutingBuf {
        num_experts: 40,
        top_k: 16,
        expert_ids: ids.clone(),
        scores: Some(logits.clone()),
        ..RoutingBuf::default()
    };
    let case = Case { routing, placement: placement.clone() };
    let stats = run(&case, Rule::BestMass, Budget::Fixed { max_ranks: 5 }, &RouterRule::softmax(false)).stats;
    assert!(best < total, "five ranks do not hold everything");
    assert!(stats.retained_mass() >= (1.0 - (-1.0f64).exp()) * best / total);
    assert!(stats.retained_mass() < 1.0);
}

#[test]
fn what_is_missing_or_makes_no_sense_is_named() {
    let (case, router) = (example(), RouterRule::softmax(false));
    let try_with = |routing: &RoutingBuf, rule: Rule<'_>, budget: Budget, router: &RouterRule| {
        let topology = Topology::flat(3).unwrap();
        let spec = PruneSpec { rule, budget, router };
        let result = prune(&routing.view().unwrap(), &case.placement, topology, spec);
        result.unwrap_err().to_string()
    };
    let two = Budget::Fixed { max_ranks: 2 };
    let without = RoutingBuf { scores: None, ..case.routing.clone() };
    assert_eq!(
        try_with(&without, Rule::BestMass, two, &router),
        "collaboration pruning needs router logits of all experts (scores [T, E]), which this routing does not have"
    );
    let none = Budget::Fixed { max_ranks: 0 };
    assert_eq!(try_with(&case.routing, Rule::BestMass, none, &router), "max_ranks is 0, expected at least 1");
    for share in [0.0, 1.5, f64::NAN] {
        let budget = Budget::Adaptive { max_ranks: 2, share };
        let message = try_with(&case.routing, Rule::BestMass, budget, &router);
        assert_eq!(message, format!("share of routing mass is {share}, expected above 0, at most 1"));
    }
    for error in [0.0, f64::INFINITY, f64::NAN] {
        let budget = Budget::Bounded { max_ranks: 2, error };
        let message = try_with(&case.routing, Rule::LeastError, budget, &router);
        assert_eq!(message, format!("bound on the weight lost is {error}, expected above 0, finite"));
    }
    let table = SimilarityTable::from_values(2, vec![1.0; 4]).unwrap();
    assert_eq!(
        try_with(&case.routing, Rule::Similarity(&table), two, &router),
        "experts of the similarity table: expected 6 values, found 2"
    );
    let bias = RouterRule { selection_bias: Some(vec![0.0; 5]), ..router.clone() };
    assert_eq!(
        try_with(&case.routing, Rule::BestMass, two, &bias),
        "selection_bias [E]: expected 6 values, found 5"
    );
    let factor = RouterRule { routed_scaling_factor: f32::NAN, ..router.clone() };
    assert_eq!(
        try_with(&case.routing, Rule::BestMass, two, &factor),
        "routed_scaling_factor is NaN, expected finite"
    );
    let other = RoutingBuf { num_experts: 7, scores: Some(vec![0.0; 7]), ..case.routing.clone() };
    assert_eq!(
        try_with(&other, Rule::BestMass, two, &router),
        "placement: it is of 6 experts, the routing is of 7"
    );
}
