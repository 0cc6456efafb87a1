//! A pass cut into parts, on one rank's wire and its cores.

/// More parts gain nothing that is worth the messages.
pub const MAX_PARTS: usize = 16;

/// What a pass of one layer asks of a rank. Seconds of all parts together, unless it says otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct PassWork {
    /// Before anything is sent: planning, counts.
    pub before_s: f64,
    /// Wire to the experts, without latency.
    pub out_s: f64,
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
    /// The cores move the bytes, too (ranks that share the cores of one machine): nothing hides.
    pub shared: bool,
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
    /// The pass in `parts` parts: all of them are packed and handed to the wire; then part after part is waited for, unpacked,
    /// computed and handed to the wire back; then what waits for nobody is computed; then the parts are waited for and
    /// added up. The wire carries one message at a time, in the order in which it got them.
    pub fn timeline(&self, parts: usize) -> Timeline {
        let n = parts.max(1) as f64;
        let step = self.move_s / 4.0 / n;
        if self.shared {
            let wire = self.out_s + self.back_s + 2.0 * n * self.latency_s;
            let rest = self.before_s + self.move_s + self.compute_s + n * self.part_s + self.after_s;
            return Timeline { total_s: rest + wire, exposed_s: wire };
        }
        let mut rank = Rank { now: self.before_s, ..Rank::default() };
        let arrivals: Vec<f64> = (0..parts.max(1))
            .map(|_| {
                rank.now += step;
                rank.send(self.out_s / n + self.latency_s)
            })
            .collect();
        let mut returns = Vec::with_capacity(arrivals.len());
        for arrival in arrivals {
            rank.wait_for(arrival);
            rank.now += step + self.compute_s / n + self.part_s + step;
            returns.push(rank.send(self.back_s / n + self.latency_s));
        }
        rank.now += self.after_s;
        for back in returns {
            rank.wait_for(back);
            rank.now += step;
        }
        Timeline { total_s: rank.now, exposed_s: rank.exposed }
    }
}

#[derive(Default)]
struct Rank {
    now: f64,
    wire_free: f64,
    exposed: f64,
}

impl Rank {
    /// When a message of so many seconds, handed over now, has arrived.
    fn send(&mut self, seconds: f64) -> f64 {
        self.wire_free = self.wire_free.max(self.now) + seconds;
        self.wire_free
    }

    fn wait_for(&mut self, time: f64) {
        self.exposed += (time - self.now).max(0.0);
        self.now = self.now.max(time);
    }
}

/// The number of parts, at most `most` and [`MAX_PARTS`], in which the passes together take the least time; the fewest
/// among equals.
pub fn best_parts(passes: &[PassWork], most: usize) -> usize {
    let total = |parts: usize| passes.iter().map(|pass| pass.timeline(parts).total_s).sum::<f64>();
    let mut best = (1, total(1));
    for parts in 2..=most.min(MAX_PARTS) {
        let seconds = total(parts);
        // What rounding alone makes less is not less.
        if seconds < best.1 * (1.0 - 1e-9) {
            best = (parts, seconds);
        }
    }
    best.0
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
        back_s: 4.0,
        latency_s: 0.5,
        move_s: 2.0,
        compute_s: 16.0,
        part_s: 1.0,
        after_s: 3.0,
        shared: false,
    };

    #[test]
    fn one_part_is_one_thing_after_the_other() {
        let one = WORK.timeline(1);
        // The way back (4.5) hides behind what comes after (3.0).
        assert!(close(one.total_s, 1.0 + 0.5 + 8.5 + 1.0 + 17.0 + 4.5 + 0.5), "{one:?}");
        assert!(close(one.exposed_s, 8.5 + 1.5), "{one:?}");
    }

    #[test]
    fn two_parts_by_hand() {
        let two = WORK.timeline(2);
        // Packed at 1.25 and 1.5; the wire brings them at 5.75 and 10.25. Part 1: 5.75 + 0.25 + 8 + 1 + 0.25 = 15.25, back
        // 17.75; part 2: 15.25 + 9.5 = 24.75, back 27.25. After: 27.75, both back; added up 28.25.
        assert!(close(two.total_s, 28.25), "{two:?}");
        assert!(close(two.exposed_s, 5.75 - 1.5), "{two:?}");
    }

    #[test]
    fn the_wire_carries_one_message_at_a_time() {
        let work = PassWork { out_s: 40.0, back_s: 40.0, compute_s: 1.0, ..PassWork::default() };
        let n = work.timeline(4);
        // Never idle: the first part is on its way back behind the last one that comes.
        assert!(close(n.total_s, 80.0), "{n:?}");
        assert!(close(work.timeline(1).total_s, 81.0));
    }

    #[test]
    fn shared_cores_hide_nothing() {
        let work = PassWork { shared: true, ..WORK };
        assert!(close(work.timeline(3).total_s, 1.0 + 2.0 + 16.0 + 3.0 + 3.0 + 12.0 + 3.0));
        assert_eq!(best_parts(&[work], 9), 1);
    }

    #[test]
    fn no_less_than_wire_or_cores_and_no_more_than_both() {
        for parts in 1..=MAX_PARTS {
            for compute_s in [0.0, 1.0, 12.0, 100.0] {
                let work = PassWork { compute_s, ..WORK };
                let (t, n) = (work.timeline(parts), parts as f64);
                let wire = 12.0 + n;
                let cores = 1.0 + 2.0 + compute_s + n + 3.0;
                assert!(t.total_s >= wire.max(cores) - 1e-9 && t.total_s <= wire + cores + 1e-9, "{t:?}");
                assert!(close(t.total_s, cores + t.exposed_s), "what is not waiting is work: {t:?}");
            }
        }
    }

    #[test]
    fn parts_are_as_many_as_pay() {
        let work = |latency_s, part_s| PassWork { latency_s, part_s, ..WORK };
        assert_eq!(best_parts(&[work(0.0, 0.0)], 100), MAX_PARTS);
        assert_eq!(best_parts(&[work(0.0, 0.0)], 3), 3);
        assert_eq!(best_parts(&[work(100.0, 0.0)], 100), 1);
        let some = best_parts(&[work(0.1, 0.3)], 100);
        assert!(1 < some && some < MAX_PARTS, "{some}");
        assert_eq!(best_parts(&[], 4), 1);
    }
}
