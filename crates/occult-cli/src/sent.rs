//! What experts over ranks sent, as `Metered` counted it.

use anyhow::Result;
use occult_comm::{Meter, Snapshot};
use occult_model::Decoder;

/// What left its rank in the exchanges of all MoE layers, all ranks together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Sent {
    /// Rows of a token, one way.
    pub(crate) rows: f64,
    /// Bytes, both ways.
    pub(crate) bytes: f64,
}

impl Sent {
    /// Since the meter was reset, which it is again (collective). `None` for a model without ranks.
    pub(crate) fn take(decoder: &Decoder, meter: Option<&Meter>) -> Result<Option<Self>> {
        let (Some(ranks), Some(meter)) = (decoder.ranks(), meter) else { return Ok(None) };
        let snapshot = meter.reset();
        // What comes back is rows of f32 and nothing else.
        let back: u64 =
            exchanges(&snapshot).filter(|(what, _)| what.starts_with("moe combine")).map(|(_, n)| n).sum();
        let mut sums = [back as f64, exchanges(&snapshot).map(|(_, n)| n).sum::<u64>() as f64];
        ranks.comm().all_reduce_sum_f64("bytes sent", &mut sums)?;
        Ok(Some(Self { rows: sums[0] / (4 * decoder.spec().hidden_size) as f64, bytes: sums[1] }))
    }
}

/// The MoE layers' own exchanges of one rank, with the bytes that left it.
pub(crate) fn exchanges(snapshot: &Snapshot) -> impl Iterator<Item = (&'static str, u64)> + '_ {
    let layers = snapshot.operations.keys().filter(|what| what.starts_with("moe "));
    layers.map(|&what| (what, snapshot.sent(what).wire()))
}
