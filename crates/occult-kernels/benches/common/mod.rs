//! What the benches share: arguments and the clock.

use std::process::exit;
use std::time::Instant;

use occult_kernels::Threads;

/// The arguments of a bench: `[--threads N] [--seconds S] [PART ..]`.
pub(crate) struct Args {
    pub(crate) threads: Threads,
    /// How long a figure is measured, if three calls take no longer; 0: one call.
    pub(crate) seconds: f64,
    /// Empty: those that run by default.
    pub(crate) parts: Vec<String>,
}

impl Args {
    /// Reads the arguments of this process. What the bench `name` does not know ends it with status 2 and a line that
    /// says what there is: a part of another bench, or a misspelt one, must not look like a run.
    pub(crate) fn parse(name: &str, seconds: f64, known: &[&str]) -> Self {
        let refuse = |what: String| -> ! {
            eprintln!("{name}: {what}; [--threads N] [--seconds S] [PART ..], parts: {}", known.join(" "));
            exit(2)
        };
        let mut threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let (mut seconds, mut parts) = (seconds, Vec::new());
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--threads" => match args.next().and_then(|n| n.parse().ok()) {
                    Some(n) if n > 0 => threads = n,
                    _ => refuse("--threads takes a number from 1".to_owned()),
                },
                "--seconds" => match args.next().and_then(|s| s.parse().ok()) {
                    Some(s) if s >= 0.0 => seconds = s,
                    _ => refuse("--seconds takes a number from 0".to_owned()),
                },
                // What `cargo bench` adds.
                "--bench" => {}
                part if known.contains(&part) => parts.push(arg),
                other => refuse(format!("no part {other:?}")),
            }
        }
        Self { threads: Threads::new(threads), seconds, parts }
    }

    /// Whether `part` was asked for, or nothing was.
    pub(crate) fn wants(&self, part: &str) -> bool {
        self.parts.is_empty() || self.parts.iter().any(|p| p == part)
    }

    /// Median seconds of a call, after one that is not counted.
    #[allow(dead_code, reason = "`ops` times pairs only")]
    pub(crate) fn time(&self, mut call: impl FnMut()) -> f64 {
        self.in_turns([&mut call])[0]
    }

    /// Median seconds of each of `calls`, which take turns, after a turn that is not counted.
    pub(crate) fn in_turns<const N: usize>(&self, mut calls: [&mut dyn FnMut(); N]) -> [f64; N] {
        calls.iter_mut().for_each(|call| call());
        let least = if self.seconds > 0.0 { 3 } else { 1 };
        let (start, mut times) = (Instant::now(), [const { Vec::new() }; N]);
        for turn in 0..200 {
            if turn >= least && start.elapsed().as_secs_f64() >= self.seconds {
                break;
            }
            for (call, times) in calls.iter_mut().zip(&mut times) {
                let start = Instant::now();
                call();
                times.push(start.elapsed().as_secs_f64());
            }
        }
        times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        })
    }
}
