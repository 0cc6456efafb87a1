//! Which sequences belong to which step and rank.
//!
//! The run's place in the data is one number: how many sequences all ranks together have consumed since the beginning. The
//! order of an epoch is a function of (seed, epoch), so nothing else has to be saved, and a run that goes on with another
//! number of ranks goes on with the same next sequence.

use crate::data::IGNORE;
use crate::data::pack::{PADDING, Packed};
use crate::data::store::{NOT_LEARNED, TokenStore};
use crate::error::{Result, TrainError};
use crate::random::{Permutation, key};

/// B sequences of L inputs, rows after another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// B.
    pub num_sequences: usize,
    /// L.
    pub length: usize,
    /// [B, L] inputs; 0 in padding.
    pub tokens: Vec<u32>,
    /// [B, L] what follows each input; [`IGNORE`] where nothing is learned.
    pub targets: Vec<u32>,
    /// [B, L] position within the segment, from 0.
    pub positions: Vec<u32>,
    /// [B, L] segment within the sequence, from 0 and ascending; [`PADDING`] at the end. Attention stays inside a segment.
    pub segments: Vec<u32>,
}

impl Batch {
    /// How many targets are learned.
    pub fn num_targets(&self) -> u64 {
        self.targets.iter().filter(|t| **t != IGNORE).count() as u64
    }

    /// How many inputs are not padding.
    pub fn num_inputs(&self) -> u64 {
        self.segments.iter().filter(|s| **s != PADDING).count() as u64
    }

    /// Cuts the batch into `pieces` batches of consecutive sequences, the first ones larger where it does not divide; the
    /// last ones are empty when there are more pieces than sequences.
    pub fn split(&self, pieces: usize) -> Vec<Batch> {
        let piece = |i: usize| {
            let rows = share(self.num_sequences, i, pieces);
            let cut = |v: &[u32]| v[rows.start * self.length..rows.end * self.length].to_vec();
            Batch {
                num_sequences: rows.len(),
                length: self.length,
                tokens: cut(&self.tokens),
                targets: cut(&self.targets),
                positions: cut(&self.positions),
                segments: cut(&self.segments),
            }
        };
        (0..pieces).map(piece).collect()
    }
}

/// Reads batches of packed sequences.
#[derive(Debug)]
pub struct Loader {
    store: TokenStore,
    packed: Packed,
    /// `None`: in the order of the files.
    seed: Option<u64>,
}

/// The items of rank `rank` when `count` items are dealt to `world` ranks in consecutive runs: the first ranks get one more
/// where it does not divide.
pub fn share(count: usize, rank: usize, world: usize) -> std::ops::Range<usize> {
    let (each, rest) = (count / world, count % world);
    let start = rank * each + rank.min(rest);
    start..start + each + usize::from(rank < rest)
}

impl Loader {
    /// Shuffles by `seed`, or keeps the files' order where there is none.
    pub fn new(store: TokenStore, packed: Packed, seed: Option<u64>) -> Self {
        Self { store, packed, seed }
    }

    /// The packed sequences.
    pub fn packed(&self) -> &Packed {
        &self.packed
    }

    /// Which sequence is the `at`-th of the whole run.
    pub fn sequence_at(&self, at: u64) -> u64 {
        let n = self.packed.num_sequences() as u64;
        let (epoch, within) = (at / n, at % n);
        let shuffled = self.seed.and_then(|seed| Permutation::new(n, key(&[seed, epoch])).at(within));
        shuffled.unwrap_or(within)
    }

    /// The part of rank `rank` of `world` of the step that consumes sequences `consumed..consumed + global`. A rank gets an
    /// empty batch when there are more ranks than sequences.
    pub fn batch(&self, consumed: u64, global: usize, rank: usize, world: usize) -> Result<Batch> {
        if rank >= world {
            return Err(TrainError::request(format!("rank {rank} of {world}")));
        }
        let mine = share(global, rank, world);
        let length = self.packed.length();
        let total = mine.len() * length;
        let mut batch = Batch {
            num_sequences: mine.len(),
            length,
            tokens: Vec::with_capacity(total),
            targets: Vec::with_capacity(total),
            positions: Vec::with_capacity(total),
            segments: Vec::with_capacity(total),
        };
        for at in mine {
            self.append(self.sequence_at(consumed + at as u64), &mut batch)?;
        }
        Ok(batch)
    }

    fn append(&self, sequence: u64, batch: &mut Batch) -> Result<()> {
        let end = batch.tokens.len() + batch.length;
        for (segment, part) in self.packed.sequence(sequence as usize).iter().enumerate() {
            let stored = self.store.read(part.start, part.len as usize + 1)?;
            for (position, pair) in stored.windows(2).enumerate() {
                let learned = pair[1] & NOT_LEARNED == 0;
                batch.tokens.push(pair[0] & !NOT_LEARNED);
                batch.targets.push(if learned { pair[1] } else { IGNORE });
                batch.positions.push(position as u32);
                batch.segments.push(segment as u32);
            }
        }
        batch.tokens.resize(end, 0);
        batch.targets.resize(end, IGNORE);
        batch.positions.resize(end, 0);
        batch.segments.resize(end, PADDING);
        Ok(())
    }
}
