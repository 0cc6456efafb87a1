//! Times of the operations beside candle's own, medians: `cargo bench -p occult-kernels --features candle-nn --bench ops -- [PART OF A NAME]`.

use std::hint::black_box;
use std::time::Instant;

use candle_core::{D, Device, Result, Tensor, Var};
use occult_kernels::Threads;
use occult_kernels::ops::{
    AttentionShape, CrossEntropy, RopeStyle, attention, cross_entropy, linear_cross_entropy, rms_norm, rope,
    swiglu,
};

fn median_ms(mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    f()?;
    let mut times = Vec::new();
    let begin = Instant::now();
    while times.len() < 3 || begin.elapsed().as_secs_f64() < 0.5 && times.len() < 50 {
        let start = Instant::now();
        f()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn randn(shape: &[usize]) -> Result<Tensor> {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu)
}

/// Forward of both without, and forward + backward of both with variables.
fn compare(
    name: &str,
    inputs: &[Tensor],
    work: Option<(f64, f64)>,
    ours: &dyn Fn(&[Tensor]) -> Result<Tensor>,
    candle: &dyn Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<()> {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-'));
    if filter.is_some_and(|f| !name.contains(&f)) {
        return Ok(());
    }
    let vars: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<Result<_>>()?;
    let tracked: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let forward =
        |f: &dyn Fn(&[Tensor]) -> Result<Tensor>| median_ms(|| f(inputs).map(|y| drop(black_box(y))));
    let both = |f: &dyn Fn(&[Tensor]) -> Result<Tensor>| {
        median_ms(|| f(&tracked)?.sum_all()?.backward().map(|g| drop(black_box(g))))
    };
    let (f, cf) = (forward(ours)?, forward(candle)?);
    let rate =
        |ms: f64, part: f64| work.map_or(String::new(), |(w, _)| format!(" {:6.1} G/s", w * part / ms / 1e6));
    print!("{name:44} forward {f:9.3} ms{} (candle {cf:9.3}, {:4.1}x)", rate(f, 1.0), cf / f);
    if let Some((_, back)) = work.filter(|w| w.1 == 0.0).map_or(Some((0.0, 3.5)), |_| None) {
        let (b, cb) = (both(ours)?, both(candle)?);
        print!("  with backward {b:9.3} ms{} (candle {cb:9.3}, {:4.1}x)", rate(b, back), cb / b);
    }
    println!();
    Ok(())
}

/// What the model does today: matrix products, a mask, softmax.
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

fn main() -> Result<()> {
    let threads = Threads::new(std::thread::available_parallelism().map_or(1, usize::from));
    println!(
        "{} threads; attention in multiply-adds of both matrices counted twice, causal ones only",
        threads.count()
    );
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
        let work = (b * h * t * (t + 1) * (dk + dv)) as f64;
        compare(
            &format!("attention B{b} H{h}/{hkv} T{t} d{dk}/{dv}"),
            &inputs,
            Some((work, 3.5)),
            &|x| attention(&threads, &x[0], &x[1], &x[2], &shape),
            &|x| attend(&x[0], &x[1], &x[2], &mask, scale),
        )?;
    }
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
        // Bytes of keys and values.
        let work = (b * hkv * s * d * 8) as f64;
        compare(
            &format!("decode B{b} H{h}/{hkv} S{s} d{d} (bytes)"),
            &inputs,
            Some((work, 0.0)),
            &|x| attention(&threads, &x[0], &x[1], &x[2], &shape),
            &|x| attend(&x[0], &x[1], &x[2], &mask, scale),
        )?;
    }
    let norm = [randn(&[512, 2048])?, randn(&[2048])?];
    let plain_norm = |x: &[Tensor]| candle_nn::ops::rms_norm_slow(&x[0], &x[1], 1e-5);
    compare("rms-norm 512 x 2048", &norm, None, &|x| rms_norm(&x[0], &x[1], 1e-5), &plain_norm)?;
    let gate_up = [randn(&[512, 8192])?, randn(&[512, 8192])?];
    compare("swiglu 512 x 8192", &gate_up, None, &|x| swiglu(&x[0], &x[1]), &|x| x[0].silu()? * &x[1])?;
    let angle = randn(&[512, 64])?;
    let (cos, sin) = (angle.cos()?, angle.sin()?);
    compare(
        "rope H16 T512 d128",
        &[randn(&[1, 16, 512, 128])?],
        None,
        &|x| rope(&x[0], &cos, &sin, RopeStyle::HalfSplit),
        &|x| candle_nn::rotary_emb::rope_slow(&x[0], &cos, &sin),
    )?;
    let targets: Vec<u32> = (0..256).map(|i| i * 97).collect();
    let ids = Tensor::from_slice(&targets, targets.len(), &Device::Cpu)?;
    let options = CrossEntropy::default();
    compare(
        "cross-entropy 256 x 50304",
        &[randn(&[256, 50304])?],
        None,
        &|x| Ok(cross_entropy(&threads, &x[0], &targets, options)?.loss),
        &|x| candle_nn::loss::cross_entropy(&x[0], &ids),
    )?;
    compare(
        "output projection + cross-entropy D512 V50304",
        &[randn(&[256, 512])?, randn(&[50304, 512])?],
        None,
        &|x| Ok(linear_cross_entropy(&threads, &x[0], &x[1], &targets, options)?.loss),
        &|x| candle_nn::loss::cross_entropy(&x[0].matmul(&x[1].t()?)?, &ids),
    )
}
