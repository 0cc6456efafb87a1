//! Simulated annealing over moves and swaps, and the descent to a local optimum that ends it.

use rand_core::Rng;
use rand_pcg::Pcg64Mcg;

use super::state::{Change, State};

/// How an annealing run cools down. Temperatures are in units of the cost; both they and the price of a (token, expert)
/// pair above the load limit change geometrically from the first value to the second.
#[derive(Debug, Clone, Copy)]
pub(super) struct Schedule {
    pub(super) proposals: u64,
    pub(super) temperature: (f64, f64),
    pub(super) overload_price: (f64, f64),
}

/// Proposes random changes and takes each with the Metropolis probability. Starting over the load limit cheaply and
/// ending with it dear lets the walk tunnel between feasible regions. `keep_going` is asked every few thousand proposals.
pub(super) fn anneal(
    state: &mut State<'_>,
    rng: &mut Pcg64Mcg,
    schedule: Schedule,
    keep_going: &mut dyn FnMut() -> bool,
) {
    const BLOCK: u64 = 256;
    let blocks = schedule.proposals.div_ceil(BLOCK);
    for block in 0..blocks {
        let progress = block as f64 / blocks as f64;
        let geometric = |(from, to): (f64, f64)| from * libm::pow(to / from, progress);
        let temperature = geometric(schedule.temperature);
        let price = geometric(schedule.overload_price);
        for _ in 0..BLOCK {
            let change = propose(state, rng);
            let Some(delta) = state.delta(change, price) else { continue };
            if delta <= 0.0 || delta < -temperature * libm::log(unit(rng)) {
                state.apply(change);
            }
        }
        if block % 16 == 0 && !keep_going() {
            break;
        }
    }
}

/// Takes the best change again and again until none improves, at `overload_price` for every (token, expert) pair above
/// the load limit.
pub(super) fn descend(state: &mut State<'_>, overload_price: f64) {
    loop {
        let mut best: Option<(f64, Change)> = None;
        let mut consider = |change| {
            if let Some(delta) = state.delta(change, overload_price)
                && delta < best.map_or(-1e-9, |(d, _)| d)
            {
                best = Some((delta, change));
            }
        };
        for expert in 0..state.num_experts() {
            (0..state.num_ranks()).for_each(|to| consider(Change::Move { expert, to }));
            (expert + 1..state.num_experts()).for_each(|b| consider(Change::Swap { a: expert, b }));
        }
        match best {
            Some((_, change)) => state.apply(change),
            None => return,
        }
    }
}

/// A random change between two ranks, a swap three times of four.
fn propose(state: &State<'_>, rng: &mut Pcg64Mcg) -> Change {
    let expert = below(rng, state.num_experts());
    if rng.next_u32() & 3 == 0 {
        Change::Move { expert, to: below(rng, state.num_ranks()) }
    } else {
        Change::Swap { a: expert, b: below(rng, state.num_experts()) }
    }
}

/// Uniform integer below `n` (< 2^32), by multiplication: the bias is below `n / 2^32`.
fn below(rng: &mut Pcg64Mcg, n: usize) -> usize {
    ((u64::from(rng.next_u32()) * n as u64) >> 32) as usize
}

/// Uniform in `(0, 1]`.
pub(super) fn unit(rng: &mut Pcg64Mcg) -> f64 {
    (f64::from(rng.next_u32()) + 1.0) / 4_294_967_296.0
}
