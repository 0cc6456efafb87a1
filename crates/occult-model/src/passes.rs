//! Many sequences in few forward passes.

use std::ops::Range;

use crate::batch::Batch;
use crate::decoder::{Decoder, Logits};
use crate::error::Result;
use crate::moe::{RoutingObserver, RoutingRecord};

/// Rows of a pass that are a good choice on CPU: enough to read every weight rarely, few enough for the attention scores of
/// a long context to fit in memory.
pub const PASS_ROWS: usize = 1024;

/// One forward pass of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pass {
    /// Which sequences; one when they are fed in pieces.
    pub sequences: Range<usize>,
    /// Which positions, counted from the start of the longest of the sequences.
    pub positions: Range<usize>,
}

impl Pass {
    /// Rows of the pass, padding included.
    pub fn rows(&self) -> usize {
        self.sequences.len() * self.positions.len()
    }
}

/// Splits sequences of these lengths into passes of at most `rows` rows (at least 1): a longer sequence is fed in pieces,
/// and short neighbours share a pass, padded on the left to the longest of them, as long as at most a quarter of its rows
/// is padding. Sequences and positions stay in order.
pub fn passes(lengths: &[usize], rows: usize) -> Vec<Pass> {
    shared_passes(lengths, rows, rows)
}

/// [`passes`] of at most `rows` rows in which several sequences make at most `share` rows.
pub(crate) fn shared_passes(lengths: &[usize], share: usize, rows: usize) -> Vec<Pass> {
    let rows = rows.max(1);
    let mut passes = Vec::new();
    let mut from = 0;
    while from < lengths.len() {
        let (mut to, mut longest, mut tokens) = (from + 1, lengths[from], lengths[from]);
        while let Some(&next) = lengths.get(to) {
            let rectangle = longest.max(next) * (to + 1 - from);
            if rectangle > share || 4 * (tokens + next) < 3 * rectangle {
                break;
            }
            (to, longest, tokens) = (to + 1, longest.max(next), tokens + next);
        }
        // Only a single sequence can be longer than `rows`.
        for start in (0..longest).step_by(rows) {
            passes.push(Pass { sequences: from..to, positions: start..longest.min(start + rows) });
        }
        from = to;
    }
    passes
}

/// Is shown the routing of a pass.
pub type PassObserver<'a> = dyn FnMut(&Pass, &RoutingRecord<'_>) -> Result<()> + 'a;

/// Runs every sequence through the model in [`passes`] of at most `rows` rows. `observe` is called for every MoE layer of a
/// pass, `each` at its end with the logits, `[B, T, V]` or `[B, 1, V]`, row after row. How sequences share passes changes results by the
/// rounding of sums only.
///
/// On a model whose experts are spread over ranks this is collective: every rank gives the same sequences, passes are dealt
/// out to the ranks, and rank 0 alone is shown the results. Passes of different sequences may then come to `each` in any
/// order; `observe` sees the sequences in theirs.
pub fn for_each_pass<S: AsRef<[u32]>>(
    model: &Decoder,
    sequences: &[S],
    rows: usize,
    logits: Logits,
    mut observe: Option<&mut PassObserver<'_>>,
    each: &mut dyn FnMut(&Pass, &[f32]) -> Result<()>,
) -> Result<()> {
    if let Some(ranks) = model.ranks() {
        return crate::ranks::for_each_pass(model, ranks, sequences, rows, logits, observe, each);
    }
    let lengths: Vec<usize> = sequences.iter().map(|s| s.as_ref().len()).collect();
    let mut cache = None;
    for pass in passes(&lengths, rows) {
        let parts: Vec<&[u32]> = match &sequences[pass.sequences.clone()] {
            [one] => vec![&one.as_ref()[pass.positions.clone()]],
            several => several.iter().map(S::as_ref).collect(),
        };
        if pass.positions.start == 0 {
            let in_pieces = lengths[pass.sequences.start] > pass.positions.end;
            cache = in_pieces.then(|| model.new_cache());
        }
        let mut observer = observe.as_deref_mut().map(|observe| |r: &RoutingRecord<'_>| observe(&pass, r));
        let observer = observer.as_mut().map(|o| o as &mut dyn RoutingObserver);
        let result = model.forward(&Batch::new(&parts)?, cache.as_mut(), logits, observer)?;
        each(&pass, &result.flatten_all()?.to_vec1::<f32>()?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn short_neighbours_share_and_long_ones_are_cut() {
        let pass = |sequences, positions| Pass { sequences, positions };
        assert_eq!(passes(&[4, 4, 4], 8), [pass(0..2, 0..4), pass(2..3, 0..4)]);
        assert_eq!(
            passes(&[20, 3], 8),
            [pass(0..1, 0..8), pass(0..1, 8..16), pass(0..1, 16..20), pass(1..2, 0..3)]
        );
        // Half of the rows would be padding.
        assert_eq!(passes(&[8, 1], 64), [pass(0..1, 0..8), pass(1..2, 0..1)]);
        assert!(passes(&[], 8).is_empty());
    }

    proptest! {
        #[test]
        fn every_position_comes_once_and_in_order(
            lengths in prop::collection::vec(1usize..40, 0..30),
            rows in 1usize..80,
        ) {
            let mut done = vec![0; lengths.len()];
            for p in passes(&lengths, rows) {
                prop_assert!(p.rows() <= rows.max(1) && !p.positions.is_empty());
                let tokens: usize = lengths[p.sequences.clone()].iter().sum();
                if p.sequences.len() > 1 {
                    prop_assert!(4 * tokens >= 3 * p.rows() && p.positions.start == 0);
                }
                for (s, done) in done.iter_mut().enumerate() {
                    if p.sequences.contains(&s) {
                        prop_assert_eq!(*done, p.positions.start);
                        *done = p.positions.end.min(lengths[s]);
                    } else if s < p.sequences.start {
                        prop_assert_eq!(*done, lengths[s]);
                    }
                }
            }
            prop_assert_eq!(done, lengths);
        }
    }
}
