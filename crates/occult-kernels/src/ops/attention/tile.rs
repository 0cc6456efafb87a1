//! What forward and backward do to a tile of scores.

use super::Inputs;

/// Query rows of a tile, at most.
pub(super) const LANES: usize = 64;
/// Keys of a tile, at most.
pub(super) const KEYS: usize = 64;

/// A block of query rows of one key head.
pub(super) struct Block {
    pub(super) b: usize,
    pub(super) kv_head: usize,
    /// First row.
    pub(super) row: usize,
    /// Rows; the lanes above are padding.
    pub(super) count: usize,
    /// Lanes: `count` up to whole registers.
    pub(super) lanes: usize,
    /// Keys `first .. end` that each lane sees. Lanes of padding see what the last row sees.
    ranges: Vec<(usize, usize)>,
}

impl Block {
    pub(super) fn new(inputs: &Inputs<'_>, b: usize, kv_head: usize, row: usize) -> Self {
        let count = LANES.min(inputs.rows() - row);
        let lanes = count.next_multiple_of(16);
        let range = |lane: usize| {
            let (_, t) = inputs.head_and_query(kv_head, row + lane.min(count - 1));
            inputs.shape.range(b, t, inputs.keys)
        };
        Self { b, kv_head, row, count, lanes, ranges: (0..lanes).map(range).collect() }
    }

    /// Tiles of keys that any lane sees: (first key, number of keys).
    pub(super) fn key_tiles(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let first = self.ranges.iter().map(|r| r.0).min().unwrap_or(0);
        let end = self.ranges.iter().map(|r| r.1).max().unwrap_or(0);
        (first..end).step_by(KEYS).map(move |key| (key, KEYS.min(end - key)))
    }

    /// Sets the scores `[n, lanes]` of keys `key .. key + n` to minus infinity where a lane does not see the key.
    pub(super) fn mask(&self, key: usize, n: usize, scores: &mut [f32]) {
        for (lane, &(first, end)) in self.ranges.iter().enumerate() {
            let seen = first.clamp(key, key + n)..end.clamp(key, key + n);
            for hidden in (key..seen.start).chain(seen.end.max(seen.start)..key + n) {
                scores[(hidden - key) * self.lanes + lane] = f32::NEG_INFINITY;
            }
        }
    }

    /// The rows of queries as lanes, scaled: `[d_k, lanes]`, zeros in lanes of padding.
    pub(super) fn queries(&self, inputs: &Inputs<'_>, out: &mut [f32]) {
        out[..inputs.dk * self.lanes].fill(0.0);
        for lane in 0..self.count {
            let (head, t) = inputs.head_and_query(self.kv_head, self.row + lane);
            for (c, x) in inputs.q.row(self.b, head, t).iter().enumerate() {
                out[c * self.lanes + lane] = x * inputs.shape.scale;
            }
        }
    }
}
