//! A group of ranks over any transport: every collective call is one or two rounds of letters.

mod reduce;
mod round;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::letter::{Address, GroupId, Kind, Letter, Payload};
use crate::post::Post;
use crate::{Buffer, CommError, Communicator, Exchange, Expect, Received, Result};
pub(crate) use reduce::reduce_bytes;
use round::{GroupExchange, Round, Sources};

/// What the ranks of a group agree on.
#[derive(Debug)]
pub(crate) struct Group {
    post: Arc<dyn Post>,
    id: GroupId,
    /// World rank of every rank of the group, ascending.
    members: Vec<usize>,
    hosts: Vec<usize>,
    /// This rank's number in the group.
    me: usize,
    next_operation: Mutex<u64>,
    /// The next group number that this world rank may give out.
    next_group: Arc<AtomicU32>,
}

impl Group {
    /// The group of all ranks.
    pub(crate) fn world(post: Arc<dyn Post>, hosts: Vec<usize>) -> Arc<Self> {
        let me = post.rank();
        Arc::new(Self {
            post,
            id: (0, 0),
            members: (0..hosts.len()).collect(),
            hosts,
            me,
            next_operation: Mutex::new(0),
            next_group: Arc::new(AtomicU32::new(1)),
        })
    }

    fn address(&self, from: usize, operation: u64) -> Address {
        Address { group: self.id, from: self.members[from], operation }
    }

    fn argument(&self, what: &'static str, reason: String) -> CommError {
        CommError::Argument { what, rank: self.post.rank(), reason }
    }

    fn num_ranks(&self) -> usize {
        self.members.len()
    }

    /// One payload to everybody; everybody's back, ranks ascending.
    fn share(
        self: &Arc<Self>,
        kind: Kind,
        what: &'static str,
        mine: Payload,
        expect: Expect,
    ) -> Result<Vec<Payload>> {
        Round::start(self, kind, what, vec![mine; self.num_ranks()], Sources::All, expect)?.wait()
    }
}

impl Drop for Group {
    /// Says goodbye, so that ranks that still wait for this one do not wait until their deadline.
    fn drop(&mut self) {
        if std::thread::panicking() && self.id == (0, 0) {
            self.post.abort("it panicked");
        }
        for (to, &world_rank) in self.members.iter().enumerate() {
            if to != self.me {
                let letter = Letter { kind: Kind::Leave, what: "".into(), payload: Payload::Empty };
                // A failure to say goodbye shows at the others as a timeout; there is nobody to report it to here.
                let _ = self.post.send(world_rank, self.address(self.me, u64::MAX), letter);
            }
        }
        self.post.mailbox().close(self.id);
    }
}

/// The communicator of a group.
#[derive(Debug, Clone)]
pub(crate) struct GroupComm(pub(crate) Arc<Group>);

impl Communicator for GroupComm {
    fn rank(&self) -> usize {
        self.0.me
    }

    fn host_of_rank(&self) -> &[usize] {
        &self.0.hosts
    }

    fn world_ranks(&self) -> &[usize] {
        &self.0.members
    }

    fn start_exchange(
        &self,
        what: &'static str,
        send: Buffer,
        send_bytes: &[usize],
        expect: Expect,
    ) -> Result<Box<dyn Exchange>> {
        let group = &self.0;
        check_exchange(group.post.rank(), group.num_ranks(), what, &send, send_bytes, &expect)?;
        let send = Arc::new(send);
        let mut at = 0;
        let out = send_bytes
            .iter()
            .map(|&bytes| {
                at += bytes;
                Payload::part(&send, at - bytes..at)
            })
            .collect();
        drop(send);
        let round = Round::start(group, Kind::Exchange, what, out, Sources::All, expect)?;
        Ok(Box::new(GroupExchange(round)))
    }

    fn all_reduce_sum(&self, what: &'static str, values: &mut [f32]) -> Result<()> {
        reduce::all_reduce_sum(&self.0, what, values)
    }

    fn all_reduce_sum_f64(&self, what: &'static str, values: &mut [f64]) -> Result<()> {
        reduce::all_reduce_sum(&self.0, what, values)
    }

    fn all_gather(&self, what: &'static str, mine: Buffer) -> Result<Vec<Buffer>> {
        let expect = Expect::AtMost(vec![usize::MAX; self.0.num_ranks()]);
        let parts = self.0.share(Kind::Gather, what, Payload::whole(mine), expect)?;
        parts.into_iter().map(Payload::into_buffer).collect()
    }

    fn broadcast(&self, what: &'static str, root: usize, buffer: Buffer) -> Result<Buffer> {
        let group = &self.0;
        let num_ranks = group.num_ranks();
        if root >= num_ranks {
            return Err(group.argument(what, format!("no root {root} among {num_ranks} ranks")));
        }
        let out = if group.me == root { vec![Payload::whole(buffer); num_ranks] } else { Vec::new() };
        let expect = Expect::AtMost(vec![usize::MAX; num_ranks]);
        let round = Round::start(group, Kind::Broadcast, what, out, Sources::Only(root), expect)?;
        round.wait()?.swap_remove(root).into_buffer()
    }

    fn barrier(&self, what: &'static str) -> Result<()> {
        let expect = Expect::Bytes(vec![0; self.0.num_ranks()]);
        self.0.share(Kind::Barrier, what, Payload::Empty, expect).map(drop)
    }

    fn split(&self, what: &'static str, colour: usize) -> Result<Box<dyn Communicator>> {
        let group = &self.0;
        // Every rank offers a group number; the lowest rank's of each colour is taken. Each rank offers one once.
        let offer = group.next_group.fetch_add(1, Ordering::Relaxed);
        let mine = Payload::whole(Buffer::from_slice(&[colour as u64, u64::from(offer)]));
        let parts = group.share(Kind::Split, what, mine, Expect::Bytes(vec![16; group.num_ranks()]))?;
        let offers: Vec<[u64; 2]> =
            parts.iter().map(|part| bytemuck::pod_read_unaligned::<[u64; 2]>(part.as_bytes())).collect();
        let chosen: Vec<usize> = (0..offers.len()).filter(|&rank| offers[rank][0] == colour as u64).collect();
        let first = chosen[0];
        let child = Group {
            post: Arc::clone(&group.post),
            id: (group.members[first] as u32, offers[first][1] as u32),
            members: chosen.iter().map(|&rank| group.members[rank]).collect(),
            hosts: chosen.iter().map(|&rank| group.hosts[rank]).collect(),
            me: chosen.iter().position(|&rank| rank == group.me).unwrap_or(0),
            next_operation: Mutex::new(0),
            next_group: Arc::clone(&group.next_group),
        };
        Ok(Box::new(Self(Arc::new(child))))
    }

    fn abort(&self, reason: &str) {
        self.0.post.abort(reason);
    }

    fn limit(&self) -> Duration {
        self.0.post.limit()
    }
}

/// What an exchange's arguments must satisfy whatever the backend.
pub(crate) fn check_exchange(
    rank: usize,
    num_ranks: usize,
    what: &'static str,
    send: &Buffer,
    send_bytes: &[usize],
    expect: &Expect,
) -> Result<()> {
    let (Expect::Bytes(expected) | Expect::AtMost(expected)) = expect;
    let sum = send_bytes.iter().try_fold(0usize, |sum, &bytes| sum.checked_add(bytes));
    let reason = if send_bytes.len() != num_ranks || expected.len() != num_ranks {
        format!("counts for {} and {} ranks in a group of {num_ranks}", send_bytes.len(), expected.len())
    } else if sum != Some(send.len_bytes()) {
        format!("the buffer has {} bytes, the counts another sum", send.len_bytes())
    } else {
        return Ok(());
    };
    Err(CommError::Argument { what, rank, reason })
}

/// Received data of a group of one.
pub(crate) fn received_alone(buffer: Buffer) -> Received {
    let bytes = vec![buffer.len_bytes()];
    Received { buffer, bytes }
}
