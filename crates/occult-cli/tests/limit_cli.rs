//! The limit on the ranks of a token: tuned in, recorded, and active where the model runs.

mod common;

use common::models::{Dir, done, fails, model, occult};
use serde_json::Value;

/// A profile, data and a model of few words, tuned by `rule` with at most 2 of 4 ranks per token.
fn tuned(dir: &Dir, rule: &[&str]) -> String {
    let ids: Vec<u32> = (0..400).map(|i| 1 + i * i % 60).collect();
    let text = |ids: &[u32]| format!("[{}]", ids.iter().map(u32::to_string).collect::<Vec<_>>().join(","));
    let rows = ids.chunks(20).map(text).collect::<Vec<_>>().join(",");
    dir.write("ids.json", &format!("[{rows}]"));
    let (from, profile) = (model("olmoe"), dir.path("profile.safetensors"));
    done(&["profile", &from, "--ids", &dir.path("ids.json"), "-o", &profile]);
    let words = ["able acid", "gold iron", "lake moon rain", "salt tree"];
    let lines: String =
        (0..80).map(|i| format!("{{\"text\": \"{}\"}}\n", words[i % 4].repeat(1 + i % 3))).collect();
    dir.write("data.jsonl", &lines);
    let (data, out) = (dir.path("data.jsonl"), dir.path("tuned"));
    let fixed =
        ["tune", &from, "--data", &data, "-o", &out, "--length", "8", "--batch-tokens", "32", "--steps", "4"];
    let limit = ["--ranks", "4", "--max-ranks", "2", "--threads", "1"];
    let similar = ["--similar-by", &profile];
    let similar: &[&str] = if rule[1] == "similarity" { &similar } else { &[] };
    done(&[&fixed, &limit[..], rule, similar].concat());
    out
}

fn eval(model: &str, ids: &str, more: &[&str]) -> Value {
    let fixed = ["eval", model, "--ids", ids, "--json", "--threads", "1"];
    let mut found: Value = serde_json::from_str(&done(&[&fixed, more].concat())).expect("JSON");
    found.as_object_mut().expect("an object").remove("seconds");
    found
}

#[test]
fn what_was_tuned_in_is_active_by_default() {
    for rule in ["router-score", "similarity", "best-mass", "least-error"] {
        let dir = Dir::new();
        let model = tuned(&dir, &["--rule", rule]);
        let (ids, profile, placement) =
            (dir.path("ids.json"), dir.path("profile.safetensors"), format!("{model}/placement.json"));
        let found = eval(&model, &ids, &[]);
        let copies = found["copies_per_token"].as_f64().expect("copies");
        assert!(copies > 1.0 && copies <= 2.0, "{rule}: {copies}");
        assert!(found["load_max_over_mean"].as_f64().expect("load") >= 1.0);
        let mut said = vec!["--placement", &placement, "--max-ranks", "2", "--rule", rule];
        if rule == "similarity" {
            said.extend(["--similar-by", &profile]);
        }
        assert_eq!(found, eval(&model, &ids, &said), "{rule}");
        let all = eval(&model, &ids, &["--max-ranks", "4"]);
        assert_ne!(found["total"], all["total"], "{rule}");
        assert!(all["copies_per_token"].as_f64().expect("copies") > copies, "{rule}");
    }
}

/// Other ids of the same experts: what each rank holds and what replaces what is the same.
#[test]
fn a_permuted_model_keeps_its_limit() {
    for rule in ["similarity", "least-error"] {
        let dir = Dir::new();
        let model = tuned(&dir, &["--rule", rule]);
        let (ids, placement, out) = (dir.path("ids.json"), dir.path("other.json"), dir.path("permuted"));
        let profile = dir.path("profile.safetensors");
        done(&["place", &profile, "--ranks", "2", "--equal", "-o", &placement]);
        done(&["permute", &model, &placement, "-o", &out]);
        let file =
            |model: &str| std::fs::read_to_string(format!("{model}/placement.json")).expect("placement");
        assert_ne!(file(&model), file(&out));
        let (before, after) = (eval(&model, &ids, &[]), eval(&out, &ids, &[]));
        assert_eq!(before["copies_per_token"], after["copies_per_token"], "{rule}");
        let perplexity = |found: &Value| found["total"]["perplexity"].as_f64().expect("perplexity");
        assert!((perplexity(&before) / perplexity(&after) - 1.0).abs() < 1e-5, "{rule}: {before} {after}");
    }
}

#[test]
fn one_rank_says_that_it_has_no_limit() {
    let dir = Dir::new();
    let model = tuned(&dir, &["--rule", "best-mass"]);
    let out = occult(&["eval", &model, "--ids", &dir.path("ids.json"), "--ranks", "1"]);
    let said = String::from_utf8(out.stderr).expect("UTF-8");
    assert!(
        out.status.success()
            && said.contains("at most 2 of 4 ranks per token; on one rank there is no limit"),
        "{said}"
    );
}

#[test]
fn similarity_without_a_table_is_refused() {
    let dir = Dir::new();
    let ids = dir.write("ids.json", "[[1, 2, 3]]");
    let limit = ["--ranks", "4", "--max-ranks", "2", "--rule", "similarity"];
    let message = fails(&[&["eval", &model("olmoe"), "--ids", &ids], &limit[..]].concat(), 2);
    assert!(message.contains("give --similar-by PROFILE"), "{message}");
    let data = dir.write("data.jsonl", "{\"text\": \"gold iron\"}\n");
    let fixed = ["tune", &model("olmoe"), "--data", &data, "-o", &dir.path("out")];
    let message = fails(&[&fixed[..], &limit].concat(), 2);
    assert!(message.contains("give --similar-by PROFILE"), "{message}");
}

#[test]
fn a_limit_below_the_routers_own_groups_is_refused() {
    let dir = Dir::new();
    let from = model("deepseek_v2-groups-bf16");
    let ids = dir.write("ids.json", "[[1, 2, 3, 4, 5]]");
    let config: Value =
        serde_json::from_slice(&std::fs::read(format!("{from}/config.json")).expect("read")).expect("JSON");
    let groups = config["n_group"].as_u64().expect("groups").to_string();
    // As many ranks as groups, in equal runs: every group is whole.
    let args = ["eval", &from, "--ids", &ids, "--ranks", &groups, "--max-ranks", "1"];
    let message = fails(&args, 1);
    assert!(message.contains("--max-ranks: layer 0:") && message.contains("routing groups"), "{message}");
    done(&[
        "eval",
        &from,
        "--ids",
        &ids,
        "--ranks",
        &groups,
        "--max-ranks",
        &config["topk_group"].to_string(),
    ]);
}
