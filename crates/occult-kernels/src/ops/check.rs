//! Tests of gradients.

use candle_core::{DType, Device, Result, Tensor, Var};

use super::simd::{Isa, for_each_isa};

/// `[-1, 1)` from a seed, the same on every machine.
pub(crate) fn values(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0xd1b5_4a32_d192_ed03;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// A tensor of [`values`].
pub(crate) fn tensor(seed: u64, shape: &[usize]) -> Result<Tensor> {
    Tensor::from_vec(values(seed, shape.iter().product()), shape, &Device::Cpu)
}

/// Largest difference, relative to the largest value of `want` (or 1 if that is smaller than 1e-3).
pub(crate) fn difference(got: &Tensor, want: &Tensor) -> Result<f32> {
    assert_eq!(got.dims(), want.dims(), "shapes");
    if got.elem_count() == 0 {
        return Ok(0.0);
    }
    let (got, want) = (got.to_dtype(DType::F32)?, want.to_dtype(DType::F32)?);
    let range = want.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
    let diff = (got - want)?.abs()?.flatten_all()?;
    // The maximum of a tensor skips NaN; the sum does not.
    assert!(!diff.sum_all()?.to_scalar::<f32>()?.is_nan(), "a value is NaN");
    Ok(diff.max(0)?.to_scalar::<f32>()? / if range < 1e-3 { 1.0 } else { range })
}

/// What is not a usual number, and a finite one whose square is none.
pub(crate) const SPECIALS: [f32; 4] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30];

type Function<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Checks `op` against `plain` (the same formula in candle's own operations): values within `tolerance` of the range,
/// gradients of a random weighted sum within ten times that; and the gradients against central differences. With every
/// instruction set of this machine.
pub(crate) fn op_is(op: Function<'_>, plain: Function<'_>, inputs: &[Tensor], tolerance: f32) -> Result<()> {
    for_each_isa(|isa| op_is_with(isa, op, plain, inputs, tolerance))
}

fn op_is_with(
    isa: Isa,
    op: Function<'_>,
    plain: Function<'_>,
    inputs: &[Tensor],
    tolerance: f32,
) -> Result<()> {
    let vars: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<Result<_>>()?;
    let args: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let (ours, theirs) = (op(&args)?, plain(&args)?);
    let off = difference(&ours, &theirs)?;
    assert!(off <= tolerance, "values differ by {off} of the range, {isa:?}");

    let probe = tensor(99, ours.dims())?;
    let got = (&ours * &probe)?.sum_all()?.backward()?;
    let want = (&theirs * &probe)?.sum_all()?.backward()?;
    for (i, var) in vars.iter().enumerate() {
        let (Some(got), Some(want)) = (got.get(var), want.get(var)) else {
            panic!("input {i} has no gradient");
        };
        let off = difference(got, want)?;
        assert!(off <= 10.0 * tolerance, "gradient {i} differs from autograd by {off} of the range, {isa:?}");
        finite_differences(op, inputs, i, &probe, got)?;
    }
    // An input that leads to no variable gets no gradient, and the others still get theirs.
    for (i, var) in vars.iter().enumerate() {
        let mut args: Vec<Tensor> = inputs.to_vec();
        args[i] = var.as_tensor().clone();
        let grads = (op(&args)? * &probe)?.sum_all()?.backward()?;
        let alone = grads.get(var).expect("the gradient of the only variable");
        assert_eq!(difference(alone, got.get(var).expect("seen above"))?, 0.0, "gradient {i} alone");
    }
    Ok(())
}

/// Checks that each of `specials`, put into each input in turn, goes where `plain` sends it, in values and in gradients of
/// a random weighted sum: NaN where that is NaN, the same infinities, finite elsewhere. With every instruction set.
pub(crate) fn specials_go_as_in(
    op: Function<'_>,
    plain: Function<'_>,
    inputs: &[Tensor],
    specials: &[f32],
) -> Result<()> {
    for (i, input) in inputs.iter().enumerate() {
        let values = input.flatten_all()?.to_vec1::<f32>()?;
        // Among whole vectors, and in the rest.
        for at in [values.len() / 3, values.len() - 1] {
            for &special in specials {
                let mut values = values.clone();
                values[at] = special;
                let mut inputs = inputs.to_vec();
                inputs[i] = Tensor::from_vec(values, input.dims(), &Device::Cpu)?;
                let vars: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<Result<_>>()?;
                let args: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
                let run = |op: Function<'_>| {
                    let y = op(&args)?;
                    let grads = (&y * tensor(98, y.dims())?)?.sum_all()?.backward()?;
                    let grads = vars.iter().map(|var| grads.get(var).expect("a gradient").clone());
                    Ok::<Vec<_>, candle_core::Error>([y].into_iter().chain(grads).collect())
                };
                let want = run(plain)?;
                for_each_isa(|isa| {
                    for (result, (got, want)) in run(op)?.iter().zip(&want).enumerate() {
                        let what = format!("{special} at {at} of input {i}, result {result}, {isa:?}");
                        same_kind(&what, got, want)?;
                    }
                    Ok::<(), candle_core::Error>(())
                })?;
            }
        }
    }
    Ok(())
}

/// NaN where `want` is NaN, the same infinities, finite elsewhere.
fn same_kind(what: &str, got: &Tensor, want: &Tensor) -> Result<()> {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let (got, want) = (got.flatten_all()?.to_vec1::<f32>()?, want.flatten_all()?.to_vec1::<f32>()?);
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        let same =
            if want.is_finite() { got.is_finite() } else { got == want || got.is_nan() && want.is_nan() };
        assert!(same, "{what}: value {i} is {got}, expected {want}");
    }
    Ok(())
}

/// The gradient of `sum(op * probe)` for input `i` against central differences, at some elements.
pub(crate) fn finite_differences(
    op: Function<'_>,
    inputs: &[Tensor],
    i: usize,
    probe: &Tensor,
    gradient: &Tensor,
) -> Result<()> {
    const STEP: f32 = 4e-3;
    let loss = |values: &[f32]| -> Result<f64> {
        let mut args = inputs.to_vec();
        args[i] = Tensor::from_slice(values, inputs[i].dims(), &Device::Cpu)?;
        // The sum in f64: in f32 it would drown the difference.
        let out = op(&args)?.to_dtype(DType::F64)?;
        (out * probe.to_dtype(DType::F64)?)?.sum_all()?.to_scalar::<f64>()
    };
    let base = inputs[i].flatten_all()?.to_vec1::<f32>()?;
    let gradient = gradient.flatten_all()?.to_vec1::<f32>()?;
    let range = gradient.iter().fold(0f32, |m, g| m.max(g.abs())).max(0.1);
    let every = (base.len() / 24).max(1);
    for at in (0..base.len()).step_by(every) {
        let mut moved = base.clone();
        moved[at] = base[at] + STEP;
        let (high, up) = (moved[at], loss(&moved)?);
        moved[at] = base[at] - STEP;
        let slope = ((up - loss(&moved)?) / f64::from(high - moved[at])) as f32;
        let off = (slope - gradient[at]).abs() / range;
        assert!(off < 5e-3, "input {i}, element {at}: slope {slope}, gradient {}", gradient[at]);
    }
    Ok(())
}
