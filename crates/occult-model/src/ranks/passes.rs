//! Many sequences in few forward passes, over ranks.

use std::ops::Range;
use std::sync::Arc;

use occult_comm::{Buffer, Expect};
use occult_plan::{ExpertId, RoutingBuf};

use super::Ranks;
use crate::batch::Batch;
use crate::decoder::{Decoder, Logits};
use crate::error::{ModelError, Result};
use crate::moe::RoutingRecord;
use crate::passes::{Pass, PassObserver, shared_passes};

/// [`for_each_pass`](crate::for_each_pass) on every rank with the same sequences. Passes are dealt out in turn: a *wave* is
/// one sequence (in pieces) or one group of short ones for every rank. Rank 0 is shown everything: logits as they come,
/// routing in the order of the sequences.
pub(crate) fn for_each_pass<S: AsRef<[u32]>>(
    model: &Decoder,
    ranks: &Arc<Ranks>,
    sequences: &[S],
    rows: usize,
    logits: Logits,
    mut observe: Option<&mut PassObserver<'_>>,
    each: &mut dyn FnMut(&Pass, &[f32]) -> Result<()>,
) -> Result<()> {
    let (rank, num_ranks) = (ranks.comm().rank(), ranks.comm().world_size());
    let lengths: Vec<usize> = sequences.iter().map(|s| s.as_ref().len()).collect();
    // Short sequences share a pass only as far as every rank has work.
    let share = lengths.iter().sum::<usize>().div_ceil(num_ranks).min(rows);
    let passes = shared_passes(&lengths, share, rows);
    let units: Vec<&[Pass]> = passes.chunk_by(|a, b| a.sequences == b.sequences).collect();
    let shape = Shape { model, logits, routing: observe.is_some() };
    for wave in units.chunks(num_ranks) {
        let mut cache = wave.get(rank).filter(|unit| unit.len() > 1).map(|_| model.new_cache());
        let mut routed: Vec<Vec<RoutingBuf>> = Vec::new();
        for step in 0..wave.iter().map(|unit| unit.len()).max().unwrap_or(0) {
            let pass_of = |rank: usize| wave.get(rank).and_then(|unit| unit.get(step));
            let mut result = Output::default();
            if let Some(pass) = pass_of(rank) {
                let parts: Vec<&[u32]> = match &sequences[pass.sequences.clone()] {
                    [one] => vec![&one.as_ref()[pass.positions.clone()]],
                    several => several.iter().map(S::as_ref).collect(),
                };
                let mut record = |r: &RoutingRecord<'_>| {
                    result.routing.push(r.routing.clone());
                    Ok(())
                };
                let observer = shape.routing.then_some(&mut record as &mut dyn crate::RoutingObserver);
                let values = model.forward(&Batch::new(&parts)?, cache.as_mut(), logits, observer)?;
                result.logits = values.flatten_all()?.to_vec1::<f32>()?;
            } else {
                model.idle()?;
            }
            for (pass, output) in shape.collect(ranks, result, &pass_of)? {
                each(&pass, &output.logits)?;
                routed.push(output.routing);
            }
        }
        if let (Some(observe), 0) = (observe.as_deref_mut(), rank) {
            show(model, wave, &lengths, routed, observe)?;
        }
    }
    Ok(())
}

/// Routing came piece by piece of all ranks in turn; it is shown sequence by sequence.
fn show(
    model: &Decoder,
    wave: &[&[Pass]],
    lengths: &[usize],
    routed: Vec<Vec<RoutingBuf>>,
    observe: &mut PassObserver<'_>,
) -> Result<()> {
    let steps = 0..wave.iter().map(|unit| unit.len()).max().unwrap_or(0);
    let order =
        steps.flat_map(|step| (0..wave.len()).filter(move |&r| wave[r].len() > step).map(move |r| (r, step)));
    let mut came: Vec<((usize, usize), Vec<RoutingBuf>)> = order.zip(routed).collect();
    came.sort_by_key(|(place, _)| *place);
    for ((r, step), layers) in came {
        let pass = &wave[r][step];
        let is_token = tokens(pass, lengths);
        for ((moe_layer, routing), layer) in layers.iter().enumerate().zip(model.spec().moe_layers()) {
            observe(pass, &RoutingRecord { layer, moe_layer, routing, is_token: is_token.as_deref() })?;
        }
    }
    Ok(())
}

/// Which rows of a pass are no padding; `None` when all are tokens.
fn tokens(pass: &Pass, lengths: &[usize]) -> Option<Vec<bool>> {
    let lengths = &lengths[pass.sequences.clone()];
    let longest = lengths.iter().copied().max()?;
    let one = |&n: &usize| (0..longest).map(move |i| i >= longest - n);
    (lengths.len() > 1 && lengths.iter().any(|&n| n < longest))
        .then(|| lengths.iter().flat_map(one).collect())
}

/// What a pass gives: logits, and the routing of every MoE layer if it is asked for.
#[derive(Debug, Default)]
struct Output {
    logits: Vec<f32>,
    routing: Vec<RoutingBuf>,
}

/// How much that is.
struct Shape<'a> {
    model: &'a Decoder,
    logits: Logits,
    routing: bool,
}

impl Shape<'_> {
    /// Numbers of the logits, and rows.
    fn sizes(&self, pass: &Pass) -> (usize, usize) {
        let positions = match self.logits {
            Logits::All => pass.positions.len(),
            Logits::Last => 1,
        };
        (pass.sequences.len() * positions * self.model.spec().vocab_size, pass.rows())
    }

    /// Numbers of one row's routing in one layer: weights, scores; ids.
    fn routing_sizes(&self) -> (usize, usize) {
        let router = self.model.spec().moe.router;
        (router.top_k + router.num_experts, router.top_k)
    }

    fn layers(&self) -> usize {
        if self.routing { self.model.spec().num_moe_layers() } else { 0 }
    }

    /// Bytes of a pass' message: logits, weights and scores of every layer, then the ids of every layer.
    fn bytes(&self, pass: &Pass) -> usize {
        let (logits, rows) = self.sizes(pass);
        let (floats, ids) = self.routing_sizes();
        4 * logits + self.layers() * rows * (4 * floats + size_of::<ExpertId>() * ids)
    }

    /// Brings all ranks' outputs to rank 0, ranks ascending (collective); other ranks get nothing.
    fn collect<'p>(
        &self,
        ranks: &Ranks,
        mine: Output,
        pass_of: &dyn Fn(usize) -> Option<&'p Pass>,
    ) -> Result<Vec<(Pass, Output)>> {
        let comm = ranks.comm();
        let (rank, num_ranks) = (comm.rank(), comm.world_size());
        let mut expected = vec![0; num_ranks];
        let mut to = vec![0; num_ranks];
        let send = if rank == 0 {
            for (r, bytes) in expected.iter_mut().enumerate().skip(1) {
                *bytes = pass_of(r).map_or(0, |pass| self.bytes(pass));
            }
            Buffer::try_zeroed::<u8>(0)?
        } else {
            let buffer = self.encode(&mine)?;
            to[0] = buffer.len_bytes();
            buffer
        };
        let received = comm.exchange("outputs of a pass", send, &to, Expect::Bytes(expected))?;
        if rank > 0 {
            return Ok(Vec::new());
        }
        let mut outputs = Vec::new();
        if let Some(pass) = pass_of(0) {
            outputs.push((pass.clone(), mine));
        }
        for r in 1..num_ranks {
            if let Some(pass) = pass_of(r) {
                outputs.push((pass.clone(), self.decode(pass, received.part(r))?));
            }
        }
        Ok(outputs)
    }

    fn encode(&self, output: &Output) -> Result<Buffer> {
        let mut pieces: Vec<&[u8]> = vec![bytemuck::cast_slice(&output.logits)];
        for routing in &output.routing {
            let (Some(weights), Some(scores)) = (&routing.weights, &routing.scores) else {
                return Err(ModelError::request("routing without weights or router logits"));
            };
            pieces.extend([bytemuck::cast_slice::<f32, u8>(weights), bytemuck::cast_slice(scores)]);
        }
        pieces.extend(output.routing.iter().map(|r| bytemuck::cast_slice::<ExpertId, u8>(&r.expert_ids)));
        Ok(Buffer::concat(&pieces)?)
    }

    fn decode(&self, pass: &Pass, bytes: &[u8]) -> Result<Output> {
        let router = self.model.spec().moe.router;
        let (logits, rows) = self.sizes(pass);
        let mut at = 0;
        let mut take = |bytes_of: usize| -> Range<usize> {
            at += bytes_of;
            at - bytes_of..at
        };
        let floats = |range: Range<usize>| bytemuck::pod_collect_to_vec::<u8, f32>(&bytes[range]);
        let mut output = Output { logits: floats(take(4 * logits)), routing: Vec::new() };
        for _ in 0..self.layers() {
            output.routing.push(RoutingBuf {
                num_experts: router.num_experts,
                top_k: router.top_k,
                expert_ids: Vec::new(),
                weights: Some(floats(take(4 * rows * router.top_k))),
                scores: Some(floats(take(4 * rows * router.num_experts))),
                occurrences: None,
            });
        }
        for routing in &mut output.routing {
            let range = take(size_of::<ExpertId>() * rows * router.top_k);
            routing.expert_ids = bytemuck::pod_collect_to_vec(&bytes[range]);
        }
        Ok(output)
    }
}
