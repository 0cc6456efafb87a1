use std::sync::Arc;

use candle_core::{DType, Result, Tensor, Var};

use super::*;
use crate::ops::check::{difference, op_is, tensor};

/// Expert i works on the rows r with `(r * 7 + i * 3) % every < keep`.
fn sparse(num_rows: usize, experts: usize, every: usize, keep: usize) -> Arc<SparseRows> {
    let mut offsets = vec![0];
    let mut idx: Vec<u32> = Vec::new();
    for e in 0..experts {
        idx.extend((0..num_rows).filter(|r| (r * 7 + e * 3) % every < keep).map(|r| r as u32));
        offsets.push(idx.len() as u32);
    }
    Arc::new(SparseRows::new(num_rows, offsets, idx).expect("sparse rows"))
}

const CASES: [(usize, usize, usize, usize, usize, usize); 4] =
    // rows, experts, one of `every` rows: keep, D, F
    [(1, 1, 1, 1, 1, 1), (7, 3, 4, 2, 5, 3), (12, 5, 11, 1, 16, 8), (33, 4, 3, 2, 40, 19)];

#[test]
fn scattering_is_its_definition_with_its_gradients() -> Result<()> {
    let threads = Threads::new(2);
    for (r, e, every, keep, d, f) in CASES {
        let rows = sparse(r, e, every, keep);
        let inputs = [tensor(1, &[r, d])?, tensor(2, &[e, 2 * f, d])?];
        op_is(
            &|t| scattering_smm(&threads, &rows, &t[0], &t[1]),
            &|t| scattering_reference(&rows, &t[0], &t[1]),
            &inputs,
            2e-6,
        )?;
    }
    Ok(())
}

#[test]
fn merging_is_its_definition_with_its_gradients() -> Result<()> {
    let threads = Threads::new(2);
    for (r, e, every, keep, d, f) in CASES {
        let rows = sparse(r, e, every, keep);
        let n = rows.num_expanded();
        let inputs = [tensor(1, &[n, 2 * f])?, tensor(2, &[e, d, f])?, tensor(3, &[n])?];
        op_is(
            &|t| merging_smm(&threads, &rows, &t[0], &t[1], &t[2]),
            &|t| merging_reference(&rows, &t[0], &t[1], &t[2]),
            &inputs,
            2e-6,
        )?;
    }
    Ok(())
}

#[test]
fn the_two_in_a_row_with_half_weights_and_sinks() -> Result<()> {
    let threads = Threads::new(2);
    let (r, e, d, f) = (9, 3, 24, 10);
    let rows = sparse(r, e, 3, 2);
    let x = Var::from_tensor(&tensor(1, &[r, d])?)?;
    let scale = Var::from_tensor(&tensor(4, &[rows.num_expanded()])?)?;
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        let up = Var::from_tensor(&tensor(2, &[e, 2 * f, d])?.to_dtype(dtype)?)?;
        let down = Var::from_tensor(&tensor(3, &[e, d, f])?.to_dtype(dtype)?)?;
        let (wide_up, wide_down) =
            (Var::from_tensor(&up.to_dtype(DType::F32)?)?, Var::from_tensor(&down.to_dtype(DType::F32)?)?);
        let want = merging_reference(
            &rows,
            &scattering_reference(&rows, x.as_tensor(), wide_up.as_tensor())?,
            wide_down.as_tensor(),
            scale.as_tensor(),
        )?;
        let (to_up, to_down) = (GradSink::new(), GradSink::new());
        let layer = |sinks: bool| -> Result<Tensor> {
            let (x, up, down, scale) = (x.as_tensor(), up.as_tensor(), down.as_tensor(), scale.as_tensor());
            if sinks {
                let pre = scattering_smm_into(&threads, &rows, x, up, &to_up)?;
                merging_smm_into(&threads, &rows, &pre, down, scale, &to_down)
            } else {
                let pre = scattering_smm(&threads, &rows, x, up)?;
                merging_smm(&threads, &rows, &pre, down, scale)
            }
        };
        assert!(difference(&layer(false)?, &want)? < 2e-6);
        let plain = want.sqr()?.sum_all()?.backward()?;
        let ours = layer(false)?.sqr()?.sum_all()?.backward()?;
        assert_eq!(ours.get(&up).expect("a gradient").dtype(), dtype);
        // Two passes add up in the sinks.
        layer(true)?.sqr()?.sum_all()?.backward()?;
        let ours = layer(true)?.sqr()?.sum_all()?.backward()?;
        assert!(ours.get(&up).is_none() && ours.get(&down).is_none());
        for var in [&x, &scale] {
            assert!(difference(ours.get(var).expect("ours"), plain.get(var).expect("plain"))? < 1e-5);
        }
        for (sink, var) in [(to_up, &wide_up), (to_down, &wide_down)] {
            let got = (sink.take(var.shape())?.expect("a gradient") / 2.0)?;
            assert!(difference(&got, plain.get(var).expect("plain"))? < 1e-5);
        }
    }
    Ok(())
}

#[test]
fn no_rows_and_wrong_shapes() -> Result<()> {
    let threads = Threads::new(1);
    let none = Arc::new(SparseRows::new(3, vec![0, 0, 0], vec![]).expect("sparse rows"));
    let (x, up) = (Var::from_tensor(&tensor(1, &[3, 4])?)?, tensor(2, &[2, 6, 4])?);
    let pre = scattering_smm(&threads, &none, x.as_tensor(), &up)?;
    assert_eq!(pre.dims(), [0, 6]);
    let (down, scale) = (tensor(3, &[2, 4, 3])?, tensor(4, &[0])?);
    let y = merging_smm(&threads, &none, &pre, &down, &scale)?;
    assert_eq!(y.to_vec2::<f32>()?, vec![vec![0.0; 4]; 3]);
    let dx = y.sum_all()?.backward()?.remove(&x).expect("a gradient");
    assert_eq!(dx.to_vec2::<f32>()?, vec![vec![0.0; 4]; 3]);

    let x = x.as_tensor();
    assert!(scattering_smm(&threads, &none, &x.narrow(0, 0, 2)?, &up).is_err());
    assert!(scattering_smm(&threads, &none, x, &up.narrow(0, 0, 1)?).is_err());
    assert!(scattering_smm(&threads, &none, x, &up.narrow(1, 0, 5)?).is_err());
    assert!(scattering_smm(&threads, &none, x, &up.narrow(2, 0, 3)?).is_err());
    assert!(merging_smm(&threads, &none, &pre, &down, &tensor(4, &[1])?).is_err());
    assert!(merging_smm(&threads, &none, &pre, &down.narrow(2, 0, 2)?, &scale).is_err());
    Ok(())
}
