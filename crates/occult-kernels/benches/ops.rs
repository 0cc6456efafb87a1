//! The operations beside candle's own, in turns, and both beside the limits of the machine, measured in the same run.
//!
//! `cargo bench -p occult-kernels --features candle-nn --bench ops -- [--threads N] [--seconds S] [PART ..]`; parts: linear
//! (dense projections, router, output layer), attention, decode, elementwise, loss.
//!
//! The share is that of the time which the multiply-add peak and the memory speed allow at least, whichever is longer;
//! bytes are inputs and results once. What fits into a cache may be read faster than memory.

mod common;

use std::hint::black_box;

use candle_core::{D, Device, Result, Tensor, Var};
use common::Args;
use occult_kernels::ops::{
    AttentionShape, CrossEntropy, RopeStyle, attention, cross_entropy, linear, linear_cross_entropy,
    rms_norm, rope, swiglu,
};
use occult_kernels::peak;

/// What a call does at least.
#[derive(Clone, Copy)]
struct Work {
    flop: f64,
    bytes: f64,
}

struct Bench {
    args: Args,
    gflops: f64,
    gb_per_s: f64,
}

type Op<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

impl Bench {
    /// `what`: seconds, rate and share of the limit of ours, then seconds of candle's and how many times as fast ours is.
    fn line(&self, name: &str, what: &str, work: Work, [ours, candle]: [f64; 2]) {
        let (computing, reading) = (work.flop / self.gflops / 1e9, work.bytes / self.gb_per_s / 1e9);
        let rate = if computing > reading {
            format!("{:7.1} GFLOP/s {:5.1} % of peak  ", work.flop / ours / 1e9, 100.0 * computing / ours)
        } else {
            format!("{:7.1} GB/s    {:5.1} % of memory", work.bytes / ours / 1e9, 100.0 * reading / ours)
        };
        println!(
            "{name:40} {what:16} {:9.3} ms {rate}  candle {:9.3} ms, {:5.2} times",
            ours * 1e3,
            candle * 1e3,
            candle / ours
        );
    }

    /// Medians of both operations, which take turns.
    fn both(&self, call: impl Fn(Op<'_>) -> Result<()>, ours: Op<'_>, candle: Op<'_>) -> Result<[f64; 2]> {
        // Whatever fails, fails at once.
        call(ours)?;
        call(candle)?;
        let run = |op| call(op).expect("an operation that did not fail before");
        Ok(self.args.in_turns([&mut || run(ours), &mut || run(candle)]))
    }

    fn forward(&self, name: &str, inputs: &[Tensor], work: Work, ours: Op<'_>, candle: Op<'_>) -> Result<()> {
        let seconds = self.both(|op| op(inputs).map(|y| drop(black_box(y))), ours, candle)?;
        self.line(name, "forward", work, seconds);
        Ok(())
    }

    /// Forward without, and forward and backward with variables, which do `more` times the work of forward:
    /// (multiply-adds, bytes).
    fn compare(
        &self,
        name: &str,
        inputs: &[Tensor],
        (work, more): (Work, (f64, f64)),
        ours: Op<'_>,
        candle: Op<'_>,
    ) -> Result<()> {
        self.forward(name, inputs, work, ours, candle)?;
        let vars: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<Result<_>>()?;
        let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let call = |op: Op<'_>| op(&tracked)?.sum_all()?.backward().map(|g| drop(black_box(g)));
        let seconds = self.both(call, ours, candle)?;
        let work = Work { flop: work.flop * more.0, bytes: work.bytes * more.1 };
        self.line(name, "forward+backward", work, seconds);
        Ok(())
    }
}

fn randn(shape: &[usize]) -> Result<Tensor> {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu)
}

/// Bytes of so many f32 values.
fn bytes(values: usize) -> f64 {
    4.0 * values as f64
}

/// Attention as candle's models compute it: matrix products, a mask, softmax.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor, scale: f64) -> Result<Tensor> {
    let (b, h, t, d) = q.dims4()?;
    let (_, hkv, s, dv) = v.dims4()?;
    let scores = (q * scale)?.reshape((b, hkv, h / hkv * t, d))?.matmul(&k.t()?)?.reshape((b, h, t, s))?;
    let p = candle_nn::ops::softmax(&scores.broadcast_add(mask)?, D::Minus1)?;
    let out = p.reshape((b, hkv, h / hkv * t, s))?.matmul(v)?;
    out.reshape((b, h, t, dv))?.transpose(1, 2)?.reshape((b, t, h * dv))
}

fn causal_mask(t: usize, s: usize) -> Result<Tensor> {
    let values: Vec<f32> =
        (0..t * s).map(|i| if i % s > i / s + s - t { f32::NEG_INFINITY } else { 0.0 }).collect();
    Tensor::from_vec(values, (1, 1, t, s), &Device::Cpu)
}

/// Dense projections, router and output layer of OLMoE.
fn linears(bench: &Bench) -> Result<()> {
    let threads = &bench.args.threads;
    let candle = |x: &[Tensor]| x[0].matmul(&x[1].t()?);
    for (name, n) in [("projection", 2048), ("router", 64), ("output layer", 50304)] {
        let (k, w) = (2048, randn(&[n, 2048])?);
        for m in [1, 32, 512] {
            let inputs = [randn(&[m, k])?, w.clone()];
            let work = Work { flop: 2.0 * (m * n * k) as f64, bytes: bytes(m * k + n * k + m * n) };
            let name = format!("{name} {m} x {n} x {k}");
            let ours = |x: &[Tensor]| linear(threads, &x[0], &x[1]);
            // The output layer is trained without these logits in memory: part `loss`.
            if n > k {
                bench.forward(&name, &inputs, work, &ours, &candle)?;
            } else {
                bench.compare(&name, &inputs, (work, (3.0, 3.0)), &ours, &candle)?;
            }
        }
    }
    Ok(())
}

fn attentions(bench: &Bench) -> Result<()> {
    for (b, h, hkv, t, s, dk, dv) in [
        (1, 16, 16, 512, 512, 128, 128),
        (4, 16, 16, 256, 256, 128, 128),
        (1, 16, 16, 1024, 1024, 128, 128),
        (1, 32, 8, 512, 512, 128, 128),
        (1, 16, 16, 512, 512, 192, 128),
        (8, 8, 8, 256, 256, 64, 64),
    ] {
        let inputs = [randn(&[b, h, t, dk])?, randn(&[b, hkv, s, dk])?, randn(&[b, hkv, s, dv])?];
        let (scale, mask) = (1.0 / (dk as f64).sqrt(), causal_mask(t, s)?);
        let shape = AttentionShape::causal(scale as f32, s - t);
        // Two matrices, of which half is not masked.
        let work = Work {
            flop: (b * h * t * (t + 1) * (dk + dv)) as f64,
            bytes: bytes(b * (h * t + hkv * s) * (dk + dv)),
        };
        bench.compare(
            &format!("attention B{b} H{h}/{hkv} T{t} d{dk}/{dv}"),
            &inputs,
            (work, (3.5, 3.0)),
            &|x| attention(&bench.args.threads, &x[0], &x[1], &x[2], &shape),
            &|x| attend(&x[0], &x[1], &x[2], &mask, scale),
        )?;
    }
    Ok(())
}

fn decode(bench: &Bench) -> Result<()> {
    for (b, h, hkv, s, d) in [
        (1, 16, 16, 1024, 128),
        (8, 16, 16, 1024, 128),
        (32, 16, 16, 512, 128),
        (8, 32, 8, 1024, 128),
        (1, 16, 1, 4096, 128),
    ] {
        let inputs = [randn(&[b, h, 1, d])?, randn(&[b, hkv, s, d])?, randn(&[b, hkv, s, d])?];
        let (scale, mask) = (1.0 / (d as f64).sqrt(), causal_mask(1, s)?);
        let shape = AttentionShape::causal(scale as f32, s - 1);
        let work = Work { flop: (4 * b * h * s * d) as f64, bytes: bytes(2 * b * (hkv * s + h) * d) };
        bench.forward(
            &format!("decode B{b} H{h}/{hkv} S{s} d{d}"),
            &inputs,
            work,
            &|x| attention(&bench.args.threads, &x[0], &x[1], &x[2], &shape),
            &|x| attend(&x[0], &x[1], &x[2], &mask, scale),
        )?;
    }
    Ok(())
}

fn elementwise(bench: &Bench) -> Result<()> {
    // Tensors that forward reads and writes, and those that both passes do, over them.
    let moved = |values: usize, forward: usize, both: usize| {
        (Work { flop: 0.0, bytes: bytes(values * forward) }, (1.0, both as f64 / forward as f64))
    };
    let norm = [randn(&[512, 2048])?, randn(&[2048])?];
    bench.compare(
        "rms-norm 512 x 2048",
        &norm,
        moved(512 * 2048, 2, 5),
        &|x| rms_norm(&x[0], &x[1], 1e-5),
        &|x| candle_nn::ops::rms_norm_slow(&x[0], &x[1], 1e-5),
    )?;
    let gate_up = [randn(&[512, 8192])?, randn(&[512, 8192])?];
    bench.compare(
        "swiglu 512 x 8192",
        &gate_up,
        moved(512 * 8192, 3, 8),
        &|x| swiglu(&x[0], &x[1]),
        &|x| x[0].silu()? * &x[1],
    )?;
    let angle = randn(&[512, 64])?;
    let (cos, sin) = (angle.cos()?, angle.sin()?);
    bench.compare(
        "rope H16 T512 d128",
        &[randn(&[1, 16, 512, 128])?],
        moved(16 * 512 * 128, 2, 4),
        &|x| rope(&x[0], &cos, &sin, RopeStyle::HalfSplit),
        &|x| candle_nn::rotary_emb::rope_slow(&x[0], &cos, &sin),
    )
}

fn losses(bench: &Bench) -> Result<()> {
    let threads = &bench.args.threads;
    let targets: Vec<u32> = (0..256).map(|i| i * 97).collect();
    let ids = Tensor::from_slice(&targets, targets.len(), &Device::Cpu)?;
    let options = CrossEntropy::default();
    // Logits are read, read again, and their gradient is written.
    bench.compare(
        "cross-entropy 256 x 50304",
        &[randn(&[256, 50304])?],
        (Work { flop: 0.0, bytes: bytes(256 * 50304) }, (1.0, 3.0)),
        &|x| Ok(cross_entropy(threads, &x[0], &targets, options)?.loss),
        &|x| candle_nn::loss::cross_entropy(&x[0], &ids),
    )?;
    bench.compare(
        "output layer + cross-entropy D512 V50304",
        &[randn(&[256, 512])?, randn(&[50304, 512])?],
        (Work { flop: 2.0 * (256 * 50304 * 512) as f64, bytes: bytes((256 + 50304) * 512) }, (3.0, 3.0)),
        &|x| Ok(linear_cross_entropy(threads, &x[0], &x[1], &targets, options)?.loss),
        &|x| candle_nn::loss::cross_entropy(&x[0].matmul(&x[1].t()?)?, &ids),
    )
}

/// A part's name, and what runs it.
type Part = (&'static str, fn(&Bench) -> Result<()>);

const PARTS: [Part; 5] = [
    ("linear", linears),
    ("attention", attentions),
    ("decode", decode),
    ("elementwise", elementwise),
    ("loss", losses),
];

fn main() -> Result<()> {
    let args = Args::parse("ops", 0.5, &PARTS.map(|(name, _)| name));
    // SAFETY: no other thread reads the environment: those of `args` do not, and candle has started none yet.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", args.threads.count().to_string()) };
    let gflops = peak::fma_gflops(&args.threads, 20);
    let gb_per_s = peak::read_gb_per_s(&args.threads, 1 << 29, 4);
    println!(
        "{} threads, {}: peak {gflops:.1} GFLOP/s, memory {gb_per_s:.1} GB/s",
        args.threads.count(),
        args.threads.instruction_set().name()
    );
    let bench = Bench { args, gflops, gb_per_s };
    PARTS.iter().filter(|(name, _)| bench.args.wants(name)).try_for_each(|(_, run)| run(&bench))
}
