use candle_core::{DType, Var};

use super::*;
use crate::ops::check::{SPECIALS, difference, op_is, specials_go_as_in, tensor};
use crate::ops::linear;

const OPTIONS: [CrossEntropy; 3] = [
    CrossEntropy { ignore: None, z_loss: 0.0 },
    CrossEntropy { ignore: Some(3), z_loss: 0.0 },
    CrossEntropy { ignore: Some(3), z_loss: 0.05 },
];

fn targets(rows: usize, vocab: usize) -> Vec<u32> {
    (0..rows).map(|i| ((i * 7 + 1) % vocab) as u32).collect()
}

#[test]
fn from_logits_is_its_definition_with_its_gradient() -> Result<()> {
    let threads = Threads::new(2);
    for options in OPTIONS {
        for (rows, vocab) in [(1, 5), (4, 9), (21, 150)] {
            let targets = targets(rows, vocab);
            op_is(
                &|t| Ok(cross_entropy(&threads, &t[0], &targets, options)?.loss),
                &|t| reference(&t[0], &targets, options),
                &[(tensor(1, &[rows, vocab])? * 3.0)?],
                2e-6,
            )?;
        }
    }
    Ok(())
}

#[test]
fn fused_is_its_definition_with_its_gradients() -> Result<()> {
    let threads = Threads::new(2);
    for options in OPTIONS {
        for (rows, vocab, d) in [(1, 5, 3), (9, 11, 4), (70, 40, 16)] {
            let targets = targets(rows, vocab);
            op_is(
                &|t| Ok(linear_cross_entropy(&threads, &t[0], &t[1], &targets, options)?.loss),
                &|t| reference(&linear::reference(&t[0], &t[1])?, &targets, options),
                &[(tensor(1, &[rows, d])? * 2.0)?, tensor(2, &[vocab, d])?],
                2e-6,
            )?;
        }
    }
    Ok(())
}

#[test]
fn nan_and_infinity_go_where_the_definition_sends_them() -> Result<()> {
    let threads = Threads::new(2);
    for options in OPTIONS {
        // The last row of the first is ignored by some options.
        for (rows, vocab) in [(2, 5), (3, 150)] {
            let targets = targets(rows, vocab);
            specials_go_as_in(
                &|t| Ok(cross_entropy(&threads, &t[0], &targets, options)?.loss),
                &|t| reference(&t[0], &targets, options),
                &[tensor(1, &[rows, vocab])?],
                &SPECIALS,
            )?;
        }
        // No row is ignored: the definition multiplies such a row with a gradient of zero, which may be NaN.
        for (rows, vocab, d) in [(1, 5, 3), (3, 150, 4)] {
            let targets = targets(rows, vocab);
            specials_go_as_in(
                &|t| Ok(linear_cross_entropy(&threads, &t[0], &t[1], &targets, options)?.loss),
                &|t| reference(&linear::reference(&t[0], &t[1])?, &targets, options),
                &[tensor(1, &[rows, d])?, tensor(2, &[vocab, d])?],
                &SPECIALS[..3],
            )?;
        }
    }
    Ok(())
}

#[test]
fn many_chunks_half_weights_sinks_and_a_second_pass() -> Result<()> {
    // A vocabulary of which only 32 rows of logits fit into a chunk.
    let (rows, vocab, d) = (70, 1 << 18, 2);
    let threads = Threads::new(2);
    let x = Var::from_tensor(&tensor(1, &[rows, d])?)?;
    let w = Var::from_tensor(&tensor(2, &[vocab, d])?.to_dtype(DType::BF16)?)?;
    let wide = Var::from_tensor(&w.to_dtype(DType::F32)?)?;
    let (targets, options) = (targets(rows, vocab), CrossEntropy { ignore: Some(8), z_loss: 1e-3 });
    let want = reference(&linear::reference(x.as_tensor(), wide.as_tensor())?, &targets, options)?;
    let plain = (want.clone() * 0.5)?.backward()?;
    let sink = GradSink::new();
    let got = linear_cross_entropy_into(&threads, x.as_tensor(), w.as_tensor(), &targets, options, &sink)?;
    assert_eq!(got.count, rows - 1);
    assert!(difference(&got.loss, &want)? < 1e-5);
    for _ in 0..2 {
        let ours = (got.loss.clone() * 0.5)?.backward()?;
        assert!(ours.get(&w).is_none());
        let off = difference(ours.get(&x).expect("ours"), plain.get(&x).expect("plain"))?;
        assert!(off < 1e-4, "{off}");
        let dw = sink.take(w.shape())?.expect("a gradient");
        let off = difference(&dw, plain.get(&wide).expect("plain"))?;
        assert!(off < 1e-4, "{off}");
    }
    Ok(())
}

#[test]
fn nothing_counted_is_zero() -> Result<()> {
    let (threads, options) = (Threads::new(1), CrossEntropy { ignore: Some(0), z_loss: 0.1 });
    let x = Var::from_tensor(&tensor(1, &[3, 4])?)?;
    let w = tensor(2, &[5, 4])?;
    for loss in [
        cross_entropy(&threads, x.as_tensor(), &[0; 3], options)?,
        linear_cross_entropy(&threads, x.as_tensor(), &w, &[0; 3], options)?,
    ] {
        assert_eq!((loss.count, loss.loss.to_scalar::<f32>()?), (0, 0.0));
        let dx = loss.loss.backward()?.remove(&x).expect("a gradient");
        assert_eq!(dx.abs()?.sum_all()?.to_scalar::<f32>()?, 0.0);
    }
    Ok(())
}

#[test]
fn targets_and_shapes_that_do_not_fit_are_errors() -> Result<()> {
    let (threads, options) = (Threads::new(1), CrossEntropy::default());
    let (x, w) = (tensor(1, &[3, 4])?, tensor(2, &[5, 4])?);
    assert!(cross_entropy(&threads, &x, &[0, 3, 4], options).is_err());
    assert!(cross_entropy(&threads, &x, &[0, 1], options).is_err());
    assert!(linear_cross_entropy(&threads, &x, &w, &[0, 4, 5], options).is_err());
    assert!(linear_cross_entropy(&threads, &x, &w, &[0], options).is_err());
    assert!(linear_cross_entropy(&threads, &x, &w.t()?, &[0; 3], options).is_err());
    assert!(linear_cross_entropy(&threads, &x.narrow(1, 0, 0)?, &w.narrow(1, 0, 0)?, &[], options).is_err());
    Ok(())
}
