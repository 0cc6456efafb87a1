//! Quantised weights: every instruction set against the definitions, bit for bit; errors of the formats; bad input.

mod common;

use common::{Guarded, bits};
use half::bf16;
use occult_kernels::quant::{
    Format, Isa, Layout, QuantError, Quantised, QuantisedBuf, QuantisedExpert, expert_ffn_with, linear,
    linear_with, quantise, reference,
};
use occult_kernels::{SparseRows, Threads};
use proptest::prelude::*;

const FORMATS: [Format; 2] = [Format::Q8, Format::Q4];

const MOST_ROWS: usize = if cfg!(miri) { 9 } else { 30 };
const MOST_COLS: usize = if cfg!(miri) { 70 } else { 200 };

fn sets() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
}

/// Numbers of a normal distribution, reproducible.
fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    let one = |_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32;
    (0..n).map(one).collect()
}

fn encode(format: Format, group: usize, rows: usize, cols: usize, w: &[f32]) -> QuantisedBuf {
    let layout = Layout::new(format, group, rows, cols).expect("layout");
    let fill = |r: usize, out: &mut [f32]| out.copy_from_slice(&w[r * cols..][..cols]);
    quantise(&Threads::new(1), layout, fill).expect("finite").0
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 3 } else { 60 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_instruction_set_gives_the_bits_of_the_definition(
        m in 0usize..MOST_ROWS, n in 0usize..70, k in 0usize..MOST_COLS, group in 0usize..3, q4: bool, threads in 1usize..4, seed: u64,
    ) {
        let format = if q4 { Format::Q4 } else { Format::Q8 };
        let w = encode(format, 32 << group, n, k, &normal(n * k, seed));
        let x = normal(m * k, seed ^ 1);
        let mut want = vec![0.0; m * n];
        reference::linear(&x, &w.view(), m, &mut want).expect("reference");
        for isa in sets() {
            let mut got = vec![f32::NAN; m * n];
            linear_with(isa, &Threads::new(threads), &x, w.view(), &mut got).expect("linear");
            prop_assert_eq!(bits(&got), bits(&want), "{:?}", isa);
        }
    }

    #[test]
    fn any_bytes_are_weights(seed: u64, q4: bool) {
        let (m, n, k) = if cfg!(miri) { (7, 17, 64) } else { (13, 37, 96) };
        let format = if q4 { Format::Q4 } else { Format::Q8 };
        let layout = Layout::new(format, 32, n, k).expect("layout");
        let data: Vec<u8> = normal(layout.data_shape().iter().product(), seed).iter().map(|v| (v * 1e4) as i32 as u8).collect();
        let scales: Vec<bf16> = normal(layout.scales_shape().iter().product(), seed ^ 2).iter().map(|&v| bf16::from_f32(v)).collect();
        let w = Quantised::new(layout, &data, &scales).expect("lengths");
        let x = normal(m * k, seed ^ 3);
        let mut want = vec![0.0; m * n];
        reference::linear(&x, &w, m, &mut want).expect("reference");
        for isa in sets() {
            let mut got = vec![0.0; m * n];
            linear_with(isa, &Threads::new(1), &x, w, &mut got).expect("linear");
            prop_assert_eq!(bits(&got), bits(&want), "{:?}", isa);
        }
    }

    #[test]
    fn experts_are_the_weighted_sum_of_linear_layers(
        r in 0usize..MOST_ROWS.min(20), e in 1usize..5, d in 1usize..70, f in 1usize..70, q4: bool, threads in 1usize..3, seed: u64,
    ) {
        let format = if q4 { Format::Q4 } else { Format::Q8 };
        let mats: Vec<_> = (0..e as u64).map(|i| expert_of(format, 32, d, f, seed ^ (10 * i))).collect();
        let experts: Vec<_> = mats.iter().map(view).collect();
        // Row i goes to the experts whose bit is set in a number of its own.
        let (mut offsets, mut idx) = (vec![0u32], Vec::new());
        for i in 0..e {
            idx.extend((0..r as u32).filter(|row| (seed >> ((u64::from(*row) * 5 + i as u64) % 60)) & 1 == 1));
            offsets.push(idx.len() as u32);
        }
        let rows = SparseRows::new(r, offsets, idx).expect("rows");
        let x = normal(r * d, seed ^ 8);
        let weights = normal(rows.num_expanded(), seed ^ 9);
        let want = defined_ffn(&rows, &x, &experts, &weights);
        for isa in sets() {
            let mut y = vec![f32::NAN; r * d];
            expert_ffn_with(isa, &Threads::new(threads), &rows, &x, &experts, &weights, &mut y).expect("ffn");
            prop_assert_eq!(bits(&y), bits(&want), "{:?}", isa);
        }
    }
}

/// What the definition gives.
fn defined_ffn(rows: &SparseRows, x: &[f32], experts: &[QuantisedExpert<'_>], weights: &[f32]) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len()];
    reference::expert_ffn(rows, x, experts, weights, &mut y).expect("reference");
    y
}

/// Gate, up and down of an expert.
fn expert_of(format: Format, group: usize, d: usize, f: usize, seed: u64) -> [QuantisedBuf; 3] {
    [(f, d, 5), (f, d, 6), (d, f, 7)].map(|(n, k, s)| encode(format, group, n, k, &normal(n * k, seed ^ s)))
}

fn view([gate, up, down]: &[QuantisedBuf; 3]) -> QuantisedExpert<'_> {
    QuantisedExpert { gate: gate.view(), up: up.view(), down: down.view() }
}

#[test]
fn every_number_of_rows_and_odd_widths() {
    let counts = if cfg!(miri) { vec![0, 7] } else { (0..=26).collect() };
    for (format, m) in FORMATS.into_iter().flat_map(|format| counts.iter().map(move |&m| (format, m))) {
        for (n, k) in [(1, 33), (17, 1), (35, 71)] {
            let w = encode(format, 32, n, k, &normal(n * k, 1));
            let mut x = Guarded::new(&normal(m * k, 2));
            let mut want = vec![0.0; m * n];
            reference::linear(x.values(), &w.view(), m, &mut want).expect("reference");
            for isa in sets() {
                let mut got = Guarded::unset(m * n);
                linear_with(isa, &Threads::new(2), x.values(), w.view(), got.values()).expect("linear");
                assert_eq!(bits(got.checked()), bits(&want), "{isa:?} {format:?} {m} x {n} x {k}");
            }
        }
    }
}

#[test]
fn experts_without_rows_and_with_one() {
    let (d, f) = (37, 19);
    for format in FORMATS {
        let mats: Vec<_> = (0..3).map(|i| expert_of(format, 32, d, f, 10 * i)).collect();
        let experts: Vec<_> = mats.iter().map(view).collect();
        let all: &[(usize, [u32; 4], &[u32])] = &[
            (0, [0; 4], &[]),
            (1, [0; 4], &[]),
            (5, [0; 4], &[]),
            (1, [0, 1, 2, 3], &[0, 0, 0]),
            (5, [0, 0, 0, 1], &[4]),
            (5, [0, 1, 1, 1], &[0]),
            (5, [0, 0, 5, 5], &[0, 1, 2, 3, 4]),
        ];
        for &(r, offsets, idx) in all {
            let rows = SparseRows::new(r, offsets.to_vec(), idx.to_vec()).expect("rows");
            let (mut x, weights) = (Guarded::new(&normal(r * d, 8)), normal(idx.len(), 9));
            let want = defined_ffn(&rows, x.values(), &experts, &weights);
            for isa in sets() {
                let mut y = Guarded::unset(r * d);
                expert_ffn_with(isa, &Threads::new(2), &rows, x.values(), &experts, &weights, y.values())
                    .expect("ffn");
                assert_eq!(bits(y.checked()), bits(&want), "{isa:?} {format:?} {offsets:?}");
            }
        }
    }
}

/// NaN where the definition has it, infinities alike, finite elsewhere.
#[track_caller]
fn assert_same_kind(isa: Isa, got: &[f32], want: &[f32]) {
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let same =
            if want.is_finite() { got.is_finite() } else { got == want || got.is_nan() && want.is_nan() };
        assert!(same, "{isa:?}: value {i} is {got}, expected {want}");
    }
}

#[test]
fn nan_and_infinity_go_where_the_definition_sends_them() {
    let (m, d, f) = (8, 70, 35);
    // The last one is finite, and its products are not.
    let all = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3.0e38];
    for special in &all[if cfg!(miri) { 3 } else { 0 }..] {
        let special = *special;
        for format in FORMATS {
            let [gate, up, down] = [(f, d, 1), (f, d, 2), (d, f, 3)]
                .map(|(n, k, s)| encode(format, 32, n, k, &normal(n * k, s)));
            let mut x = normal(m * d, 4);
            x[2 * d + 66] = special;
            let mut want = vec![0.0; m * f];
            reference::linear(&x, &gate.view(), m, &mut want).expect("reference");
            assert!(want[2 * f..3 * f].iter().any(|v| !v.is_finite()));
            for isa in sets() {
                let mut got = vec![0.0; m * f];
                linear_with(isa, &Threads::new(1), &x, gate.view(), &mut got).expect("linear");
                assert_same_kind(isa, &got, &want);
            }
            // The same in x, then in the weight of a row.
            let expert = QuantisedExpert { gate: gate.view(), up: up.view(), down: down.view() };
            let rows = SparseRows::new(m, vec![0, 8], (0..8).collect()).expect("rows");
            for in_weight in [false, true] {
                let (mut x, mut weights) = (x.clone(), normal(m, 5));
                if in_weight {
                    x[2 * d + 66] = 0.5;
                    weights[2] = special;
                }
                let want = defined_ffn(&rows, &x, &[expert], &weights);
                for isa in sets() {
                    let mut y = vec![0.0; m * d];
                    expert_ffn_with(isa, &Threads::new(1), &rows, &x, &[expert], &weights, &mut y)
                        .expect("ffn");
                    assert_same_kind(isa, &y, &want);
                }
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn a_hot_expert_of_more_rows_than_a_batch_adds_up() {
    let (r, d, f) = (5000, 32, 16);
    let mats: Vec<_> = (0..6).map(|s| encode(Format::Q8, 32, f * 2, d, &normal(f * 2 * d, s))).collect();
    let square = |i: usize| mats[i].view();
    let experts: Vec<_> =
        (0..2).map(|i| QuantisedExpert { gate: square(i), up: square(i + 2), down: square(i + 4) }).collect();
    let idx: Vec<u32> = (0..r as u32).chain([3, 4999]).collect();
    let rows = SparseRows::new(r, vec![0, r as u32, r as u32 + 2], idx).expect("rows");
    let (x, weights) = (normal(r * d, 7), normal(r + 2, 8));
    let want = defined_ffn(&rows, &x, &experts, &weights);
    for (isa, threads) in sets().flat_map(|isa| [(isa, 1), (isa, 2)]) {
        let mut y = vec![0.0; r * d];
        expert_ffn_with(isa, &Threads::new(threads), &rows, &x, &experts, &weights, &mut y).expect("ffn");
        assert!(bits(&y) == bits(&want), "{isa:?}, {threads} threads");
    }
}

#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn experts_with_several_steps_of_k_and_chunks_of_rows() {
    // D and F above a step of 512 columns; the first expert has more rows than a task takes, the last one row.
    let (r, d, f) = (270, 530, 520);
    for (format, group) in [(Format::Q8, 32), (Format::Q4, 64)] {
        let mats: Vec<_> = (0..3).map(|i| expert_of(format, group, d, f, 10 * i)).collect();
        let experts: Vec<_> = mats.iter().map(view).collect();
        let idx: Vec<u32> = (1..r as u32).chain([3, 77, 200]).chain([269]).collect();
        let n = idx.len() as u32;
        let rows = SparseRows::new(r, vec![0, n - 4, n - 1, n], idx).expect("rows");
        let (mut x, weights) = (Guarded::new(&normal(r * d, 8)), normal(n as usize, 9));
        let want = defined_ffn(&rows, x.values(), &experts, &weights);
        for (isa, threads) in sets().flat_map(|isa| [(isa, 1), (isa, 3)]) {
            let (threads, mut y) = (Threads::new(threads), Guarded::unset(r * d));
            expert_ffn_with(isa, &threads, &rows, x.values(), &experts, &weights, y.values()).expect("ffn");
            assert!(bits(y.checked()) == bits(&want), "{isa:?} {format:?}/{group} {threads:?}");
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn several_steps_of_k_and_chunks_of_rows_give_the_bits_of_the_definition() {
    for (format, group) in [(Format::Q8, 32), (Format::Q8, 128), (Format::Q4, 32), (Format::Q4, 64)] {
        for (m, n, k) in [(600, 40, 70), (7, 100, 1200), (3, 70, 1200), (300, 24, 1030)] {
            let w = encode(format, group, n, k, &normal(n * k, 1));
            let x = normal(m * k, 2);
            let mut want = vec![0.0; m * n];
            reference::linear(&x, &w.view(), m, &mut want).expect("reference");
            for isa in sets() {
                for threads in [1, 3] {
                    let mut got = vec![f32::NAN; m * n];
                    linear_with(isa, &Threads::new(threads), &x, w.view(), &mut got).expect("linear");
                    assert!(bits(&got) == bits(&want), "{isa:?} {format:?}/{group} {m} x {n} x {k}");
                }
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn errors_of_the_formats_on_a_normal_distribution() {
    // Relative root mean square, per cent: what the documentation says, and little more.
    for (format, group, least, most) in [
        (Format::Q8, 32, 0.50, 0.56),
        (Format::Q8, 64, 0.56, 0.62),
        (Format::Q8, 128, 0.62, 0.68),
        (Format::Q4, 32, 7.0, 7.6),
    ] {
        let (n, k) = (64, 512);
        let w = normal(n * k, 3);
        let layout = Layout::new(format, group, n, k).expect("layout");
        let fill = |r: usize, out: &mut [f32]| out.copy_from_slice(&w[r * k..][..k]);
        let (q, stats) = quantise(&Threads::new(2), layout, fill).expect("finite");
        let percent = 100.0 * stats.relative_rms();
        assert!(percent > least && percent < most, "{format:?} in groups of {group}: {percent} %");
        let back = reference::dequantise(&q.view());
        let (mut squares, mut max) = (0.0, 0f32);
        for (a, b) in w.iter().zip(&back) {
            squares += f64::from(a - b) * f64::from(a - b);
            max = max.max((a - b).abs());
        }
        assert!((squares / stats.squared_error - 1.0).abs() < 1e-6 && max == stats.max_error, "{stats:?}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn a_product_with_8_bits_is_close_to_the_exact_one() {
    let (m, n, k) = (8, 64, 1024);
    let (w, x) = (normal(n * k, 4), normal(m * k, 5));
    let exact = |i: usize, j: usize| -> f64 {
        (0..k).map(|c| f64::from(x[i * k + c]) * f64::from(w[j * k + c])).sum()
    };
    for (format, most) in [(Format::Q8, 0.8), (Format::Q4, 7.7)] {
        let q = encode(format, 32, n, k, &w);
        let mut y = vec![0.0; m * n];
        linear(&Threads::new(2), &x, q.view(), &mut y).expect("linear");
        let (mut error, mut size) = (0.0, 0.0);
        for (o, y) in y.iter().enumerate() {
            let exact = exact(o / n, o % n);
            error += (f64::from(*y) - exact).powi(2);
            size += exact * exact;
        }
        let percent = 100.0 * (error / size).sqrt();
        assert!(percent < most, "{format:?}: {percent} %");
    }
}

#[test]
fn extreme_values() {
    let k = 64;
    for format in FORMATS {
        // A group of zeros, one outlier, numbers near the ends of f32.
        let mut w = vec![0.0; 4 * k];
        w[k + 3] = -5.0;
        w[2 * k..3 * k].fill(3.0e38);
        w[3 * k..].fill(1.0e-37);
        let q = encode(format, 32, 4, k, &w);
        let back = reference::dequantise(&q.view());
        assert!(back[..k].iter().all(|v| *v == 0.0), "{format:?}: zeros stay zeros");
        assert!((back[k + 3] + 5.0).abs() < 0.02 && back[k + 4] == 0.0, "{format:?}: {}", back[k + 3]);
        assert!(back[2 * k..3 * k].iter().all(|v| (v / 3.0e38 - 1.0).abs() < 5e-3), "{format:?}");
        assert!(back[3 * k..].iter().all(|v| v.abs() <= 1.0e-37), "{format:?}");
        // Activations that are not finite spoil their own rows, and only those.
        let mut x = normal(4 * k, 6);
        (x[k], x[2 * k + 40]) = (f32::NAN, f32::INFINITY);
        x[3 * k..].fill(0.0);
        for isa in sets() {
            let mut y = vec![1.0; 16];
            linear_with(isa, &Threads::new(1), &x, q.view(), &mut y).expect("linear");
            assert!(y[..4].iter().all(|v| !v.is_nan()), "{isa:?}: {y:?}");
            assert!(y[4..12].iter().all(|v| v.is_nan()), "{isa:?}: {y:?}");
            assert!(y[12..].iter().all(|v| *v == 0.0), "{isa:?}: {y:?}");
        }
    }
}

#[test]
fn what_cannot_be_quantised_is_refused_with_its_place() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for format in FORMATS {
            let layout = Layout::new(format, 32, 20, 40).expect("layout");
            let fill = |r: usize, row: &mut [f32]| row[39] = if r == 17 { value } else { 1.0 };
            let error = quantise(&Threads::new(2), layout, fill).expect_err("not finite");
            assert!(matches!(error, QuantError::NotFinite { row: 17, col: 39, .. }), "{error}");
        }
    }
}

#[test]
fn wrong_sizes_are_errors() {
    assert_eq!(Layout::new(Format::Q8, 48, 16, 64), Err(QuantError::Group(48)));
    assert!(Layout::new(Format::Q8, 32, usize::MAX, 2).is_err());
    assert!(Layout::new(Format::Q8, 32, usize::MAX / 64, 64).is_err());
    let q = encode(Format::Q8, 32, 16, 64, &normal(16 * 64, 1));
    let (layout, data, scales) = (*q.view().layout(), q.view().data(), q.view().scales());
    assert!(Quantised::new(layout, &data[1..], scales).is_err());
    assert!(Quantised::new(layout, data, &scales[1..]).is_err());
    let threads = Threads::new(1);
    assert!(linear(&threads, &[0.0; 65], q.view(), &mut [0.0; 16]).is_err());
    assert!(linear(&threads, &[0.0; 64], q.view(), &mut [0.0; 17]).is_err());
    let bad = [bf16::INFINITY; 32];
    let bad = Quantised::new(layout, data, &bad).expect("lengths");
    assert!(matches!(bad.check_finite(), Err(QuantError::BadScale { at: 0, .. })));
    assert!(q.view().check_finite().is_ok());
    let rows = SparseRows::new(1, vec![0, 1], vec![0]).expect("rows");
    let expert = QuantisedExpert { gate: q.view(), up: q.view(), down: q.view() };
    let error = expert_ffn_with(Isa::Scalar, &threads, &rows, &[0.0; 64], &[expert], &[1.0], &mut [0.0; 64]);
    assert!(matches!(error, Err(QuantError::Shape(_))), "down has the shape of gate");
    let error = expert_ffn_with(Isa::Scalar, &threads, &rows, &[0.0; 64], &[], &[1.0], &mut [0.0; 64]);
    assert!(matches!(error, Err(QuantError::Shape(_))), "no expert");
}

#[test]
fn the_layout_is_the_documented_one() {
    let (n, k) = (18, 70); // 2 panels; 3 groups of 32
    let w = normal(n * k, 2);
    for format in FORMATS {
        let q = encode(format, 32, n, k, &w);
        let (view, back) = (q.view(), reference::dequantise(&q.view()));
        let layout = view.layout();
        let quads = if format == Format::Q8 { 24 } else { 12 };
        assert_eq!((layout.data_shape(), layout.scales_shape()), ([2, quads, 16, 4], [2, 3, 16]));
        for (row, col) in [(0, 0), (1, 2), (5, 69), (17, 6), (16, 33)] {
            let (p, r) = (row / 16, row % 16);
            let scale = view.scales()[(p * 3 + col / 32) * 16 + r].to_f32();
            let level = match format {
                Format::Q8 => view.data()[((p * 24 + col / 4) * 16 + r) * 4 + col % 4],
                Format::Q4 => {
                    let byte = view.data()[((p * 12 + col / 8) * 16 + r) * 4 + col % 4];
                    let code = if col % 8 < 4 { byte & 15 } else { byte >> 4 };
                    occult_kernels::quant::LEVELS[usize::from(code)]
                }
            };
            assert_eq!((f32::from(level) - 128.0) * scale, back[row * k + col], "{format:?} {row} {col}");
        }
        assert_eq!((reference::level(&view, 17, 70), reference::level(&view, 17, 95)), (0, 0), "padding");
    }
}

#[test]
fn the_general_entries_take_quantised_matrices_or_say_that_they_do_not() {
    use occult_kernels::linear::{LinearDims, linear as dense, linear_bwd_x};
    use occult_kernels::smm::{ExpertDims, ExpertMatrices, GateUp, expert_ffn, scatter};
    use occult_kernels::{KernelError, Matrix};
    let (d, f, threads) = (64, 32, Threads::new(1));
    let mats: Vec<_> = [(f, d), (f, d), (d, f)]
        .into_iter()
        .map(|(n, k)| encode(Format::Q8, 32, n, k, &normal(n * k, n as u64)))
        .collect();
    let matrix = |i: usize| Matrix::Quantised(mats[i].view());
    let x = normal(d, 3);
    let (mut got, mut want) = (vec![0.0; f], vec![0.0; f]);
    let dims = LinearDims { rows: 1, out: f, inner: d };
    dense(&threads, dims, &x, matrix(0), &mut got).expect("linear");
    reference::linear(&x, &mats[0].view(), 1, &mut want).expect("reference");
    assert_eq!(bits(&got), bits(&want));
    assert_eq!(matrix(0).at(70), reference::dequantise(&mats[0].view())[70]);
    // The right number of values in the wrong shape.
    let turned = LinearDims { rows: 2, out: d, inner: f };
    let is = |e: Result<(), KernelError>| assert!(matches!(e, Err(KernelError::Quantised { .. })), "{e:?}");
    is(dense(&threads, turned, &x, matrix(0), &mut vec![0.0; 2 * d]));
    is(linear_bwd_x(&threads, dims, &got, matrix(0), &mut vec![0.0; d]));
    let rows = SparseRows::new(1, vec![0, 1], vec![0]).expect("rows");
    let dims = ExpertDims { hidden: d, intermediate: f };
    let up = [GateUp { gate: matrix(0), up: matrix(1) }];
    is(scatter(&threads, &rows, dims, &x, &up, &mut vec![0.0; 2 * f]));
    let floats = normal(d * f, 9);
    let expert = ExpertMatrices { gate: matrix(0), up: matrix(1), down: matrix(2) };
    let mixed = ExpertMatrices { down: Matrix::F32(&floats), ..expert };
    let mut y = vec![0.0; d];
    is(expert_ffn(&threads, &rows, dims, &x, &[mixed], &[0.5], &mut y));
    expert_ffn(&threads, &rows, dims, &x, &[expert], &[0.5], &mut y).expect("ffn");
    let quantised = QuantisedExpert { gate: mats[0].view(), up: mats[1].view(), down: mats[2].view() };
    assert_eq!(bits(&y), bits(&defined_ffn(&rows, &x, &[quantised], &[0.5])));
    assert!(y.iter().any(|v| *v != 0.0));
}
