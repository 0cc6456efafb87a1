//! The commands that read models, on the tiny checkpoints of occult-model and what transformers computes from them.

mod common;

use std::fs;
use std::path::Path;

use common::models::{Dir, done, fails, fixtures, model, occult};
use occult_formats::{Columns, Profile};
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// Largest difference of logits, as a part of their range.
const LIMIT: f32 = 2e-4;

fn done_json(args: &[&str]) -> Value {
    serde_json::from_str(&done(args)).expect("JSON")
}

/// The message of a command that must fail with exit code 1.
fn refused(args: &[&str]) -> String {
    fails(args, 1)
}

struct Tensors(Vec<u8>);

impl Tensors {
    fn open(path: impl AsRef<Path>) -> Self {
        Self(fs::read(path).expect("a file"))
    }

    fn get(&self, name: &str) -> (Vec<usize>, Vec<u8>) {
        let file = SafeTensors::deserialize(&self.0).expect("safetensors");
        let tensor = file.tensor(name).expect(name);
        (tensor.shape().to_vec(), tensor.data().to_vec())
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        self.get(name).1.as_chunks().0.iter().map(|&c| f32::from_le_bytes(c)).collect()
    }

    fn i64(&self, name: &str) -> Vec<i64> {
        self.get(name).1.as_chunks().0.iter().map(|&c| i64::from_le_bytes(c)).collect()
    }
}

fn reference(case: &str) -> Tensors {
    Tensors::open(fixtures().join(case).join("reference.safetensors"))
}

fn difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let low = want.iter().copied().fold(f32::INFINITY, f32::min);
    let high = want.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let diff = got.iter().zip(want).map(|(g, w)| (g - w).abs());
    diff.fold(0.0, |a, d| if d.is_nan() { f32::INFINITY } else { a.max(d) }) / (high - low)
}

fn cases() -> Vec<String> {
    let entries = fs::read_dir(fixtures()).expect("fixtures").map(|e| e.expect("entry").path());
    let cases = entries.filter(|p| p.join("reference.safetensors").is_file());
    let cases: Vec<String> =
        cases.map(|p| p.file_name().and_then(|n| n.to_str()).expect("UTF-8").to_owned()).collect();
    assert!(cases.len() >= 14, "{cases:?}");
    cases
}

#[test]
fn logits_and_router_choices_are_those_of_transformers() {
    let dir = Dir::new();
    for case in cases() {
        let out = dir.path("logits.safetensors");
        let ids = fixtures().join(&case).join("reference.safetensors");
        done(&["logits", &model(&case), "--ids", ids.to_str().expect("UTF-8"), "--out", &out]);
        let (got, want) = (Tensors::open(&out), reference(&case));
        assert_eq!(got.get("logits").0, want.get("logits").0, "{case}");
        let diff = difference(&got.f32("logits"), &want.f32("logits"));
        assert!(diff <= LIMIT, "{case}: logits differ by {diff:.1e} of their range");
        assert_eq!(got.i64("expert_ids"), want.i64("expert_ids"), "{case}");
        let &[batch, len, _] = &got.get("logits").0[..] else { panic!("{case}: three dimensions") };
        let &[layers, _, top_k] = &want.get("expert_ids").0[..] else { panic!("{case}: three dimensions") };
        assert_eq!(got.get("expert_ids").0, [layers, batch, len, top_k], "{case}");
    }
}

#[test]
fn shorter_sequences_are_aligned_at_the_end() {
    let dir = Dir::new();
    let run = |ids: &str| {
        let (ids, out) = (dir.write("ids.json", ids), dir.path("out.safetensors"));
        done(&["logits", &model("olmoe"), "--ids", &ids, "--out", &out]);
        Tensors::open(out)
    };
    let (both, short, long) = (run("[[7, 8], [3, 4, 5, 6]]"), run("[[7, 8]]"), run("[[3, 4, 5, 6]]"));
    assert_eq!(both.get("logits").0, [2, 4, 96]);
    let logits = both.f32("logits");
    assert!(logits[..2 * 96].iter().all(|&l| l == 0.0), "positions before the sequence");
    assert!(difference(&logits[2 * 96..4 * 96], &short.f32("logits")) <= LIMIT);
    assert!(difference(&logits[4 * 96..], &long.f32("logits")) <= LIMIT);
    // [2 layers, 2 sequences, 4 positions, 4 experts]
    let ids = both.i64("expert_ids");
    assert_eq!(ids[..8], [-1; 8]);
    assert_eq!(ids[8..16], short.i64("expert_ids")[..8]);
    assert_eq!(ids[32 + 16..], long.i64("expert_ids")[16..]);
}

#[test]
fn results_do_not_depend_on_how_sequences_share_passes() {
    let dir = Dir::new();
    let sequence = |i: u64, n: u64| Vec::from_iter((0..n).map(|j| (i * 31 + j * 17 + j / 5) % 93 + 3));
    let lengths = [9, 10, 8, 1, 1, 2, 40, 11, 12, 30, 31];
    let lists = Vec::from_iter(lengths.into_iter().zip(0..).map(|(n, i)| sequence(i, n)));
    let ids = dir.write("ids.json", &json!(lists).to_string());
    for case in ["olmoe", "mixtral-window-fused", "deepseek_v2-lite", "qwen2_moe-norm-tied-window"] {
        let run = |rows: &str| {
            let (out, profile) = (dir.path("out.safetensors"), dir.path("profile.safetensors"));
            let (model, more) = (model(case), ["--batch-tokens", rows]);
            done(&[&["logits", &model, "--ids", &ids, "--out", &out][..], &more].concat());
            done(&[&["profile", &model, "--ids", &ids, "-o", &profile][..], &more].concat());
            let profile = Profile::open(Path::new(&profile)).expect("a profile");
            (Tensors::open(out), profile.read_rows(0, Columns::ALL, usize::MAX).expect("rows").routing)
        };
        let (want, rows) = run("1");
        assert_eq!(rows.num_tokens() as u64, lengths.iter().sum::<u64>());
        for size in ["7", "24", "64", "1000"] {
            let (got, shared) = run(size);
            let diff = difference(&got.f32("logits"), &want.f32("logits"));
            assert!(diff <= LIMIT, "{case}, {size} rows: logits differ by {diff:.1e}");
            assert_eq!(got.i64("expert_ids"), want.i64("expert_ids"), "{case}, {size} rows");
            assert_eq!(
                shared.expert_ids, rows.expert_ids,
                "{case}, {size} rows: the profile keeps the order"
            );
        }
    }
}

#[test]
fn a_mask_says_where_sequences_begin() {
    use safetensors::tensor::{Dtype, TensorView, serialize};
    let dir = Dir::new();
    let bytes = |values: &[i64]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
    let file = |mask: &[i64]| {
        let (ids, mask) = (bytes(&[0, 0, 7, 8, 3, 4, 5, 6]), bytes(mask));
        let view = |data| TensorView::new(Dtype::I64, vec![2, 4], data).expect("a tensor");
        let tensors = [("input_ids", view(&ids)), ("attention_mask", view(&mask))];
        let path = dir.path("ids.safetensors");
        fs::write(&path, serialize(tensors, None).expect("safetensors")).expect("written");
        path
    };
    let (a, b) = (dir.path("a.safetensors"), dir.path("b.safetensors"));
    let ids = file(&[0, 0, 1, 1, 1, 1, 1, 1]);
    done(&["logits", &model("olmoe"), "--ids", &ids, "--out", &a]);
    let lists = dir.write("ids.json", "[[7, 8], [3, 4, 5, 6]]");
    done(&["logits", &model("olmoe"), "--ids", &lists, "--out", &b]);
    assert_eq!(fs::read(&a).expect("a"), fs::read(&b).expect("b"));
    let ids = file(&[1, 0, 1, 1, 1, 1, 1, 1]);
    assert!(refused(&["logits", &model("olmoe"), "--ids", &ids, "--out", &a]).contains("a 0 after a 1"));
}

#[test]
fn bad_ids_are_named_and_nothing_is_written() {
    let dir = Dir::new();
    let long = format!("[{:?}]", vec![1; 65]);
    for (ids, message) in [
        ("[[1, 96]]", "sequence 0 has token id 96, the model's vocabulary has 96"),
        (long.as_str(), "sequence 0 has 65 tokens, the model's context is 64"),
        ("[[1], []]", "sequence 1 has no tokens"),
        ("[]", "has no sequences"),
        ("[1, 2]", "list of lists"),
        ("[[-1]]", "list of lists"),
        ("nothing", "neither a JSON list of lists nor a safetensors file"),
    ] {
        let (path, out) = (dir.write("ids.json", ids), dir.path("out.safetensors"));
        let error = refused(&["logits", &model("olmoe"), "--ids", &path, "--out", &out]);
        assert!(error.contains(message) && error.contains("ids.json"), "{ids}: {error}");
    }
    assert_eq!(dir.names(), ["ids.json"]);
}

#[test]
fn a_profile_holds_what_the_routers_of_transformers_decide() {
    let dir = Dir::new();
    for (case, norm) in
        [("olmoe", false), ("qwen2_moe-norm-tied-window", true), ("deepseek_v2-groups-bf16", false)]
    {
        let out = dir.path("profile.safetensors");
        let ids = fixtures().join(case).join("reference.safetensors");
        done(&["profile", &model(case), "--ids", ids.to_str().expect("UTF-8"), "-o", &out]);
        let (profile, want) = (Profile::open(Path::new(&out)).expect("a profile"), reference(case));
        let meta = profile.meta();
        assert_eq!((meta.model.as_deref(), &meta.domains[..]), (Some(case), &["reference".to_owned()][..]));
        let config: Value =
            serde_json::from_slice(&fs::read(fixtures().join(case).join("config.json")).expect("config"))
                .expect("JSON");
        assert_eq!(meta.num_hidden_layers.map(u64::from), config["num_hidden_layers"].as_u64(), "{case}");
        let router = meta.router.as_ref().expect("router");
        assert_eq!(router.norm_topk_prob, norm, "{case}");
        assert_eq!(
            router.num_groups.map(|g| g as u64),
            config["n_group"].as_u64().filter(|&g| g > 1),
            "{case}"
        );
        let (mut chosen, mut scores, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for layer in 0..profile.num_layers() {
            let rows = profile.read_rows(layer, Columns::ALL, usize::MAX).expect("rows");
            chosen.extend(rows.routing.expert_ids.iter().map(|&e| i64::from(e)));
            scores.extend(rows.routing.scores.expect("router logits"));
            weights.extend(rows.routing.weights.expect("weights"));
        }
        assert_eq!(chosen, want.i64("expert_ids"), "{case}");
        assert!(difference(&scores, &want.f32("router_logits")) <= LIMIT, "{case}");
        assert!(difference(&weights, &want.f32("weights")) <= LIMIT, "{case}");
    }
}

#[test]
fn text_becomes_domains_windows_and_a_limited_number_of_tokens() {
    let dir = Dir::new();
    let text = dir.write("prose.txt", &"tokens share the experts ".repeat(20));
    let ids = dir.write("numbers.json", &json!([(1..60).collect::<Vec<_>>(), [5, 6, 7]]).to_string());
    let out = dir.path("profile.safetensors");
    let args =
        ["profile", &model("olmoe"), "--text", &text, "--ids", &ids, "-o", &out, "--context", "16", "--json"];
    let all = done_json(&args);
    assert_eq!(all["meta"]["domains"], json!(["prose", "numbers"]));
    let limited = done_json(&[&args[..], &["--max-tokens", "20", "--model-name", "tiny"]].concat());
    assert_eq!((&limited["tokens"], &limited["meta"]["model"]), (&json!(40), &json!("tiny")));
    let profile = Profile::open(Path::new(&out)).expect("a profile");
    let rows = profile.read_rows(1, Columns::ALL, usize::MAX).expect("rows");
    assert_eq!(rows.domains.expect("domains"), [vec![0; 20], vec![1; 20]].concat());
    // The second window starts anew: its first token sees nothing before it.
    let first = dir.write("first.json", "[[17]]");
    done(&["profile", &model("olmoe"), "--ids", &first, "-o", &dir.path("first.safetensors")]);
    let alone = Profile::open(Path::new(&dir.path("first.safetensors"))).expect("a profile");
    let alone = alone.read_rows(1, Columns::ALL, usize::MAX).expect("rows").routing;
    let scores = rows.routing.scores.expect("scores");
    assert!(difference(&scores[36 * 16..37 * 16], &alone.scores.expect("scores")) <= LIMIT);
}

#[test]
fn a_limit_on_a_long_text_gives_the_first_tokens_of_the_whole() {
    let dir = Dir::new();
    let long = dir.write("long.txt", &"we share the experts of a token, and keep it; ".repeat(400));
    let run = |name: &str, more: &[&str]| {
        let out = dir.path(name);
        done(&[&["profile", &model("olmoe"), "--text", &long, "-o", &out][..], more].concat());
        let profile = Profile::open(Path::new(&out)).expect("a profile");
        profile.read_rows(0, Columns::ALL, usize::MAX).expect("rows").routing
    };
    let (whole, limited) = (run("whole", &[]), run("limited", &["--max-tokens", "64"]));
    assert_eq!((limited.num_tokens(), whole.num_tokens() > 2000), (64, true));
    assert_eq!(limited.scores.expect("scores"), whole.scores.expect("scores")[..64 * 16]);
}

#[test]
fn profile_place_permute_gives_the_same_logits_in_another_order() {
    let dir = Dir::new();
    for case in ["olmoe", "qwen3_moe-window-bias-fused-bf16", "qwen2_moe-sharded-bf16"] {
        let reference_file = fixtures().join(case).join("reference.safetensors");
        let ids = reference_file.to_str().expect("UTF-8");
        let (profile, placement) = (dir.path("profile.safetensors"), dir.path("placement.json"));
        done(&["profile", &model(case), "--ids", ids, "-o", &profile]);
        let stats = done_json(&["stats", &profile, "--ranks", "4", "--json"]);
        assert!(stats["mean"]["copies_per_token"].as_f64().is_some_and(|c| c > 1.0), "{stats}");
        done(&["place", &profile, "--ranks", "4", "--equal", "-o", &placement]);
        let permuted = dir.path(case);
        let report =
            done_json(&["permute", &model(case), &placement, "-o", &permuted, "--ids", ids, "--json"]);
        assert!(report["logit_difference"].as_f64().is_some_and(|d| d <= f64::from(LIMIT)), "{report}");
        let out = dir.path("logits.safetensors");
        done(&["logits", &permuted, "--ids", ids, "--out", &out]);
        let (got, want) = (Tensors::open(&out), reference(case));
        assert!(difference(&got.f32("logits"), &want.f32("logits")) <= LIMIT, "{case}");
        assert_ne!(got.i64("expert_ids"), want.i64("expert_ids"), "{case}: the order is another one");
        assert!(refused(&["permute", &model(case), &placement, "-o", &permuted]).contains("exists already"));
    }
}

#[test]
fn a_placement_of_another_model_is_refused_and_leaves_nothing() {
    let dir = Dir::new();
    let ids = dir.write("ids.json", &json!([(1..60).collect::<Vec<_>>()]).to_string());
    let (profile, placement) = (dir.path("profile.safetensors"), dir.path("placement.json"));
    done(&["profile", &model("olmoe"), "--ids", &ids, "-o", &profile]);
    done(&["place", &profile, "--ranks", "2", "--equal", "-o", &placement]);
    let error = refused(&["permute", &model("deepseek_v2-lite"), &placement, "-o", &dir.path("permuted")]);
    assert!(error.contains("the placement is for another model"), "{error}");
    assert_eq!(dir.names(), ["ids.json", "placement.json", "profile.safetensors"]);
}

#[test]
fn convert_is_byte_identical_and_both_layouts_go_round() {
    let dir = Dir::new();
    let same = |a: &str, b: &str| {
        for entry in fs::read_dir(a).expect("a directory") {
            let path = entry.expect("entry").path();
            let name = path.file_name().expect("a name");
            // What transformers computed is no part of the model.
            if name != "reference.safetensors" && name != "gradients.safetensors" {
                let copy = fs::read(Path::new(b).join(name)).unwrap_or_else(|e| panic!("{name:?}: {e}"));
                assert!(fs::read(&path).expect("a file") == copy, "{b}: {name:?} differs");
            }
        }
    };
    for case in cases() {
        let copy = dir.path(&case);
        done(&["convert", &model(&case), "-o", &copy]);
        same(&model(&case), &copy);
    }
    let (fused, back) = (dir.path("fused"), dir.path("back"));
    done(&["convert", &model("olmoe"), "-o", &fused, "--layout", "fused"]);
    assert_eq!(done_json(&["inspect", &fused, "--json"])["expert_layout"], "fused");
    done(&["convert", &fused, "-o", &back, "--layout", "per-expert"]);
    same(&model("olmoe"), &back);
}

#[test]
fn inspect_says_what_a_model_is() {
    let facts = done_json(&["inspect", &model("deepseek_v2-groups-bf16"), "--json"]);
    for (name, value) in [
        ("kind", json!("model")),
        ("family", json!("deepseek_v2")),
        ("moe_layers", json!(2)),
        ("experts", json!(12)),
        ("top_k", json!(3)),
        ("routing_groups", json!(4)),
        ("weight_files", json!(2)),
    ] {
        assert_eq!(facts[name], value, "{name}");
    }
    assert!(done(&["inspect", &model("olmoe")]).contains("64800"), "parameters: weight bytes / 4");
}

#[test]
fn eval_gives_the_figures_of_the_harness() {
    let dir = Dir::new();
    let eval: Value =
        serde_json::from_slice(&fs::read(fixtures().join("eval.json")).expect("eval")).expect("JSON");
    let text = dir.write("text.txt", eval["text"].as_str().expect("text"));
    let tasks = fixtures().join("choice.jsonl");
    let window = eval["window"].to_string();
    let tasks = tasks.to_str().expect("UTF-8");
    let got = done_json(&[
        "eval",
        &model("olmoe"),
        "--text",
        &text,
        "--tasks",
        tasks,
        "--context",
        &window,
        "--json",
    ]);
    let (nll, want) =
        (got["texts"][0]["nll"].as_f64().expect("nll"), -eval["rolling"].as_f64().expect("rolling"));
    assert!((nll - want).abs() < 1e-5 * want, "{nll} for {want}");
    assert_eq!((&got["tasks"][0]["acc"], &got["tasks"][0]["acc_norm"]), (&eval["acc"], &eval["acc_norm"]));
    let table = done(&["eval", &model("olmoe"), "--text", &text, "--context", &window]);
    assert!(
        table.contains(&format!("{:.4}", got["texts"][0]["perplexity"].as_f64().expect("perplexity"))),
        "{table}"
    );
}

#[test]
fn generate_streams_the_text_of_its_ids() {
    let model = model("olmoe");
    let args = ["generate", &model, "--prompt", "tokens share", "--max-tokens", "12"];
    let drawn = |seed: &str| done_json(&[&args[..], &["--seed", seed, "--json"]].concat());
    let one = drawn("1");
    assert_eq!(one["ids"], drawn("1")["ids"], "the same seed, the same text");
    assert_ne!(one["ids"], drawn("2")["ids"]);
    // generation_config.json of this model says so.
    assert!((one["temperature"].as_f64().expect("temperature") - 0.7).abs() < 1e-6);
    let streamed = done(&[&args[..], &["--seed", "1"]].concat());
    assert_eq!(streamed, format!("{}\n", one["text"].as_str().expect("text")));
    let greedy = |seed: &str| done(&[&args[..], &["--temperature", "0", "--seed", seed]].concat());
    assert_eq!(greedy("1"), greedy("2"));
    let chat = done_json(&[&args[..], &["--chat", "--json"]].concat());
    assert!(
        chat["prompt_tokens"].as_u64() > one["prompt_tokens"].as_u64(),
        "the template adds to the prompt"
    );
    let long = "tokens ".repeat(100);
    assert!(refused(&["generate", &model, "--prompt", &long]).contains("context"));
    assert!(
        refused(&["generate", &fixtures().join("mixtral-f16").to_string_lossy(), "--prompt", "x"])
            .contains("tokenizer")
    );
}

#[test]
fn generate_continues_ids_without_a_tokenizer() {
    let dir = Dir::new();
    // One without a tokenizer, whose continuation does not end early.
    let fits = |case: &String| {
        let ids = reference(case).i64("greedy");
        !fixtures().join(case).join("tokenizer.json").exists() && !ids[8..].contains(&2)
    };
    let case = &cases().into_iter().find(fits).expect("such a case");
    let want = reference(case).i64("greedy");
    let (prompt, new) = (json!(want[..8]), json!(want[8..]).to_string());
    let one = dir.write("one.json", &prompt.to_string());
    let args = ["generate", &model(case), "--max-tokens", "12", "--ids"];
    let lines = |text: String| {
        Vec::from_iter(text.lines().map(|l| serde_json::from_str::<Value>(l).expect("JSON").to_string()))
    };
    assert_eq!(lines(done(&[&args[..], &[&one]].concat())), std::slice::from_ref(&new));
    let two = dir.write("two.json", &json!([prompt, [5], prompt]).to_string());
    let got = lines(done(&[&args[..], &[&two]].concat()));
    assert_eq!((got.len(), &got[0], &got[2]), (3, &new, &new));
    let objects = done_json(&[&args[..], &[&two, "--json"]].concat());
    assert_eq!((objects[2]["ids"].to_string(), &objects[1]["prompt_tokens"]), (new, &json!(1)));
}

#[test]
fn prompts_that_do_not_fit_the_model_are_named() {
    let dir = Dir::new();
    let long = json!([[4, 5], Vec::from_iter((0..64).map(|i| i % 90))]).to_string();
    for (ids, message) in [
        (long.as_str(), "sequence 1: the prompt has 64 tokens, the model's context is 64"),
        ("[3, 96]", "sequence 0: the prompt has token id 96, the model's vocabulary has 96"),
        ("[]", "has no sequences"),
        ("[[]]", "sequence 0 has no tokens"),
    ] {
        let ids = dir.write("ids.json", ids);
        let error = refused(&["generate", &model("olmoe"), "--ids", &ids]);
        assert!(error.contains("ids.json") && error.contains(message), "{error}");
    }
}

#[test]
fn nothing_to_do_is_refused() {
    let dir = Dir::new();
    let (one, empty) = (dir.write("one.json", "[[5]]"), dir.write("empty.txt", ""));
    let (model, out) = (model("olmoe"), dir.path("out"));
    for args in [
        &["eval", &model, "--text", &empty, "--max-tokens", "0"][..],
        &["profile", &model, "--text", &empty, "-o", &out, "--max-tokens", "0"],
        &["profile", &model, "--ids", &one, "-o", &out, "--batch-tokens", "0"],
        &["profile", &model, "--ids", &one, "-o", &out, "--context", "0"],
        &["generate", &model, "--prompt", "a", "--max-tokens", "0"],
        &["logits", &model, "--ids", &one, "--out", &out, "--threads", "0"],
    ] {
        let run = occult(args);
        let error = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(2), "{args:?}: {error}");
        assert!(error.contains("expected at least 1"), "{args:?}: {error}");
    }
    // A single token has nothing before it, and an empty text has not even that.
    assert!(refused(&["eval", &model, "--ids", &one]).contains("nothing to score"));
    assert!(refused(&["eval", &model, "--text", &empty]).contains("has no text"));
    assert!(refused(&["profile", &model, "--text", &empty, "-o", &out]).contains("has no text"));
    assert_eq!(dir.names(), ["empty.txt", "one.json"]);
}

#[test]
fn progress_is_silent_where_there_is_no_terminal() {
    let dir = Dir::new();
    let run = occult(&["convert", &model("olmoe"), "-o", &dir.path("copy")]);
    assert!(run.status.success() && run.stderr.is_empty(), "{}", String::from_utf8_lossy(&run.stderr));
}
