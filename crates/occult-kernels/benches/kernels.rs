//! Figures of the kernels beside the limits of the machine, measured in the same run.
//!
//! `cargo bench -p occult-kernels --no-default-features --bench kernels -- [--threads N] [--seconds S] [PART ..]`; parts:
//! layer, layer1024, skew, decode (each also with one type of weights only: layer-f32, layer-bf16), dense, latency, memory
//! (the peak memory of forward and backward at 4,096 tokens; alone, not by default).
//! `--seconds 0`: one call each, after one that is not counted.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};

use common::Args;
use half::bf16;
use occult_kernels::linear::{LinearDims, linear, linear_bwd_w, linear_bwd_x};
use occult_kernels::smm::{self, ExpertDims, ExpertMatrices, GateUp, MergeGrads, MergeInputs, ScatterGrads};
use occult_kernels::{Matrix, SparseRows, peak};

const OLMOE: ExpertDims = ExpertDims { hidden: 2048, intermediate: 1024 };
const EXPERTS: usize = 64;
const TOP_K: usize = 8;

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next() as f32 / (1_u64 << 31) as f32 - 0.5).collect()
    }
}

struct Bench {
    args: Args,
    gflops: f64,
    gb_per_s: f64,
}

impl Bench {
    fn compute(&self, what: &str, flop: f64, seconds: f64) {
        let rate = flop / seconds / 1e9;
        println!(
            "{what:<58} {:9.3} ms {rate:8.1} GFLOP/s  {:5.1} % of peak",
            seconds * 1e3,
            100.0 * rate / self.gflops
        );
    }

    fn stream(&self, what: &str, bytes: f64, flop: f64, seconds: f64) {
        let rate = bytes / seconds / 1e9;
        println!(
            "{what:<58} {:9.3} ms {rate:8.1} GB/s     {:5.1} % of memory, {:6.1} GFLOP/s",
            seconds * 1e3,
            100.0 * rate / self.gb_per_s,
            flop / seconds / 1e9
        );
    }
}

/// Top-8 of 64 experts: uniform, or with expert 0 in every second token's choice.
fn routing(tokens: usize, skewed: bool) -> SparseRows {
    let mut rng = Rng(7);
    let mut rows: Vec<Vec<u32>> = vec![Vec::new(); EXPERTS];
    if skewed {
        // Half of all expanded rows belong to expert 0: R rows are as many as that needs, each with expert 0 and as
        // many others in total.
        let half = tokens * TOP_K / 2;
        rows[0] = (0..half as u32).collect();
        for n in 0..half {
            rows[1 + n % (EXPERTS - 1)].push(n as u32);
        }
        return sparse(half, rows);
    }
    for token in 0..tokens as u32 {
        let mut chosen = Vec::new();
        while chosen.len() < TOP_K {
            let expert = rng.next() as usize % EXPERTS;
            if !chosen.contains(&expert) {
                chosen.push(expert);
                rows[expert].push(token);
            }
        }
    }
    sparse(tokens, rows)
}

fn sparse(num_rows: usize, rows: Vec<Vec<u32>>) -> SparseRows {
    let mut offsets = vec![0];
    for rows in &rows {
        offsets.push(offsets[offsets.len() - 1] + rows.len() as u32);
    }
    SparseRows::new(num_rows, offsets, rows.concat()).expect("a routing of our own")
}

enum Weights {
    F32([Vec<f32>; 3]),
    Bf16([Vec<bf16>; 3]),
}

impl Weights {
    fn new(f32: bool) -> Self {
        let len = EXPERTS * OLMOE.hidden * OLMOE.intermediate;
        let narrow = |values: Vec<f32>| values.into_iter().map(|x| bf16::from_f32(x * 0.05)).collect();
        if f32 {
            Self::F32([1, 2, 3].map(|seed| Rng(seed).values(len).into_iter().map(|x| x * 0.05).collect()))
        } else {
            Self::Bf16([1, 2, 3].map(|seed| narrow(Rng(seed).values(len))))
        }
    }

    fn name(&self) -> &'static str {
        if matches!(self, Self::F32(_)) { "f32" } else { "bf16" }
    }

    fn experts(&self) -> Vec<ExpertMatrices<'_>> {
        let len = OLMOE.hidden * OLMOE.intermediate;
        (0..EXPERTS)
            .map(|expert| {
                let at = expert * len..(expert + 1) * len;
                let [gate, up, down] = [0, 1, 2].map(|i| match self {
                    Self::F32(all) => Matrix::F32(&all[i][at.clone()]),
                    Self::Bf16(all) => Matrix::Bf16(&all[i][at.clone()]),
                });
                ExpertMatrices { gate, up, down }
            })
            .collect()
    }
}

/// Inference, forward, and forward with backward of one layer; seconds of each.
fn layer(bench: &Bench, name: &str, rows: &SparseRows, weights: &Weights) -> [f64; 3] {
    let ExpertDims { hidden: d, intermediate: f } = OLMOE;
    let (r, n) = (rows.num_rows(), rows.num_expanded());
    let experts = weights.experts();
    let x = Rng(5).values(r * d);
    let row_weights = Rng(6).values(n);
    let mut y = vec![0.0; r * d];
    let flop = 6.0 * (n * d * f) as f64;
    let inference = bench.args.time(|| {
        smm::expert_ffn(&bench.args.threads, rows, OLMOE, &x, &experts, &row_weights, &mut y)
            .expect("shapes");
    });
    bench.compute(&format!("{name} {} inference", weights.name()), flop, inference);
    let up: Vec<_> = experts.iter().map(|e| GateUp { gate: e.gate, up: e.up }).collect();
    let down: Vec<_> = experts.iter().map(|e| e.down).collect();
    let mut pre = vec![0.0; n * 2 * f];
    let mut forward = |pre: &mut [f32]| {
        smm::scatter(&bench.args.threads, rows, OLMOE, &x, &up, pre).expect("shapes");
        let inputs = MergeInputs { pre, row_weights: &row_weights, w_down: &down };
        smm::merge(&bench.args.threads, rows, OLMOE, inputs, &mut y).expect("shapes");
    };
    let ahead = bench.args.time(|| forward(&mut pre));
    bench.compute(&format!("{name} {} forward", weights.name()), flop, ahead);
    let dy = Rng(8).values(r * d);
    let (mut d_row_weights, mut dx) = (vec![0.0; n], vec![0.0; r * d]);
    let (mut d_w_down, mut d_w_up) = (vec![0.0; EXPERTS * d * f], vec![0.0; EXPERTS * 2 * f * d]);
    let both = bench.args.time(|| {
        forward(&mut pre);
        let grads = MergeGrads {
            d_pre: &mut pre,
            d_row_weights: &mut d_row_weights,
            d_w_down: Some(&mut d_w_down),
            act: None,
        };
        smm::merge_bwd_in_place(&bench.args.threads, rows, OLMOE, &row_weights, &down, &dy, grads)
            .expect("shapes");
        let grads = ScatterGrads { dx: Some(&mut dx), d_w_up: Some(&mut d_w_up) };
        smm::scatter_bwd(&bench.args.threads, rows, OLMOE, &x, &up, &pre, grads).expect("shapes");
    });
    bench.compute(&format!("{name} {} forward+backward", weights.name()), 3.0 * flop, both);
    [inference, ahead, both]
}

/// One expert with half of the rows beside rows shared out evenly, as many in all.
fn skew(bench: &Bench, weights: &Weights) {
    let balanced = layer(bench, "layer 4096 tokens, balanced", &routing(4096, false), weights);
    let skewed = layer(bench, "layer 4096 tokens, one expert half", &routing(4096, true), weights);
    let [inference, forward, both] = std::array::from_fn(|i| 100.0 * balanced[i] / skewed[i]);
    println!(
        "one expert half over balanced, {}: inference {inference:.1} %, forward {forward:.1} %, forward+backward {both:.1} %",
        weights.name()
    );
}

/// Memory of this process in GB, where the system tells: `VmRSS`, what is resident, or `VmHWM`, the most there was.
fn memory_gb(field: &str) -> f64 {
    let of = |status: String| -> Option<f64> {
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
        Some(line.trim().trim_end_matches(" kB").parse::<f64>().ok()? * 1024.0 / 1e9)
    };
    std::fs::read_to_string("/proc/self/status").ok().and_then(of).unwrap_or(f64::NAN)
}

fn decode(bench: &Bench, tokens: usize, weights: &Weights) {
    let ExpertDims { hidden: d, intermediate: f } = OLMOE;
    let rows = routing(tokens, false);
    let experts = weights.experts();
    let x = Rng(5).values(tokens * d);
    let row_weights = Rng(6).values(rows.num_expanded());
    let mut y = vec![0.0; tokens * d];
    let busy = (0..EXPERTS).filter(|&e| !rows.rows_of(e).is_empty()).count();
    let bytes = (busy * 3 * d * f * if matches!(weights, Weights::F32(_)) { 4 } else { 2 }) as f64;
    // Weights larger than the cache: other experts each time would be fairer still; these are 64 experts of a layer.
    let seconds = bench.args.time(|| {
        smm::expert_ffn(&bench.args.threads, &rows, OLMOE, &x, &experts, &row_weights, &mut y)
            .expect("shapes");
    });
    let flop = 6.0 * (rows.num_expanded() * d * f) as f64;
    bench.stream(
        &format!("decode {tokens} tokens, {busy} experts, {}", weights.name()),
        bytes,
        flop,
        seconds,
    );
}

fn dense(bench: &Bench, m: usize, n: usize, k: usize) {
    let dims = LinearDims { rows: m, out: n, inner: k };
    let (x, dout) = (Rng(1).values(m * k), Rng(2).values(m * n));
    let w = Rng(3).values(n * k);
    let narrow: Vec<bf16> = w.iter().map(|&x| bf16::from_f32(x)).collect();
    let (mut out, mut dx, mut dw) = (vec![0.0; m * n], vec![0.0; m * k], vec![0.0; n * k]);
    let flop = 2.0 * (m * n * k) as f64;
    let name = format!("dense {m} x {n} x {k}");
    for (stored, w) in [("f32", Matrix::F32(&w)), ("bf16", Matrix::Bf16(&narrow))] {
        let seconds = bench.args.time(|| linear(&bench.args.threads, dims, &x, w, &mut out).expect("shapes"));
        bench.compute(&format!("{name} {stored}"), flop, seconds);
    }
    let seconds = bench
        .args
        .time(|| linear_bwd_x(&bench.args.threads, dims, &dout, Matrix::F32(&w), &mut dx).expect("shapes"));
    bench.compute(&format!("{name} dx"), flop, seconds);
    let seconds =
        bench.args.time(|| linear_bwd_w(&bench.args.threads, dims, &dout, &x, &mut dw).expect("shapes"));
    bench.compute(&format!("{name} dw"), flop, seconds);
}

const PARTS: [&str; 17] = [
    "layer",
    "layer-f32",
    "layer-bf16",
    "layer1024",
    "layer1024-f32",
    "layer1024-bf16",
    "skew",
    "skew-f32",
    "skew-bf16",
    "decode",
    "decode-f32",
    "decode-bf16",
    "memory",
    "memory-f32",
    "memory-bf16",
    "dense",
    "latency",
];

fn main() {
    let args = Args::parse("kernels", 1.0, &PARTS);
    let threads = &args.threads;
    let gflops = peak::fma_gflops(threads, 20);
    let gb_per_s = peak::read_gb_per_s(threads, 1 << 29, 4);
    println!(
        "{} threads, {}: peak {gflops:.1} GFLOP/s, memory {gb_per_s:.1} GB/s",
        threads.count(),
        threads.instruction_set().name()
    );
    let bench = Bench { args, gflops, gb_per_s };
    let wants = |part: &str| bench.args.wants(part);
    if wants("latency") {
        let count = bench.args.threads.count();
        let inside = AtomicUsize::new(0);
        // Every task waits for all others to have begun: the call ends when all threads are in.
        let seconds = bench.args.time(|| {
            inside.store(0, Ordering::SeqCst);
            bench.args.threads.for_each(count, |_| {
                inside.fetch_add(1, Ordering::SeqCst);
                while inside.load(Ordering::SeqCst) < count {
                    std::hint::spin_loop();
                }
            });
        });
        println!("fork, all threads in, and join: {:.2} us", seconds * 1e6);
    }
    for f32 in [true, false] {
        let wanted =
            |part: &str| wants(part) || wants(&format!("{part}-{}", if f32 { "f32" } else { "bf16" }));
        if !["layer", "layer1024", "skew", "decode", "memory"].iter().any(|part| wanted(part)) {
            continue;
        }
        let before = memory_gb("VmRSS");
        let weights = Weights::new(f32);
        if bench.args.parts.iter().any(|part| part.starts_with("memory")) {
            layer(&bench, "layer 4096 tokens", &routing(4096, false), &weights);
            let bytes = EXPERTS * 3 * OLMOE.hidden * OLMOE.intermediate * (4 + if f32 { 4 } else { 2 });
            let (peak, held) = (memory_gb("VmHWM"), bytes as f64 / 1e9);
            println!(
                "peak memory {peak:.2} GB: program {before:.2} GB, weights and gradients {held:.2} GB, rest {:.2} GB",
                peak - before - held
            );
            return;
        }
        if wanted("layer1024") {
            layer(&bench, "layer 1024 tokens", &routing(1024, false), &weights);
        }
        if wanted("layer") {
            layer(&bench, "layer 4096 tokens", &routing(4096, false), &weights);
        }
        if wanted("skew") {
            skew(&bench, &weights);
        }
        if wanted("decode") {
            for tokens in [1, 8, 32] {
                decode(&bench, tokens, &weights);
            }
        }
    }
    if wants("dense") {
        for m in [16, 32, 64, 128, 256, 512] {
            dense(&bench, m, 2048, 1024);
        }
        dense(&bench, 4096, 4096, 4096);
    }
}
