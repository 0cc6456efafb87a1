//! A plain candle model with one mixture-of-experts layer, trained with candle's own optimiser.
//!
//! Everything but the three calls of `occult_kernels::ops` in `Moe::forward` is ordinary candle: `candle_nn::Linear`,
//! `VarMap`, `AdamW`. The toy problem: points around eight centres, each centre with its own linear map; a single linear
//! map cannot fit all of them, experts can.
//!
//! Run with `cargo run --release -p occult-kernels --features candle-nn --example candle_moe`.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{AdamW, Init, Linear, Module, Optimizer, VarBuilder, VarMap, linear, linear_no_bias};
use occult_kernels::Threads;
use occult_kernels::ops::router::{self, Grouped, RouterRule, Scoring, Selection};
use occult_kernels::ops::{merging_smm, scattering_smm};

const INPUT: usize = 8;
const HIDDEN: usize = 32;
const EXPERTS: usize = 8;
const EXPERT_WIDTH: usize = 16;
const TOP_K: usize = 2;
const POINTS: usize = 256;
const STEPS: usize = 300;

/// Router and experts; the experts' weights are stacked and used whole.
struct Moe {
    threads: Threads,
    router: Linear,
    /// `[e, 2F, D]`: gate rows, then up rows, of every expert.
    w_up: Tensor,
    /// `[e, D, F]`
    w_down: Tensor,
    rule: RouterRule,
}

impl Moe {
    fn new(vb: &VarBuilder<'_>) -> Result<Self> {
        let uniform = |width: usize| {
            let bound = 1.0 / (width as f64).sqrt();
            Init::Uniform { lo: -bound, up: bound }
        };
        Ok(Self {
            threads: Threads::new(std::thread::available_parallelism().map_or(1, usize::from)),
            router: linear_no_bias(HIDDEN, EXPERTS, vb.pp("router"))?,
            w_up: vb.get_with_hints((EXPERTS, 2 * EXPERT_WIDTH, HIDDEN), "w_up", uniform(HIDDEN))?,
            w_down: vb.get_with_hints((EXPERTS, HIDDEN, EXPERT_WIDTH), "w_down", uniform(EXPERT_WIDTH))?,
            rule: RouterRule {
                scoring: Scoring::Softmax,
                selection: Selection { top_k: TOP_K, groups: None, bias: None },
                norm_topk: true,
                scale: 1.0,
            },
        })
    }

    /// `x` `[T, D]` gives `[T, D]` and the balance loss.
    fn forward(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        // Scores, the chosen experts, and their weights; gradients reach the router through the weights.
        let routed = router::route(&self.router.forward(x)?, &self.rule)?;
        // Which rows each expert works on. Nothing is gathered: the sparse matmuls read rows by index.
        let grouped = Grouped::new(&routed.expert_ids, TOP_K, EXPERTS)?;
        let row_weights = grouped.row_weights(&routed.weights)?;
        let pre = scattering_smm(&self.threads, &grouped.rows, x, &self.w_up)?;
        let y = merging_smm(&self.threads, &grouped.rows, &pre, &self.w_down, &row_weights)?;
        let balance = router::load_balancing_loss(&[routed.scores], &[&routed.expert_ids], TOP_K, None)?;
        Ok((y, balance))
    }
}

/// Input projection, MoE layer with residual, output projection.
struct Model {
    input: Linear,
    moe: Moe,
    output: Linear,
}

impl Model {
    fn new(vb: &VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            input: linear(INPUT, HIDDEN, vb.pp("input"))?,
            moe: Moe::new(&vb.pp("moe"))?,
            output: linear(HIDDEN, INPUT, vb.pp("output"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let x = self.input.forward(x)?;
        let (y, balance) = self.moe.forward(&x)?;
        Ok((self.output.forward(&(x + y)?)?, balance))
    }
}

/// Points and targets: point i belongs to centre i mod 8, whose map is its own.
fn data(device: &Device) -> Result<(Tensor, Tensor)> {
    let centres = Tensor::randn(0f32, 2.0, (EXPERTS, INPUT), device)?;
    let maps = Tensor::randn(0f32, 0.5, (EXPERTS, INPUT, INPUT), device)?;
    let (mut points, mut targets) = (Vec::new(), Vec::new());
    for centre in 0..EXPERTS {
        let near = Tensor::randn(0f32, 0.5, (POINTS / EXPERTS, INPUT), device)?;
        targets.push(near.matmul(&maps.get(centre)?)?);
        points.push(near.broadcast_add(&centres.get(centre)?)?);
    }
    Ok((Tensor::cat(&points, 0)?, Tensor::cat(&targets, 0)?))
}

fn main() -> Result<()> {
    let device = Device::Cpu;
    let vars = VarMap::new();
    let model = Model::new(&VarBuilder::from_varmap(&vars, DType::F32, &device))?;
    let mut optimizer = AdamW::new_lr(vars.all_vars(), 3e-3)?;
    let (x, target) = data(&device)?;
    let mut errors = Vec::new();
    for step in 0..=STEPS {
        let (y, balance) = model.forward(&x)?;
        let error = (y - &target)?.sqr()?.mean_all()?;
        // 0.01: the usual weight of the balance loss.
        optimizer.backward_step(&(&error + (&balance * 0.01)?)?)?;
        if step % 50 == 0 {
            let (error, balance) = (error.to_scalar::<f32>()?, balance.to_scalar::<f32>()?);
            errors.push(error);
            println!("step {step:4}  error {error:.4}  balance {balance:.3} (even: {TOP_K})");
        }
    }
    let (first, last) = (errors[0], errors[errors.len() - 1]);
    assert!(last < 0.5 * first, "the error went from {first} to {last} only");
    Ok(())
}
