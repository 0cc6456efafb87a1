//! Generation, tokenizer, chat template, and the measures of lm-evaluation-harness.
#![cfg(feature = "tokenizer")]

mod common;

use std::ops::ControlFlow;

use common::{CASES, Reference, dir, load};
use occult_model::eval::{ChoiceScores, Perplexity, perplexity, read_items, score_item};
use occult_model::hf::GenerationDefaults;
use occult_model::{GenerateOptions, Message, Sampling, Stop, TextTokenizer, generate};
use serde_json::Value;

fn eval_json() -> Value {
    serde_json::from_slice(&std::fs::read(dir("eval.json")).expect("eval.json")).expect("json")
}

fn tokenizer() -> TextTokenizer {
    TextTokenizer::open(&dir("olmoe"), load("olmoe").spec()).expect("tokenizer")
}

#[test]
fn greedy_continuations_are_those_of_transformers() {
    for case in CASES {
        let want: Vec<u32> = Reference::of(case).ints("greedy").iter().map(|&id| id as u32).collect();
        let mut streamed = Vec::new();
        let options = GenerateOptions { max_new_tokens: Some(want.len() - 8), ..GenerateOptions::default() };
        let got = generate(&load(case), &want[..8], &options, &mut |id| {
            streamed.push(id);
            Ok(ControlFlow::Continue(()))
        });
        let got = got.expect(case);
        assert_eq!(got.ids, want[8..], "{case}");
        assert_eq!((got.stop, streamed), (Stop::MaxTokens, got.ids), "{case}");
    }
}

#[test]
fn generation_stops_for_every_reason() {
    let model = load("olmoe");
    let greedy: Vec<u32> = Reference::of("olmoe").ints("greedy").iter().map(|&id| id as u32).collect();
    let go = |_| Ok(ControlFlow::Continue(()));
    let run = |options: &GenerateOptions| generate(&model, &greedy[..8], options, &mut { go }).expect("text");
    let stop_at = greedy[10];
    let first = greedy[8..].iter().position(|&id| id == stop_at).expect("there") + 1;
    let stopped = run(&GenerateOptions { stop_ids: vec![stop_at], ..GenerateOptions::default() });
    assert_eq!((stopped.ids.len(), stopped.stop), (first, Stop::StopId(stop_at)));
    let full = run(&GenerateOptions::default());
    assert_eq!((full.ids.len(), full.stop), (64 - 8, Stop::Context));
    let caller =
        generate(&model, &greedy[..8], &GenerateOptions::default(), &mut |_| Ok(ControlFlow::Break(())));
    assert_eq!(caller.expect("text").stop, Stop::Caller);
    let sampling = Sampling { temperature: 1.0, top_p: 0.9, seed: 5, ..Sampling::default() };
    let sampled = GenerateOptions { sampling, max_new_tokens: Some(20), ..GenerateOptions::default() };
    assert_eq!(run(&sampled), run(&sampled), "the same seed, the same text");
    let other = GenerateOptions { sampling: Sampling { seed: 6, ..sampling }, ..sampled.clone() };
    assert_ne!(run(&sampled), run(&other));
}

#[test]
fn ids_text_and_streams_agree() {
    let (tokenizer, eval) = (tokenizer(), eval_json());
    let text = eval["text"].as_str().expect("text");
    let want: Vec<u32> = serde_json::from_value(eval["text_ids"].clone()).expect("ids");
    assert_eq!(tokenizer.encode(text, false).expect("ids"), want);
    assert_eq!(tokenizer.encode(text, true).expect("ids")[..2], [1, want[0]]);
    assert_eq!(tokenizer.decode(&want).expect("text"), text);
    let mut stream = tokenizer.stream();
    let streamed: String = want.iter().map(|&id| stream(id).expect("text")).collect();
    assert_eq!(streamed, text);
}

#[test]
fn chats_are_rendered_as_transformers_renders_them() {
    let (tokenizer, eval) = (tokenizer(), eval_json());
    let mut messages: Vec<Message> = serde_json::from_value(eval["messages"].clone()).expect("messages");
    assert_eq!(tokenizer.chat(&messages).expect("chat"), eval["chat"].as_str().expect("chat"));
    messages[0].role = "critic".into();
    assert!(tokenizer.chat(&messages).expect_err("role").to_string().contains("no role critic"));
}

/// What the templates of released models do beyond the simplest: last turns first, namespaces, methods of Python's strings,
/// tools that are not given, filters, leaving a loop.
#[test]
fn templates_of_released_models_can_be_written() {
    let temp = tempfile::tempdir().expect("temp");
    std::fs::copy(dir("olmoe").join("tokenizer.json"), temp.path().join("tokenizer.json")).expect("copy");
    std::fs::copy(dir("olmoe").join("config.json"), temp.path().join("config.json")).expect("copy");
    let template = r#"{%- if tools is not none and tools is defined %}{{- tools|tojson }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and not message.content.startswith("<x>") %}
        {%- set ns.last = (messages|length - 1) - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set text = message.content.split("</t>")[-1].lstrip("\n") %}{%- endif %}
    {{- "[" + message.role + ("!" if loop.index0 == ns.last else "") + "]" + text|trim }}
{%- endfor %}
{{- messages | selectattr("role", "equalto", "user") | list | length }}
{%- if add_generation_prompt %}{{- "[assistant]" }}{%- endif %}"#;
    std::fs::write(temp.path().join("chat_template.jinja"), template).expect("template");
    let tokenizer = TextTokenizer::open(temp.path(), load("olmoe").spec()).expect("tokenizer");
    let message = |role: &str, text: &str| Message { role: role.into(), content: text.into() };
    let chat = [message("user", "a"), message("assistant", "<t>no</t>\nb "), message("user", "<x>c")];
    assert_eq!(tokenizer.chat(&chat).expect("chat"), "[user!]a[assistant]b[user]<x>c2[assistant]");
}

#[test]
fn generation_defaults_are_read() {
    let defaults = GenerationDefaults::read(&dir("olmoe")).expect("defaults");
    let want = GenerationDefaults {
        bos_id: Some(1),
        eos_ids: vec![2],
        do_sample: true,
        temperature: Some(0.7),
        top_k: None,
        top_p: Some(0.9),
    };
    assert_eq!(defaults, want);
    let bare = GenerationDefaults::read(&dir("qwen3_moe")).expect("from config.json");
    assert_eq!((bare.bos_id, bare.eos_ids, bare.do_sample), (Some(1), vec![2], false));
}

#[test]
fn multiple_choice_scores_are_those_of_the_harness() {
    let (model, tokenizer, eval) = (load("olmoe"), tokenizer(), eval_json());
    let prefix = Some(eval["prefix"].as_u64().expect("prefix") as u32);
    let encode = |text: &str, special: bool| tokenizer.encode(text, special);
    let mut scores = ChoiceScores::default();
    let items = read_items(&dir("choice.jsonl")).expect("items");
    for (i, item) in items.iter().enumerate() {
        let score = score_item(&model, &encode, prefix, item).expect("score");
        let want: Vec<f64> = serde_json::from_value(eval["log_likelihoods"][i].clone()).expect("sums");
        for (got, want) in score.log_likelihoods.iter().zip(&want) {
            assert!((got - want).abs() < 1e-4 * want.abs(), "item {i}: {got} for {want}");
        }
        assert_eq!(score.log_likelihoods.len(), want.len());
        assert_eq!(serde_json::json!([score.acc, score.acc_norm]), eval["items"][i], "item {i}");
        scores.add(&score);
    }
    assert_eq!(scores.items, 25);
    assert!((scores.acc() - eval["acc"].as_f64().expect("acc")).abs() < 1e-9);
    assert!((scores.acc_norm() - eval["acc_norm"].as_f64().expect("acc_norm")).abs() < 1e-9);
}

#[test]
fn rolling_perplexity_is_that_of_the_harness() {
    let (model, eval) = (load("olmoe"), eval_json());
    let ids = tokenizer().encode(eval["text"].as_str().expect("text"), true).expect("ids");
    let window = eval["window"].as_u64().expect("window") as usize;
    let got = perplexity(&model, &ids, Some(1), window, None).expect("perplexity");
    assert_eq!(got.tokens as usize, ids.len());
    let want = -eval["rolling"].as_f64().expect("rolling");
    assert!((got.nll - want).abs() < 1e-5 * want, "{} for {want}", got.nll);
    assert!((got.value() - (want / ids.len() as f64).exp()).abs() < 1e-2);
    let without = perplexity(&model, &ids, None, window, None).expect("perplexity");
    assert_eq!(without.tokens as usize, ids.len() - 1, "the first token has nothing before it");
    let mut sum = Perplexity::default();
    sum.add(&got);
    sum.add(&without);
    assert_eq!(sum.tokens, got.tokens + without.tokens);
}
