//! Letters as messages: what is being sent, what is arriving, and in which order it is handed on.

use std::collections::VecDeque;
use std::sync::Arc;

use super::envelope::{ENVELOPE_BYTES, Envelope, INLINE_BYTES};
use super::wire::{Outgoing, Receiving, Sending, WireResult, test_some};
use crate::Buffer;
use crate::letter::{Address, Letter, Payload, cut};
use crate::mailbox::{Failure, Mailbox};

/// Tag of every envelope. MPI keeps messages of one sender and tag in order.
const ENVELOPE_TAG: u32 = 1;
/// Payloads are tagged in turn, from 2 on; every MPI has tags up to 32,767.
const NUM_TAGS: u32 = 30_000;
/// Longest message. Below the 64 KiB up to which Open MPI sends over TCP at once: a longer one waits until the receiver has
/// called MPI twice, so that rows for a rank that computes would stand still.
const PIECE_BYTES: usize = 60 * 1024;
/// Longest reason that is told to others.
const REASON_BYTES: usize = 2000;

/// State of the messages of one rank.
#[derive(Debug)]
pub(super) struct Engine {
    rank: usize,
    num_ranks: usize,
    sending: Vec<Sending>,
    /// The next envelope, from anybody.
    envelope: Option<Receiving>,
    /// Letters whose envelope has come, by sender, in order: a letter is handed on when those before it are.
    arriving: Vec<VecDeque<Arriving>>,
    next_tag: Vec<u32>,
}

#[derive(Debug)]
struct Arriving {
    address: Address,
    letter: Letter,
    /// The payload, while it is under way.
    landing: Option<Receiving>,
}

// SAFETY: MPI handles may be used from any thread when MPI was started with MPI_THREAD_SERIALIZED and calls do not
// overlap. The engine exists only behind a mutex, and only after that level was granted.
unsafe impl Send for Engine {}

impl Engine {
    pub(super) fn new(rank: usize, num_ranks: usize) -> WireResult<Self> {
        let arriving = (0..num_ranks).map(|_| VecDeque::new()).collect();
        let envelope = Some(next_envelope()?);
        Ok(Self { rank, num_ranks, sending: Vec::new(), envelope, arriving, next_tag: vec![0; num_ranks] })
    }

    /// Whether messages are under way that need calls to move.
    pub(super) fn is_busy(&self) -> bool {
        !self.sending.is_empty() || self.arriving.iter().any(|letters| !letters.is_empty())
    }

    pub(super) fn is_sending(&self) -> bool {
        !self.sending.is_empty()
    }

    pub(super) fn send(&mut self, to: usize, address: Address, letter: Letter) -> WireResult<()> {
        let bytes = letter.payload.len_bytes();
        let first = self.next_tag[to];
        let what = letter.what.into_owned();
        let envelope = Envelope::Letter { kind: letter.kind, what, address, bytes: bytes as u64, tag: first };
        if bytes <= INLINE_BYTES {
            return self.send_envelope(to, &envelope, letter.payload.as_bytes());
        }
        self.send_envelope(to, &envelope, &[])?;
        if let Payload::Part(buffer, range) = letter.payload {
            for (tag, at) in tags(first).zip(range.clone().step_by(PIECE_BYTES)) {
                let piece = at..range.end.min(at + PIECE_BYTES);
                self.sending.push(Sending::start(Outgoing::Part(Arc::clone(&buffer), piece), to, tag)?);
            }
        }
        self.next_tag[to] = after(first, bytes);
        Ok(())
    }

    /// Tells everybody of a failure.
    pub(super) fn send_failure(&mut self, failure: &Failure) -> WireResult<()> {
        let reason = cut(&failure.reason, REASON_BYTES);
        let envelope = Envelope::Failure { rank: failure.rank, bytes: reason.len() as u64 };
        (0..self.num_ranks)
            .filter(|&to| to != self.rank)
            .collect::<Vec<_>>()
            .into_iter()
            .try_for_each(|to| self.send_envelope(to, &envelope, reason.as_bytes()))
    }

    fn send_envelope(&mut self, to: usize, envelope: &Envelope, inline: &[u8]) -> WireResult<()> {
        let message = [&envelope.encode()[..], inline].concat().into_boxed_slice();
        self.sending.push(Sending::start(Outgoing::Own(message), to, ENVELOPE_TAG)?);
        Ok(())
    }

    /// Moves what can be moved, without waiting. Returns how many messages were finished.
    pub(super) fn progress(&mut self, mailbox: &Mailbox) -> WireResult<usize> {
        let mut finished = 0;
        loop {
            let now = self.test()?;
            if now == 0 {
                return Ok(finished);
            }
            finished += now;
            if let Some((message, from, len)) = self.envelope.as_mut().and_then(Receiving::take) {
                self.envelope = Some(next_envelope()?);
                self.open(from, message.as_bytes().get(..len).unwrap_or(&[]), mailbox)?;
            }
            self.sending.retain(|sending| !sending.is_done());
            self.deliver(mailbox);
        }
    }

    /// Asks MPI once about everything that is under way. Returns how many messages were finished.
    fn test(&mut self) -> WireResult<usize> {
        let landings = self.arriving.iter_mut().flatten().filter_map(|letter| letter.landing.as_mut());
        let receiving = self.envelope.iter_mut().chain(landings).flat_map(Receiving::requests);
        test_some(receiving.chain(self.sending.iter_mut().map(Sending::request)))
    }

    /// Hands on the letters that are complete and have none before them.
    fn deliver(&mut self, mailbox: &Mailbox) {
        for letters in &mut self.arriving {
            while let Some(first) = letters.front_mut() {
                if let Some(landing) = &mut first.landing {
                    let Some((buffer, ..)) = landing.take() else { break };
                    first.letter.payload = Payload::whole(buffer);
                    first.landing = None;
                }
                if let Some(done) = letters.pop_front() {
                    mailbox.deliver(done.address, done.letter);
                }
            }
        }
    }

    fn open(&mut self, from: usize, message: &[u8], mailbox: &Mailbox) -> WireResult<()> {
        let unreadable = || format!("unreadable message from rank {from}");
        let envelope =
            Envelope::decode(message, from).filter(|_| from < self.num_ranks).ok_or_else(unreadable)?;
        let inline = &message[ENVELOPE_BYTES..];
        match envelope {
            Envelope::Failure { rank, .. } => {
                mailbox.fail(Failure { rank, reason: String::from_utf8_lossy(inline).into_owned() });
            }
            Envelope::Letter { kind, what, address, bytes, tag } => {
                let bytes = usize::try_from(bytes).map_err(|_| unreadable())?;
                let (payload, landing) = if bytes <= INLINE_BYTES {
                    if inline.len() != bytes {
                        return Err(unreadable());
                    }
                    (Payload::whole(Buffer::from_slice(inline)), None)
                } else {
                    let buffer = Buffer::try_zeroed::<u8>(bytes).map_err(|error| error.to_string())?;
                    (Payload::Empty, Some(Receiving::start(buffer, PIECE_BYTES, Some(from), tags(tag))?))
                };
                let letter = Letter { kind, what: what.into(), payload };
                self.arriving[from].push_back(Arriving { address, letter, landing });
            }
        }
        Ok(())
    }

    /// Stops listening, so that MPI can be finalised. `false` as long as MPI has not let go.
    pub(super) fn stop_listening(&mut self) -> WireResult<bool> {
        let Some(envelope) = &mut self.envelope else { return Ok(true) };
        test_some(envelope.requests().iter_mut())?;
        if envelope.take().is_some() {
            self.envelope = None;
        }
        Ok(self.envelope.is_none())
    }

    pub(super) fn cancel_listening(&mut self) -> WireResult<()> {
        self.envelope.as_mut().map_or(Ok(()), Receiving::cancel)
    }
}

fn next_envelope() -> WireResult<Receiving> {
    let len = ENVELOPE_BYTES + INLINE_BYTES;
    let buffer = Buffer::try_zeroed::<u8>(len).map_err(|error| error.to_string())?;
    Receiving::start(buffer, len, None, std::iter::once(ENVELOPE_TAG))
}

/// Tags of the pieces of a payload.
fn tags(first: u32) -> impl Iterator<Item = u32> {
    (0..).map(move |piece: u32| 2 + (first + piece) % NUM_TAGS)
}

/// The first tag number after a payload.
fn after(first: u32, bytes: usize) -> u32 {
    (first + bytes.div_ceil(PIECE_BYTES) as u32) % NUM_TAGS
}
