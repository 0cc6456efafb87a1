//! What every backend must do, whatever the number of ranks. Data are functions of the ranks, so that each rank knows
//! what the others must have sent.

use occult_comm::{Buffer, CommError, Communicator, Expect, Metered};

type Outcome = Result<(), CommError>;

/// A named piece of the suite. Wrong data are a panic, errors come back.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&dyn Communicator) -> Outcome,
}

/// All of it.
pub(crate) const CASES: &[Case] = &[
    Case { name: "exchange uneven", run: exchange_uneven },
    Case { name: "exchange at most", run: exchange_at_most },
    Case { name: "exchange large", run: exchange_large },
    Case { name: "exchange nothing", run: exchange_nothing },
    Case { name: "every type", run: every_type },
    Case { name: "two in flight", run: two_in_flight },
    Case { name: "polled", run: polled },
    Case { name: "dropped", run: dropped },
    Case { name: "many in a row", run: many_in_a_row },
    Case { name: "sums in f32", run: sums_f32 },
    Case { name: "sums in f64", run: sums_f64 },
    Case { name: "gather", run: gather },
    Case { name: "broadcast", run: broadcast },
    Case { name: "split", run: split },
    Case { name: "arguments", run: arguments },
    Case { name: "metered", run: metered },
    Case { name: "hosts", run: hosts },
];

/// Numbers that look random and are the same on every rank.
fn mix(a: usize, b: usize, c: usize) -> usize {
    let mut x = (a as u64) << 40 ^ (b as u64) << 20 ^ c as u64 ^ 0x9e37_79b9_7f4a_7c15;
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ x >> 31) as usize
}

/// The bytes that go from one rank to another in one round.
fn message(round: usize, from: usize, to: usize, len: usize) -> Vec<u8> {
    let seed = mix(round, from, to);
    (0..len).map(|at| (seed.wrapping_add(at * 31) >> 3) as u8).collect()
}

/// Exchanges messages whose lengths are given by `len(from, to)`, and checks them.
fn exchange(
    comm: &dyn Communicator,
    what: &'static str,
    round: usize,
    at_most: bool,
    len: impl Fn(usize, usize) -> usize,
) -> Outcome {
    let (me, num_ranks) = (comm.rank(), comm.world_size());
    let send: Vec<u8> = (0..num_ranks).flat_map(|to| message(round, me, to, len(me, to))).collect();
    let send_bytes: Vec<usize> = (0..num_ranks).map(|to| len(me, to)).collect();
    let bytes: Vec<usize> = (0..num_ranks).map(|from| len(from, me)).collect();
    let expect = match at_most {
        true => Expect::AtMost(bytes.iter().map(|bytes| bytes + from_bound(round)).collect()),
        false => Expect::Bytes(bytes.clone()),
    };
    let received = comm.exchange(what, Buffer::from_slice(&send), &send_bytes, expect)?;
    assert_eq!(received.bytes, bytes, "{what} {round}");
    assert_eq!(received.buffer.len_bytes(), bytes.iter().sum::<usize>());
    for from in 0..num_ranks {
        assert!(received.part(from) == message(round, from, me, len(from, me)), "{what} {round} from {from}");
    }
    Ok(())
}

/// Slack of an upper bound: none in every other round.
fn from_bound(round: usize) -> usize {
    1000 * (round % 2)
}

fn exchange_uneven(comm: &dyn Communicator) -> Outcome {
    for round in 0..40 {
        // A third of the messages is empty; lengths are no multiples of anything; some are longer than what MPI sends
        // in one piece.
        exchange(comm, "uneven", round, false, |from, to| match mix(round, from, to) % 6 {
            0 | 1 => 0,
            2 => mix(to, round, from) % 70_000,
            _ => mix(to, round, from) % 300,
        })?;
    }
    Ok(())
}

fn exchange_at_most(comm: &dyn Communicator) -> Outcome {
    for round in 0..40 {
        exchange(comm, "at most", round, true, |from, to| {
            mix(round, from, to) % 3 * (mix(to, from, round) % 20_000)
        })?;
    }
    Ok(())
}

fn exchange_large(comm: &dyn Communicator) -> Outcome {
    let num_ranks = comm.world_size();
    exchange(comm, "large to the next", 1, false, |from, to| {
        if to == (from + 1) % num_ranks { 5_000_001 } else { usize::from(to == from) * 3_000_000 }
    })?;
    exchange(comm, "large to all", 2, true, |from, to| 1_000_003 + from * 10 + to)
}

fn exchange_nothing(comm: &dyn Communicator) -> Outcome {
    exchange(comm, "nothing", 0, false, |_, _| 0)?;
    exchange(comm, "nothing", 1, true, |_, _| 0)?;
    exchange(comm, "only rank 0 sends", 2, false, |from, _| if from == 0 { 100_000 } else { 0 })?;
    exchange(comm, "only to itself", 3, false, |from, to| if from == to { 50_000 } else { 0 })
}

fn every_type(comm: &dyn Communicator) -> Outcome {
    fn check<T: bytemuck::Pod + PartialEq + std::fmt::Debug>(
        comm: &dyn Communicator,
        value: impl Fn(usize, usize) -> T,
    ) -> Outcome {
        let (me, num_ranks) = (comm.rank(), comm.world_size());
        // Rank r sends r + to + 1 values.
        let send: Vec<T> =
            (0..num_ranks).flat_map(|to| (0..=me + to).map(move |_| to)).map(|to| value(me, to)).collect();
        let bytes: Vec<usize> = (0..num_ranks).map(|peer| (me + peer + 1) * size_of::<T>()).collect();
        let buffer = Buffer::from_slice(&send);
        let received = comm.exchange("typed", buffer, &bytes, Expect::Bytes(bytes.clone()))?;
        let wanted: Vec<T> = (0..num_ranks)
            .flat_map(|from| (0..=me + from).map(move |_| from))
            .map(|from| value(from, me))
            .collect();
        assert_eq!(received.buffer.as_slice::<T>(), wanted);
        Ok(())
    }
    check::<f32>(comm, |from, to| from as f32 - 0.5 * to as f32)?;
    check::<f64>(comm, |from, to| 1.0 / (1 + from + 100 * to) as f64)?;
    check::<u8>(comm, |from, to| (from * 16 + to) as u8)?;
    check::<i8>(comm, |from, to| from as i8 - to as i8)?;
    // What bf16 and f16 rows are made of.
    check::<u16>(comm, |from, to| (from * 4096 + to) as u16)?;
    check::<i16>(comm, |from, to| (from as i16 - to as i16) * 1000)?;
    check::<u32>(comm, |from, to| (from << 20 | to) as u32)?;
    check::<i32>(comm, |from, to| (from as i32 - to as i32) << 20)?;
    check::<i64>(comm, |from, to| (from as i64 - to as i64) << 40)?;
    check::<u64>(comm, |from, to| (mix(from, to, 0)) as u64)
}

fn two_in_flight(comm: &dyn Communicator) -> Outcome {
    let (me, num_ranks) = (comm.rank(), comm.world_size());
    let start = |round: usize, len: usize| {
        let send: Vec<u8> = (0..num_ranks).flat_map(|to| message(round, me, to, len)).collect();
        let bytes = vec![len; num_ranks];
        comm.start_exchange("in flight", Buffer::from_slice(&send), &bytes, Expect::Bytes(bytes.clone()))
    };
    for len in [10, 100_000] {
        let (first, second) = (start(1, len)?, start(2, len + 1)?);
        // Another operation overtakes both, and the second is waited for first.
        comm.barrier("between")?;
        for (round, exchange, len) in [(2, second, len + 1), (1, first, len)] {
            let received = exchange.wait()?;
            assert!((0..num_ranks).all(|from| received.part(from) == message(round, from, me, len)));
        }
    }
    Ok(())
}

fn polled(comm: &dyn Communicator) -> Outcome {
    let (me, num_ranks) = (comm.rank(), comm.world_size());
    for len in [100, 200_000] {
        let send: Vec<u8> = (0..num_ranks).flat_map(|to| message(9, me, to, len)).collect();
        let bytes = vec![len; num_ranks];
        let mut exchange =
            comm.start_exchange("polled", Buffer::from_slice(&send), &bytes, Expect::AtMost(bytes.clone()))?;
        // Ends: with the data, or with an error when a peer fails.
        while !exchange.test()? {
            std::thread::yield_now();
        }
        assert!(exchange.test()?);
        let received = exchange.wait()?;
        assert!((0..num_ranks).all(|from| received.part(from) == message(9, from, me, len)));
    }
    Ok(())
}

fn dropped(comm: &dyn Communicator) -> Outcome {
    let num_ranks = comm.world_size();
    for round in 0..4 {
        let len = if round % 2 == 0 { 8 } else { 100_000 };
        let bytes = vec![len; num_ranks];
        let buffer = Buffer::zeroed::<u8>(len * num_ranks);
        drop(comm.start_exchange("dropped", buffer, &bytes, Expect::Bytes(bytes.clone()))?);
        exchange(comm, "after a dropped one", round, false, |from, to| from + to)?;
    }
    Ok(())
}

fn many_in_a_row(comm: &dyn Communicator) -> Outcome {
    for round in 0..200 {
        comm.barrier("again")?;
        exchange(comm, "again and again", round, round % 2 == 0, |from, to| (from + to + round) % 5)?;
    }
    Ok(())
}

macro_rules! sums {
    ($name:ident, $reduce:ident, $float:ty) => {
        fn $name(comm: &dyn Communicator) -> Outcome {
            // Values whose sum depends on the order of the additions.
            let value = |rank: usize, at: usize| {
                (mix(rank, at, 7) as $float) * (10.0 as $float).powi(rank as i32 % 4 * 3)
            };
            let num_ranks = comm.world_size();
            for len in [0, 1, 5, 511, 512, 513, 1024, 1025, 2000, 100_003] {
                let mut values: Vec<$float> = (0..len).map(|at| value(comm.rank(), at)).collect();
                comm.$reduce("sum", &mut values)?;
                for (at, sum) in values.iter().enumerate() {
                    let wanted = (1..num_ranks).fold(value(0, at), |sum, rank| sum + value(rank, at));
                    assert_eq!(sum.to_bits(), wanted.to_bits(), "length {len}, element {at}");
                }
            }
            // -0 + -0 is -0: the sum starts with the first rank's value, not with 0.
            let mut zeros = [-0.0 as $float];
            comm.$reduce("zeros", &mut zeros)?;
            assert!(zeros[0].is_sign_negative());
            Ok(())
        }
    };
}
sums!(sums_f32, all_reduce_sum, f32);
sums!(sums_f64, all_reduce_sum_f64, f64);

fn gather(comm: &dyn Communicator) -> Outcome {
    for (round, scale) in [0, 1, 77, 40_000].into_iter().enumerate() {
        let mine = Buffer::from_slice(&message(round, comm.rank(), 0, scale * comm.rank()));
        let all = comm.all_gather("gather", mine)?;
        assert_eq!(all.len(), comm.world_size());
        for (from, buffer) in all.iter().enumerate() {
            assert!(buffer.as_bytes() == message(round, from, 0, scale * from), "from {from}");
        }
    }
    Ok(())
}

fn broadcast(comm: &dyn Communicator) -> Outcome {
    for root in 0..comm.world_size() {
        for len in [0, 10, 300_000] {
            let mine = if comm.rank() == root { message(3, root, 0, len) } else { vec![1; 3] };
            let buffer = comm.broadcast("news", root, Buffer::from_slice(&mine))?;
            assert!(buffer.as_bytes() == message(3, root, 0, len), "root {root}");
        }
    }
    Ok(())
}

fn split(comm: &dyn Communicator) -> Outcome {
    let (me, num_ranks) = (comm.rank(), comm.world_size());
    let half = comm.split("by parity", me % 2)?;
    let members: Vec<usize> = (0..num_ranks).filter(|rank| rank % 2 == me % 2).collect();
    assert_eq!(half.world_size(), members.len());
    assert_eq!(members[half.rank()], me);
    assert_eq!(half.world_ranks(), members.iter().map(|&rank| comm.world_ranks()[rank]).collect::<Vec<_>>());
    let mut sum = [me as f64];
    half.all_reduce_sum_f64("sum of a half", &mut sum)?;
    assert_eq!(sum[0], members.iter().sum::<usize>() as f64);
    // Halves and the whole at the same time, and groups of groups.
    for round in 0..3 {
        exchange(&*half, "in a half", round, false, |from, to| from * 3 + to + round)?;
        exchange(comm, "in the whole", round, true, |from, to| from * 5 + to + round)?;
    }
    let quarter = half.split("quarters", half.rank() / 2)?;
    let alone = comm.split("alone", me + 17)?;
    assert_eq!((alone.world_size(), alone.rank()), (1, 0));
    exchange(&*quarter, "in a quarter", 1, false, |from, to| 1000 + from + to)?;
    exchange(&*alone, "alone", 1, false, |_, _| 12)?;
    drop(half);
    exchange(&*quarter, "in a quarter of nothing", 1, false, |from, to| 40_000 + from + to)
}

fn arguments(comm: &dyn Communicator) -> Outcome {
    let num_ranks = comm.world_size();
    let start = |send: usize, send_bytes: usize, expected: usize| {
        let buffer = Buffer::zeroed::<u8>(send);
        let expect = Expect::Bytes(vec![0; expected]);
        comm.start_exchange("wrong", buffer, &vec![0; send_bytes], expect).map(drop).unwrap_err()
    };
    // Refused before anything is sent: the communicator goes on.
    for error in [start(1, num_ranks, num_ranks), start(0, num_ranks + 1, num_ranks), start(0, num_ranks, 0)]
    {
        assert!(matches!(error, CommError::Argument { what: "wrong", .. }), "{error}");
    }
    assert!(matches!(comm.broadcast("no root", num_ranks, Buffer::empty()), Err(CommError::Argument { .. })));
    comm.barrier("still here")
}

fn metered(comm: &dyn Communicator) -> Outcome {
    let (me, num_ranks) = (comm.rank(), comm.world_size());
    let comm = Metered::new(comm);
    let meter = comm.meter();
    meter.set_row_bytes("rows", 4);
    let len = |from: usize, to: usize| 4 * (from + 2 * to);
    exchange(&comm, "rows", 0, false, len)?;
    exchange(&comm, "rows", 1, true, len)?;
    comm.all_reduce_sum("short", &mut [1.0; 10])?;
    comm.all_reduce_sum_f64("long", &mut vec![1.0; 840 * num_ranks])?;
    comm.all_gather("gathered", Buffer::zeroed::<u8>(10 + me))?;
    comm.broadcast("told", num_ranks - 1, Buffer::zeroed::<u8>(if me + 1 == num_ranks { 5 } else { 0 }))?;
    comm.barrier("met")?;
    let half = comm.split("halves", me % 2)?;
    half.all_gather("in a half", Buffer::zeroed::<u8>(3))?;
    let snapshot = meter.reset();
    let counts = |what: &str| &snapshot.operations[what];
    let by_rank =
        |bytes: &dyn Fn(usize) -> usize| (0..num_ranks).map(|peer| bytes(peer) as u64).collect::<Vec<_>>();
    let rows = counts("rows");
    assert_eq!(rows.calls, 2);
    assert_eq!(rows.sent_bytes, by_rank(&|to| 2 * len(me, to)));
    assert_eq!(rows.received_bytes, by_rank(&|from| 2 * len(from, me)));
    assert_eq!(rows.sent_rows(), Some(by_rank(&|to| 2 * (me + 2 * to))));
    assert_eq!(rows.received_rows(), Some(by_rank(&|from| 2 * (from + 2 * me))));
    assert_eq!(snapshot.sent("rows").local, 2 * len(me, me) as u64);
    assert_eq!(snapshot.sent("rows").wire(), rows.sent_bytes.iter().sum::<u64>() - 2 * len(me, me) as u64);
    assert_eq!(counts("short").sent_bytes, by_rank(&|_| 40));
    // 840 values to each rank that adds them, 840 sums back.
    let long = if num_ranks * 840 * 8 > 4096 { 2 * 840 * 8 } else { 840 * 8 };
    assert_eq!(counts("long").sent_bytes, by_rank(&|_| long));
    assert_eq!(counts("long").received_bytes, by_rank(&|_| long));
    assert_eq!(counts("long").sent_rows(), None);
    assert_eq!(counts("gathered").sent_bytes, by_rank(&|_| 10 + me));
    assert_eq!(counts("gathered").received_bytes, by_rank(&|from| 10 + from));
    assert_eq!(counts("told").sent_bytes, by_rank(&|_| if me + 1 == num_ranks { 5 } else { 0 }));
    assert_eq!(counts("told").received_bytes, by_rank(&|from| if from + 1 == num_ranks { 5 } else { 0 }));
    assert_eq!((counts("met").calls, snapshot.sent("met").wire()), (1, 0));
    assert_eq!(counts("in a half").sent_bytes, by_rank(&|to| if to % 2 == me % 2 { 3 } else { 0 }));
    assert!(meter.snapshot().operations.is_empty());
    Ok(())
}

fn hosts(comm: &dyn Communicator) -> Outcome {
    let hosts = comm.host_of_rank();
    assert_eq!((hosts.len(), comm.world_ranks().len()), (comm.world_size(), comm.world_size()));
    // Everybody says the same.
    let mine: Vec<u64> = hosts.iter().map(|&host| host as u64).collect();
    let all = comm.all_gather("hosts", Buffer::from_slice(&mine))?;
    assert!(all.iter().all(|other| other.as_slice::<u64>() == mine));
    Ok(())
}
