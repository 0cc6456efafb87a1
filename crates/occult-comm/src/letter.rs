//! What travels: an envelope that says which operation it belongs to, and bytes.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use crate::Buffer;

/// Kind of an operation. The numbers cross the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Exchange = 1,
    /// All-reduce: whole vectors to everybody (short ones).
    ReduceWhole = 2,
    /// All-reduce: each rank's chunk to the rank that adds it.
    ReduceChunks = 3,
    /// All-reduce: the sums back.
    ReduceSums = 4,
    Gather = 5,
    Broadcast = 6,
    Barrier = 7,
    Split = 8,
    /// The sender has dropped its communicator.
    Leave = 9,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Exchange => "exchange",
            Self::ReduceWhole => "all-reduce (short)",
            Self::ReduceChunks => "all-reduce",
            Self::ReduceSums => "all-reduce (sums)",
            Self::Gather => "all-gather",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
            Self::Split => "split",
            Self::Leave => "end",
        }
    }
}

/// Where a letter belongs. Ordered so that the letters of one sender to one group are neighbours, operations ascending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Address {
    pub(crate) group: GroupId,
    /// World rank of the sender.
    pub(crate) from: usize,
    /// Number of the operation in its group; `u64::MAX` for the last letter of all.
    pub(crate) operation: u64,
}

/// Identity of a group: the lowest world rank in it and a number that this rank gives out once.
pub(crate) type GroupId = (u32, u32);

/// One rank's part of an operation for one other rank.
#[derive(Debug)]
pub(crate) struct Letter {
    pub(crate) kind: Kind,
    pub(crate) what: Cow<'static, str>,
    pub(crate) payload: Payload,
}

/// Bytes of a shared buffer: parts of one buffer go to several ranks without a copy.
#[derive(Debug, Clone)]
pub(crate) enum Payload {
    Empty,
    Part(Arc<Buffer>, Range<usize>),
}

impl Payload {
    pub(crate) fn part(buffer: &Arc<Buffer>, range: Range<usize>) -> Self {
        if range.is_empty() { Self::Empty } else { Self::Part(Arc::clone(buffer), range) }
    }

    pub(crate) fn whole(buffer: Buffer) -> Self {
        let range = 0..buffer.len_bytes();
        Self::part(&Arc::new(buffer), range)
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.as_bytes().len()
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Empty => &[],
            Self::Part(buffer, range) => &buffer.as_bytes()[range.clone()],
        }
    }

    /// The bytes as a buffer of their own; without a copy when nobody else holds them.
    pub(crate) fn into_buffer(self) -> crate::Result<Buffer> {
        match self {
            Self::Empty => Ok(Buffer::empty()),
            Self::Part(buffer, range) if range == (0..buffer.len_bytes()) => {
                Arc::try_unwrap(buffer).or_else(|shared| Buffer::concat(&[shared.as_bytes()]))
            }
            Self::Part(buffer, range) => Buffer::concat(&[&buffer.as_bytes()[range]]),
        }
    }
}
