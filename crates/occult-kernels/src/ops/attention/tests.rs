use candle_core::Var;
use proptest::prelude::*;

use super::*;
use crate::ops::check::{difference, op_is, tensor};
use crate::ops::simd::for_each_isa;

/// Batch, heads, key heads, queries, past, d_k, d_v.
type Sizes = (usize, usize, usize, usize, usize, usize, usize);

fn inputs((b, h, hkv, t, past, dk, dv): Sizes) -> Result<[Tensor; 3]> {
    let s = past + t;
    Ok([
        (tensor(1, &[b, h, t, dk])? * 2.0)?,
        (tensor(2, &[b, hkv, s, dk])? * 2.0)?,
        tensor(3, &[b, hkv, s, dv])?,
    ])
}

fn shape(past: usize, dk: usize) -> AttentionShape {
    AttentionShape::causal(1.0 / (dk as f32).sqrt(), past)
}

fn is_its_definition(sizes: Sizes, shape: &AttentionShape) -> Result<()> {
    let threads = Threads::new(2);
    op_is(
        &|t| attention(&threads, &t[0], &t[1], &t[2], shape),
        &|t| reference(&t[0], &t[1], &t[2], shape),
        &inputs(sizes)?,
        3e-6,
    )
}

#[test]
fn causal_prefill_with_its_gradients() -> Result<()> {
    for sizes in [
        (1, 1, 1, 1, 0, 1, 1),
        (2, 2, 2, 5, 0, 8, 8),
        (1, 4, 2, 70, 0, 16, 16),
        (1, 2, 1, 33, 7, 24, 17),
        (2, 6, 2, 20, 3, 9, 12),
    ] {
        is_its_definition(sizes, &shape(sizes.4, sizes.5))?;
    }
    Ok(())
}

#[test]
fn few_rows_with_their_gradients() -> Result<()> {
    for sizes in
        [(3, 4, 4, 1, 70, 16, 16), (1, 4, 2, 2, 5, 8, 20), (1, 4, 1, 1, 130, 33, 7), (2, 2, 2, 4, 0, 4, 4)]
    {
        is_its_definition(sizes, &shape(sizes.4, sizes.5))?;
    }
    Ok(())
}

#[test]
fn packed_texts_see_their_own() -> Result<()> {
    let starts: Vec<u32> =
        [0, 0, 2, 2, 2, 5, 6, 6, 6, 6].into_iter().chain([0; 7]).chain([7, 7, 7]).collect();
    for window in [None, Some(2)] {
        let shape = AttentionShape { starts: Some(starts.clone().into()), window, ..shape(0, 8) };
        is_its_definition((2, 4, 2, 10, 0, 8, 8), &shape)?;
    }
    Ok(())
}

#[test]
fn padding_and_windows() -> Result<()> {
    for (t, past) in [(40, 0), (30, 6), (2, 40), (1, 90)] {
        for window in [None, Some(1), Some(13), Some(1000)] {
            for padding in [None, Some(vec![0, 9]), Some(vec![5, 0])] {
                let padding = padding.map(Arc::from);
                let shape = AttentionShape { padding, window, ..shape(past, 8) };
                is_its_definition((2, 2, 1, t, past, 8, 6), &shape)?;
            }
        }
    }
    Ok(())
}

#[test]
fn without_causality() -> Result<()> {
    let whole = AttentionShape { causal: false, ..shape(0, 8) };
    is_its_definition((2, 2, 2, 30, 0, 8, 8), &whole)?;
    is_its_definition((2, 2, 2, 3, 0, 8, 8), &AttentionShape { padding: Some([2, 1].into()), ..whole })
}

#[test]
fn long_sequences_are_merged_from_chunks() -> Result<()> {
    let (sizes, threads) = ((1, 2, 1, 1, 2500, 8, 8), Threads::new(2));
    let [q, k, v] = inputs(sizes)?;
    let shape = shape(2500, 8);
    let want = reference(&q, &k, &v, &shape)?;
    for_each_isa(|isa| {
        let got = attention(&threads, &q, &k, &v, &shape)?;
        assert!(difference(&got, &want)? < 3e-6, "{isa:?}");
        Ok(())
    })
}

#[test]
fn views_of_a_cache_and_the_number_of_threads_change_no_bit() -> Result<()> {
    for t in [1, 3, 50] {
        let past = 20;
        let q = tensor(1, &[2, t, 4, 16])?.transpose(1, 2)?;
        let k = tensor(2, &[2, 2, 100, 16])?.narrow(2, 0, past + t)?;
        let v = tensor(3, &[2, 2, 100, 8])?.narrow(2, 0, past + t)?;
        let shape = shape(past, 16);
        let views = attention(&Threads::new(1), &q, &k, &v, &shape)?;
        let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
        let (q, k, v) = (Var::from_tensor(&q)?, Var::from_tensor(&k)?, Var::from_tensor(&v)?);
        let run = |threads: usize| {
            let y = attention(&Threads::new(threads), q.as_tensor(), k.as_tensor(), v.as_tensor(), &shape)?;
            Ok::<_, candle_core::Error>((y.sqr()?.sum_all()?.backward()?, y))
        };
        let ((grads, one), (other_grads, three)) = (run(1)?, run(3)?);
        assert_eq!(difference(&views, &one)?, 0.0);
        assert_eq!(difference(&three, &one)?, 0.0);
        for var in [&q, &k, &v] {
            let (a, b) = (grads.get(var).expect("one"), other_grads.get(var).expect("three"));
            assert_eq!(difference(a, b)?, 0.0);
        }
    }
    Ok(())
}

#[test]
fn nan_reaches_the_rows_that_see_it_and_no_others() -> Result<()> {
    for (t, past) in [(30, 0), (2, 28)] {
        let [q, k, v] = inputs((1, 1, 1, t, past, 4, 4))?;
        let mut keys = k.flatten_all()?.to_vec1::<f32>()?;
        keys[29 * 4] = f32::NAN;
        let k = Tensor::from_vec(keys, k.shape(), k.device())?;
        for_each_isa(|isa| {
            let y = attention(&Threads::new(1), &q, &k, &v, &shape(past, 4))?;
            let y = y.squeeze(0)?.to_vec2::<f32>()?;
            let (last, rest) = y.split_last().expect("rows");
            assert!(last.iter().all(|x| x.is_nan()), "{last:?}, {isa:?}");
            assert!(rest.iter().flatten().all(|x| x.is_finite()), "{isa:?}");
            Ok::<(), candle_core::Error>(())
        })?;
    }
    Ok(())
}

#[test]
fn nothing_to_see_is_zero_and_empty_inputs_are_empty() -> Result<()> {
    let threads = Threads::new(1);
    let [q, k, v] = inputs((1, 2, 2, 9, 0, 4, 4))?;
    let blind = AttentionShape { causal: false, padding: Some([9].into()), ..shape(0, 4) };
    let q_var = Var::from_tensor(&q)?;
    let y = attention(&threads, q_var.as_tensor(), &k, &v, &blind)?;
    assert_eq!(y.abs()?.sum_all()?.to_scalar::<f32>()?, 0.0);
    let dq = y.sum_all()?.backward()?.remove(&q_var).expect("a gradient");
    assert_eq!(dq.abs()?.sum_all()?.to_scalar::<f32>()?, 0.0);
    let none = q.narrow(2, 0, 0)?;
    assert_eq!(attention(&threads, &none, &k, &v, &shape(9, 4))?.dims(), [1, 0, 8]);
    let whole = AttentionShape { causal: false, ..shape(0, 4) };
    for t in [9, 1] {
        let y = attention(&threads, &q.narrow(2, 0, t)?, &k.narrow(2, 0, 0)?, &v.narrow(2, 0, 0)?, &whole)?;
        assert_eq!(y.abs()?.sum_all()?.to_scalar::<f32>()?, 0.0);
    }
    assert!(attention(&threads, &q, &k, &v.narrow(3, 0, 0)?, &whole).is_err());
    Ok(())
}

#[test]
fn what_does_not_fit_is_an_error() -> Result<()> {
    let threads = Threads::new(1);
    let [q, k, v] = inputs((2, 3, 3, 4, 2, 8, 8))?;
    let good = shape(2, 8);
    let fails = |q: &Tensor, k: &Tensor, v: &Tensor, shape: &AttentionShape| {
        attention(&threads, q, k, v, shape).is_err()
    };
    assert!(!fails(&q, &k, &v, &good));
    assert!(fails(&q, &k, &v, &AttentionShape { past: 3, ..good.clone() }));
    assert!(fails(&q, &k, &v, &AttentionShape { past: usize::MAX, ..good.clone() }));
    assert!(fails(&q, &k, &v, &AttentionShape { window: Some(0), ..good.clone() }));
    assert!(fails(&q, &k, &v, &AttentionShape { causal: false, ..good.clone() }));
    assert!(fails(&q, &k, &v, &AttentionShape { padding: Some([1].into()), ..good.clone() }));
    assert!(fails(&q.narrow(3, 0, 7)?, &k, &v, &good));
    assert!(fails(&q.narrow(1, 0, 2)?, &k, &v, &good));
    assert!(fails(&q, &k.narrow(2, 0, 5)?, &v, &good));
    assert!(fails(&q, &k, &v.narrow(0, 0, 1)?, &good));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn random_shapes(
        (b, hkv, group, t) in (1..3usize, 1..3usize, 1..4usize, 1..90usize),
        (past, dk, dv) in (0..70usize, 1..40usize, 1..40usize),
        window in proptest::option::of(1..100usize),
        pad in proptest::option::of(0..60usize),
    ) {
        let padding = pad.map(|p| (0..b).map(|i| (p * (i + 1)) % (past + t + 1)).collect());
        let shape = AttentionShape { window, padding, ..shape(past, dk) };
        let [q, k, v] = inputs((b, hkv * group, hkv, t, past, dk, dv)).expect("inputs");
        let (threads, want) = (Threads::new(2), reference(&q, &k, &v, &shape).expect("reference"));
        for_each_isa(|isa| {
            let got = attention(&threads, &q, &k, &v, &shape).expect("attention");
            let off = difference(&got, &want).expect("difference");
            prop_assert!(off < 5e-6, "values differ by {off} of the range, {isa:?}");
            Ok(())
        })?;
    }
}
