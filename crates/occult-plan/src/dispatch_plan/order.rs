//! The entries of one token in ascending slot order, which is (rank, local expert) order.

/// Up to this many slots a bitmap is swept per token, beyond it the token's keys are sorted.
const MAX_BITMAP_SLOTS: usize = 1024;

/// Orders the few entries of one token. A bitmap is filled and swept, which has no unpredictable branches; that is
/// several times faster than comparing.
#[derive(Debug, Clone, Default)]
pub(super) struct SlotOrder {
    /// One bit per slot, all zero between tokens. Empty when there are too many slots.
    bits: Vec<u64>,
    /// Entry of each slot that is set in `bits`.
    entry: Vec<u32>,
    keys: Vec<u64>,
}

impl SlotOrder {
    pub(super) fn reset(&mut self, num_slots: usize) {
        self.bits.clear();
        self.entry.clear();
        if num_slots <= MAX_BITMAP_SLOTS {
            self.bits.resize(num_slots.div_ceil(64), 0);
            self.entry.resize(self.bits.len() * 64, 0);
        }
    }

    /// Calls `visit(slot, entry)` for the slots of one token, ascending. `slots` are distinct and below `num_slots`;
    /// entry `i` of `slots` is `first_entry + i`.
    #[inline(always)]
    pub(super) fn for_each(&mut self, slots: &[u32], first_entry: u32, mut visit: impl FnMut(usize, u32)) {
        if self.bits.is_empty() {
            self.keys.clear();
            self.keys.extend(slots.iter().zip(0u64..).map(|(&s, i)| u64::from(s) << 32 | i));
            self.keys.sort_unstable();
            for &key in &self.keys {
                visit((key >> 32) as usize, first_entry + key as u32);
            }
            return;
        }
        for (&slot, entry) in slots.iter().zip(first_entry..) {
            self.bits[slot as usize / 64] |= 1 << (slot % 64);
            self.entry[slot as usize] = entry;
        }
        for (i, (word, entries)) in self.bits.iter_mut().zip(self.entry.chunks_exact(64)).enumerate() {
            let mut bits = std::mem::take(word);
            while bits != 0 {
                let bit = bits.trailing_zeros() as usize;
                bits &= bits - 1;
                visit(64 * i + bit, entries[bit]);
            }
        }
    }
}
