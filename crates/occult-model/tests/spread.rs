//! Whole models with their experts over ranks: the results of one process.

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::sync::Arc;

use common::{Reference, dir};
use occult_comm::{ThreadOptions, run_threads};
use occult_model::{
    Decoder, GenerateOptions, LoadOptions, Logits, ModelError, ModelFiles, Pass, Ranks, RoutingRecord,
    Spread, Threads, eval, for_each_pass, generate,
};
use occult_moe::{LayerOptions, Mode, Overlap, PruneRule, Pruning};
use occult_plan::{Budget, ExpertId, LayerPlacement, Placement, Topology};

/// One of every family.
const CASES: [&str; 6] = [
    "olmoe",
    "qwen2_moe-norm-tied-window",
    "qwen3_moe",
    "deepseek",
    "deepseek_v2-groups-bf16",
    "mixtral-f16",
];

fn files(case: &str) -> Result<ModelFiles, ModelError> {
    ModelFiles::open(&dir(case), LoadOptions { threads: Some(Threads::new(1)), dtype: None })
}

/// Uneven, in no order; with more than two ranks the last has no experts, and expert 0 has a replica on rank 1.
fn placement(files: &ModelFiles, num_ranks: usize, turn: usize) -> Placement {
    let spec = files.spec();
    let e = spec.moe.router.num_experts;
    let layer = |number: usize| {
        let mut ranks: Vec<Vec<ExpertId>> = vec![Vec::new(); num_ranks];
        let used = if num_ranks > 2 { num_ranks - 1 } else { num_ranks };
        for expert in 0..e {
            ranks[(expert * 5 + expert / 3 + number + turn) % used].push(expert as ExpertId);
        }
        if used > 1 && !ranks[1].contains(&0) {
            ranks[1].push(0);
        }
        LayerPlacement::from_rank_experts(e, &ranks).expect("a layer")
    };
    let layers = (0..spec.num_moe_layers()).map(layer).collect();
    Placement::new(Topology::new(num_ranks, 1).expect("topology"), layers).expect("placement")
}

fn options(num_ranks: usize) -> LayerOptions {
    LayerOptions::new(Topology::new(num_ranks, 1).expect("topology"))
}

/// Runs `work` on every rank with the model; results by rank.
fn over_ranks<T: Send>(
    case: &str,
    num_ranks: usize,
    options: &LayerOptions,
    work: impl Fn(&mut Decoder) -> Result<T, ModelError> + Sync,
) -> Vec<T> {
    let results = run_threads(num_ranks, &ThreadOptions::default(), |comm| {
        let ranks = Ranks::new(Arc::from(comm));
        let files = files(case)?;
        let spread = Spread::new(placement(&files, num_ranks, 0), options.clone());
        work(&mut files.load_spread(&ranks, &spread)?)
    });
    results.all().unwrap_or_else(|(rank, error)| panic!("{case}, rank {rank} of {num_ranks}: {error}"))
}

/// What passes show: logits of every token, and every layer's experts and scores, sequence after sequence.
#[derive(Debug, Default, PartialEq)]
struct Shown {
    logits: Vec<Vec<f32>>,
    routing: Vec<Vec<(Vec<ExpertId>, Vec<f32>)>>,
}

fn show(model: &Decoder, sequences: &[Vec<u32>], rows: usize) -> Result<Shown, ModelError> {
    let (vocab, layers) = (model.spec().vocab_size, model.spec().num_moe_layers());
    let mut shown = Shown { logits: vec![Vec::new(); sequences.len()], routing: vec![Vec::new(); layers] };
    let mut observe = |_: &Pass, r: &RoutingRecord<'_>| {
        let r_tokens = r.tokens();
        shown.routing[r.moe_layer]
            .push((r_tokens.expert_ids.clone(), r_tokens.scores.clone().expect("scores")));
        Ok(())
    };
    let logits = &mut shown.logits;
    for_each_pass(model, sequences, rows, Logits::All, Some(&mut observe), &mut |pass, values| {
        for (s, rows) in pass.sequences.clone().zip(values.chunks_exact(pass.positions.len() * vocab)) {
            let fed = sequences[s].len().min(pass.positions.end) - pass.positions.start;
            logits[s].extend_from_slice(&rows[rows.len() - fed * vocab..]);
        }
        Ok(())
    })?;
    // Rows of one layer after another, however they were cut into passes.
    for layer in &mut shown.routing {
        let ids = layer.iter().flat_map(|(ids, _)| ids.iter().copied()).collect();
        let scores = layer.iter().flat_map(|(_, scores)| scores.iter().copied()).collect();
        *layer = vec![(ids, scores)];
    }
    Ok(shown)
}

fn close(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let off = common::difference(got, want);
    assert!(off <= common::LIMIT, "{what}: {off:.1e}");
}

/// Of different lengths, so that passes are padded, cut and shared.
fn sequences(case: &str) -> Vec<Vec<u32>> {
    let all = Reference::of(case).sequences();
    let cut = |i: usize, n: usize| all[i % all.len()].iter().copied().take(n).collect();
    vec![cut(0, 9), cut(1, 12), cut(0, 3), cut(1, 7), cut(0, 11)]
}

#[test]
fn passes_over_ranks_show_what_one_process_shows() {
    for case in CASES {
        let sequences = sequences(case);
        for rows in [4, 1024] {
            let want = show(&common::load(case), &sequences, rows).expect(case);
            for num_ranks in [1, 2, 3, 4, 8] {
                let all =
                    over_ranks(case, num_ranks, &options(num_ranks), |model| show(model, &sequences, rows));
                for (i, (got, want)) in all[0].logits.iter().zip(&want.logits).enumerate() {
                    close(got, want, &format!("{case}, {num_ranks} ranks, {rows} rows, sequence {i}"));
                }
                for (got, want) in all[0].routing.iter().zip(&want.routing) {
                    assert_eq!(got[0].0, want[0].0, "{case}, {num_ranks} ranks: experts");
                    close(&got[0].1, &want[0].1, "scores");
                }
                // Nobody else is shown anything.
                assert!(all[1..].iter().all(|shown| shown.logits.iter().all(Vec::is_empty)));
            }
        }
    }
}

#[test]
fn two_runs_are_equal_to_the_bit_and_a_limit_of_all_ranks_is_none() {
    let case = "olmoe";
    let sequences = sequences(case);
    let run = |options: &LayerOptions| {
        over_ranks(case, 4, options, |model| show(model, &sequences, 1024)).swap_remove(0)
    };
    let plain = run(&options(4));
    assert_eq!(plain, run(&options(4)));
    let pruning = |max_ranks| {
        let pruning = Pruning { rule: PruneRule::BestMass, budget: Budget::Fixed { max_ranks } };
        LayerOptions { pruning: Some(pruning), ..options(4) }
    };
    assert_eq!(plain, run(&pruning(4)));
    assert_ne!(plain, run(&pruning(1)));
}

#[test]
fn modes_and_parts_change_no_result() {
    for case in ["olmoe", "qwen2_moe-norm-tied-window"] {
        let sequences = sequences(case);
        let want = show(&common::load(case), &sequences, 1024).expect(case);
        let conventional = LayerOptions { mode: Mode::Conventional, ..options(3) };
        let parts = LayerOptions { overlap: Overlap::Chunks(3), small_batch_tokens: 0, ..options(3) };
        for options in [conventional, parts] {
            let all = over_ranks(case, 3, &options, |model| show(model, &sequences, 1024));
            for (got, want) in all[0].logits.iter().zip(&want.logits) {
                close(got, want, case);
            }
        }
    }
}

#[test]
fn every_rank_generates_its_own_text() {
    let case = "olmoe";
    let sequences = sequences(case);
    let continuation = |model: &Decoder, i: usize| {
        let options = GenerateOptions { max_new_tokens: Some(2 + 3 * i), ..GenerateOptions::default() };
        generate(model, &sequences[i], &options, &mut |_| Ok(ControlFlow::Continue(())))
    };
    let one = common::load(case);
    let want: Vec<_> = (0..sequences.len()).map(|i| continuation(&one, i).expect("text")).collect();
    for num_ranks in [1, 2, 3, 8] {
        let got = over_ranks(case, num_ranks, &options(num_ranks), |model| {
            let rank = model.ranks().expect("ranks").comm().rank();
            let own = (rank..sequences.len()).step_by(num_ranks);
            let texts =
                own.map(|i| Ok((i, continuation(model, i)?))).collect::<Result<Vec<_>, ModelError>>()?;
            model.attend()?;
            Ok(texts)
        });
        let mut got: Vec<_> = got.into_iter().flatten().collect();
        got.sort_by_key(|(i, _)| *i);
        assert_eq!(got.into_iter().map(|(_, text)| text).collect::<Vec<_>>(), want, "{num_ranks} ranks");
    }
}

#[test]
fn perplexity_is_the_same_on_every_rank() {
    let case = "mixtral-f16";
    let text = sequences(case).concat();
    let want = eval::perplexity(&common::load(case), &text, None, 8, None).expect(case);
    for score in over_ranks(case, 3, &options(3), |model| eval::perplexity(model, &text, None, 8, None)) {
        assert_eq!(score.tokens, want.tokens);
        assert!((score.nll / want.nll - 1.0).abs() < 1e-5, "{score:?} {want:?}");
    }
}

/// A copy of a model in which one expert is not finite.
fn poisoned(case: &str, expert: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("temp");
    for entry in fs::read_dir(dir(case)).expect("directory") {
        let path = entry.expect("entry").path();
        fs::copy(&path, copy.path().join(path.file_name().expect("name"))).expect("copy");
    }
    let file = copy.path().join("model.safetensors");
    let bytes = fs::read(&file).expect("weights");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("tensors");
    let at = tensors.tensor(expert).expect(expert).data().as_ptr() as usize - bytes.as_ptr() as usize;
    let mut bytes = bytes.clone();
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&file, bytes).expect("write");
    copy
}

#[test]
fn a_rank_reads_its_own_experts_alone() {
    let name = "model.layers.0.mlp.experts.1.up_proj.weight";
    let copy = poisoned("olmoe", name);
    let results = run_threads(2, &ThreadOptions::default(), |comm| {
        let ranks = Ranks::new(Arc::from(comm));
        let files = ModelFiles::open(copy.path(), LoadOptions::default())?;
        let placement = placement(&files, 2, 0);
        let held = placement.layers()[0].experts_of(ranks.comm().rank() as u16).contains(&1);
        let loaded = files.load_spread(&ranks, &Spread::new(placement, options(2)));
        assert_eq!(held, loaded.is_err());
        if let Err(error) = loaded {
            assert!(error.to_string().contains(name), "{error}");
        }
        Ok::<_, ModelError>(held)
    });
    let held = results.all().expect("both ranks end");
    assert_eq!(held.iter().filter(|h| **h).count(), 1, "one rank has the expert");
}

#[test]
fn another_placement_is_taken_by_all_or_none() {
    let case = "olmoe";
    let sequences = sequences(case);
    over_ranks(case, 3, &options(3), |model| {
        let before = show(model, &sequences, 1024)?;
        let files = files(case)?;
        let spread = |turn| Spread::new(placement(&files, 3, turn), options(3));
        let report = model.replace_placement(&files, &spread(1), &sequences[0])?;
        assert!(report.logit_difference <= common::LIMIT && report.checked_tokens == sequences[0].len());
        let after = show(model, &sequences, 1024)?;
        for (before, after) in before.logits.iter().zip(&after.logits).filter(|(b, _)| !b.is_empty()) {
            close(after, before, "another placement");
        }
        // With pruning the logits differ: refused, and the model is as before.
        let pruning = Pruning { rule: PruneRule::RouterScore, budget: Budget::Fixed { max_ranks: 1 } };
        let pruned = Spread { options: LayerOptions { pruning: Some(pruning), ..options(3) }, ..spread(2) };
        let error = model.replace_placement(&files, &pruned, &sequences[0]).expect_err("other logits");
        assert!(error.to_string().contains("the old placement stays"), "{error}");
        assert_eq!(after, show(model, &sequences, 1024)?);
        // One rank that cannot read: nobody changes.
        let wrong = Spread::new(placement(&files, 2, 0), options(3));
        let error = model.replace_placement(&files, &wrong, &sequences[0]).expect_err("two ranks");
        assert!(error.to_string().contains("on 3 ranks, found"), "{error}");
        assert_eq!(after, show(model, &sequences, 1024)?);
        Ok(())
    });
}
