//! What holds whatever the values are: thread counts, NaN and infinity, gradients, refusals.

mod common;

use common::{FRONT, Layer, Rng, STORED, Stored, Weight, assert_close, budgets};
use occult_kernels::linear::{self, LinearDims};
use occult_kernels::smm::{self, ExpertDims, MergeGrads, MergeInputs, ScatterGrads};
use occult_kernels::{KernelError, Matrix, SparseRows, Threads};

/// Everything forward and backward computes, in one list.
fn all_results(threads: &Threads, layer: &Layer) -> Vec<Vec<f32>> {
    let (rows, dims) = (&layer.rows, layer.dims);
    let ExpertDims { hidden: d, intermediate: f } = dims;
    let (r, n, e) = (rows.num_rows(), rows.num_expanded(), rows.num_experts());
    let (up, down) = (layer.up(), layer.down());
    let dy = Rng(3).values(r * d);
    let mut out: Vec<Vec<f32>> = [n * 2 * f, r * d, r * d, n * 2 * f, n, e * d * f, r * d, e * 2 * f * d]
        .map(|len| vec![0.0; len])
        .into();
    let [pre, y, y_fused, d_pre, d_row_weights, d_w_down, dx, d_w_up] = out.as_mut_slice() else {
        unreachable!("eight results")
    };
    smm::scatter(threads, rows, dims, &layer.x, &up, pre).unwrap();
    let inputs = MergeInputs { pre, row_weights: &layer.row_weights, w_down: &down };
    smm::merge(threads, rows, dims, inputs, y).unwrap();
    smm::expert_ffn(threads, rows, dims, &layer.x, &layer.experts(), &layer.row_weights, y_fused).unwrap();
    let grads = MergeGrads { d_pre, d_row_weights, d_w_down: Some(d_w_down), act: None };
    smm::merge_bwd(threads, rows, dims, inputs, &dy, grads).unwrap();
    let grads = ScatterGrads { dx: Some(dx), d_w_up: Some(d_w_up) };
    smm::scatter_bwd(threads, rows, dims, &layer.x, &up, d_pre, grads).unwrap();
    out
}

fn bits(values: &[Vec<f32>]) -> Vec<Vec<u32>> {
    values.iter().map(|values| common::bits(values)).collect()
}

#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn thread_count_does_not_change_a_bit() {
    let dims = ExpertDims { hidden: 150, intermediate: 70 };
    for (num_rows, share) in [(9, 0.4), (90, 0.5), (300, 0.9)] {
        let layer = Layer::new(5, Stored::Bf16, dims, num_rows, 5, share);
        for one in budgets(1) {
            let expected = bits(&all_results(&one, &layer));
            for count in [2, 3, 5, 16] {
                let many = Threads::new(count).with_instruction_set(one.instruction_set()).unwrap();
                assert!(bits(&all_results(&many, &layer)) == expected, "{count} threads, {one:?}");
            }
        }
    }
}

#[test]
fn gradients_in_place_are_the_same_bits() {
    let (hidden, intermediate) = if cfg!(miri) { (5, 6) } else { (40, 70) };
    // The last: more rows than one group holds.
    let all = [(0, 1, 7), (1, 3, 9), (60, 5, intermediate), (2500, 2, 1024)];
    for (num_rows, num_experts, intermediate) in all.into_iter().take(if cfg!(miri) { 2 } else { 4 }) {
        let dims = ExpertDims { hidden: if num_rows > 60 { 3 } else { hidden }, intermediate };
        let layer = Layer::new(9, Stored::Bf16, dims, num_rows, num_experts, 0.9);
        let (rows, weights, down) = (&layer.rows, &layer.row_weights, layer.down());
        let (n, d, f) = (rows.num_expanded(), dims.hidden, dims.intermediate);
        let (pre, dy) = (Rng(1).values(n * 2 * f), Rng(2).values(num_rows * d));
        for threads in budgets(2) {
            for keep in [false, true] {
                let [apart, in_place] = [false, true].map(|in_place| {
                    let len = |len: usize| vec![0.0; len];
                    let mut all = vec![pre.clone(), len(n), len(num_experts * d * f), len(n * f)];
                    let [d_pre, d_row_weights, d_w_down, act] = all.as_mut_slice() else {
                        unreachable!("four results")
                    };
                    let act = keep.then_some(&mut act[..]);
                    let grads = MergeGrads { d_pre, d_row_weights, d_w_down: Some(d_w_down), act };
                    let done = if in_place {
                        smm::merge_bwd_in_place(&threads, rows, dims, weights, &down, &dy, grads)
                    } else {
                        let inputs = MergeInputs { pre: &pre, row_weights: weights, w_down: &down };
                        smm::merge_bwd(&threads, rows, dims, inputs, &dy, grads)
                    };
                    done.unwrap();
                    bits(&all)
                });
                assert!(apart == in_place, "{num_rows} rows, activations kept: {keep}, {threads:?}");
            }
        }
    }
}

#[test]
fn every_position_of_a_row_gives_the_same_bits() {
    // The same row everywhere: tiles, edges and blocks must not differ.
    let (all_rows, out, inner) = if cfg!(miri) { (vec![14], 9, 18) } else { (vec![7, 45, 75], 37, 50) };
    for rows in all_rows {
        let dims = LinearDims { rows, out, inner };
        let row = Rng(1).values(dims.inner);
        let w_row = Rng(2).values(dims.inner);
        let (x, w) = (row.repeat(dims.rows), w_row.repeat(dims.out));
        for threads in budgets(2) {
            let mut out = vec![0.0; dims.rows * dims.out];
            linear::linear(&threads, dims, &x, Matrix::F32(&w), &mut out).unwrap();
            assert!(out.iter().all(|v| v.to_bits() == out[0].to_bits()), "{rows} rows, {threads:?}");
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn nan_and_infinity_go_where_the_reference_sends_them() {
    let dims = ExpertDims { hidden: 40, intermediate: 36 };
    for (num_rows, share) in [(4, 0.8), (60, 0.8), (90, 0.8)] {
        for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -200.0] {
            let mut layer = Layer::new(11, Stored::F32, dims, num_rows, 4, share);
            layer.x[dims.hidden + 3] = special;
            let mut dy = Rng(12).values(layer.x.len());
            dy[2 * dims.hidden + 1] = special;
            assert_layer_is_of_the_kind_of_the_reference(&layer, &dy);
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn nan_and_infinity_in_weights_go_where_the_reference_sends_them() {
    let dims = ExpertDims { hidden: 40, intermediate: 36 };
    // With every instruction set: few rows, rows that are many for weights of four bytes, and for those of two.
    for (num_rows, share, least) in [(4, 0.8, 1), (75, 0.8, 49), (160, 0.9, 129)] {
        for stored in STORED {
            let layer = || Layer::new(11, stored, dims, num_rows, 3, share);
            let rows = layer().rows;
            let rows_of = |expert: &usize| rows.rows_of(*expert).len();
            let expert = (0..3).max_by_key(rows_of).unwrap();
            assert!(rows_of(&expert) >= least);
            let dy = Rng(12).values(num_rows * dims.hidden);
            // Among whole vectors, in the rest of a row, and finite in some types only.
            for (special, at) in
                [(f32::NAN, 0.3), (f32::INFINITY, 1.0), (f32::NEG_INFINITY, 0.6), (1e30, 0.5)]
            {
                let place = |len: usize| ((len - 1) as f32 * at) as usize;
                for which in 0..3 {
                    let mut layer = layer();
                    layer.weights[expert][which].set(place(dims.hidden * dims.intermediate), special);
                    assert_layer_is_of_the_kind_of_the_reference(&layer, &dy);
                }
                let mut layer = layer();
                let rows = rows.expanded_of(expert);
                layer.row_weights[rows.start + place(rows.len())] = special;
                assert_layer_is_of_the_kind_of_the_reference(&layer, &dy);
            }
        }
    }
}

/// All that forward and backward compute, with every instruction set: NaN where the reference has it, see
/// [`assert_same_kind`].
#[track_caller]
fn assert_layer_is_of_the_kind_of_the_reference(layer: &Layer, dy: &[f32]) {
    let (rows, dims, up, down) = (&layer.rows, layer.dims, layer.up(), layer.down());
    let mut pre = vec![0.0; rows.num_expanded() * 2 * dims.intermediate];
    smm::reference::scatter(rows, dims, &layer.x, &up, &mut pre);
    let inputs = MergeInputs { pre: &pre, row_weights: &layer.row_weights, w_down: &down };
    let mut y = vec![0.0; layer.x.len()];
    smm::reference::merge(rows, dims, inputs, &mut y);
    let expected = gradients(layer, &pre, dy, None);
    for threads in budgets(2) {
        let mut found = vec![0.0; pre.len()];
        smm::scatter(&threads, rows, dims, &layer.x, &up, &mut found).unwrap();
        assert_same_kind(&found, &pre);
        let mut found = vec![0.0; y.len()];
        smm::merge(&threads, rows, dims, inputs, &mut found).unwrap();
        assert_same_kind(&found, &y);
        let (experts, weights) = (layer.experts(), &layer.row_weights);
        smm::expert_ffn(&threads, rows, dims, &layer.x, &experts, weights, &mut found).unwrap();
        assert_same_kind(&found, &y);
        for (found, expected) in gradients(layer, &pre, dy, Some(&threads)).iter().zip(&expected) {
            assert_same_kind(found, expected);
        }
    }
}

/// d_pre, d_row_weights, d_w_down, dx and d_w_up: of the kernels, or by definition.
fn gradients(layer: &Layer, pre: &[f32], dy: &[f32], threads: Option<&Threads>) -> [Vec<f32>; 5] {
    let (rows, dims, up, down) = (&layer.rows, layer.dims, layer.up(), layer.down());
    let (n, d, f) = (rows.num_expanded(), dims.hidden, dims.intermediate);
    let e = rows.num_experts();
    let mut all = [n * 2 * f, n, e * d * f, layer.x.len(), e * 2 * f * d].map(|len| vec![0.0; len]);
    let [d_pre, d_row_weights, d_w_down, ..] = &mut all;
    let inputs = MergeInputs { pre, row_weights: &layer.row_weights, w_down: &down };
    let merge = MergeGrads { d_pre, d_row_weights, d_w_down: Some(d_w_down), act: None };
    match threads {
        Some(threads) => smm::merge_bwd(threads, rows, dims, inputs, dy, merge).unwrap(),
        None => smm::reference::merge_bwd(rows, dims, inputs, dy, merge),
    }
    let d_pre = &all[0].clone();
    let [_, _, _, dx, d_w_up] = &mut all;
    let scatter = ScatterGrads { dx: Some(dx), d_w_up: Some(d_w_up) };
    match threads {
        Some(threads) => smm::scatter_bwd(threads, rows, dims, &layer.x, &up, d_pre, scatter).unwrap(),
        None => smm::reference::scatter_bwd(rows, dims, &layer.x, &up, d_pre, scatter),
    }
    all
}

#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn nan_and_infinity_in_dense_layers() {
    // Few rows, and many for weights of four bytes and of two.
    for (rows, stored) in [3, 50, 131].into_iter().flat_map(|rows| STORED.map(|stored| (rows, stored))) {
        let dims = LinearDims { rows, out: 37, inner: 45 };
        for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in 0..3 {
                let [mut x, mut dout] = [rows * 45, rows * 37].map(|len| Rng(len as u64).values(len));
                let mut w = Weight::new(&mut Rng(37 * 45), stored, 37 * 45);
                match place {
                    0 => x[41] = special,
                    1 => w.set(41, special),
                    _ => dout[41] = special,
                }
                let (x, w, dout) = (&x, w.matrix(), &dout);
                let mut expected = [rows * 37, rows * 45, 37 * 45].map(|len| vec![0.0; len]);
                linear::reference::linear(dims, x, w, &mut expected[0]);
                linear::reference::linear_bwd_x(dims, dout, w, &mut expected[1]);
                linear::reference::linear_bwd_w(dims, dout, x, &mut expected[2]);
                for threads in budgets(2) {
                    let mut found = [rows * 37, rows * 45, 37 * 45].map(|len| vec![0.0; len]);
                    linear::linear(&threads, dims, x, w, &mut found[0]).unwrap();
                    linear::linear_bwd_x(&threads, dims, dout, w, &mut found[1]).unwrap();
                    linear::linear_bwd_w(&threads, dims, dout, x, &mut found[2]).unwrap();
                    for (found, expected) in found.iter().zip(&expected) {
                        assert_same_kind(found, expected);
                    }
                }
            }
        }
    }
}

/// NaN where NaN is expected, the same infinities, finite elsewhere.
#[track_caller]
fn assert_same_kind(found: &[f32], expected: &[f32]) {
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let same = if expected.is_finite() {
            found.is_finite()
        } else {
            found == expected || (found.is_nan() && expected.is_nan())
        };
        assert!(same, "value {i} is {found}, expected {expected}");
    }
}

/// The layer's loss `<y, c>` in f64 by its definition.
fn loss(layer: &Layer, c: &[f32]) -> f64 {
    let ExpertDims { hidden: d, intermediate: f } = layer.dims;
    let mut loss = 0.0;
    for (expert, weights) in layer.weights.iter().enumerate() {
        for n in layer.rows.expanded_of(expert) {
            let r = layer.rows.row_idx()[n] as usize;
            let dot = |w: Matrix<'_>, j: usize| -> f64 {
                (0..d).map(|k| f64::from(layer.x[r * d + k]) * f64::from(w.at(j * d + k))).sum()
            };
            for j in 0..f {
                let (g, u) = (dot(weights[0].matrix(), j), dot(weights[1].matrix(), j));
                let h = f64::from(layer.row_weights[n]) * g / (1.0 + (-g).exp()) * u;
                let down = weights[2].matrix();
                loss +=
                    h * (0..d).map(|i| f64::from(c[r * d + i]) * f64::from(down.at(i * f + j))).sum::<f64>();
            }
        }
    }
    loss
}

const STEP: f32 = 1.0 / 1024.0;

#[track_caller]
fn assert_slope(what: &str, found: f32, [below, above]: [f64; 2]) {
    let expected = ((above - below) / (2.0 * f64::from(STEP))) as f32;
    assert!((found - expected).abs() < 2e-3 * (1.0 + expected.abs()), "{what}: {found}, {expected}");
}

#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn gradients_are_finite_differences() {
    let dims = ExpertDims { hidden: 7, intermediate: 5 };
    // Experts with few rows, and with so many that their weights are packed.
    for (num_rows, least) in [(6, 1), (24, 13), (84, 49)] {
        let mut layer = Layer::new(21, Stored::F32, dims, num_rows, 3, 0.7);
        let rows_of = |expert| layer.rows.expanded_of(expert).len();
        assert!((0..3).any(|expert| rows_of(expert) >= least));
        let c = Rng(3).values(num_rows * 7); // as in `all_results`
        for threads in budgets(2) {
            let results = all_results(&threads, &layer);
            let (d_row_weights, d_w_down, dx, d_w_up) = (&results[4], &results[5], &results[6], &results[7]);
            let mut check = |what: &str, found: f32, place: &dyn Fn(&mut Layer) -> &mut f32| {
                *place(&mut layer) -= STEP;
                let below = loss(&layer, &c);
                *place(&mut layer) += 2.0 * STEP;
                let above = loss(&layer, &c);
                *place(&mut layer) -= STEP;
                assert_slope(what, found, [below, above]);
            };
            for (i, &found) in dx.iter().enumerate() {
                check("dx", found, &|layer| &mut layer.x[i]);
            }
            for (i, &found) in d_row_weights.iter().enumerate() {
                check("row weight", found, &|layer| &mut layer.row_weights[i]);
            }
            for expert in 0..3 {
                for i in 0..35 {
                    check("down", d_w_down[expert * 35 + i], &|layer| value(layer, expert, 2, i));
                    check("gate", d_w_up[expert * 70 + i], &|layer| value(layer, expert, 0, i));
                    check("up", d_w_up[expert * 70 + 35 + i], &|layer| value(layer, expert, 1, i));
                }
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn gradients_of_dense_layers_are_finite_differences() {
    for rows in [1, 3, 20] {
        let dims = LinearDims { rows, out: 5, inner: 7 };
        let (mut x, mut w, dout) = (Rng(1).values(rows * 7), Rng(2).values(35), Rng(3).values(rows * 5));
        // <out, dout> in f64.
        let loss = |x: &[f32], w: &[f32]| -> f64 {
            let value = |i: usize| -> f64 {
                (0..7).map(|k| f64::from(x[i / 5 * 7 + k]) * f64::from(w[i % 5 * 7 + k])).sum()
            };
            dout.iter().enumerate().map(|(i, &d)| f64::from(d) * value(i)).sum()
        };
        for threads in budgets(2) {
            let (mut dx, mut dw) = (vec![f32::NAN; rows * 7], vec![0.0; 35]);
            linear::linear_bwd_x(&threads, dims, &dout, Matrix::F32(&w), &mut dx).unwrap();
            linear::linear_bwd_w(&threads, dims, &dout, &x, &mut dw).unwrap();
            for (i, &found) in dx.iter().enumerate() {
                let kept = x[i];
                let slope = [-STEP, STEP].map(|step| {
                    x[i] = kept + step;
                    loss(&x, &w)
                });
                x[i] = kept;
                assert_slope("dx", found, slope);
            }
            for (i, &found) in dw.iter().enumerate() {
                let kept = w[i];
                let slope = [-STEP, STEP].map(|step| {
                    w[i] = kept + step;
                    loss(&x, &w)
                });
                w[i] = kept;
                assert_slope("dw", found, slope);
            }
        }
    }
}

fn value(layer: &mut Layer, expert: usize, which: usize, i: usize) -> &mut f32 {
    match &mut layer.weights[expert][which] {
        Weight::F32(values) => &mut values[FRONT + i],
        _ => unreachable!("f32 weights"),
    }
}

#[test]
fn weight_gradients_are_added_to_and_frozen_weights_are_left_out() {
    let dims = ExpertDims { hidden: 6, intermediate: 4 };
    let layer = Layer::new(8, Stored::F32, dims, 5, 2, 1.0);
    let threads = Threads::new(1);
    let (rows, up, n) = (&layer.rows, layer.up(), layer.rows.num_expanded());
    let d_pre = Rng(1).values(n * 8);
    let (mut once, mut twice, mut dx) = (vec![0.0; 2 * 8 * 6], vec![0.0; 2 * 8 * 6], vec![0.0; 30]);
    let run = |d_w_up: Option<&mut [f32]>, dx: Option<&mut [f32]>| {
        let grads = ScatterGrads { dx, d_w_up };
        smm::scatter_bwd(&threads, rows, dims, &layer.x, &up, &d_pre, grads).unwrap();
    };
    run(Some(&mut once), None);
    run(Some(&mut twice), None);
    run(Some(&mut twice), Some(&mut dx));
    once.iter_mut().for_each(|value| *value *= 2.0);
    assert_close("twice", &twice, &once);
    let mut alone = vec![1.0; 30];
    run(None, Some(&mut alone));
    assert_eq!(alone, dx);
}

#[test]
fn wrong_lengths_are_refused() {
    let threads = Threads::new(1);
    let dims = LinearDims { rows: 2, out: 3, inner: 4 };
    let (x, w) = (vec![0.0; 8], vec![0.0; 12]);
    let refused = linear::linear(&threads, dims, &x, Matrix::F32(&w), &mut [0.0; 5]);
    assert_eq!(refused, Err(KernelError::Length { what: "out [M, N]", expected: 6, found: 5 }));
    let huge = LinearDims { rows: usize::MAX, out: 3, inner: 4 };
    let refused = linear::linear(&threads, huge, &x, Matrix::F32(&w), &mut [0.0; 6]);
    assert_eq!(refused, Err(KernelError::Overflow { what: "x [M, K]" }));

    // Where the pre-activation is to become its gradient, it stays as it was.
    let layer = Layer::new(1, Stored::F32, ExpertDims { hidden: 3, intermediate: 2 }, 4, 1, 2.0);
    let n = layer.rows.num_expanded();
    let (mut pre, mut d_row_weights) = (vec![1.0; n * 4], vec![0.0; n + 1]);
    let grads = MergeGrads { d_pre: &mut pre, d_row_weights: &mut d_row_weights, d_w_down: None, act: None };
    let (weights, down, dy) = (&layer.row_weights, layer.down(), [0.0; 12]);
    let refused = smm::merge_bwd_in_place(&threads, &layer.rows, layer.dims, weights, &down, &dy, grads);
    assert_eq!(refused, Err(KernelError::Length { what: "d_row_weights [N]", expected: n, found: n + 1 }));
    assert_eq!(pre, vec![1.0; n * 4]);
}

#[test]
fn contradicting_rows_are_refused() {
    for (offsets, row_idx) in [
        (vec![], vec![]),
        (vec![1, 1], vec![0]),
        (vec![0, 2], vec![0]),
        (vec![0, 2, 1, 2], vec![0, 1]),
        (vec![0, 2], vec![1, 1]),
        (vec![0, 2], vec![1, 0]),
        (vec![0, 1], vec![3]),
    ] {
        assert!(SparseRows::new(3, offsets.clone(), row_idx.clone()).is_err(), "{offsets:?} {row_idx:?}");
    }
    assert!(SparseRows::new(3, vec![0, 2, 2, 3], vec![0, 2, 1]).is_ok());
    assert!(SparseRows::new(0, vec![0], vec![]).is_ok());
}
