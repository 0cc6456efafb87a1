//! Which ranks the tokens of a model that runs visit.

use anyhow::Result;
use occult_model::{ModelError, RoutingRecord};
use occult_moe::MoeError;
use occult_plan::{HomeRanks, Placement, TrafficMeter, TrafficSummary};

/// Counts, layer by layer, the ranks that tokens visit under a placement.
pub(crate) struct Visits<'p> {
    layers: Vec<TrafficMeter<'p>>,
}

impl<'p> Visits<'p> {
    pub(crate) fn new(placement: &'p Placement) -> Result<Self> {
        let meter = |layer| TrafficMeter::new(layer, placement.topology(), HomeRanks::Uniform);
        Ok(Self { layers: placement.layers().iter().map(meter).collect::<Result<_, _>>()? })
    }

    /// Counts what a layer decided.
    pub(crate) fn record(&mut self, record: &RoutingRecord<'_>) -> Result<(), ModelError> {
        let failed =
            |e: occult_plan::PlanError| ModelError::Moe { layer: record.layer, source: MoeError::from(e) };
        let Some(meter) = self.layers.get_mut(record.moe_layer) else { return Ok(()) };
        record.tokens().view().and_then(|routing| meter.add(&routing)).map_err(failed)
    }

    /// The mean over layers; `None` where nothing was counted, as on ranks that are shown nothing.
    pub(crate) fn finish(self) -> Option<TrafficSummary> {
        let layers: Option<Vec<_>> =
            self.layers.into_iter().map(|m| Some(m.finish().ok()?.summary())).collect();
        TrafficSummary::mean(&layers?)
    }
}
