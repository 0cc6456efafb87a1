//! Checkpoints written back: round trips, other layouts and formats, permuted experts.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use common::{CASES, LIMIT, Reference, difference, dir, load_dir, values};
use occult_model::hf::ExpertLayout;
use occult_model::{Batch, ConvertOptions, LoadOptions, Logits, ModelFiles, StoredDtype, convert, permute};
use occult_plan::{LayerPlacement, Placement, Topology};

fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).expect("directory").map(|e| e.expect("entry"));
    entries.map(|e| (e.file_name().into_string().expect("name"), fs::read(e.path()).expect("file"))).collect()
}

/// The weights that transformers made, without the reference beside them (it is no part of the model).
fn model_files(case: &str) -> BTreeMap<String, Vec<u8>> {
    let mut files = contents(&dir(case));
    files.retain(|name, _| !["reference.safetensors", "gradients.safetensors"].contains(&name.as_str()));
    files
}

fn layout(case: &str) -> ExpertLayout {
    ModelFiles::open(&dir(case), LoadOptions::default()).expect(case).names().layout
}

fn logits(dir: &Path, case: &str) -> Vec<f32> {
    let batch = Batch::new(&Reference::of(case).sequences()).expect("batch");
    values(&load_dir(dir).forward(&batch, None, Logits::All, None).expect("logits"))
}

/// For those who do not watch.
fn silent() -> impl FnMut(u64, u64) {
    |_, _| {}
}

#[test]
fn writing_back_is_byte_identical() {
    let temp = tempfile::tempdir().expect("temp");
    for case in CASES {
        let out = temp.path().join(case);
        convert(&dir(case), &out, &ConvertOptions { layout: layout(case), dtype: None }, &mut silent())
            .expect(case);
        let (got, want) = (contents(&out), model_files(case));
        assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "{case}");
        for (name, bytes) in want {
            assert!(got[&name] == bytes, "{case}: {name} differs");
        }
    }
}

#[test]
fn fused_and_back_is_byte_identical() {
    let temp = tempfile::tempdir().expect("temp");
    for case in CASES {
        if layout(case) == ExpertLayout::Fused {
            continue;
        }
        let (fused, back) = (temp.path().join(format!("{case}-fused")), temp.path().join(case));
        convert(
            &dir(case),
            &fused,
            &ConvertOptions { layout: ExpertLayout::Fused, dtype: None },
            &mut silent(),
        )
        .expect(case);
        let names = ModelFiles::open(&fused, LoadOptions::default()).expect("fused");
        assert_eq!(names.names().layout, ExpertLayout::Fused);
        assert_eq!(
            logits(&fused, case),
            logits(&dir(case), case),
            "{case}: same values, same order of additions"
        );
        convert(&fused, &back, &ConvertOptions::default(), &mut silent()).expect(case);
        let (got, want) = (contents(&back), model_files(case));
        for (name, bytes) in want.iter().filter(|(n, _)| n.ends_with(".safetensors")) {
            assert!(got[name] == *bytes, "{case}: {name} differs");
        }
        let json = |files: &BTreeMap<String, Vec<u8>>| -> Option<serde_json::Value> {
            files.get("model.safetensors.index.json").map(|b| serde_json::from_slice(b).expect("index"))
        };
        assert_eq!(json(&got), json(&want), "{case}: index");
    }
}

#[test]
fn released_names_come_out_of_fused_ones() {
    let temp = tempfile::tempdir().expect("temp");
    let out = temp.path().join("out");
    convert(&dir("mixtral-window-fused"), &out, &ConvertOptions::default(), &mut silent()).expect("convert");
    let files = ModelFiles::open(&out, LoadOptions::default()).expect("open");
    assert!(files.checkpoint().contains("model.layers.1.block_sparse_moe.experts.7.w2.weight"));
    assert!(!files.checkpoint().names().any(|n| n.contains("gate_up_proj")));
    assert_eq!(
        logits(&out, "mixtral-window-fused"),
        logits(&dir("mixtral-window-fused"), "mixtral-window-fused")
    );
}

#[test]
fn widening_to_f32_changes_no_logit_and_the_configuration_says_so() {
    let temp = tempfile::tempdir().expect("temp");
    for case in ["qwen2_moe-sharded-bf16", "mixtral-f16"] {
        let out = temp.path().join(case);
        let options = ConvertOptions { dtype: Some(StoredDtype::F32), ..ConvertOptions::default() };
        convert(&dir(case), &out, &options, &mut silent()).expect(case);
        assert!(difference(&logits(&out, case), &logits(&dir(case), case)) < 1e-6);
        let config = fs::read_to_string(out.join("config.json")).expect("config");
        assert!(config.contains("\"torch_dtype\": \"float32\""), "{config}");
    }
}

#[test]
fn loading_in_another_format_is_converting_and_loading() {
    let temp = tempfile::tempdir().expect("temp");
    let out = temp.path().join("out");
    let dtype = Some(StoredDtype::Bf16);
    convert(&dir("olmoe"), &out, &ConvertOptions { dtype, ..ConvertOptions::default() }, &mut silent())
        .expect("convert");
    let batch = Batch::new(&Reference::of("olmoe").sequences()).expect("batch");
    let model = ModelFiles::open(&dir("olmoe"), LoadOptions { dtype, threads: None })
        .and_then(|f| f.load())
        .expect("load");
    let got = values(&model.forward(&batch, None, Logits::All, None).expect("logits"));
    assert_eq!(got, logits(&out, "olmoe"));
    assert!(difference(&got, &logits(&dir("olmoe"), "olmoe")) > 1e-4, "rounding to bf16 shows");
}

#[test]
fn an_existing_directory_is_not_touched() {
    let temp = tempfile::tempdir().expect("temp");
    fs::write(temp.path().join("precious"), "x").expect("write");
    let error =
        convert(&dir("olmoe"), temp.path(), &ConvertOptions::default(), &mut silent()).expect_err("exists");
    assert!(error.to_string().contains("exists already"), "{error}");
    assert_eq!(contents(temp.path()).len(), 1);
}

/// A placement whose ranks hold every `ranks`-th expert, another rotation in every layer.
fn strided(case: &str, ranks: usize) -> Placement {
    let spec = ModelFiles::open(&dir(case), LoadOptions::default()).expect(case).spec().clone();
    let layer = |i: usize| {
        let rank_of: Vec<u16> = (0..spec.moe.router.num_experts).map(|e| ((e + i) % ranks) as u16).collect();
        LayerPlacement::from_expert_ranks(ranks, &rank_of).expect("placement")
    };
    let layers = (0..spec.num_moe_layers()).map(layer).collect();
    Placement::new(Topology::new(ranks, 1).expect("topology"), layers).expect("placement")
}

#[test]
fn permuted_experts_give_the_same_logits_in_every_family() {
    let temp = tempfile::tempdir().expect("temp");
    for case in CASES.iter().filter(|c| !c.contains("groups")) {
        let out = temp.path().join(case);
        let sample: Vec<u32> = Reference::of(case).sequences().concat();
        let report =
            permute(&dir(case), &strided(case, 4), &out, Some(&sample), &mut silent(), &mut |_, _| Ok(()))
                .expect(case);
        assert!(report.logit_difference < 1e-5 && report.routing_changes == 0, "{case}: {report:?}");
        assert_eq!(report.checked_tokens, sample.len());
        assert_eq!(report.orders[0][..2], [0, 4], "rank 0 holds 0, 4, 8 ...");
        assert!(difference(&logits(&out, case), &Reference::of(case).f32("logits")) <= LIMIT, "{case}");
        assert!(
            contents(&out).iter().any(|(n, b)| n.ends_with(".safetensors") && model_files(case)[n] != *b)
        );
    }
}

#[test]
fn routing_groups_stay_together() {
    let case = "deepseek_v2-groups-bf16"; // 12 experts in 4 groups
    let temp = tempfile::tempdir().expect("temp");
    let error =
        permute(&dir(case), &strided(case, 4), &temp.path().join("a"), None, &mut silent(), &mut |_, _| {
            Ok(())
        })
        .expect_err("splits groups");
    assert!(error.to_string().contains("experts of a group must stay together"), "{error}");
    assert!(!temp.path().join("a").exists());
    let swap = LayerPlacement::from_rank_experts(4, &[[6u16, 7, 8], [9, 10, 11], [0, 1, 2], [3, 4, 5]]);
    assert!(swap.is_err(), "12 experts");
    let swap = LayerPlacement::from_rank_experts(12, &[[6u16, 7, 8], [9, 10, 11], [0, 1, 2], [3, 4, 5]])
        .expect("whole groups");
    let placement = Placement::new(Topology::new(4, 1).expect("topology"), vec![swap; 2]).expect("placement");
    let report =
        permute(&dir(case), &placement, &temp.path().join("b"), None, &mut silent(), &mut |_, _| Ok(()))
            .expect("whole groups move");
    assert!(report.logit_difference < 1e-5, "{report:?}");
}

#[test]
fn uneven_or_replicated_placements_are_refused() {
    let temp = tempfile::tempdir().expect("temp");
    let out = temp.path().join("out");
    let refused = |layers: Vec<LayerPlacement>, word: &str| {
        let placement = Placement::new(Topology::new(layers[0].num_ranks(), 1).expect("topology"), layers)
            .expect("placement");
        let error = permute(&dir("mixtral-f16"), &placement, &out, None, &mut silent(), &mut |_, _| Ok(()))
            .expect_err(word)
            .to_string();
        assert!(error.contains(word), "{error}");
        assert!(!out.exists());
    };
    let uneven =
        LayerPlacement::from_rank_experts(8, &[vec![0u16, 1, 2, 3, 4], vec![5, 6, 7]]).expect("uneven");
    refused(vec![uneven; 2], "equal parts");
    let replicas = LayerPlacement::from_rank_experts(8, &[vec![0u16, 1, 2, 3, 4], vec![0, 4, 5, 6, 7]])
        .expect("replicas");
    refused(vec![replicas; 2], "replicas");
    let even = LayerPlacement::from_rank_experts(8, &[[0u16, 1, 2, 3], [4, 5, 6, 7]]).expect("even");
    refused(vec![even], "1 layers of 8 experts, the model has 2 of 8");
}

#[test]
fn progress_ends_at_the_bytes_of_all_weights() {
    let temp = tempfile::tempdir().expect("temp");
    let case = "qwen2_moe-sharded-bf16";
    let files = ModelFiles::open(&dir(case), LoadOptions::default()).expect(case);
    let total = files.checkpoint().total_bytes();
    let mut seen = Vec::new();
    let mut watch = |done, of| seen.push((done, of));
    convert(&dir(case), &temp.path().join("a"), &ConvertOptions::default(), &mut watch).expect("convert");
    permute(&dir(case), &strided(case, 4), &temp.path().join("b"), None, &mut watch, &mut |_, _| Ok(()))
        .expect("permute");
    let ends: Vec<usize> = (0..seen.len()).filter(|&i| seen[i] == (total, total)).collect();
    assert_eq!(ends.len(), 2, "once each");
    assert_eq!(ends[1], seen.len() - 1);
    for part in [&seen[..=ends[0]], &seen[ends[0] + 1..]] {
        assert!(part.len() > 10 && part.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 == total), "{part:?}");
    }
}
