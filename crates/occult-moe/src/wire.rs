//! A dispatch message: what one rank sends to another.
//!
//! | part | bytes |
//! |---|---|
//! | only where counts do not travel before: rows, pairs (u32 each) | 8 |
//! | routing weights, f32 | 4 per pair |
//! | rows, f32 | 4 D per row |
//! | expert ids, u16, the last of each row marked by its highest bit | 2 per pair |
//!
//! All in native byte order: ranks of one job run on machines of one kind.

use std::ops::Range;

use occult_plan::RowExperts;

use crate::error::{MoeError, Result};
use crate::row_plan::{LAST_OF_ROW, RowPlan};

/// Bytes of the counts of one message: rows and pairs.
pub const COUNT_BYTES: usize = 8;

/// Bytes of a message of `rows` rows of `d` elements and `pairs` (row, expert) pairs, without counts.
pub fn message_bytes([rows, pairs]: [u32; 2], d: usize) -> usize {
    rows as usize * d * 4 + pairs as usize * 6
}

/// Writes the message of some consecutive rows of a plan. `x` `[sources, D]`, `weights` by the source's pairs.
pub(crate) fn pack(
    plan: &RowPlan,
    rows: Range<usize>,
    x: &[f32],
    weights: &[f32],
    d: usize,
    header: bool,
    out: &mut [u8],
) {
    let pairs = plan.pair_offsets[rows.start] as usize..plan.pair_offsets[rows.end] as usize;
    let mut out = Writer(out);
    if header {
        out.put(bytemuck::bytes_of(&[rows.len() as u32, pairs.len() as u32]));
    }
    for &entry in &plan.entry_idx[pairs.clone()] {
        out.put(&weights[entry as usize].to_ne_bytes());
    }
    for &source in &plan.row_source[rows.clone()] {
        out.put(bytemuck::cast_slice(&x[source as usize * d..][..d]));
    }
    for ends in plan.pair_offsets[rows.start..=rows.end].windows(2) {
        let of = ends[0] as usize..ends[1] as usize;
        for (i, id) in plan.ids[of.clone()].iter().enumerate() {
            let mark = if i + 1 == of.len() { LAST_OF_ROW } else { 0 };
            out.put(&(id | mark).to_ne_bytes());
        }
    }
}

struct Writer<'a>(&'a mut [u8]);

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) {
        let (head, rest) = std::mem::take(&mut self.0).split_at_mut(bytes.len());
        head.copy_from_slice(bytes);
        self.0 = rest;
    }
}

/// Splits the counts off a message that carries them.
pub(crate) fn take_header(message: &[u8], peer: usize, d: usize) -> Result<([u32; 2], &[u8])> {
    let wrong = |expected: String| MoeError::Message {
        what: "dispatch message",
        peer,
        expected,
        found: format!("{} bytes", message.len()),
    };
    let Some((head, rest)) = message.split_at_checked(COUNT_BYTES) else {
        return Err(wrong("counts of 8 bytes".into()));
    };
    let counts: [u32; 2] = bytemuck::pod_read_unaligned(head);
    let expected = message_bytes(counts, d);
    if rest.len() != expected {
        return Err(wrong(format!(
            "{} bytes for {} rows and {} pairs",
            expected + COUNT_BYTES,
            counts[0],
            counts[1]
        )));
    }
    Ok((counts, rest))
}

/// Reads the message of one peer and appends it: rows to `x`, ids and weights to `experts`.
pub(crate) fn unpack(
    message: &[u8],
    peer: usize,
    counts: [u32; 2],
    d: usize,
    x: &mut Vec<f32>,
    experts: &mut RowExperts,
) -> Result<()> {
    let [rows, pairs] = counts.map(|n| n as usize);
    let (weights, rest) = message.split_at(pairs * 4);
    let (values, ids) = rest.split_at(rows * d * 4);
    let mut row_weights = vec![0f32; pairs];
    bytemuck::cast_slice_mut(&mut row_weights).copy_from_slice(weights);
    // A message may begin anywhere.
    x.extend(values.chunks_exact(4).map(bytemuck::pod_read_unaligned::<f32>));
    let (mut row_counts, mut since) = (Vec::with_capacity(rows), 0u32);
    let ids = ids.chunks_exact(2).map(|b| {
        let id = u16::from_ne_bytes([b[0], b[1]]);
        since += 1;
        if id & LAST_OF_ROW != 0 {
            row_counts.push(std::mem::take(&mut since));
        }
        id & !LAST_OF_ROW
    });
    let ids: Vec<u16> = ids.collect();
    if row_counts.len() != rows || since != 0 {
        return Err(MoeError::Message {
            what: "expert ids",
            peer,
            expected: format!("{rows} rows"),
            found: format!("{} rows and {since} ids more", row_counts.len()),
        });
    }
    Ok(experts.append(row_counts, &ids, &row_weights)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> RowPlan {
        RowPlan {
            group_offsets: vec![0, 2],
            row_source: vec![1, 0],
            source_offsets: vec![0, 1, 2],
            source_rows: vec![1, 0],
            pair_offsets: vec![0, 2, 3],
            ids: vec![3, 5, 0],
            entry_idx: vec![2, 1, 0],
        }
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        let mut bytes = vec![0; message_bytes([2, 3], 2) + COUNT_BYTES];
        pack(&plan(), 0..2, &[1.0, 2.0, 3.0, 4.0], &[0.1, 0.2, 0.3], 2, true, &mut bytes);
        let (counts, rest) = take_header(&bytes, 0, 2).expect("header");
        assert_eq!(counts, [2, 3]);
        let (mut x, mut experts) = (Vec::new(), RowExperts::new());
        unpack(rest, 0, counts, 2, &mut x, &mut experts).expect("message");
        assert_eq!(x, [3.0, 4.0, 1.0, 2.0]);
        assert_eq!(experts.offsets(), [0, 2, 3]);
        assert_eq!(experts.local_experts(), [3, 5, 0]);
        assert_eq!(experts.weights(), [0.3, 0.2, 0.1]);
    }

    #[test]
    fn a_message_of_other_counts_is_refused() {
        let mut bytes = vec![0; message_bytes([2, 3], 2) + COUNT_BYTES];
        pack(&plan(), 0..2, &[1.0, 2.0, 3.0, 4.0], &[0.1, 0.2, 0.3], 2, true, &mut bytes);
        let error = take_header(&bytes[..20], 4, 2).expect_err("short");
        assert!(error.to_string().contains("rank 4"), "{error}");
        let (_, rest) = take_header(&bytes, 0, 2).expect("header");
        let mut cut = rest.to_vec();
        let last = cut.len() - 1;
        cut[last] &= 0x7f;
        let error =
            unpack(&cut, 7, [2, 3], 2, &mut Vec::new(), &mut RowExperts::new()).expect_err("unmarked");
        assert!(error.to_string().contains("rank 7"), "{error}");
    }
}
