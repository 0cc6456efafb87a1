//! Every kernel of every instruction set of this machine against its definition, on all sorts of shapes.

mod common;

use common::{
    Guarded, Layer, Rng, STORED, Stored, Weight, assert_close, assert_close_or, bits, budgets, least_of,
};
use occult_kernels::SparseRows;
use occult_kernels::linear::{self, LinearDims};
use occult_kernels::smm::{
    self, ExpertDims, MergeGrads, MergeInputs, ScatterGrads, WeightGrads, WeightInputs,
};
use proptest::prelude::*;

const SIZES: [usize; 14] = [0, 1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 48, 65, 97];

fn size() -> impl Strategy<Value = usize> {
    // Miri: more rows than are few, and more of everything than a tile.
    let (sizes, below) = if cfg!(miri) { (&SIZES[..8], 18) } else { (&SIZES[..], 140) };
    prop_oneof![3 => prop::sample::select(sizes.to_vec()), 1 => 0_usize..below]
}

fn stored() -> impl Strategy<Value = Stored> {
    prop::sample::select(STORED.to_vec())
}

fn check_linear(seed: u64, stored: Stored, dims: LinearDims) {
    let LinearDims { rows: m, out: n, inner: k } = dims;
    let mut rng = Rng(seed);
    // One value in front, as everywhere here: slices need no alignment.
    let x = &rng.values(m * k + 1)[1..];
    let dout = &rng.values(m * n + 1)[1..];
    let w = Weight::new(&mut rng, stored, n * k);
    let start = rng.values(n * k);
    for threads in budgets(2) {
        let what = |op: &str| format!("{op} {dims:?} {stored:?} {:?}", threads.instruction_set());
        let (mut found, mut expected) = (Guarded::unset(m * n), vec![0.0; m * n]);
        linear::linear(&threads, dims, x, w.matrix(), found.values()).unwrap();
        linear::reference::linear(dims, x, w.matrix(), &mut expected);
        assert_close(&what("forward"), found.checked(), &expected);

        let (mut found, mut expected) = (Guarded::unset(m * k), vec![0.0; m * k]);
        linear::linear_bwd_x(&threads, dims, dout, w.matrix(), found.values()).unwrap();
        linear::reference::linear_bwd_x(dims, dout, w.matrix(), &mut expected);
        assert_close(&what("dx"), found.checked(), &expected);

        let (mut found, mut expected) = (Guarded::new(&start), start.clone());
        linear::linear_bwd_w(&threads, dims, dout, x, found.values()).unwrap();
        linear::reference::linear_bwd_w(dims, dout, x, &mut expected);
        assert_close(&what("dw"), found.checked(), &expected);
    }
}

/// Sums of the absolute terms of each gradient of a row's weight, `[N]`: activation times its gradient.
fn row_weight_terms(layer: &Layer, pre: &[f32], dy: &[f32]) -> Vec<f32> {
    let ExpertDims { hidden: d, intermediate: f } = layer.dims;
    let mut sums = vec![0.0; layer.rows.num_expanded()];
    for (expert, w_down) in layer.down().iter().enumerate() {
        for n in layer.rows.expanded_of(expert) {
            let (gate, up) = pre[n * 2 * f..][..2 * f].split_at(f);
            let dy = &dy[layer.rows.row_idx()[n] as usize * d..][..d];
            let terms = (0..f).map(|k| {
                let gradient: f32 = (0..d).map(|j| dy[j] * w_down.at(j * f + k)).sum();
                (gate[k] / (1.0 + (-gate[k]).exp()) * up[k] * gradient).abs()
            });
            sums[n] = terms.sum();
        }
    }
    sums
}

fn check_layer(layer: &Layer, stored: Stored) {
    let (rows, dims) = (&layer.rows, layer.dims);
    let ExpertDims { hidden: d, intermediate: f } = dims;
    let (r, n, e) = (rows.num_rows(), rows.num_expanded(), rows.num_experts());
    let (up, down, experts) = (layer.up(), layer.down(), layer.experts());
    let mut rng = Rng(99);
    let (mut x, mut row_weights) = (Guarded::new(&layer.x), Guarded::new(&layer.row_weights));
    let (x, row_weights) = (&*x.values(), &*row_weights.values());
    let dy = &rng.values(r * d + 1)[1..];
    let (start_down, start_up) = (rng.values(e * d * f), rng.values(e * 2 * f * d));

    let mut pre = vec![0.0; n * 2 * f];
    smm::reference::scatter(rows, dims, x, &up, &mut pre);
    let mut unaligned = Guarded::new(&pre);
    let inputs = MergeInputs { pre: unaligned.values(), row_weights, w_down: &down };
    let mut y = vec![0.0; r * d];
    smm::reference::merge(rows, dims, inputs, &mut y);
    let (mut d_pre, mut d_row_weights, mut d_down) = (vec![0.0; pre.len()], vec![0.0; n], start_down.clone());
    let mut act = vec![0.0; n * f];
    let grads = MergeGrads {
        d_pre: &mut d_pre,
        d_row_weights: &mut d_row_weights,
        d_w_down: Some(&mut d_down),
        act: Some(&mut act),
    };
    smm::reference::merge_bwd(rows, dims, inputs, dy, grads);
    let (mut in_place, mut unused) = (pre.clone(), vec![0.0; n]);
    let grads = MergeGrads { d_pre: &mut in_place, d_row_weights: &mut unused, d_w_down: None, act: None };
    smm::reference::merge_bwd_in_place(rows, dims, row_weights, &down, dy, grads);
    assert_eq!(bits(&in_place), bits(&d_pre));
    let (mut dx, mut d_up) = (vec![0.0; r * d], start_up.clone());
    let grads = ScatterGrads { dx: Some(&mut dx), d_w_up: Some(&mut d_up) };
    smm::reference::scatter_bwd(rows, dims, x, &up, &d_pre, grads);

    // A tenth of the absolute terms: more than the sums only where terms cancel.
    let row_weights_least =
        row_weight_terms(layer, &pre, dy).into_iter().fold(least_of(n), |max, sum| max.max(sum / 10.0));

    for threads in budgets(2) {
        let what = |op: &str| format!("{op} R {r} N {n} {dims:?} {stored:?} {:?}", threads.instruction_set());
        let mut found = Guarded::unset(pre.len());
        smm::scatter(&threads, rows, dims, x, &up, found.values()).unwrap();
        assert_close(&what("scatter"), found.checked(), &pre);

        let mut found = Guarded::unset(y.len());
        smm::merge(&threads, rows, dims, inputs, found.values()).unwrap();
        assert_close(&what("merge"), found.checked(), &y);

        let mut found = Guarded::unset(y.len());
        smm::expert_ffn(&threads, rows, dims, x, &experts, row_weights, found.values()).unwrap();
        // All outputs hang on the activations.
        assert_close_or(&what("expert_ffn"), found.checked(), &y, least_of(y.len().min(n * f)));

        for (keep, in_place) in [(false, false), (true, false), (false, true), (true, true)] {
            let before = if in_place { Guarded::new(&pre) } else { Guarded::unset(pre.len()) };
            let mut found = (before, Guarded::unset(n), Guarded::new(&start_down));
            let mut kept = Guarded::unset(n * f);
            let grads = MergeGrads {
                d_pre: found.0.values(),
                d_row_weights: found.1.values(),
                d_w_down: Some(found.2.values()),
                act: keep.then_some(kept.values()),
            };
            if in_place {
                smm::merge_bwd_in_place(&threads, rows, dims, row_weights, &down, dy, grads).unwrap();
            } else {
                smm::merge_bwd(&threads, rows, dims, inputs, dy, grads).unwrap();
            }
            assert_close(&what("d_pre"), found.0.checked(), &d_pre);
            // One value per row, so there may be one alone, and its terms may cancel.
            assert_close_or(&what("d_row_weights"), found.1.checked(), &d_row_weights, row_weights_least);
            assert_close(&what("d_w_down"), found.2.checked(), &d_down);
            if keep {
                assert_close(&what("act"), kept.checked(), &act);
            }
        }

        let mut found = (Guarded::unset(dx.len()), Guarded::new(&start_up));
        let grads = ScatterGrads { dx: Some(found.0.values()), d_w_up: Some(found.1.values()) };
        smm::scatter_bwd(&threads, rows, dims, x, &up, &d_pre, grads).unwrap();
        assert_close(&what("dx"), found.0.checked(), &dx);
        assert_close(&what("d_w_up"), found.1.checked(), &d_up);
    }

    // The same values, stored in another order, give the gradients of the weights alone.
    let stored: Vec<u32> = (0..n as u32).rev().collect();
    let reversed = |values: &[f32], width: usize| -> Vec<f32> {
        values.chunks_exact(width.max(1)).rev().flatten().copied().collect()
    };
    let (act, d_pre) = (reversed(&act, f), reversed(&d_pre, 2 * f));
    let inputs = WeightInputs { x, dy, act: &act, d_pre: &d_pre, stored: &stored };
    for add in [false, true] {
        let start = |values: &[f32]| if add { values.to_vec() } else { vec![f32::NAN; values.len()] };
        let (mut down, mut up) = (start(&start_down), start(&start_up));
        let grads = WeightGrads { d_w_up: Some(&mut up), d_w_down: Some(&mut down), add };
        smm::reference::weights_bwd(rows, dims, inputs, grads);
        if add {
            assert_close("d_w_down by definition", &down, &d_down);
            assert_close("d_w_up by definition", &up, &d_up);
        }
        for threads in budgets(2) {
            let mut found = (Guarded::new(&start(&start_down)), Guarded::new(&start(&start_up)));
            let grads = WeightGrads { d_w_up: Some(found.1.values()), d_w_down: Some(found.0.values()), add };
            smm::weights_bwd(&threads, rows, dims, inputs, grads).unwrap();
            assert_close("d_w_down alone", found.0.checked(), &down);
            assert_close("d_w_up alone", found.1.checked(), &up);
        }
    }
    let outside = WeightInputs { stored: &vec![n as u32; n], ..inputs };
    let grads = WeightGrads { d_w_up: None, d_w_down: None, add: true };
    assert_eq!(smm::weights_bwd(&budgets(1)[0], rows, dims, outside, grads).is_err(), n > 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 3 } else { 96 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn linear_is_its_definition(seed: u64, stored in stored(), rows in size(), out in size(), inner in size()) {
        check_linear(seed, stored, LinearDims { rows, out, inner });
    }

    #[test]
    fn sparse_matmuls_are_their_definitions(
        seed: u64,
        stored in stored(),
        hidden in size(),
        intermediate in size(),
        num_rows in size(),
        num_experts in 0_usize..6,
        share in 0.0..1.0_f64,
    ) {
        let dims = ExpertDims { hidden, intermediate };
        check_layer(&Layer::new(seed, stored, dims, num_rows, num_experts, share), stored);
    }
}

/// Numbers of rows one by one: none, one, few (which read weights as stored), and every way to divide rows into tiles.
fn row_counts() -> Vec<usize> {
    // Up to 48 or 128 are few with AVX-512, up to 12 elsewhere.
    if cfg!(miri) { vec![0, 1, 13] } else { (0..=62).chain(127..=142).collect() }
}

#[test]
fn every_number_of_rows() {
    let (out, inner, intermediate) = if cfg!(miri) { (11, 7, 3) } else { (35, 19, 9) };
    for rows in row_counts() {
        for stored in STORED {
            check_linear(rows as u64, stored, LinearDims { rows, out, inner });
        }
        // All rows to both experts.
        let dims = ExpertDims { hidden: inner, intermediate };
        check_layer(&Layer::new(5, Stored::Bf16, dims, rows, 2, 1.0), Stored::Bf16);
    }
}

#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn every_odd_width() {
    for width in (1..70).step_by(2) {
        for (i, stored) in STORED.into_iter().enumerate() {
            // Few, and so many that the weights are packed.
            for rows in [[1, 5, 17][i], 130] {
                check_linear(1, stored, LinearDims { rows, out: width, inner: 13 });
                check_linear(2, stored, LinearDims { rows, out: 13, inner: width });
            }
        }
        let dims = ExpertDims { hidden: width, intermediate: width + 2 };
        for num_rows in [15, 75] {
            check_layer(&Layer::new(3, Stored::F32, dims, num_rows, 2, 0.7), Stored::F32);
        }
    }
}

#[test]
fn experts_without_rows() {
    let dims = ExpertDims { hidden: 11, intermediate: 6 };
    for (num_rows, num_experts) in [(0, 0), (0, 3), (4, 0), (4, 1), (14, 3)] {
        check_layer(&Layer::new(6, Stored::F32, dims, num_rows, num_experts, 0.0), Stored::F32);
    }
    // One row at the last of three experts, and at the first.
    for offsets in [vec![0, 0, 0, 1], vec![0, 1, 1, 1]] {
        let mut layer = Layer::new(6, Stored::F32, dims, 2, 3, 0.0);
        layer.rows = SparseRows::new(2, offsets, vec![1]).unwrap();
        layer.row_weights = vec![0.5];
        check_layer(&layer, Stored::F32);
    }
}

#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn several_blocks_of_k_rows_and_columns() {
    for stored in STORED {
        check_linear(1, stored, LinearDims { rows: 70, out: 300, inner: 1030 });
        check_linear(4, stored, LinearDims { rows: 140, out: 300, inner: 1030 });
        check_linear(2, stored, LinearDims { rows: 5, out: 300, inner: 1030 });
        check_linear(3, stored, LinearDims { rows: 1100, out: 40, inner: 21 });
    }
    let dims = ExpertDims { hidden: 530, intermediate: 270 };
    for num_rows in [40, 230] {
        check_layer(&Layer::new(4, Stored::Bf16, dims, num_rows, 4, 0.6), Stored::Bf16);
    }
}

#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn several_groups_of_rows() {
    // More rows than one group holds (2^21 values), one expert with many.
    let dims = ExpertDims { hidden: 3, intermediate: 1024 };
    check_layer(&Layer::new(7, Stored::F32, dims, 2500, 3, 0.9), Stored::F32);
}
