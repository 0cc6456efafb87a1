//! Every kernel of every instruction set of this machine against its definition, on all sorts of shapes.

mod common;

use common::{Layer, Rng, STORED, Stored, Weight, assert_close, budgets};
use occult_kernels::linear::{self, LinearDims};
use occult_kernels::smm::{
    self, ExpertDims, MergeGrads, MergeInputs, ScatterGrads, WeightGrads, WeightInputs,
};
use proptest::prelude::*;

const SIZES: [usize; 14] = [0, 1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 48, 65, 97];

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![3 => prop::sample::select(SIZES.to_vec()), 1 => 0_usize..140]
}

fn stored() -> impl Strategy<Value = Stored> {
    prop::sample::select(STORED.to_vec())
}

fn check_linear(seed: u64, stored: Stored, dims: LinearDims) {
    let LinearDims { rows: m, out: n, inner: k } = dims;
    let mut rng = Rng(seed);
    // One value of padding in front: slices need no alignment.
    let x = &rng.values(m * k + 1)[1..];
    let dout = &rng.values(m * n + 1)[1..];
    let w = Weight::new(&mut rng, stored, n * k);
    let start = rng.values(n * k);
    for threads in budgets(2) {
        let what = |op: &str| format!("{op} {dims:?} {stored:?} {:?}", threads.instruction_set());
        let (mut found, mut expected) = (vec![f32::NAN; m * n], vec![0.0; m * n]);
        linear::linear(&threads, dims, x, w.matrix(), &mut found).unwrap();
        linear::reference::linear(dims, x, w.matrix(), &mut expected);
        assert_close(&what("forward"), &found, &expected);

        let (mut found, mut expected) = (vec![f32::NAN; m * k], vec![0.0; m * k]);
        linear::linear_bwd_x(&threads, dims, dout, w.matrix(), &mut found).unwrap();
        linear::reference::linear_bwd_x(dims, dout, w.matrix(), &mut expected);
        assert_close(&what("dx"), &found, &expected);

        let (mut found, mut expected) = (start.clone(), start.clone());
        linear::linear_bwd_w(&threads, dims, dout, x, &mut found).unwrap();
        linear::reference::linear_bwd_w(dims, dout, x, &mut expected);
        assert_close(&what("dw"), &found, &expected);
    }
}

fn check_layer(layer: &Layer, stored: Stored) {
    let (rows, dims) = (&layer.rows, layer.dims);
    let ExpertDims { hidden: d, intermediate: f } = dims;
    let (r, n, e) = (rows.num_rows(), rows.num_expanded(), rows.num_experts());
    let (up, down, experts) = (layer.up(), layer.down(), layer.experts());
    let mut rng = Rng(99);
    let dy = rng.values(r * d);
    let (start_down, start_up) = (rng.values(e * d * f), rng.values(e * 2 * f * d));

    let mut pre = vec![0.0; n * 2 * f];
    smm::reference::scatter(rows, dims, &layer.x, &up, &mut pre);
    let inputs = MergeInputs { pre: &pre, row_weights: &layer.row_weights, w_down: &down };
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
    smm::reference::merge_bwd(rows, dims, inputs, &dy, grads);
    let (mut dx, mut d_up) = (vec![0.0; r * d], start_up.clone());
    let grads = ScatterGrads { dx: Some(&mut dx), d_w_up: Some(&mut d_up) };
    smm::reference::scatter_bwd(rows, dims, &layer.x, &up, &d_pre, grads);

    for threads in budgets(2) {
        let what = |op: &str| format!("{op} R {r} N {n} {dims:?} {stored:?} {:?}", threads.instruction_set());
        let mut found = vec![f32::NAN; pre.len()];
        smm::scatter(&threads, rows, dims, &layer.x, &up, &mut found).unwrap();
        assert_close(&what("scatter"), &found, &pre);

        let mut found = vec![f32::NAN; y.len()];
        smm::merge(&threads, rows, dims, inputs, &mut found).unwrap();
        assert_close(&what("merge"), &found, &y);

        let mut found = vec![f32::NAN; y.len()];
        smm::expert_ffn(&threads, rows, dims, &layer.x, &experts, &layer.row_weights, &mut found).unwrap();
        assert_close(&what("expert_ffn"), &found, &y);

        for keep in [false, true] {
            let mut found = (vec![f32::NAN; pre.len()], vec![f32::NAN; n], start_down.clone());
            let mut kept = vec![f32::NAN; n * f];
            let grads = MergeGrads {
                d_pre: &mut found.0,
                d_row_weights: &mut found.1,
                d_w_down: Some(&mut found.2),
                act: keep.then_some(&mut kept),
            };
            smm::merge_bwd(&threads, rows, dims, inputs, &dy, grads).unwrap();
            assert_close(&what("d_pre"), &found.0, &d_pre);
            assert_close(&what("d_row_weights"), &found.1, &d_row_weights);
            assert_close(&what("d_w_down"), &found.2, &d_down);
            if keep {
                assert_close(&what("act"), &kept, &act);
            }
        }

        let mut found = (vec![f32::NAN; dx.len()], start_up.clone());
        let grads = ScatterGrads { dx: Some(&mut found.0), d_w_up: Some(&mut found.1) };
        smm::scatter_bwd(&threads, rows, dims, &layer.x, &up, &d_pre, grads).unwrap();
        assert_close(&what("dx"), &found.0, &dx);
        assert_close(&what("d_w_up"), &found.1, &d_up);
    }

    // The same values, stored in another order, give the gradients of the weights alone.
    let stored: Vec<u32> = (0..n as u32).rev().collect();
    let reversed = |values: &[f32], width: usize| -> Vec<f32> {
        values.chunks_exact(width.max(1)).rev().flatten().copied().collect()
    };
    let (act, d_pre) = (reversed(&act, f), reversed(&d_pre, 2 * f));
    let inputs = WeightInputs { x: &layer.x, dy: &dy, act: &act, d_pre: &d_pre, stored: &stored };
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
            let mut found = (start(&start_down), start(&start_up));
            let grads = WeightGrads { d_w_up: Some(&mut found.1), d_w_down: Some(&mut found.0), add };
            smm::weights_bwd(&threads, rows, dims, inputs, grads).unwrap();
            assert_close("d_w_down alone", &found.0, &down);
            assert_close("d_w_up alone", &found.1, &up);
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

#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn several_blocks_of_k_rows_and_columns() {
    for stored in STORED {
        check_linear(1, stored, LinearDims { rows: 70, out: 300, inner: 1030 });
        check_linear(2, stored, LinearDims { rows: 5, out: 300, inner: 1030 });
        check_linear(3, stored, LinearDims { rows: 1100, out: 40, inner: 21 });
    }
    let dims = ExpertDims { hidden: 530, intermediate: 270 };
    check_layer(&Layer::new(4, Stored::Bf16, dims, 40, 4, 0.6), Stored::Bf16);
}

#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn several_groups_of_rows() {
    // More rows than one group holds (2^21 values), one expert with many.
    let dims = ExpertDims { hidden: 3, intermediate: 1024 };
    check_layer(&Layer::new(7, Stored::F32, dims, 2500, 3, 0.9), Stored::F32);
}
