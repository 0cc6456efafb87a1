//! Where the time of one layer goes, ranks as threads of this process, random routing.
//!
//! `cargo run --release -p occult-moe --example layer_times -- RANKS TOKENS_PER_RANK HIDDEN FFN EXPERTS TOP_K`

use std::sync::Arc;
use std::time::Instant;

use candle_core::{Device, Tensor, Var};
use occult_comm::{Communicator, Metered, ThreadOptions, run_threads};
use occult_kernels::Threads;
use occult_moe::{
    ExpertParallelLayer, ExpertTensors, LayerOptions, Mode, MoeError, Overlap, PhaseSeconds, PruneRule,
    Pruning, RouterSpec,
};
use occult_plan::{Budget, LayerPlacement, Topology};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let sizes: Vec<usize> = std::env::args().skip(1).map(|a| a.parse()).collect::<Result<_, _>>()?;
    let (world, tokens, d, f, e, k) = match sizes[..] {
        [] => (4, 256, 512, 256, 32, 8),
        [w, t, d, f, e, k] => (w, t, d, f, e, k),
        _ => return Err("RANKS TOKENS_PER_RANK HIDDEN FFN EXPERTS TOP_K".into()),
    };
    let topology = Topology::flat(world)?;
    let ranks: Vec<u16> = (0..e).map(|i| (i * world / e) as u16).collect();
    let placement = LayerPlacement::from_expert_ranks(world, &ranks)?;
    let dedup = LayerOptions::new(topology);
    let prune = |max_ranks| {
        let budget = Budget::Fixed { max_ranks };
        LayerOptions { pruning: Some(Pruning { rule: PruneRule::BestMass, budget }), ..dedup.clone() }
    };
    let modes = [
        ("conventional", LayerOptions { mode: Mode::Conventional, ..dedup.clone() }),
        ("dedup", dedup.clone()),
        ("dedup, 4 parts", LayerOptions { overlap: Overlap::Chunks(4), ..dedup.clone() }),
        ("pruned to 2 ranks", prune(2)),
        ("pruned to 1 rank", prune(1)),
    ];
    println!(
        "{:<20} {:>9} {:>9} {:>12}  plan move compute wire (of rank 0, forward + backward)",
        "mode", "fwd s", "f+b s", "wire bytes"
    );
    for (name, options) in modes {
        let results = run_threads(world, &ThreadOptions::default(), |comm| {
            measure(comm.into(), &placement, &options, (tokens, d, f, e, k))
        });
        let ranks = results.all().map_err(|(rank, error)| format!("rank {rank}: {error}"))?;
        let bytes: u64 = ranks.iter().map(|r| r.2).sum();
        let (forward, both, _, s) = ranks[0];
        let shares = [s.plan, s.moving, s.compute, s.wire].map(|t| format!("{:.1}%", 100.0 * t / both));
        println!("{name:<20} {forward:>9.4} {both:>9.4} {bytes:>12}  {}", shares.join(" "));
    }
    Ok(())
}

type Times = (f64, f64, u64, PhaseSeconds);

/// The median step of five by the time of both passes.
fn measure(
    comm: Arc<dyn Communicator>,
    placement: &LayerPlacement,
    options: &LayerOptions,
    (t, d, f, e, k): (usize, usize, usize, usize, usize),
) -> Result<Times, MoeError> {
    let metered = Metered::new(comm);
    let meter = metered.meter();
    let comm: Arc<dyn Communicator> = Arc::new(metered);
    let n = placement.experts_of(comm.rank() as u16).len();
    let normal = |shape: &[usize], std: f32| Tensor::randn(0f32, std, shape, &Device::Cpu);
    let (up, down) =
        (Var::from_tensor(&normal(&[n, 2 * f, d], 0.02)?)?, Var::from_tensor(&normal(&[n, d, f], 0.02)?)?);
    let (x, logits) = (Var::from_tensor(&normal(&[t, d], 1.0)?)?, normal(&[t, e], 1.0)?);
    let router = RouterSpec::softmax(e, k, false);
    let layer = ExpertParallelLayer::new(
        Arc::clone(&comm),
        router,
        placement.clone(),
        options.clone(),
        Threads::new(1),
    )?;
    let mut times = Vec::new();
    for _ in 0..5 {
        comm.barrier("start")?;
        meter.reset();
        layer.take_seconds();
        let start = Instant::now();
        let experts = ExpertTensors { w_up: &up, w_down: &down, sinks: None };
        let (y, _) = layer.forward(&x, &logits, experts, None, None)?;
        let forward = start.elapsed().as_secs_f64();
        y.sum_all()?.backward()?;
        comm.barrier("end")?;
        let both = start.elapsed().as_secs_f64();
        times.push((forward, both, meter.snapshot().sent_total().wire(), layer.take_seconds()));
    }
    times.sort_by(|a, b| a.1.total_cmp(&b.1));
    Ok(times[2])
}
