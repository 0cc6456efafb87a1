//! Quantised weights beside the limits of the machine, measured in the same run.
//!
//! `cargo bench -p occult-kernels --no-default-features --bench quant -- [--threads N] [--seconds S] [PART ..]`; parts: groups,
//! dense, experts.
//!
//! GOP/s counts a multiplication and an addition as two. GB/s counts the bytes of the weights once per call. Medians.

mod common;

use common::Args;
use half::bf16;
use occult_kernels::quant::{Format, Isa, Layout, Quantised, QuantisedExpert, expert_ffn, linear};
use occult_kernels::{SparseRows, peak};

/// Bytes that no cache of this class of machine holds.
const LARGE: usize = 256 << 20;

/// `count` matrices of one shape in one allocation.
struct Pool {
    layout: Layout,
    /// From the first multiple of 64 bytes, as in a file.
    data: Vec<u8>,
    scales: Vec<bf16>,
}

impl Pool {
    fn new(format: Format, group: usize, n: usize, k: usize, count: usize) -> Self {
        let layout = Layout::new(format, group, n, k).expect("layout");
        let bytes = layout.data_shape().iter().product::<usize>() * count;
        let scales = layout.scales_shape().iter().product::<usize>() * count;
        let data = (0..bytes + 64).map(|i| ((i * 7919) >> 3) as u8).collect();
        Self { layout, data, scales: vec![bf16::from_f32(0.01); scales] }
    }

    fn get(&self, i: usize) -> Quantised<'_> {
        let bytes: usize = self.layout.data_shape().iter().product();
        let scales: usize = self.layout.scales_shape().iter().product();
        let (data, scales) = (
            &self.data[self.data.as_ptr().align_offset(64)..][i * bytes..][..bytes],
            &self.scales[i * scales..][..scales],
        );
        Quantised::new(self.layout, data, scales).expect("lengths")
    }

    fn len(&self) -> usize {
        self.data.len() / self.layout.data_shape().iter().product::<usize>()
    }
}

fn rows_of(m: usize, k: usize) -> Vec<f32> {
    (0..m * k).map(|i| (i as f32 * 0.37).sin()).collect()
}

struct Bench {
    args: Args,
    /// Of 8-bit products; none where they are plain Rust.
    gops: Option<f64>,
    gb_per_s: f64,
}

impl Bench {
    fn line(&self, what: &str, ops: f64, bytes: f64, seconds: f64) {
        let (gops, gbs) = (ops / seconds / 1e9, bytes / seconds / 1e9);
        let of_peak = self.gops.map_or("-".to_owned(), |peak| format!("{:.0} %", 100.0 * gops / peak));
        println!(
            "{what:<44} {:>9.3} ms {gops:>8.0} GOP/s {of_peak:>6} of peak {gbs:>7.1} GB/s {:>4.0} % of memory",
            seconds * 1e3,
            100.0 * gbs / self.gb_per_s
        );
    }
}

fn dense(bench: &Bench, pool: &Pool, m: usize, out: &mut [f32]) {
    let (n, k) = (pool.layout.rows(), pool.layout.cols());
    let x = rows_of(m, k);
    let mut i = 0;
    let seconds = bench.args.time(|| {
        linear(&bench.args.threads, &x, pool.get(i % pool.len()), &mut out[..m * n]).expect("linear");
        i += 1;
    });
    let bytes = pool.get(0).bytes() as f64;
    let (format, group) = (pool.layout.format().name(), pool.layout.group());
    bench.line(&format!("{format}/{group} {m} x {n} x {k}"), 2.0 * (m * n * k) as f64, bytes, seconds);
}

/// `tokens` tokens, each with 8 of 64 experts, evenly.
fn routing(tokens: usize) -> SparseRows {
    let (mut offsets, mut idx) = (vec![0], Vec::new());
    for e in 0..64u32 {
        idx.extend((0..tokens as u32).filter(|t| (e + 64 - t * 13 % 64) % 8 == 0));
        offsets.push(idx.len() as u32);
    }
    SparseRows::new(tokens, offsets, idx).expect("rows")
}

fn experts(bench: &Bench, up: &Pool, down: &Pool, tokens: usize) {
    let (f, d) = (up.layout.rows(), up.layout.cols());
    let all: Vec<_> = (0..64)
        .map(|e| QuantisedExpert { gate: up.get(2 * e), up: up.get(2 * e + 1), down: down.get(e) })
        .collect();
    let rows = routing(tokens);
    let (x, weights) = (rows_of(tokens, d), vec![0.125; rows.num_expanded()]);
    let mut y = vec![0.0; tokens * d];
    let seconds = bench.args.time(|| {
        expert_ffn(&bench.args.threads, &rows, &x, &all, &weights, &mut y).expect("ffn");
    });
    let used = (0..64).filter(|&e| !rows.rows_of(e).is_empty()).count();
    let bytes = (used * (2 * up.get(0).bytes() + down.get(0).bytes())) as f64;
    let what = format!("{} 64 experts, top 8, {tokens} tokens", up.layout.format().name());
    bench.line(&what, 6.0 * (rows.num_expanded() * d * f) as f64, bytes, seconds);
}

fn main() {
    let args = Args::parse("quant", 1.0, &["groups", "dense", "experts"]);
    let gops = peak::int8_gops(&args.threads, 20);
    let gb_per_s = peak::read_gb_per_s(&args.threads, LARGE, 5);
    println!(
        "{} threads, {:?}: 8-bit products {} GOP/s, memory {gb_per_s:.1} GB/s",
        args.threads.count(),
        Isa::best(),
        gops.map_or("-".to_owned(), |gops| format!("{gops:.0}"))
    );
    let bench = Bench { args, gops, gb_per_s };
    let wanted = |part: &str| bench.args.wants(part);
    let mut out = vec![0.0; 512 * 50304];
    if wanted("groups") {
        for group in [32, 64, 128] {
            dense(&bench, &Pool::new(Format::Q8, group, 2048, 2048, 1), 512, &mut out);
        }
    }
    for format in [Format::Q8, Format::Q4] {
        if wanted("dense") {
            let projections = Pool::new(format, Layout::DEFAULT_GROUP, 2048, 2048, 40);
            let head = Pool::new(format, Layout::DEFAULT_GROUP, 50304, 2048, 1);
            for m in [1, 8, 32, 512] {
                dense(&bench, &projections, m, &mut out);
                dense(&bench, &head, m, &mut out);
            }
        }
        if wanted("experts") {
            let up = Pool::new(format, Layout::DEFAULT_GROUP, 1024, 2048, 128);
            let down = Pool::new(format, Layout::DEFAULT_GROUP, 2048, 1024, 64);
            for tokens in [1, 8, 32, 128, 512, 4096] {
                experts(&bench, &up, &down, tokens);
            }
        }
    }
}
