//! Dense layers as they are defined. Shapes as in [`crate::linear`]; slices that are too short panic.

use super::LinearDims;
use crate::Matrix;

/// See [`crate::linear::linear`].
pub fn linear(dims: LinearDims, x: &[f32], w: Matrix<'_>, out: &mut [f32]) {
    for m in 0..dims.rows {
        for n in 0..dims.out {
            out[m * dims.out + n] =
                (0..dims.inner).map(|k| x[m * dims.inner + k] * w.at(n * dims.inner + k)).sum();
        }
    }
}

/// See [`crate::linear::linear_bwd_x`].
pub fn linear_bwd_x(dims: LinearDims, dout: &[f32], w: Matrix<'_>, dx: &mut [f32]) {
    for m in 0..dims.rows {
        for k in 0..dims.inner {
            dx[m * dims.inner + k] =
                (0..dims.out).map(|n| dout[m * dims.out + n] * w.at(n * dims.inner + k)).sum();
        }
    }
}

/// See [`crate::linear::linear_bwd_w`].
pub fn linear_bwd_w(dims: LinearDims, dout: &[f32], x: &[f32], dw: &mut [f32]) {
    for n in 0..dims.out {
        for k in 0..dims.inner {
            dw[n * dims.inner + k] +=
                (0..dims.rows).map(|m| dout[m * dims.out + n] * x[m * dims.inner + k]).sum::<f32>();
        }
    }
}
