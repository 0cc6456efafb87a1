//! The similarity table against its formula.

use occult_plan::{PlanError, RoutingBuf, SimilarityAccumulator, SimilarityTable};
use proptest::prelude::*;

/// Top-1 routing with these logits, `[T, E]`.
fn routing(num_experts: usize, logits: &[f32], occurrences: Option<Vec<u32>>) -> RoutingBuf {
    let tokens = logits.len() / num_experts;
    RoutingBuf {
        num_experts,
        top_k: 1,
        expert_ids: vec![0; tokens],
        scores: Some(logits.to_vec()),
        occurrences,
        ..RoutingBuf::default()
    }
}

fn table(num_experts: usize, chunks: &[&[f32]]) -> SimilarityTable {
    let mut accumulator = SimilarityAccumulator::new(num_experts);
    for chunk in chunks {
        accumulator.add(&routing(num_experts, chunk, None).view().unwrap()).unwrap();
    }
    accumulator.finish()
}

fn reference(num_experts: usize, logits: &[f32]) -> Vec<f64> {
    let column = |e: usize| logits.iter().skip(e).step_by(num_experts).map(|&l| f64::from(l));
    let dot = |i, j| column(i).zip(column(j)).map(|(a, b)| a * b).sum::<f64>();
    let entry =
        |i, j| if dot(i, i) * dot(j, j) > 0.0 { dot(i, j).powi(2) / (dot(i, i) * dot(j, j)) } else { 0.0 };
    (0..num_experts * num_experts).map(|ij| entry(ij / num_experts, ij % num_experts)).collect()
}

fn logits() -> impl Strategy<Value = (usize, Vec<f32>, usize)> {
    (1usize..=11, 0usize..300).prop_flat_map(|(num_experts, tokens)| {
        (Just(num_experts), prop::collection::vec(-8.0f32..8.0, num_experts * tokens), 0..=tokens)
    })
}

proptest! {
    #[test]
    fn equals_the_formula_and_does_not_depend_on_chunks((num_experts, logits, cut) in logits()) {
        let whole = table(num_experts, &[&logits]);
        for (found, expected) in whole.as_slice().iter().zip(reference(num_experts, &logits)) {
            prop_assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} != {expected}");
        }
        let (first, second) = logits.split_at(cut * num_experts);
        prop_assert_eq!(table(num_experts, &[first, second]), whole, "bit for bit");
    }

    #[test]
    fn a_row_counts_as_often_as_it_occurs(
        logits in prop::collection::vec(-8.0f32..8.0, 5 * 3),
        occurrences in prop::collection::vec(0u32..4, 3),
    ) {
        let repeated: Vec<f32> = (logits.chunks_exact(5).zip(&occurrences))
            .flat_map(|(row, &n)| row.repeat(n as usize))
            .collect();
        let mut accumulator = SimilarityAccumulator::new(5);
        accumulator.add(&routing(5, &logits, Some(occurrences)).view().unwrap()).unwrap();
        for (a, b) in accumulator.finish().as_slice().iter().zip(table(5, &[&repeated]).as_slice()) {
            prop_assert!((a - b).abs() < 1e-6, "{a} != {b}");
        }
    }
}

#[test]
fn equal_opposite_and_unrelated_columns() {
    // Columns: x, 2x, -x, one that is orthogonal to x, zero.
    let found = table(5, &[&[1.0, 2.0, -1.0, 3.0, 0.0, 3.0, 6.0, -3.0, -1.0, 0.0]]);
    let expected = [
        [1.0, 1.0, 1.0, 0.0, 0.0],
        [1.0, 1.0, 1.0, 0.0, 0.0],
        [1.0, 1.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 1.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0],
    ];
    assert_eq!(found.as_slice(), expected.concat());
    assert_eq!(found.get(0, 2), 1.0);
}

#[test]
fn no_tokens_is_a_table_of_zeros() {
    assert_eq!(SimilarityAccumulator::new(3).finish().as_slice(), [0.0; 9]);
}

#[test]
fn missing_logits_and_wrong_values_are_named() {
    let mut accumulator = SimilarityAccumulator::new(2);
    let without = RoutingBuf { scores: None, ..routing(2, &[0.0, 1.0], None) };
    let error = accumulator.add(&without.view().unwrap()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the similarity table needs router logits of all experts (scores [T, E]), which this routing does not have"
    );
    let error = accumulator.add(&routing(3, &[0.0; 3], None).view().unwrap()).unwrap_err();
    assert_eq!(error, PlanError::Shape { what: "experts of the similarity table", expected: 2, found: 3 });

    SimilarityTable::from_values(2, vec![1.0; 3]).unwrap_err();
    let error = SimilarityTable::from_values(2, vec![1.0, 0.0, f32::NAN, 1.0]).unwrap_err();
    assert_eq!(error.to_string(), "similarity is NaN at [1, 0], expected 0 to 1");
    assert_eq!(SimilarityTable::from_values(2, vec![1.0; 4]).unwrap().row(1), [1.0, 1.0]);
}
