//! Losses and gradients of transformers, and what must not change them: recomputing, packing, freezing, writing back.

mod common;

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use common::{Reference, dir};
use occult_model::hf::{ExpertLayout, TrainingDefaults};
use occult_model::{
    Batch, Decoder, IGNORE, LoadOptions, Logits, ModelFiles, ModelParameters, ParameterKind, StoredDtype,
    Threads, TrainBatch, TrainOptions, TrainOutput,
};

/// The cases of `fixtures/make_gradients.py`.
const CASES: [&str; 3] = ["olmoe", "qwen2_moe-norm-tied-window", "deepseek_v2-lite"];

type Gradients = HashMap<String, Tensor>;

fn files(case: &str) -> ModelFiles {
    let options = LoadOptions { threads: Some(Threads::new(2)), dtype: None };
    ModelFiles::open(&dir(case), options).expect(case)
}

fn all(case: &str) -> ModelParameters {
    ModelParameters::read(&files(case), None, &|_, _| true).expect(case)
}

/// Ids and next tokens of sequences of equal length, side by side.
fn targets(sequences: &[Vec<u32>]) -> (Vec<u32>, Vec<u32>) {
    let next = |s: &Vec<u32>| s[1..].iter().copied().chain([IGNORE]).collect::<Vec<_>>();
    (sequences.concat(), sequences.iter().flat_map(next).collect())
}

/// Mean loss and gradients.
fn step(
    parameters: &ModelParameters,
    model: &Decoder,
    batch: TrainBatch<'_>,
    options: TrainOptions,
    more: &dyn Fn(&TrainOutput) -> Option<Tensor>,
) -> (f32, Gradients) {
    let out = model.forward_train(batch, options).expect("forward");
    let mut loss = (&out.loss / out.num_targets as f64).expect("mean");
    if let Some(more) = more(&out) {
        loss = (loss + more).expect("sum");
    }
    let value = loss.to_scalar::<f32>().expect("scalar");
    parameters.accumulate(&loss.backward().expect("backward")).expect("accumulate");
    let take =
        |p: &occult_model::Parameter| p.take_gradient().expect("gradient").map(|g| (p.name().to_owned(), g));
    (value, parameters.iter().filter_map(take).collect())
}

/// Largest difference relative to the largest value.
fn relative(got: &Tensor, want: &Tensor) -> f32 {
    assert_eq!(got.dims(), want.dims());
    let max = |t: Tensor| t.abs().and_then(|t| t.flatten_all()?.max(0)?.to_scalar::<f32>()).expect("max");
    let sum = got.sum_all().and_then(|t| t.to_scalar::<f32>()).expect("sum");
    assert!(sum.is_finite(), "a gradient is {sum}");
    max((got - want).expect("difference")) / max(want.clone())
}

fn close(got: &Gradients, want: &Gradients, limit: f32) {
    let mut worst = ("", 0f32);
    assert_eq!(got.len(), want.len(), "how many parameters have gradients");
    for (name, want) in want {
        let off = relative(got.get(name).unwrap_or_else(|| panic!("{name} has no gradient")), want);
        assert!(off <= limit, "{name}: off by {off:.1e}");
        if off >= worst.1 {
            worst = (name, off);
        }
    }
    println!("worst: {} with {:.1e}", worst.0, worst.1);
}

#[test]
fn losses_and_gradients_are_those_of_transformers() {
    for case in CASES {
        let stored = candle_core::safetensors::load(dir(case).join("gradients.safetensors"), &Device::Cpu)
            .expect("reference");
        let scalar = |name: &str| Some(stored.get(name)?.to_vec1::<f32>().expect(name)[0]);
        let want: Gradients = stored
            .iter()
            .filter_map(|(k, v)| Some((k.strip_prefix("grad.")?.to_owned(), v.clone())))
            .collect();
        let sequences = Reference::of(case).sequences();
        let (tokens, targets) = targets(&sequences);
        let batch =
            TrainBatch { num_sequences: sequences.len(), tokens: &tokens, targets: &targets, segments: None };
        let defaults = TrainingDefaults::read(&dir(case)).expect("defaults");
        for recompute in [false, true] {
            let parameters = all(case);
            let model = parameters.decoder().expect(case);
            let balance = |out: &TrainOutput| {
                let want = scalar("aux_loss")?;
                let loss = out.balance_loss(defaults.balance, sequences.len(), None).expect("balance");
                let got = loss.to_scalar::<f32>().expect("scalar");
                assert!((got - want).abs() < 1e-4 * want, "balance loss {got} for {want}");
                Some((loss * defaults.balance_coefficient).expect("scaled"))
            };
            let options = TrainOptions { recompute, ..TrainOptions::default() };
            let (loss, got) = step(&parameters, &model, batch, options, &balance);
            let wanted = scalar("loss").expect("loss");
            assert!((loss - wanted).abs() < 1e-5 * wanted, "{case}: loss {loss} for {wanted}");
            print!("{case}, recompute {recompute}: ");
            close(&got, &want, 1e-3);
        }
    }
}

#[test]
fn packed_texts_are_the_texts_by_themselves() {
    for case in CASES {
        let sequences = Reference::of(case).sequences();
        let parameters = all(case);
        let model = parameters.decoder().expect(case);
        let options = TrainOptions::default();
        let texts = [&sequences[0][..9], &sequences[1][..11], &sequences[0][9..13]].map(<[u32]>::to_vec);
        let packed = texts.concat();
        let next: Vec<u32> = texts.iter().flat_map(|t| targets(std::slice::from_ref(t)).1).collect();
        let segments: Vec<u32> =
            texts.iter().enumerate().flat_map(|(i, t)| vec![i as u32 * 3; t.len()]).collect();
        let batch =
            TrainBatch { num_sequences: 1, tokens: &packed, targets: &next, segments: Some(&segments) };
        let (loss, got) = step(&parameters, &model, batch, options, &|_| None);

        let mut sum = 0.0;
        let count = next.iter().filter(|&&t| t != IGNORE).count() as f32;
        for text in &texts {
            let (tokens, targets) = targets(std::slice::from_ref(text));
            let batch = TrainBatch { num_sequences: 1, tokens: &tokens, targets: &targets, segments: None };
            let out = model.forward_train(batch, options).expect("forward");
            sum += out.loss.to_scalar::<f32>().expect("scalar") / count;
            let loss = (out.loss / f64::from(count)).expect("part of the mean");
            parameters.accumulate(&loss.backward().expect("backward")).expect("accumulate");
        }
        assert!((loss - sum).abs() < 1e-5 * sum, "{case}: loss {loss} for {sum}");
        let want = parameters
            .iter()
            .filter_map(|p| p.take_gradient().expect("gradient").map(|g| (p.name().to_owned(), g)))
            .collect();
        close(&got, &want, 1e-4);
    }
}

#[test]
fn frozen_parameters_get_no_gradients_and_the_others_the_same() {
    let case = "qwen2_moe-norm-tied-window";
    let sequences = Reference::of(case).sequences();
    let (tokens, targets) = targets(&sequences);
    let batch = TrainBatch { num_sequences: 2, tokens: &tokens, targets: &targets, segments: None };
    let whole = all(case);
    let model = whole.decoder().expect(case);
    let (_, want) = step(&whole, &model, batch, TrainOptions::default(), &|_| None);
    for recompute in [false, true] {
        let only_experts = |_: &str, kind: ParameterKind| matches!(kind, ParameterKind::Experts { .. });
        let parameters = ModelParameters::read(&files(case), None, &only_experts).expect(case);
        let model = parameters.decoder().expect(case);
        let options = TrainOptions { recompute, ..TrainOptions::default() };
        let (_, got) = step(&parameters, &model, batch, options, &|_| None);
        let want: Gradients = want
            .iter()
            .filter(|(n, _)| n.contains(".experts."))
            .map(|(n, g)| (n.clone(), g.clone()))
            .collect();
        assert!(!want.is_empty());
        close(&got, &want, 1e-4);
    }
}

#[test]
fn parameters_written_back_are_the_checkpoint() {
    for case in CASES {
        let parameters = all(case);
        for layout in [ExpertLayout::PerExpert, ExpertLayout::Fused] {
            let to = tempfile::tempdir().expect("directory");
            std::fs::copy(dir(case).join("config.json"), to.path().join("config.json")).expect("copy");
            parameters.write(to.path(), layout, StoredDtype::F32).expect("write");
            let batch = Batch::new(&Reference::of(case).sequences()).expect("batch");
            let run = |model: Decoder| {
                common::values(&model.forward(&batch, None, Logits::All, None).expect("forward"))
            };
            let (before, after) = (run(common::load(case)), run(common::load_dir(to.path())));
            assert_eq!(before, after, "{case}");
            // The variables themselves compute the same, up to the order of sums in the fused network.
            let trained = run(parameters.decoder().expect(case));
            assert!(common::difference(&trained, &before) < common::LIMIT);
        }
    }
}

#[test]
fn random_weights_do_not_depend_on_which_experts_are_held() {
    let spec = files("olmoe").spec().clone();
    let threads = Threads::new(1);
    let make = |held: Option<&dyn Fn(usize) -> Vec<usize>>| {
        ModelParameters::random(&spec, &threads, 5, 0.02, held, &|_, _| true).expect("random")
    };
    let (whole, part) = (make(None), make(Some(&|layer| vec![layer, 7])));
    assert_eq!(part.experts_of(1), [1, 7]);
    let values = |p: &ModelParameters, name: &str| {
        p.get(name).expect(name).var().flatten_all().and_then(|t| t.to_vec1::<f32>()).expect(name)
    };
    let name = "model.layers.1.mlp.experts.gate_up_proj";
    let (all, some) = (values(&whole, name), values(&part, name));
    let each = all.len() / 16;
    assert_eq!(some, [&all[each..2 * each], &all[7 * each..8 * each]].concat());
    let deviation = (all.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / all.len() as f64).sqrt();
    assert!((deviation - 0.02).abs() < 5e-4, "{deviation}");
    assert!(values(&whole, "model.norm.weight").iter().all(|&v| v == 1.0));
    let wrong: &dyn Fn(usize) -> Vec<usize> = &|_| vec![7, 1];
    assert!(ModelParameters::random(&spec, &threads, 5, 0.02, Some(wrong), &|_, _| true).is_err());
}

#[test]
fn impossible_batches_are_refused() {
    let parameters = all("olmoe");
    let model = parameters.decoder().expect("model");
    let fails = |num_sequences: usize, tokens: &[u32], targets: &[u32], segments: Option<&[u32]>| {
        let batch = TrainBatch { num_sequences, tokens, targets, segments };
        model.forward_train(batch, TrainOptions::default()).is_err()
    };
    assert!(!fails(1, &[1, 2], &[2, IGNORE], None));
    assert!(fails(0, &[], &[], None));
    assert!(fails(2, &[1, 2, 3], &[1, 2, 3], None));
    assert!(fails(1, &[1, 2], &[2], None));
    assert!(fails(1, &[1, 96], &[2, 3], None));
    assert!(fails(1, &[1, 2], &[96, 3], None));
    assert!(fails(1, &[1, 2], &[2, 3], Some(&[0])));
    assert!(fails(1, &[1; 65], &[1; 65], None), "longer than the context");
}
