//! Sums over the ranks, in ascending order of rank.

use std::ops::{AddAssign, Range};
use std::sync::Arc;

use bytemuck::Pod;

use super::Group;
use super::round::{Round, Sources};
use crate::letter::{Kind, Payload};
use crate::{Buffer, Expect, Result};

/// Vectors up to this length go whole to everybody: one round instead of two.
const WHOLE_BYTES: usize = 4096;

/// Bytes that rank `me` of `num_ranks` sends to every rank (its own part included) to sum `len` values of
/// `value_bytes`: what [`all_reduce_sum`] does, for those who count.
pub(crate) fn reduce_bytes(len: usize, value_bytes: usize, num_ranks: usize, me: usize) -> Vec<usize> {
    if len * value_bytes <= WHOLE_BYTES {
        return vec![len * value_bytes; num_ranks];
    }
    let chunk = |rank| chunk(len, num_ranks, rank).len() * value_bytes;
    (0..num_ranks).map(|to| chunk(to) + chunk(me)).collect()
}

/// The values that `rank` adds.
fn chunk(len: usize, num_ranks: usize, rank: usize) -> Range<usize> {
    let bound = |rank: usize| (len as u128 * rank as u128 / num_ranks as u128) as usize;
    bound(rank)..bound(rank + 1)
}

/// `((v0 + v1) + v2) + ..` element by element, on every rank. Short vectors are added by every rank; of long ones each
/// rank adds a chunk. Either way every element is added once in the same order, so the bits agree.
pub(super) fn all_reduce_sum<T: Pod + AddAssign>(
    group: &Arc<Group>,
    what: &'static str,
    values: &mut [T],
) -> Result<()> {
    let (num_ranks, me) = (group.num_ranks(), group.me);
    let mine = Arc::new(Buffer::try_from_slice(values)?);
    let value_bytes = size_of::<T>();
    if mine.len_bytes() <= WHOLE_BYTES {
        let payload = Payload::part(&mine, 0..mine.len_bytes());
        let expect = Expect::Bytes(vec![mine.len_bytes(); num_ranks]);
        let parts = group.share(Kind::ReduceWhole, what, payload, expect)?;
        add_ascending(values, &parts);
        return Ok(());
    }
    let bytes_of = |rank| {
        let chunk = chunk(values.len(), num_ranks, rank);
        chunk.start * value_bytes..chunk.end * value_bytes
    };
    let out = (0..num_ranks).map(|to| Payload::part(&mine, bytes_of(to))).collect();
    drop(mine);
    let expect = Expect::Bytes(vec![bytes_of(me).len(); num_ranks]);
    let parts = Round::start(group, Kind::ReduceChunks, what, out, Sources::All, expect)?.wait()?;
    let expect = Expect::Bytes((0..num_ranks).map(|from| bytes_of(from).len()).collect());
    let my_chunk = chunk(values.len(), num_ranks, me);
    let own = &mut values[my_chunk];
    add_ascending(own, &parts);
    drop(parts);
    let sums = group.share(Kind::ReduceSums, what, Payload::whole(Buffer::try_from_slice(own)?), expect)?;
    for (rank, sum) in sums.iter().enumerate() {
        let chunk = chunk(values.len(), num_ranks, rank);
        bytemuck::cast_slice_mut::<T, u8>(&mut values[chunk]).copy_from_slice(sum.as_bytes());
    }
    Ok(())
}

/// `sum = parts[0] + parts[1] + ..`; every part has the length of `sum`.
fn add_ascending<T: Pod + AddAssign>(sum: &mut [T], parts: &[Payload]) {
    for (rank, part) in parts.iter().enumerate() {
        let terms = part.as_bytes().chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned::<T>);
        if rank == 0 {
            sum.iter_mut().zip(terms).for_each(|(sum, term)| *sum = term);
        } else {
            sum.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_the_vector_and_the_bytes_add_up() {
        for (len, num_ranks) in [(0, 3), (1, 4), (1025, 1), (4097, 8), (10_000, 3)] {
            let mut at = 0;
            for rank in 0..num_ranks {
                let chunk = chunk(len, num_ranks, rank);
                assert_eq!(chunk.start, at);
                at = chunk.end;
            }
            assert_eq!(at, len);
        }
        // 2,000 values of 4 bytes over 4 ranks: 500 to each in the first round, 500 in the second.
        assert_eq!(reduce_bytes(2000, 4, 4, 1), [4000; 4]);
        assert_eq!(reduce_bytes(1024, 4, 3, 0), [4096; 3]);
    }
}
