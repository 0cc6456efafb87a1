//! The logits and router choices of transformers, for every family and option.

mod common;

use common::{CASES, LIMIT, Reference, difference, load, values};
use occult_model::{Batch, Logits, RoutingRecord};
use occult_plan::RoutingBuf;

/// Runs `check` for every case and reports all that fail, with the figures of all.
fn each_case(check: impl Fn(&str) -> Result<f32, String>) {
    let mut failed = false;
    for case in CASES {
        match check(case) {
            Ok(diff) => println!("{case}: {diff:.1e} of the logit range"),
            Err(message) => {
                failed = true;
                println!("{case}: {message}");
            }
        }
    }
    assert!(!failed, "see the list above");
}

fn within(diff: f32) -> Result<f32, String> {
    if diff <= LIMIT {
        Ok(diff)
    } else {
        Err(format!("logits differ by {diff:.1e} of their range, limit {LIMIT:.0e}"))
    }
}

#[test]
fn every_fixture_is_a_case() {
    let root = common::dir("");
    let mut found: Vec<String> = std::fs::read_dir(root)
        .expect("fixtures")
        .map(|e| e.expect("entry").file_name().into_string().expect("name"))
        .filter(|n| common::dir(n).join("reference.safetensors").exists())
        .collect();
    found.sort();
    assert_eq!(found, CASES);
}

#[test]
fn logits_and_routing_are_those_of_transformers() {
    each_case(|case| {
        let (model, reference) = (load(case), Reference::of(case));
        let mut records: Vec<(usize, usize, RoutingBuf)> = Vec::new();
        let mut observe = |r: &RoutingRecord<'_>| {
            assert!(r.is_token.is_none(), "nothing is padded");
            records.push((r.layer, r.moe_layer, r.routing.clone()));
            Ok(())
        };
        let batch = Batch::new(&reference.sequences()).expect("batch");
        let logits = model.forward(&batch, None, Logits::All, Some(&mut observe)).expect(case);
        assert_eq!(logits.dims(), reference.shape("logits"));

        let layers: Vec<(usize, usize)> = records.iter().map(|r| (r.0, r.1)).collect();
        let expected: Vec<(usize, usize)> =
            model.spec().moe_layers().enumerate().map(|(i, l)| (l, i)).collect();
        assert_eq!(layers, expected);
        let ids: Vec<i64> =
            records.iter().flat_map(|r| r.2.expert_ids.iter().map(|&e| i64::from(e))).collect();
        if ids != reference.ints("expert_ids") {
            return Err("router choices differ".into());
        }
        let flat = |f: fn(&RoutingBuf) -> &Option<Vec<f32>>| -> Vec<f32> {
            records.iter().flat_map(|r| f(&r.2).clone().expect("recorded")).collect()
        };
        let scores = difference(&flat(|r| &r.scores), &reference.f32("router_logits"));
        let weights = difference(&flat(|r| &r.weights), &reference.f32("weights"));
        if scores > LIMIT || weights > LIMIT {
            return Err(format!("router logits differ by {scores:.1e}, weights by {weights:.1e}"));
        }
        within(difference(&values(&logits), &reference.f32("logits")))
    });
}

#[test]
fn chunks_and_single_tokens_give_the_logits_of_one_pass() {
    each_case(|case| {
        let (model, reference) = (load(case), Reference::of(case));
        let sequences = reference.sequences();
        let want = reference.f32("logits");
        let (v, t) = (model.spec().vocab_size, sequences[0].len());
        let mut worst = 0f32;
        for lengths in [vec![7, 1, 9, 7], vec![1; t], vec![t - 1, 1]] {
            let mut cache = model.new_cache();
            let mut got = vec![Vec::new(); sequences.len()];
            let mut from = 0;
            for length in lengths {
                let part: Vec<&[u32]> = sequences.iter().map(|s| &s[from..from + length]).collect();
                let batch = Batch::new(&part).expect("batch");
                let logits = model.forward(&batch, Some(&mut cache), Logits::All, None).expect(case);
                for (row, chunk) in got.iter_mut().zip(values(&logits).chunks(length * v)) {
                    row.extend_from_slice(chunk);
                }
                from += length;
            }
            assert_eq!(cache.len(), t);
            worst = worst.max(difference(&got.concat(), &want));
        }
        within(worst)
    });
}

#[test]
fn left_padding_changes_nothing() {
    each_case(|case| {
        let (model, reference) = (load(case), Reference::of(case));
        let mask = reference.ints("padded.mask");
        let full = reference.sequences();
        let (v, t) = (model.spec().vocab_size, full[0].len());
        let rows = mask.chunks(t).zip(&full);
        let sequences: Vec<Vec<u32>> = rows
            .map(|(m, s)| s.iter().zip(m).filter(|(_, m)| **m == 1).map(|(id, _)| *id).collect())
            .collect();
        assert!(sequences[1].len() < t, "the second sequence is shorter");
        let keep = |logits: &[f32]| -> Vec<f32> {
            logits.chunks(v).zip(&mask).filter(|(_, m)| **m == 1).flat_map(|(l, _)| l.to_vec()).collect()
        };
        let want = keep(&reference.f32("padded.logits"));
        let batch = Batch::new(&sequences).expect("batch");
        let mut tokens = 0;
        let mut observe = |r: &RoutingRecord<'_>| {
            tokens = r.tokens().num_tokens();
            Ok(())
        };
        let whole = model.forward(&batch, None, Logits::All, Some(&mut observe)).expect(case);
        assert_eq!(tokens, sequences.iter().map(Vec::len).sum::<usize>(), "padding is not recorded");

        // The first part of the batch is padded; the rest follows through the cache.
        let mut cache = model.new_cache();
        let head: Vec<&[u32]> = sequences.iter().map(|s| &s[..s.len() - 4]).collect();
        let tail: Vec<&[u32]> = sequences.iter().map(|s| &s[s.len() - 4..]).collect();
        model.forward(&Batch::new(&head).expect("head"), Some(&mut cache), Logits::Last, None).expect(case);
        let tail = model
            .forward(&Batch::new(&tail).expect("tail"), Some(&mut cache), Logits::All, None)
            .expect(case);
        let ends: Vec<f32> = reference
            .f32("padded.logits")
            .chunks(t * v)
            .flat_map(|row| row[(t - 4) * v..].to_vec())
            .collect();
        let worst = difference(&keep(&values(&whole)), &want).max(difference(&values(&tail), &ends));
        within(worst)
    });
}

#[test]
fn the_last_logits_are_the_last_of_all() {
    let (model, reference) = (load("olmoe"), Reference::of("olmoe"));
    let batch = Batch::single(&reference.sequences()[0]).expect("batch");
    let all = values(&model.forward(&batch, None, Logits::All, None).expect("all"));
    let last = values(&model.forward(&batch, None, Logits::Last, None).expect("last"));
    assert!(difference(&last, &all[all.len() - last.len()..]) < 1e-6);
}

#[test]
fn a_cache_that_grows_gives_the_logits_of_one_pass() {
    let model = load("deepseek_v2-lite"); // context 640
    let ids: Vec<u32> = (0..600).map(|i| (i * 37 + i / 7) % 96).collect();
    let last = |logits: occult_model::Result<candle_core::Tensor>| values(&logits.expect("logits"));
    let whole = last(model.forward(&Batch::single(&ids).expect("batch"), None, Logits::Last, None));
    let mut cache = model.new_cache();
    let mut records = 0;
    let mut observe = |_: &RoutingRecord<'_>| {
        records += 1;
        Ok(())
    };
    let chunked = last(occult_model::prefill(&model, &ids, &mut cache, Some(&mut observe)));
    assert_eq!(records, 2, "one MoE layer, two chunks");
    assert!(difference(&chunked, &whole) <= LIMIT);
    let mut cache = model.new_cache();
    let mut single = Vec::new();
    for &id in &ids {
        single =
            last(model.forward(&Batch::single(&[id]).expect("batch"), Some(&mut cache), Logits::Last, None));
    }
    assert!(difference(&single, &whole) <= LIMIT);
}
