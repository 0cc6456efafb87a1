//! Where the time of a layer goes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// What a span of time was spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Choosing experts, pruning, planning who gets a copy, building BRIM_1.
    Plan,
    /// Packing rows for the wire, unpacking, adding returned copies.
    Move,
    /// Expert products, and the shared experts.
    Compute,
    /// Waiting for the wire with nothing else to do.
    Wire,
    /// Gradients of the experts' weights.
    Weights,
}

/// Nanoseconds per phase on one rank since the last [`Timers::take`]; shared by the ops of a layer.
#[derive(Debug, Default)]
pub struct Timers {
    ns: [AtomicU64; 5],
    /// When the experts' backward products began.
    backward: Mutex<Option<Instant>>,
}

/// Seconds per phase.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PhaseSeconds {
    /// [`Phase::Plan`].
    pub plan: f64,
    /// [`Phase::Move`].
    pub moving: f64,
    /// [`Phase::Compute`] and [`Phase::Weights`].
    pub compute: f64,
    /// [`Phase::Wire`]: exposed, not hidden behind compute.
    pub wire: f64,
    /// [`Phase::Weights`].
    pub weights: f64,
}

impl Timers {
    /// Runs `body` and adds its time to a phase.
    pub fn time<R>(&self, phase: Phase, body: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = body();
        self.add(phase, start);
        result
    }

    fn add(&self, phase: Phase, start: Instant) {
        let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.ns[phase as usize].fetch_add(ns, Ordering::Relaxed);
    }

    /// Autograd walks the expert products between combine's and dispatch's backward: their time is what lies between.
    pub(crate) fn begin_backward(&self) {
        *self.backward.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    pub(crate) fn end_backward(&self) {
        if let Some(start) = self.backward.lock().unwrap_or_else(PoisonError::into_inner).take() {
            self.add(Phase::Compute, start);
        }
    }

    /// What was added since the last call.
    pub fn take(&self) -> PhaseSeconds {
        let [plan, moving, compute, wire, weights] =
            [0, 1, 2, 3, 4].map(|i: usize| self.ns[i].swap(0, Ordering::Relaxed) as f64 * 1e-9);
        PhaseSeconds { plan, moving, compute: compute + weights, wire, weights }
    }
}
