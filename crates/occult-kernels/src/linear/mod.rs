//! Dense layers, `out = x W^T`: projections, shared experts, router, output head.

pub mod reference;

use crate::core::divide::run;
use crate::core::product::{Left, Product, Right, Target};
use crate::error::{expect_floats, expect_len};
use crate::threads::{SendPtr, input};
use crate::{Matrix, Result, Threads, quant};

/// Sizes of one dense product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearDims {
    /// M: rows.
    pub rows: usize,
    /// N: features out.
    pub out: usize,
    /// K: features in.
    pub inner: usize,
}

/// `out[m, n] = sum over k of x[m, k] w[n, k]`.
///
/// - `x` `[M, K]`
/// - `w` `[N, K]`; with quantised weights `x` is quantised as well ([`crate::quant::linear`])
/// - `out` `[M, N]`, overwritten
///
/// # Errors
/// [`crate::KernelError::Length`] when a slice does not have its shape.
pub fn linear(threads: &Threads, dims: LinearDims, x: &[f32], w: Matrix<'_>, out: &mut [f32]) -> Result<()> {
    check(dims, x.len(), w.len(), out.len())?;
    let LinearDims { rows: m, out: n, inner: k } = dims;
    if let Matrix::Quantised(w) = w {
        w.expect_shape("w", n, k)?;
        return Ok(quant::linear(threads, x, w, out)?);
    }
    let product = Product {
        m,
        n,
        k,
        a: Left { data: input(x), stride: k, idx: None, by_steps: false },
        b: Right::Transposed { matrix: w },
        c: Target { to: SendPtr(out.as_mut_ptr()), stride: n, idx: None, add: false },
        few_rows: threads.isa().is_few(m, w),
    };
    // SAFETY: `check` compared every slice with its shape; `out` is borrowed mutably.
    unsafe { run(threads, &[product]) };
    Ok(())
}

/// Gradient of [`linear`] for its input: `dx[m, k] = sum over n of dout[m, n] w[n, k]`.
///
/// - `dout` `[M, N]`
/// - `w` `[N, K]`
/// - `dx` `[M, K]`, overwritten
///
/// # Errors
/// [`crate::KernelError::Length`] when a slice does not have its shape.
pub fn linear_bwd_x(
    threads: &Threads,
    dims: LinearDims,
    dout: &[f32],
    w: Matrix<'_>,
    dx: &mut [f32],
) -> Result<()> {
    check(dims, dx.len(), w.len(), dout.len())?;
    expect_floats("the gradient of a dense layer", &[w])?;
    let LinearDims { rows: m, out: n, inner: k } = dims;
    let product = Product {
        m,
        n: k,
        k: n,
        a: Left { data: input(dout), stride: n, idx: None, by_steps: false },
        b: Right::Plain { matrix: w, idx: None },
        c: Target { to: SendPtr(dx.as_mut_ptr()), stride: k, idx: None, add: false },
        few_rows: false,
    };
    // SAFETY: `check` compared every slice with its shape; `dx` is borrowed mutably.
    unsafe { run(threads, &[product]) };
    Ok(())
}

/// Gradient of [`linear`] for its weight: `dw[n, k] += sum over m of dout[m, n] x[m, k]`.
///
/// - `dout` `[M, N]`
/// - `x` `[M, K]`
/// - `dw` `[N, K]`, added to
///
/// # Errors
/// [`crate::KernelError::Length`] when a slice does not have its shape.
pub fn linear_bwd_w(
    threads: &Threads,
    dims: LinearDims,
    dout: &[f32],
    x: &[f32],
    dw: &mut [f32],
) -> Result<()> {
    check(dims, x.len(), dw.len(), dout.len())?;
    let LinearDims { rows: m, out: n, inner: k } = dims;
    let product = Product {
        m: n,
        n: k,
        k: m,
        a: Left { data: input(dout), stride: n, idx: None, by_steps: true },
        b: Right::Plain { matrix: Matrix::F32(x), idx: None },
        c: Target { to: SendPtr(dw.as_mut_ptr()), stride: k, idx: None, add: true },
        few_rows: false,
    };
    // SAFETY: `check` compared every slice with its shape; `dw` is borrowed mutably.
    unsafe { run(threads, &[product]) };
    Ok(())
}

fn check(dims: LinearDims, x: usize, w: usize, out: usize) -> Result<()> {
    expect_len("x [M, K]", x, &[dims.rows, dims.inner])?;
    expect_len("w [N, K]", w, &[dims.out, dims.inner])?;
    expect_len("out [M, N]", out, &[dims.rows, dims.out])
}
