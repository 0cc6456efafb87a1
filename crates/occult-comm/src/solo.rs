//! One rank that is the whole world: what it sends, it receives.

use std::sync::Mutex;
use std::time::Duration;

use crate::group::{check_exchange, received_alone};
use crate::{Buffer, CommError, Communicator, Exchange, Expect, Received, Result};

/// The communicator of a world of one. Buffers pass through without a copy.
#[derive(Debug, Default)]
pub struct SoloComm {
    aborted: Mutex<Option<String>>,
}

impl SoloComm {
    /// A world of one rank.
    pub fn new() -> Self {
        Self::default()
    }

    fn check(&self, what: &'static str) -> Result<()> {
        let aborted = self.aborted.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match &*aborted {
            Some(reason) => Err(CommError::Peer { what, rank: 0, reason: reason.clone() }),
            None => Ok(()),
        }
    }
}

impl Communicator for SoloComm {
    fn rank(&self) -> usize {
        0
    }

    fn host_of_rank(&self) -> &[usize] {
        &[0]
    }

    fn world_ranks(&self) -> &[usize] {
        &[0]
    }

    fn start_exchange(
        &self,
        what: &'static str,
        send: Buffer,
        send_bytes: &[usize],
        expect: Expect,
    ) -> Result<Box<dyn Exchange>> {
        self.check(what)?;
        check_exchange(0, 1, what, &send, send_bytes, &expect)?;
        let found = send.len_bytes();
        let expected = match expect {
            Expect::Bytes(bytes) if bytes[0] != found => format!("{} bytes", bytes[0]),
            Expect::AtMost(bytes) if bytes[0] < found => format!("at most {} bytes", bytes[0]),
            _ => return Ok(Box::new(SoloExchange(send))),
        };
        Err(CommError::Mismatch { what, rank: 0, peer: 0, expected, found: format!("{found} bytes") })
    }

    fn all_reduce_sum(&self, what: &'static str, _: &mut [f32]) -> Result<()> {
        self.check(what)
    }

    fn all_reduce_sum_f64(&self, what: &'static str, _: &mut [f64]) -> Result<()> {
        self.check(what)
    }

    fn all_gather(&self, what: &'static str, mine: Buffer) -> Result<Vec<Buffer>> {
        self.check(what)?;
        Ok(vec![mine])
    }

    fn broadcast(&self, what: &'static str, root: usize, buffer: Buffer) -> Result<Buffer> {
        self.check(what)?;
        if root > 0 {
            let reason = format!("no root {root} among 1 ranks");
            return Err(CommError::Argument { what, rank: 0, reason });
        }
        Ok(buffer)
    }

    fn barrier(&self, what: &'static str) -> Result<()> {
        self.check(what)
    }

    fn split(&self, what: &'static str, _: usize) -> Result<Box<dyn Communicator>> {
        self.check(what)?;
        Ok(Box::new(Self::new()))
    }

    fn abort(&self, reason: &str) {
        let mut aborted = self.aborted.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        aborted.get_or_insert_with(|| reason.to_owned());
    }

    /// Nothing ever waits.
    fn limit(&self) -> Duration {
        Duration::ZERO
    }
}

#[derive(Debug)]
struct SoloExchange(Buffer);

impl Exchange for SoloExchange {
    fn test(&mut self) -> Result<bool> {
        Ok(true)
    }

    fn wait(self: Box<Self>) -> Result<Received> {
        Ok(received_alone(self.0))
    }
}
