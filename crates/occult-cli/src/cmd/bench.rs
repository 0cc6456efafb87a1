//! `occult bench`

use std::time::Instant;

use anyhow::{Result, bail};
use occult_kernels::peak;
use occult_model::hf::{ExpertLayout, Names, Role};
use occult_model::spec::AttentionSpec;
use occult_model::{Batch, Decoder, Logits, ModelSpec, RoutingRecord, Threads, prefill};
use serde_json::{Value, json};

use crate::bench::{exchange, layer, step};
use crate::model_args::{BenchArgs, BenchModelArgs, BenchWhat, Phase};
use crate::output::{Table, figure, print, print_json};
use crate::{model, progress};

/// Bytes that are read to measure the bandwidth: much more than caches hold.
const READ_BYTES: usize = 1 << 30;

pub(super) fn run(args: &BenchArgs) -> Result<()> {
    match &args.what {
        BenchWhat::Model(args) => bench_model(args),
        BenchWhat::Layer(args) => layer::run(args),
        BenchWhat::Exchange(args) => exchange::run(args),
        BenchWhat::Step(args) => step::run(args),
    }
}

/// What the machine can do.
struct Limits {
    /// Of the arithmetic that products with weights are done in.
    gflops: f64,
    gb_per_s: f64,
}

/// One measured phase.
struct Measured {
    name: String,
    /// Tokens of one call.
    tokens: usize,
    /// Of each call, ascending.
    seconds: Vec<f64>,
    flop: f64,
    bytes: f64,
}

impl Measured {
    fn median(&self) -> f64 {
        self.seconds[self.seconds.len() / 2]
    }

    /// The least seconds the machine needs: all arithmetic at its peak, or all weights once from memory.
    fn least(&self, limits: &Limits) -> f64 {
        (self.flop / limits.gflops).max(self.bytes / limits.gb_per_s) / 1e9
    }

    fn json(&self, limits: &Limits) -> Value {
        let (median, least) = (self.median(), self.least(limits));
        json!({
            "what": self.name,
            "tokens": self.tokens,
            "median_s": median,
            "best_s": self.seconds[0],
            "runs": self.seconds.len(),
            "tokens_per_s": self.tokens as f64 / median,
            "limit_tokens_per_s": self.tokens as f64 / least,
            "share_of_limit": least / median,
            "gflop": self.flop / 1e9,
            "gbytes": self.bytes / 1e9,
        })
    }
}

fn bench_model(args: &BenchModelArgs) -> Result<()> {
    if args.runs == 0 || args.prompt == 0 || args.new_tokens == 0 || args.batches.contains(&0) {
        bail!("--runs, --prompt, --new-tokens and --batches must be at least 1");
    }
    let decoder = model::load(&args.load)?;
    let bytes_per_value = model::bytes_per_value(&args.load)?;
    let counts = Counts::of(decoder.spec(), bytes_per_value);
    let spinner = progress::spinner("measuring");
    // Weights of less than 16 bits are multiplied in 8 bits.
    let quantised = bytes_per_value < 2.0;
    let (before, mut measured) = (limits(decoder.threads(), quantised), Vec::new());
    if args.what.contains(&Phase::Prefill) {
        for (batch, len) in [(1, 512), (8, 128)] {
            let len = len.min(decoder.spec().context_len);
            measured.push(bench_prefill(&decoder, &counts, batch, len, args.runs)?);
        }
    }
    if args.what.contains(&Phase::Decode) {
        for &batch in &args.batches {
            measured.push(bench_decode(&decoder, &counts, batch, args)?);
        }
    }
    let after = limits(decoder.threads(), quantised);
    spinner.finish_and_clear();
    let limits =
        Limits { gflops: before.gflops.max(after.gflops), gb_per_s: before.gb_per_s.max(after.gb_per_s) };
    if args.json {
        return print_json(&json!({
            "model": args.load.model,
            "threads": decoder.threads().count(),
            "peak_gflops": limits.gflops,
            "read_gb_per_s": limits.gb_per_s,
            "phases": measured.iter().map(|m| m.json(&limits)).collect::<Vec<_>>(),
        }));
    }
    print(&format!(
        "{} threads: {} {:.0} GFLOP/s, memory {:.1} GB/s\n\n",
        decoder.threads().count(),
        if quantised { "8-bit multiply-add" } else { "multiply-add" },
        limits.gflops,
        limits.gb_per_s
    ))?;
    let mut table = Table::new(["phase", "ms", "tokens/s", "limit", "of limit", "GFLOP/s", "GB/s"]);
    for m in &measured {
        let (median, tokens) = (m.median(), m.tokens as f64);
        let least = m.least(&limits);
        table.row([
            m.name.clone(),
            figure(Some(median * 1e3), 1),
            figure(Some(tokens / median), 1),
            figure(Some(tokens / least), 1),
            format!("{:.0} %", 100.0 * least / median),
            figure(Some(m.flop / median / 1e9), 0),
            figure(Some(m.bytes / median / 1e9), 1),
        ]);
    }
    print(&table.render())
}

fn limits(threads: &Threads, quantised: bool) -> Limits {
    let in_8_bits = if quantised { peak::int8_gops(threads, 20) } else { None };
    Limits {
        gflops: in_8_bits.unwrap_or_else(|| peak::fma_gflops(threads, 20)),
        gb_per_s: peak::read_gb_per_s(threads, READ_BYTES, 5),
    }
}

/// Ids that differ, the same in every run.
fn sequences(batch: usize, len: usize, vocab: usize) -> Vec<Vec<u32>> {
    let mut state = 3u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as usize % vocab) as u32
    };
    (0..batch).map(|_| (0..len).map(|_| next()).collect()).collect()
}

fn sorted(mut seconds: Vec<f64>) -> Vec<f64> {
    seconds.sort_by(f64::total_cmp);
    seconds
}

/// Distinct experts of each MoE layer and call.
fn count_experts(distinct: &mut usize) -> impl FnMut(&RoutingRecord<'_>) -> occult_model::Result<()> + '_ {
    |record| {
        let mut ids = record.routing.expert_ids.clone();
        ids.sort_unstable();
        ids.dedup();
        *distinct += ids.len();
        Ok(())
    }
}

fn bench_prefill(
    decoder: &Decoder,
    counts: &Counts,
    batch: usize,
    len: usize,
    runs: usize,
) -> Result<Measured> {
    let batch = Batch::new(&sequences(batch, len, decoder.spec().vocab_size))?;
    let (mut seconds, mut distinct) = (Vec::new(), 0);
    for run in 0..=runs {
        let mut cache = decoder.new_cache();
        distinct = 0;
        let mut observer = count_experts(&mut distinct);
        let start = Instant::now();
        decoder.forward(&batch, Some(&mut cache), Logits::Last, Some(&mut observer))?;
        // The first run touches the weights for the first time.
        if run > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let b = batch.batch_size();
    Ok(Measured {
        name: format!("prefill {b}x{len}"),
        tokens: b * len,
        seconds: sorted(seconds),
        flop: counts.flop(b * len, b) + b as f64 * counts.attention_flop(len, 0),
        bytes: counts.bytes(distinct as f64),
    })
}

fn bench_decode(decoder: &Decoder, counts: &Counts, batch: usize, args: &BenchModelArgs) -> Result<Measured> {
    let (prompt, new) = (args.prompt, args.new_tokens);
    if prompt + new > decoder.spec().context_len {
        bail!(
            "--prompt and --new-tokens are more than the model's context of {}",
            decoder.spec().context_len
        );
    }
    let prompts = sequences(batch, prompt, decoder.spec().vocab_size);
    let (mut seconds, mut distinct) = (Vec::new(), 0);
    for run in 0..=args.runs {
        let mut cache = decoder.new_cache();
        let mut next = if batch == 1 {
            greedy(&prefill(decoder, &prompts[0], &mut cache, None)?.flatten_all()?.to_vec1()?, 1)
        } else {
            let logits = decoder.forward(&Batch::new(&prompts)?, Some(&mut cache), Logits::Last, None)?;
            greedy(&logits.flatten_all()?.to_vec1()?, batch)
        };
        distinct = 0;
        let mut observer = count_experts(&mut distinct);
        let start = Instant::now();
        for _ in 0..new {
            let step = Batch::new(&next)?;
            let logits = decoder.forward(&step, Some(&mut cache), Logits::Last, Some(&mut observer))?;
            next = greedy(&logits.flatten_all()?.to_vec1()?, batch);
        }
        if run > 0 {
            seconds.push(start.elapsed().as_secs_f64() / new as f64);
        }
    }
    Ok(Measured {
        name: format!("decode b{batch}"),
        tokens: batch,
        seconds: sorted(seconds),
        flop: counts.flop(batch, batch) + batch as f64 * counts.attention_flop(1, prompt + new / 2),
        bytes: counts.bytes(distinct as f64 / new as f64),
    })
}

/// The id with the largest logit of each sequence.
fn greedy(logits: &[f32], batch: usize) -> Vec<[u32; 1]> {
    let best = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap_or(0);
    logits.chunks_exact((logits.len() / batch).max(1)).map(|row| [best(row) as u32]).collect()
}

/// Values that a forward pass multiplies with.
struct Counts {
    /// Of everything but the embedding, the routed experts and the output.
    each: f64,
    output: f64,
    /// Of one expert of one layer.
    expert: f64,
    /// Experts per token, all MoE layers together.
    chosen: f64,
    /// Heads times the width of keys and of values, all layers together.
    heads: f64,
    bytes_per_value: f64,
}

impl Counts {
    fn of(spec: &ModelSpec, bytes_per_value: f64) -> Self {
        let names = Names::new(spec.family, ExpertLayout::Fused);
        let output = (spec.vocab_size * spec.hidden_size) as f64;
        let mut each = 0.0;
        for info in names.tensors(spec) {
            let is_table = ["model.embed_tokens.weight", "lm_head.weight"].contains(&info.name.as_str());
            let routed = matches!(info.role, Role::FusedGateUp { .. } | Role::FusedDown { .. });
            if !is_table && !routed {
                each += info.shape.iter().product::<usize>() as f64;
            }
        }
        let widths = match &spec.attention {
            AttentionSpec::Grouped(s) => s.num_heads * 2 * s.head_dim,
            AttentionSpec::Latent(s) => s.num_heads * (s.nope_dim + s.rope_dim + s.v_dim),
        };
        Self {
            each,
            output,
            expert: (3 * spec.moe.expert_size * spec.hidden_size) as f64,
            chosen: (spec.num_moe_layers() * spec.moe.router.top_k) as f64,
            heads: (widths * spec.layers.len()) as f64,
            bytes_per_value,
        }
    }

    /// Of all products with weights, for this many tokens and rows of logits.
    fn flop(&self, tokens: usize, logits: usize) -> f64 {
        2.0 * ((self.each + self.chosen * self.expert) * tokens as f64 + self.output * logits as f64)
    }

    /// Of the causal scores and sums of one sequence.
    fn attention_flop(&self, queries: usize, past: usize) -> f64 {
        let seen = queries as f64 * (past as f64 + (queries + 1) as f64 / 2.0);
        2.0 * self.heads * seen
    }

    /// Of the weights that are read, when this many experts are visited (all layers together).
    fn bytes(&self, experts: f64) -> f64 {
        (self.each + self.output + experts * self.expert) * self.bytes_per_value
    }
}
