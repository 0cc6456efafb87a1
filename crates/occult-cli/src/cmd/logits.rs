//! `occult logits`

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};

use anyhow::{Context, Result, bail};
use occult_formats::write_atomic_with;
use occult_model::{Decoder, Logits, ModelError, ModelSpec, Pass, RoutingRecord, for_each_pass};
use serde_json::json;

use crate::model_args::LogitsArgs;
use crate::output::print;
use crate::spreading::with_model;
use crate::{inputs, model, progress};

/// Most positions, padding included.
const MAX_POSITIONS: usize = 1 << 26;

pub(super) fn run(args: &LogitsArgs) -> Result<()> {
    // What can be wrong without the weights is found before they are read.
    let sequences = inputs::ids(&args.ids)?;
    let spec = occult_model::hf::read_spec(&args.load.model)?;
    let shape = Shape::of(&sequences, &spec).with_context(|| args.ids.display().to_string())?;
    let done = with_model(&args.load, &args.spread, |decoder| {
        if !decoder.is_first_rank() {
            let (none, mut observe) =
                (&mut |_: &Pass, _: &[f32]| Ok(()), |_: &Pass, _: &RoutingRecord<'_>| Ok(()));
            let rows = args.batch_tokens;
            return Ok(for_each_pass(decoder, &sequences, rows, Logits::All, Some(&mut observe), none)?);
        }
        write_atomic_with(&args.out, |file| write(file, &sequences, decoder, &shape, args.batch_tokens))
            .with_context(|| format!("computing {}", args.out.display()))
    })?;
    if done.is_none() {
        return Ok(());
    }
    let Shape { batch, len, vocab, layers, top_k } = shape;
    print(&format!(
        "{}: logits [{batch}, {len}, {vocab}] f32, expert_ids [{layers}, {batch}, {len}, {top_k}] i64\n",
        args.out.display()
    ))
}

/// The letters of the two tensors' shapes.
struct Shape {
    batch: usize,
    len: usize,
    vocab: usize,
    layers: usize,
    top_k: usize,
}

impl Shape {
    fn of(sequences: &[Vec<u32>], spec: &ModelSpec) -> Result<Self> {
        model::check_ids(sequences, spec, spec.context_len)?;
        let (batch, len) = (sequences.len(), sequences.iter().map(Vec::len).max().unwrap_or(0));
        if batch.saturating_mul(len) > MAX_POSITIONS {
            bail!("{batch} sequences of up to {len} tokens are more than {MAX_POSITIONS} positions");
        }
        let (layers, top_k) = (spec.num_moe_layers(), spec.moe.router.top_k);
        Ok(Self { batch, len, vocab: spec.vocab_size, layers, top_k })
    }
}

/// `expert_ids` stands first, so that both tensors are aligned, and is known last: logits go straight to the file, passes in any order.
fn write(
    file: &mut File,
    sequences: &[Vec<u32>],
    decoder: &Decoder,
    shape: &Shape,
    rows: usize,
) -> Result<()> {
    let &Shape { batch, len, vocab, layers, top_k } = shape;
    let (ids_bytes, logits_bytes) = (8 * layers * batch * len * top_k, 4 * batch * len * vocab);
    let header = json!({
        "expert_ids": { "dtype": "I64", "shape": [layers, batch, len, top_k], "data_offsets": [0, ids_bytes] },
        "logits": { "dtype": "F32", "shape": [batch, len, vocab], "data_offsets": [ids_bytes, ids_bytes + logits_bytes] },
    });
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut expert_ids = vec![-1i64; layers * batch * len * top_k];
    let bar = progress::bar(sequences.iter().map(|s| s.len() as u64).sum(), "tokens");
    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    let data = out.stream_position()?;
    // What is not written, the logits of padding, is zero.
    out.get_ref().set_len(data + (ids_bytes + logits_bytes) as u64)?;
    // Where a pass' positions stand in the result: sequences are aligned at the end.
    let first = |pass: &Pass| {
        let longest = sequences[pass.sequences.clone()].iter().map(Vec::len).max().unwrap_or(0);
        len - longest + pass.positions.start
    };
    let mut observe = |pass: &Pass, r: &RoutingRecord<'_>| {
        let (at, t) = (first(pass), pass.positions.len());
        for (b, rows) in pass.sequences.clone().zip(r.routing.expert_ids.chunks_exact(t * top_k)) {
            let skip = (len - sequences[b].len()).saturating_sub(at) * top_k;
            let from = ((r.moe_layer * batch + b) * len + at) * top_k + skip;
            for (to, &id) in expert_ids[from..].iter_mut().zip(&rows[skip..]) {
                *to = id.into();
            }
        }
        Ok(())
    };
    let mut failed = None;
    let result =
        for_each_pass(decoder, sequences, rows, Logits::All, Some(&mut observe), &mut |pass, logits| {
            let (at, t) = (first(pass), pass.positions.len());
            for (b, rows) in pass.sequences.clone().zip(logits.chunks_exact(t * vocab)) {
                let skip = (len - sequences[b].len()).saturating_sub(at);
                let to = data + (ids_bytes + 4 * (b * len + at + skip) * vocab) as u64;
                let written =
                    out.seek(SeekFrom::Start(to)).and_then(|_| write_f32(&mut out, &rows[skip * vocab..]));
                failed = failed.take().or(written.err());
                bar.inc((t - skip) as u64);
            }
            match failed {
                Some(_) => Err(ModelError::request("writing failed")),
                None => Ok(()),
            }
        });
    if let Some(error) = failed {
        return Err(error.into());
    }
    result?;
    bar.finish_and_clear();
    out.seek(SeekFrom::Start(data))?;
    for id in &expert_ids {
        out.write_all(&id.to_le_bytes())?;
    }
    Ok(out.flush()?)
}

fn write_f32(out: &mut impl Write, values: &[f32]) -> std::io::Result<()> {
    values.iter().try_for_each(|v| out.write_all(&v.to_le_bytes()))
}
