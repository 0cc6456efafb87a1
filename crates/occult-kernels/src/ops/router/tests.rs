use candle_core::{D, Device, Var};

use super::*;
use crate::ops::check::{difference, finite_differences, op_is, tensor};

fn selection(top_k: usize) -> Selection {
    Selection { top_k, groups: None, bias: None }
}

fn near(got: &Tensor, want: f64) -> Result<()> {
    let got = f64::from(got.to_scalar::<f32>()?);
    assert!((got - want).abs() < 1e-6 * want.abs().max(1.0), "{got}, not {want}");
    Ok(())
}

#[test]
fn scores_are_their_definition_with_their_gradients() -> Result<()> {
    for dims in [[1, 1], [3, 5], [7, 64], [2, 130]] {
        let inputs = [(tensor(1, &dims)? * 4.0)?];
        let softmax = |t: &[Tensor]| {
            let e = t[0].exp()?;
            e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
        };
        op_is(&|t| router_scores(&t[0], Scoring::Softmax), &softmax, &inputs, 2e-6)?;
        let sigmoid = |t: &[Tensor]| t[0].exp()? / (t[0].exp()? + 1.0)?;
        op_is(&|t| router_scores(&t[0], Scoring::Sigmoid), &sigmoid, &inputs, 2e-6)?;
    }
    Ok(())
}

#[test]
fn the_best_are_chosen_and_equal_scores_go_to_the_lower_id() -> Result<()> {
    let scores = [0.1, 0.4, 0.1, 0.2, 0.4, 0.0];
    assert_eq!(select_experts(&scores, 6, &selection(4))?, [1, 4, 3, 0]);
    assert_eq!(select_experts(&scores, 6, &selection(6))?, [1, 4, 3, 0, 2, 5]);
    assert_eq!(select_experts(&scores, 3, &selection(1))?, [1, 1]);
    let bias = Selection { bias: Some([0.0, -1.0, 0.0, 0.0, 0.0, 1.0].into()), ..selection(2) };
    assert_eq!(select_experts(&scores, 6, &bias)?, [5, 4]);
    Ok(())
}

#[test]
fn groups_limit_the_choice() -> Result<()> {
    let scores = [0.3, 0.0, 0.2, 0.19, 0.1, 0.11];
    let groups = |score, top_groups| Selection {
        groups: Some(Groups { num_groups: 3, top_groups, score }),
        ..selection(2)
    };
    assert_eq!(select_experts(&scores, 6, &groups(GroupScore::Best, 1))?, [0, 1]);
    assert_eq!(select_experts(&scores, 6, &groups(GroupScore::BestTwo, 1))?, [2, 3]);
    assert_eq!(select_experts(&scores, 6, &groups(GroupScore::Best, 2))?, [0, 2]);
    Ok(())
}

#[test]
fn choices_that_cannot_be_are_errors() {
    let scores = [0.5, 0.5, f32::NAN, 0.5];
    assert!(select_experts(&scores, 4, &selection(1)).is_err());
    assert!(select_experts(&scores[..2], 2, &selection(3)).is_err());
    assert!(select_experts(&scores[..2], 2, &selection(0)).is_err());
    assert!(select_experts(&scores[..2], 0, &selection(1)).is_err());
    assert!(select_experts(&scores[..1], 2, &selection(1)).is_err());
    let bias = Selection { bias: Some([0.0].into()), ..selection(1) };
    assert!(select_experts(&scores[..2], 2, &bias).is_err());
    let groups = Some(Groups { num_groups: 2, top_groups: 1, score: GroupScore::Best });
    assert!(select_experts(&scores[..2], 2, &Selection { groups, ..selection(2) }).is_err());
}

#[test]
fn weights_are_their_definition_with_their_gradient() -> Result<()> {
    let ids = [4, 0, 2, 2, 1, 3];
    for norm_topk in [false, true] {
        let how = TopkWeights { top_k: 3, norm_topk, scale: 2.5 };
        let inputs = [(tensor(1, &[2, 5])? + 1.2)?];
        op_is(&|t| routing_weights(&t[0], &ids, how), &|t| reference(&t[0], &ids, how), &inputs, 2e-6)?;
    }
    Ok(())
}

#[test]
fn absent_places_weigh_nothing() -> Result<()> {
    let how = TopkWeights { top_k: 3, norm_topk: true, scale: 1.0 };
    let scores = Var::new(&[[0.1f32, 0.3, 0.2], [0.0, 0.0, 0.0]], &Device::Cpu)?;
    let ids = [1, ABSENT, 0, 0, 1, 2];
    let w = routing_weights(scores.as_tensor(), &ids, how)?;
    let want = Tensor::new(&[[0.75f32, 0.0, 0.25], [0.0, 0.0, 0.0]], &Device::Cpu)?;
    assert!(difference(&w, &want)? < 1e-6);
    let probe = tensor(5, &[1, 3])?;
    let first = |t: &[Tensor]| routing_weights(&t[0], &ids[..3], how);
    let row = Var::from_tensor(&scores.narrow(0, 0, 1)?.contiguous()?)?;
    let grads = (first(&[row.as_tensor().clone()])? * &probe)?.sum_all()?.backward()?;
    let dims = [row.as_tensor().detach()];
    finite_differences(&first, &dims, 0, &probe, grads.get(&row).expect("a gradient"))?;
    assert!(routing_weights(scores.as_tensor(), &[3; 6], how).is_err());
    assert!(routing_weights(scores.as_tensor(), &[0; 5], how).is_err());
    Ok(())
}

#[test]
fn a_route_is_scores_choice_and_weights() -> Result<()> {
    let rule = RouterRule { scoring: Scoring::Softmax, selection: selection(2), norm_topk: true, scale: 1.0 };
    let logits = Tensor::new(&[[0f32, 3f32.ln(), 0.0], [2f32.ln(), 0.0, 0.0]], &Device::Cpu)?;
    let routed = route(&logits, &rule)?;
    assert_eq!(routed.expert_ids, [1, 0, 0, 1]);
    let scores = Tensor::new(&[[0.2f32, 0.6, 0.2], [0.5, 0.25, 0.25]], &Device::Cpu)?;
    assert!(difference(&routed.scores, &scores)? < 1e-6);
    let weights = Tensor::new(&[[0.75f32, 0.25], [2.0 / 3.0, 1.0 / 3.0]], &Device::Cpu)?;
    assert!(difference(&routed.weights, &weights)? < 1e-6);
    Ok(())
}

/// Two layers of two tokens and three experts, two chosen.
fn layers() -> Result<([Tensor; 2], [[u32; 4]; 2])> {
    let a = Tensor::new(&[[0.5f32, 0.3, 0.2], [0.1, 0.2, 0.7]], &Device::Cpu)?;
    let b = Tensor::new(&[[0.6f32, 0.2, 0.2], [0.4, 0.5, 0.1]], &Device::Cpu)?;
    Ok(([a, b], [[0, 1, 2, 1], [0, 1, 1, 0]]))
}

#[test]
fn load_balancing_loss_is_that_of_transformers() -> Result<()> {
    let (scores, ids) = layers()?;
    let ids: Vec<&[u32]> = ids.iter().map(|ids| &ids[..]).collect();
    // Chosen 3, 4 and 1 times by 4 (layer, token) rows; mean scores 0.4, 0.3, 0.3.
    let want = 3.0 * (0.75 * 0.4 + 1.0 * 0.3 + 0.25 * 0.3);
    near(&load_balancing_loss(&scores, &ids, 2, None)?, want)?;
    // Only the second token: chosen 1, 2, 1 times in 2 rows; means 0.25, 0.35, 0.4.
    let want = 3.0 * (0.5 * 0.25 + 1.0 * 0.35 + 0.5 * 0.4);
    near(&load_balancing_loss(&scores, &ids, 2, Some(&[false, true]))?, want)?;
    near(&load_balancing_loss(&scores, &ids, 2, Some(&[false, false]))?, 0.0)?;
    assert!(load_balancing_loss(&scores, &ids[..1], 2, None).is_err());
    assert!(load_balancing_loss(&scores, &ids, 1, None).is_err());
    assert!(load_balancing_loss(&scores, &ids, 2, Some(&[true])).is_err());
    Ok(())
}

#[test]
fn deepseeks_losses_are_its_formulas() -> Result<()> {
    let ([a, b], [ids_a, ids_b]) = layers()?;
    // Shares of 4 choices times 3 experts: 0.75, 1.5, 0.75; mean scores 0.3, 0.25, 0.45.
    near(&expert_balance_loss(&a, &ids_a, 2, None)?, 0.75 * 0.3 + 1.5 * 0.25 + 0.75 * 0.45)?;
    // The two layers as two sequences of two tokens. Second: 1.5, 1.5, 0; means 0.5, 0.35, 0.15.
    let (scores, ids) = (Tensor::cat(&[&a, &b], 0)?, [ids_a, ids_b].concat());
    let (first, second) = (0.75 * 0.3 + 1.5 * 0.25 + 0.75 * 0.45, 1.5 * 0.5 + 1.5 * 0.35);
    near(&sequence_balance_loss(&scores, &ids, 2, 2, None)?, (first + second) / 2.0)?;
    // Without the second token of the first sequence: 1.5, 1.5, 0 with 0.5, 0.3, 0.2.
    let mask = [true, false, true, true];
    near(&sequence_balance_loss(&scores, &ids, 2, 2, Some(&mask))?, (1.5 * 0.8 + second) / 2.0)?;
    let mask = [false, false, true, true];
    near(&sequence_balance_loss(&scores, &ids, 2, 2, Some(&mask))?, second)?;
    assert!(sequence_balance_loss(&scores, &ids, 2, 3, None).is_err());
    Ok(())
}

#[test]
fn z_loss_is_the_mean_square_of_the_log_sums() -> Result<()> {
    let logits = Tensor::new(&[[0f32, 0.0], [3f32.ln(), 0.0]], &Device::Cpu)?;
    let (a, b) = (2f64.ln().powi(2), 4f64.ln().powi(2));
    near(&router_z_loss(&logits, None)?, (a + b) / 2.0)?;
    near(&router_z_loss(&logits, Some(&[false, true]))?, b)?;
    near(&router_z_loss(&logits, Some(&[false, false]))?, 0.0)?;
    assert!(router_z_loss(&logits, Some(&[true])).is_err());
    Ok(())
}

#[test]
fn losses_have_the_slopes_they_say() -> Result<()> {
    let logits = Var::from_tensor(&(tensor(1, &[6, 5])? * 2.0)?)?;
    let ids: Vec<u32> = (0..12).map(|i| (i * 3 % 5) as u32).collect();
    let mask = [true, true, false, true, true, true];
    let losses: [&dyn Fn(&[Tensor]) -> Result<Tensor>; 4] = [
        &|t| {
            let scores = router_scores(&t[0], Scoring::Softmax)?;
            load_balancing_loss(&[scores.clone(), scores], &[&ids, &ids], 2, Some(&mask))
        },
        &|t| expert_balance_loss(&router_scores(&t[0], Scoring::Softmax)?, &ids, 2, None),
        &|t| sequence_balance_loss(&router_scores(&t[0], Scoring::Softmax)?, &ids, 2, 2, Some(&mask)),
        &|t| router_z_loss(&t[0], Some(&mask)),
    ];
    let probe = Tensor::new(7f32, &Device::Cpu)?;
    for loss in losses {
        let grads = (loss(&[logits.as_tensor().clone()])? * &probe)?.backward()?;
        let gradient = grads.get(&logits).expect("a gradient");
        finite_differences(loss, &[logits.as_tensor().detach()], 0, &probe, gradient)?;
        assert!(gradient.abs()?.sum_all()?.to_scalar::<f32>()? > 0.01);
    }
    Ok(())
}

#[test]
fn grouping_turns_a_routing_around() -> Result<()> {
    let ids = [2, 0, ABSENT, 2, 0, 3];
    let grouped = Grouped::new(&ids, 2, 4)?;
    assert_eq!(grouped.rows.expert_offsets(), [0, 2, 2, 4, 5]);
    assert_eq!(grouped.rows.row_idx(), [0, 2, 0, 1, 2]);
    assert_eq!(grouped.slots, [1, 4, 0, 3, 5]);
    let weights = Tensor::new(&[[0f32, 1.0], [2.0, 3.0], [4.0, 5.0]], &Device::Cpu)?;
    assert_eq!(grouped.row_weights(&weights)?.to_vec1::<f32>()?, [1.0, 4.0, 0.0, 3.0, 5.0]);
    assert!(Grouped::new(&[1, 1], 2, 4).is_err());
    assert!(Grouped::new(&[1, 4], 2, 4).is_err());
    assert!(Grouped::new(&[1, 2, 3], 2, 4).is_err());
    assert!(Grouped::new(&[], 0, 4).is_err());
    assert_eq!(Grouped::new(&[], 2, 4)?.rows.num_expanded(), 0);
    Ok(())
}
