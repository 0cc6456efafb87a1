//! The bytes in front of every message: what a letter is, so that ranks that disagree find out.

use crate::letter::{Address, Kind, cut_name};

/// Length of an envelope; what follows it in the same message is aligned like the message.
pub(super) const ENVELOPE_BYTES: usize = 128;

/// Payloads up to this length travel in the same message as their envelope: one message per peer for small batches, at
/// the price of a copy. Longer ones follow at once in messages of their own, without waiting for an answer.
pub(super) const INLINE_BYTES: usize = 32 * 1024 - ENVELOPE_BYTES;

const MAGIC: u32 = u32::from_le_bytes(*b"occ1");

/// Kind of the message that reports a failure; the numbers below are those of [`Kind`].
const FAILURE: u8 = 255;

/// What an envelope says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Envelope {
    /// A letter of `bytes` payload bytes, inline or in messages tagged from `tag` on.
    Letter { kind: Kind, what: String, address: Address, bytes: u64, tag: u32 },
    /// World rank `rank` failed; the reason is the inline payload of `bytes` bytes.
    Failure { rank: usize, bytes: u64 },
}

impl Envelope {
    pub(super) fn encode(&self) -> [u8; ENVELOPE_BYTES] {
        let mut out = [0; ENVELOPE_BYTES];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(&MAGIC.to_le_bytes());
        match self {
            Self::Letter { kind, what, address, bytes, tag } => {
                let name = cut_name(what);
                put(&[*kind as u8, name.len() as u8, 0, 0]);
                put(&bytes.to_le_bytes());
                put(&address.operation.to_le_bytes());
                put(&address.group.0.to_le_bytes());
                put(&address.group.1.to_le_bytes());
                put(&tag.to_le_bytes());
                put(name.as_bytes());
            }
            Self::Failure { rank, bytes } => {
                put(&[FAILURE, 0, 0, 0]);
                put(&bytes.to_le_bytes());
                put(&(*rank as u64).to_le_bytes());
            }
        }
        out
    }

    /// Reads the envelope of a message from world rank `from`; nothing when it is none of ours.
    pub(super) fn decode(message: &[u8], from: usize) -> Option<Self> {
        let u32_at = |at: usize| Some(u32::from_le_bytes(message.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_le_bytes(message.get(at..at + 8)?.try_into().ok()?));
        if message.len() < ENVELOPE_BYTES || u32_at(0)? != MAGIC {
            return None;
        }
        let (kind, bytes) = (message[4], u64_at(8)?);
        if kind == FAILURE {
            return Some(Self::Failure { rank: usize::try_from(u64_at(16)?).ok()?, bytes });
        }
        let name = message[..ENVELOPE_BYTES].get(36..36 + usize::from(message[5]))?;
        Some(Self::Letter {
            kind: Kind::from_number(kind)?,
            what: std::str::from_utf8(name).ok()?.to_owned(),
            address: Address { group: (u32_at(24)?, u32_at(28)?), from, operation: u64_at(16)? },
            bytes,
            tag: u32_at(32)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn envelopes_survive_the_wire_and_rubbish_does_not() {
        let address = Address { group: (3, 70_000), from: 5, operation: u64::MAX - 1 };
        let what = "dispatch of a layer with a name longer than what an envelope has room for, ö".to_owned();
        for kind in [Kind::Exchange, Kind::Leave, Kind::ReduceSums] {
            let letter = Envelope::Letter { kind, what: what.clone(), address, bytes: 1 << 40, tag: 29_999 };
            let cut =
                Envelope::Letter { kind, what: cut_name(&what).into(), address, bytes: 1 << 40, tag: 29_999 };
            assert_eq!(Envelope::decode(&letter.encode(), 5), Some(cut));
        }
        let failure = Envelope::Failure { rank: 7, bytes: 12 };
        assert_eq!(Envelope::decode(&failure.encode(), 1), Some(failure.clone()));
        assert_eq!(Envelope::decode(&failure.encode()[..ENVELOPE_BYTES - 1], 1), None);
        let mut bytes = failure.encode();
        bytes[4] = 77;
        assert_eq!(Envelope::decode(&bytes, 1), None);
        bytes = failure.encode();
        bytes[0] ^= 1;
        assert_eq!(Envelope::decode(&bytes, 1), None);
        let mut bytes = Envelope::Letter { kind: Kind::Gather, what, address, bytes: 0, tag: 0 }.encode();
        bytes[5] = 255;
        assert_eq!(Envelope::decode(&bytes, 1), None);
    }
}
