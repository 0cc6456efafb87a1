//! A pass cut into parts, on one rank's wire and its cores.

use super::Cut;

/// More parts gain nothing that is worth the messages.
pub const MAX_PARTS: usize = 16;
/// How much larger inner parts may be. More left hardly anything at the ends to hide.
const MAX_INNER: usize = 3;
/// How much more than the least time is as good, for fewer parts.
const NEARLY: f64 = 0.03;

/// What a pass of one layer asks of a rank. Seconds of all parts together, unless it says otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct PassWork {
    /// Before anything is sent: planning, counts.
    pub before_s: f64,
    /// Wire to the experts, without latency.
    pub out_s: f64,
    /// Of the way out what takes up the direction that the way back needs: less than `out_s` where a rank gets more rows than
    /// it sends, or sends more than it gets. Links are full duplex.
    pub duplex_s: f64,
    /// Wire back, without latency.
    pub back_s: f64,
    /// Latency of each exchange of each part.
    pub latency_s: f64,
    /// Packing, unpacking, copying, adding up: a quarter each.
    pub move_s: f64,
    /// What every part's rows wait for before they go back.
    pub compute_s: f64,
    /// What each part costs beside that: the weights are read again.
    pub part_s: f64,
    /// Computed when all rows are on their way back (gradients of weights).
    pub after_s: f64,
    /// On two levels: what passes on rows within the node. The wire above is then that between nodes.
    pub within: Option<Within>,
    /// The cores move the bytes, too (ranks that share the cores of one machine): nothing hides.
    pub shared: bool,
}

/// Rows between the ranks of a node, on two levels. A rank takes part when it is done with what it computes, so nothing hides it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Within {
    /// To the experts, without latency.
    pub out_s: f64,
    /// Back, without latency.
    pub back_s: f64,
    /// Latencies of each part: of counts, of the way out, of the way back.
    pub part_s: f64,
}

/// How a pass goes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Timeline {
    /// From begin to end.
    pub total_s: f64,
    /// Of that, waiting for the wire with nothing else to do.
    pub exposed_s: f64,
}

impl std::ops::Add for Timeline {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { total_s: self.total_s + other.total_s, exposed_s: self.exposed_s + other.exposed_s }
    }
}

impl PassWork {
    /// The pass in parts: all of them are packed and handed to the wire; then part after part is waited for, unpacked,
    /// computed and handed to the wire back; then what waits for nobody is computed; then the parts are waited for and
    /// added up. The wire carries one message at a time, in the order in which it got them. On two levels rows change over
    /// within the node: when a part has come, and on their way back when the next one has (the last one's after a third of
    /// what waits for nobody).
    pub fn timeline(&self, cut: Cut) -> Timeline {
        let step = self.move_s / 4.0;
        let within = self.within.unwrap_or_default();
        if self.shared {
            let n = cut.parts() as f64;
            let wire = self.wire_s(cut);
            let rest = self.before_s + self.move_s + self.compute_s + n * self.part_s + self.after_s;
            return Timeline { total_s: rest + wire, exposed_s: wire };
        }
        let mut rank = Rank { now: self.before_s, ..Rank::default() };
        let mut arrivals = Vec::with_capacity(cut.parts());
        for share in cut.shares() {
            rank.now += share * step;
            let [out_s, duplex_s] = [self.out_s, self.duplex_s].map(|s| share * s + self.latency_s);
            arrivals.push(rank.send_out(out_s, duplex_s));
        }
        let mut returns = Vec::with_capacity(arrivals.len());
        let mut send_back = |rank: &mut Rank, share: f64| {
            rank.wait_for(rank.now + share * within.back_s);
            returns.push(rank.send_back(share * self.back_s + self.latency_s));
        };
        let mut held = None;
        for (share, arrival) in cut.shares().zip(arrivals) {
            rank.wait_for(arrival);
            rank.wait_for(rank.now + share * within.out_s + within.part_s);
            if let Some(before) = held.take() {
                send_back(&mut rank, before);
            }
            rank.now += share * (2.0 * step + self.compute_s) + self.part_s;
            match self.within {
                Some(_) => held = Some(share),
                None => send_back(&mut rank, share),
            }
        }
        rank.now += self.after_s / 3.0;
        if let Some(last) = held {
            send_back(&mut rank, last);
        }
        rank.now += self.after_s * 2.0 / 3.0;
        for (share, back) in cut.shares().zip(returns) {
            rank.wait_for(back);
            rank.now += share * step;
        }
        Timeline { total_s: rank.now, exposed_s: rank.exposed }
    }

    /// Wire of all parts, nothing hidden.
    pub fn wire_s(&self, cut: Cut) -> f64 {
        let (n, within) = (cut.parts() as f64, self.within.unwrap_or_default());
        let latencies = n * (2.0 * self.latency_s + within.part_s);
        self.out_s + self.back_s + within.out_s + within.back_s + latencies
    }
}

#[derive(Default)]
struct Rank {
    now: f64,
    /// When the wire is free in the direction of the way out, and in that of the way back.
    out_free: f64,
    back_free: f64,
    exposed: f64,
}

impl Rank {
    /// When a message of so many seconds, handed over now, has arrived; the seconds that it takes the other direction.
    fn send_out(&mut self, seconds: f64, duplex_s: f64) -> f64 {
        self.out_free = self.out_free.max(self.now) + seconds;
        self.back_free = self.back_free.max(self.now) + duplex_s;
        self.out_free
    }

    fn send_back(&mut self, seconds: f64) -> f64 {
        self.back_free = self.back_free.max(self.now) + seconds;
        self.back_free
    }

    fn wait_for(&mut self, time: f64) {
        self.exposed += (time - self.now).max(0.0);
        self.now = self.now.max(time);
    }
}

/// Of the cuts into at most `most` and [`MAX_PARTS`] parts, the one with the fewest parts whose time for the passes together is
/// the least or nearly so: what the schedule does not know (rows are noticed a little late, small products take longer) grows
/// with the parts. Sizes are those with the least time, among equals the most even ones.
pub fn best_cut(passes: &[PassWork], most: usize) -> Cut {
    let total = |cut: Cut| passes.iter().map(|pass| pass.timeline(cut).total_s).sum::<f64>();
    let of_parts = |parts: usize| {
        let cuts =
            (1..=MAX_INNER).map(|inner| Cut::even(parts).with_inner(inner)).map(|cut| (cut, total(cut)));
        // What rounding alone makes less is not less.
        cuts.fold(
            (Cut::even(parts), f64::INFINITY),
            |best, of| if of.1 < best.1 * (1.0 - 1e-9) { of } else { best },
        )
    };
    let best: Vec<(Cut, f64)> = (1..=most.clamp(1, MAX_PARTS)).map(of_parts).collect();
    let least = best.iter().map(|of| of.1).fold(f64::INFINITY, f64::min);
    best.iter().find(|of| of.1 <= least * (1.0 + NEARLY)).map_or(Cut::WHOLE, |of| of.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-9 * (1.0 + a.abs() + b.abs())
    }

    const WORK: PassWork = PassWork {
        before_s: 1.0,
        out_s: 8.0,
        duplex_s: 8.0,
        back_s: 4.0,
        latency_s: 0.5,
        move_s: 2.0,
        compute_s: 16.0,
        part_s: 1.0,
        after_s: 3.0,
        within: None,
        shared: false,
    };

    #[test]
    fn one_part_is_one_thing_after_the_other() {
        let one = WORK.timeline(Cut::WHOLE);
        // The way back (4.5) hides behind what comes after (3.0).
        assert!(close(one.total_s, 1.0 + 0.5 + 8.5 + 1.0 + 17.0 + 4.5 + 0.5), "{one:?}");
        assert!(close(one.exposed_s, 8.5 + 1.5), "{one:?}");
    }

    #[test]
    fn two_parts_by_hand() {
        let two = WORK.timeline(Cut::even(2));
        // Packed at 1.25 and 1.5; the wire brings them at 5.75 and 10.25. Part 1: 5.75 + 0.25 + 8 + 1 + 0.25 = 15.25, back
        // 17.75; part 2: 15.25 + 9.5 = 24.75, back 27.25. After: 27.75, both back; added up 28.25.
        assert!(close(two.total_s, 28.25), "{two:?}");
        assert!(close(two.exposed_s, 5.75 - 1.5), "{two:?}");
    }

    #[test]
    fn the_wire_carries_one_message_at_a_time() {
        let work =
            PassWork { out_s: 40.0, duplex_s: 40.0, back_s: 40.0, compute_s: 1.0, ..PassWork::default() };
        let n = work.timeline(Cut::even(4));
        // Never idle: the first part is on its way back behind the last one that comes.
        assert!(close(n.total_s, 80.0), "{n:?}");
        assert!(close(work.timeline(Cut::WHOLE).total_s, 81.0));
    }

    #[test]
    fn a_rank_that_gets_more_than_it_sends_begins_to_answer_early() {
        let work =
            PassWork { out_s: 40.0, duplex_s: 20.0, back_s: 40.0, compute_s: 2.0, ..PassWork::default() };
        let total = |cut| work.timeline(cut).total_s;
        assert!(close(total(Cut::WHOLE), 82.0));
        // Parts come at 20 and 40. What it sends out itself is gone at 20, so the answer to the first leaves at 21, that to
        // the second at 41.
        assert!(close(total(Cut::even(2)), 61.0));
        // Never less than what leaves the rank.
        assert!(close(total(Cut::even(4)), 60.0));
    }

    #[test]
    fn shared_cores_hide_nothing() {
        let work = PassWork { shared: true, ..WORK };
        assert!(close(work.timeline(Cut::even(3)).total_s, 1.0 + 2.0 + 16.0 + 3.0 + 3.0 + 12.0 + 3.0));
        assert_eq!(best_cut(&[work], 9), Cut::WHOLE);
    }

    #[test]
    fn two_levels_by_hand() {
        let work = PassWork { within: Some(Within { out_s: 2.0, back_s: 1.0, part_s: 0.25 }), ..WORK };
        // Over the wire at 10.0, within the node at 12.25; computed at 30.25; after a third of the rest, 31.25, within the
        // node at 32.25 and back at 36.75; added up 37.25.
        let one = work.timeline(Cut::WHOLE);
        assert!(close(one.total_s, 37.25), "{one:?}");
        assert!(close(one.exposed_s, 8.5 + 2.25 + 1.0 + (4.5 - 2.0)), "{one:?}");
        // Packed at 1.25 and 1.5, over the wire at 5.75 and 10.25. Part 1 within the node at 7.0, computed at 16.5; part 2
        // within at 17.75, part 1 back within at 18.25 and over the wire at 20.75; computed at 27.75, then 28.75, part 2 back
        // within at 29.25, over the wire at 31.75; the rest at 31.25, part 1 added up at 31.5, part 2 at 32.0.
        let two = work.timeline(Cut::even(2));
        assert!(close(two.total_s, 32.0), "{two:?}");
        assert!(close(work.wire_s(Cut::even(2)), 12.0 + 3.0 + 2.0 * 1.25));
    }

    #[test]
    fn no_less_than_wire_or_cores_and_no_more_than_both() {
        for parts in 1..=MAX_PARTS {
            for compute_s in [0.0, 1.0, 12.0, 100.0] {
                let work = PassWork { compute_s, ..WORK };
                let (t, n) = (work.timeline(Cut::even(parts)), parts as f64);
                let wire = 12.0 + n;
                let cores = 1.0 + 2.0 + compute_s + n + 3.0;
                assert!(t.total_s >= wire.max(cores) - 1e-9 && t.total_s <= wire + cores + 1e-9, "{t:?}");
                assert!(close(t.total_s, cores + t.exposed_s), "what is not waiting is work: {t:?}");
            }
        }
    }

    #[test]
    fn parts_are_as_many_as_pay() {
        let best =
            |latency_s, part_s, most| best_cut(&[PassWork { latency_s, part_s, ..WORK }], most).parts();
        // Until the wire is hidden.
        let many = best(0.0, 0.0, 100);
        assert!((4..=MAX_PARTS).contains(&many), "{many}");
        assert_eq!(best(0.0, 0.0, 3), 3);
        assert_eq!(best(100.0, 0.0, 100), 1);
        let some = best(0.1, 0.3, 100);
        assert!(1 < some && some < MAX_PARTS, "{some}");
        assert_eq!(best_cut(&[], 4), Cut::WHOLE);
    }

    #[test]
    fn three_uneven_parts_by_hand() {
        // Shares 1/4, 1/2, 1/4. Packed at 1.125, 1.375, 1.5; the wire brings them at 3.625, 8.125, 10.625. Part 1: 3.625 +
        // 0.25 + 4 + 1 = 8.875, back 10.375; part 2: 8.875 + 0.5 + 8 + 1 = 18.375, back 20.875; part 3: 18.375 + 5.25 =
        // 23.625, back 25.125. After: 26.625, all back; added up 27.125.
        let three = WORK.timeline(Cut::even(3).with_inner(2));
        assert!(close(three.total_s, 27.125), "{three:?}");
        assert!(close(three.exposed_s, 3.625 - 1.5), "{three:?}");
    }

    #[test]
    fn ends_are_small_where_compute_hides_the_rest() {
        let slow = PassWork { compute_s: 40.0, latency_s: 0.0, ..WORK };
        assert_eq!(best_cut(&[slow], 3), Cut::even(3).with_inner(3));
        // Where the wire is never idle, uneven parts gain nothing.
        let wire =
            PassWork { out_s: 40.0, duplex_s: 40.0, back_s: 40.0, compute_s: 1.0, ..PassWork::default() };
        assert_eq!(best_cut(&[wire], 3).inner(), 1);
    }
}
