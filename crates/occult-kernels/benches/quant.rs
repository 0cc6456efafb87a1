//! Quantised weights beside the limits of this run: `cargo bench -p occult-kernels --bench quant [-- THREADS [PART]]`.
//!
//! GOP/s counts a multiplication and an addition as two. GB/s counts the bytes of the weights once per call. Medians.

use std::time::Instant;

use half::bf16;
use occult_kernels::quant::{Format, Isa, Layout, Quantised, QuantisedExpert, expert_ffn, linear};
use occult_kernels::{SparseRows, Threads, peak};

/// Bytes that no cache of this class of machine holds.
const LARGE: usize = 256 << 20;

/// Median seconds of calls, as many as fit into about `budget` seconds, at least three.
fn median(budget: f64, mut call: impl FnMut()) -> f64 {
    call();
    let (start, mut times) = (Instant::now(), Vec::new());
    while times.len() < 3 || (start.elapsed().as_secs_f64() < budget && times.len() < 200) {
        let before = Instant::now();
        call();
        times.push(before.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

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

struct Limits {
    gops: f64,
    gbs: f64,
}

impl Limits {
    fn line(&self, what: &str, ops: f64, bytes: f64, seconds: f64) {
        let (gops, gbs) = (ops / seconds / 1e9, bytes / seconds / 1e9);
        let (of_peak, of_read) = (100.0 * gops / self.gops, 100.0 * gbs / self.gbs);
        println!(
            "{what:<44} {:>9.3} ms {gops:>8.0} GOP/s {of_peak:>4.0} % {gbs:>7.1} GB/s {of_read:>4.0} %",
            seconds * 1e3
        );
    }
}

fn dense(threads: &Threads, limits: &Limits, pool: &Pool, m: usize, out: &mut [f32]) {
    let (n, k) = (pool.layout.rows(), pool.layout.cols());
    let x = rows_of(m, k);
    let mut i = 0;
    let seconds = median(0.7, || {
        linear(threads, &x, pool.get(i % pool.len()), &mut out[..m * n]).expect("linear");
        i += 1;
    });
    let bytes = pool.get(0).bytes() as f64;
    let (format, group) = (pool.layout.format().name(), pool.layout.group());
    limits.line(&format!("{format}/{group} {m} x {n} x {k}"), 2.0 * (m * n * k) as f64, bytes, seconds);
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

fn experts(threads: &Threads, limits: &Limits, up: &Pool, down: &Pool, tokens: usize) {
    let (f, d) = (up.layout.rows(), up.layout.cols());
    let all: Vec<_> = (0..64)
        .map(|e| QuantisedExpert { gate: up.get(2 * e), up: up.get(2 * e + 1), down: down.get(e) })
        .collect();
    let rows = routing(tokens);
    let (x, weights) = (rows_of(tokens, d), vec![0.125; rows.num_expanded()]);
    let mut y = vec![0.0; tokens * d];
    let seconds = median(1.0, || {
        expert_ffn(threads, &rows, &x, &all, &weights, &mut y).expect("ffn");
    });
    let used = (0..64).filter(|&e| !rows.rows_of(e).is_empty()).count();
    let bytes = (used * (2 * up.get(0).bytes() + down.get(0).bytes())) as f64;
    let what = format!("{} 64 experts, top 8, {tokens} tokens", up.layout.format().name());
    limits.line(&what, 6.0 * (rows.num_expanded() * d * f) as f64, bytes, seconds);
}

fn main() {
    let mut args = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = Threads::new(args.next().and_then(|a| a.parse().ok()).unwrap_or(cores));
    let part = args.next().unwrap_or_default();
    let wanted = |name: &str| part.is_empty() || part == name;
    let limits = Limits {
        gops: peak::int8_gops(&threads, 20).unwrap_or(f64::NAN),
        gbs: peak::read_gb_per_s(&threads, LARGE, 5),
    };
    println!(
        "{:?}, {} threads: products {:.0} GOP/s, reading {:.1} GB/s",
        Isa::best(),
        threads.count(),
        limits.gops,
        limits.gbs
    );
    let mut out = vec![0.0; 512 * 50304];
    if wanted("groups") {
        for group in [32, 64, 128] {
            dense(&threads, &limits, &Pool::new(Format::Q8, group, 2048, 2048, 1), 512, &mut out);
        }
    }
    for format in [Format::Q8, Format::Q4] {
        if wanted("dense") {
            let projections = Pool::new(format, Layout::DEFAULT_GROUP, 2048, 2048, 40);
            let head = Pool::new(format, Layout::DEFAULT_GROUP, 50304, 2048, 1);
            for m in [1, 8, 32, 512] {
                dense(&threads, &limits, &projections, m, &mut out);
                dense(&threads, &limits, &head, m, &mut out);
            }
        }
        if wanted("experts") {
            let up = Pool::new(format, Layout::DEFAULT_GROUP, 1024, 2048, 128);
            let down = Pool::new(format, Layout::DEFAULT_GROUP, 2048, 1024, 64);
            for tokens in [1, 8, 32, 128, 512, 4096] {
                experts(&threads, &limits, &up, &down, tokens);
            }
        }
    }
}
