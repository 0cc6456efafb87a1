//! Random bytes and mutated valid files never panic an importer, never leave a temporary file, and where an import
//! succeeds, its profile can be read.
//!
//! A normal run takes a few hundred cases for each format. `OCCULT_FUZZ_SECONDS=600 cargo test -p occult-formats --test
//! fuzz` keeps going for that long in all; failures print the case, and proptest keeps its seed.

mod common;

use std::time::{Duration, Instant};

use common::{Array, Folder, npz, safetensors};
use occult_formats::{Columns, ImportFormat, ImportOptions, Profile, detect};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// A small valid file of every format that is one file.
fn seeds() -> Vec<(ImportFormat, &'static str, Vec<u8>)> {
    let ids = Array::i32("expert_ids", &[3, 2, 2], &[0, 1, 5, 4, 2, 3, 1, 0, 4, 5, 3, 2]);
    let weights = Array::f16("weights", &[3, 2, 2], &[0.5; 12]);
    let logits = Array::f32("router_logits", &[3, 2, 6], &[0.25; 36]);
    let domains = Array::u8("domains", &[3], &[1, 0, 1]);
    let arrays = [ids.clone(), weights, logits, domains];
    let mut with_scalar = arrays.to_vec();
    with_scalar.push(Array::i64("num_experts", &[], &[6]));
    let metadata = [("num_experts", "6"), ("layer_ids", "[1, 2]"), ("domains", "[\"a\", \"b\"]")];
    let counts = Array { name: "1_3", ..Array::i64("", &[6], &[1, 2, 3, 4, 5, 6]) };
    let raw = Array { name: "1_3", ..Array::i32("", &[2, 2], &[1, 2, 3, 4]) };
    let mbolt = [0x544C_424D, 1, 6, 2, 2, 2, 0, 1, 2, 3, 0, 2, 1, 5, 4_i32];
    vec![
        (ImportFormat::Safetensors, "a.safetensors", safetensors(&arrays, &metadata)),
        (ImportFormat::Npz, "a.npz", npz(&with_scalar, zip::CompressionMethod::Stored)),
        (ImportFormat::Npz, "b.npz", npz(&with_scalar, zip::CompressionMethod::Deflated)),
        (ImportFormat::VllmRouted, "a.npy", ids.npy()),
        (ImportFormat::MegatronTrace, "router_trace_rank0.jsonl", TRACE.as_bytes().to_vec()),
        (
            ImportFormat::MegatronCounts,
            "rank0.jsonl",
            b"{\"iter\":1,\"block\":\"decoder\",\"layer\":3,\"tpe\":[[1,2,3,4,5,6]]}\n".to_vec(),
        ),
        (ImportFormat::TensorrtLlm, "rank0.safetensors", safetensors(&[counts], &[])),
        (ImportFormat::TensorrtLlm, "rank0_raw.safetensors", safetensors(&[raw], &[])),
        (ImportFormat::C2rJson, "co.json", b"{\"base\": [[[-1, 4, 2], [4, -1, 6], [2, 6, -1]]]}".to_vec()),
        (
            ImportFormat::C2rJson,
            "rank.json",
            b"{\"layers\": 1, \"experts\": 3, \"rank\": [[[2, 1, 0], [0, 2, 1], [1, 0, 2]]]}".to_vec(),
        ),
        (ImportFormat::EplbLoad, "load.json", b"{\"logical_count\": [[1, 2, 3], [4, 5, 6]]}".to_vec()),
        (ImportFormat::EplbLoad, "load.txt", b"1 2 3\n4.5 5 6\n".to_vec()),
        (ImportFormat::EplbLoad, "load.npy", Array::f32("", &[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).npy()),
        (ImportFormat::GptOssTrace, "routes_u8.bin", (0..96).map(|i| (i % 4) + (i / 4) % 24).collect()),
        (
            ImportFormat::OlmoeTrace,
            "sets.csv",
            b"domain,layer,token_id,occurrences,e0,e1,e2\nx,7,1,3,0,2,5\ny,0,2,1,1,2,3\n".to_vec(),
        ),
        (ImportFormat::MixtralTrace, "pairs.csv", b"domain,layer,e0,e1,occurrences\nx,7,1,3,5\n".to_vec()),
        (
            ImportFormat::ExpertCountsJson,
            "counts.json",
            b"{\"m\": {\"d\": {\"0\": [1, 2], \"7\": [3, 4]}}}".to_vec(),
        ),
        (ImportFormat::SglangCsv, "stat.csv", b"layer_id,expert_id,count\n1,0,5\n1,2,1\n".to_vec()),
        (ImportFormat::Mbolt, "a.mbolt", mbolt.iter().flat_map(|w| w.to_le_bytes()).collect()),
    ]
}

const TRACE: &str = "{\"step\":0,\"block\":\"decoder\",\"layer\":5,\"rank\":0,\"num_tokens\":2,\"topk\":2,\"top_indices\":[[1,5],[0,3]]}\n\
                     {\"step\":0,\"block\":\"decoder\",\"layer\":3,\"rank\":0,\"num_tokens\":1,\"topk\":2,\"top_indices\":[[2,1]]}\n";

/// One change to a file.
#[derive(Debug, Clone)]
enum Change {
    Set(usize, u8),
    Insert(usize, Vec<u8>),
    Remove(usize, usize),
    /// Repeats a part: lists and lines grow.
    Repeat(usize, usize),
    Truncate(usize),
}

fn change() -> impl Strategy<Value = Change> {
    // Bytes that mean something in some format are more likely than others.
    let byte = prop_oneof![any::<u8>(), proptest::sample::select(b"0129-,:[]{}\"\n .e\xff\x00\x80".to_vec())];
    let place = 0..4096_usize;
    prop_oneof![
        4 => (place.clone(), byte.clone()).prop_map(|(at, b)| Change::Set(at, b)),
        2 => (place.clone(), proptest::collection::vec(byte, 1..8)).prop_map(|(at, b)| Change::Insert(at, b)),
        2 => (place.clone(), 1..16_usize).prop_map(|(at, n)| Change::Remove(at, n)),
        1 => (place.clone(), 1..64_usize).prop_map(|(at, n)| Change::Repeat(at, n)),
        1 => place.prop_map(Change::Truncate),
    ]
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    let len = bytes.len();
    if len == 0 {
        return;
    }
    match change {
        Change::Set(at, byte) => bytes[at % len] = *byte,
        Change::Insert(at, new) => drop(bytes.splice(at % len..at % len, new.iter().copied())),
        Change::Remove(at, n) => drop(bytes.drain(at % len..(at % len + n).min(len))),
        Change::Repeat(at, n) => {
            let part = bytes[at % len..(at % len + n).min(len)].to_vec();
            bytes.splice(at % len..at % len, part);
        }
        Change::Truncate(at) => bytes.truncate(at % len),
    }
}

/// Imports a file in every way that it could be asked for; what succeeds must be readable.
fn try_import(folder: &Folder, format: ImportFormat, name: &str, bytes: &[u8]) -> Result<(), TestCaseError> {
    let input = folder.file(name, bytes);
    // Detection may refuse, but must not panic.
    let _ = detect(&input);
    for num_experts in [Some(6), None] {
        let options = ImportOptions { format: Some(format), num_experts, ..ImportOptions::default() };
        let result = folder.import(std::slice::from_ref(&input), &options);
        match result {
            Ok(summary) => {
                let profile = Profile::open(&folder.output()).unwrap();
                for layer in 0..summary.meta.num_layers() {
                    if summary.rows[layer].is_some() {
                        let rows = profile.read_rows(layer, Columns::ALL, 64).unwrap();
                        prop_assert!(rows.routing.view().is_ok());
                    }
                    if profile.has_counts(layer) {
                        profile.counts(layer).unwrap();
                        profile.coactivation(layer).unwrap();
                    }
                }
                prop_assert_eq!(folder.left_in_output(), ["profile.safetensors"]);
                std::fs::remove_file(folder.output()).unwrap();
            }
            Err(error) => {
                prop_assert!(!error.to_string().is_empty());
                prop_assert!(folder.left_in_output().is_empty(), "left: {:?}", folder.left_in_output());
            }
        }
    }
    Ok(())
}

/// Runs `cases` cases, and then more until this test's share of `OCCULT_FUZZ_SECONDS` is over.
fn run<S: Strategy>(
    cases: u32,
    share: f64,
    strategy: S,
    test: impl Fn(S::Value) -> Result<(), TestCaseError>,
) {
    let seconds =
        std::env::var("OCCULT_FUZZ_SECONDS").ok().and_then(|s| s.parse::<f64>().ok()).unwrap_or(0.0);
    let end = Instant::now() + Duration::from_secs_f64((seconds * share).clamp(0.0, 1e6));
    loop {
        let config = Config { cases, failure_persistence: None, ..Config::default() };
        if let Err(error) = TestRunner::new(config).run(&strategy, &test) {
            panic!("{error}");
        }
        if Instant::now() >= end {
            break;
        }
    }
}

#[test]
fn mutated_files() {
    let seeds = seeds();
    let folder = Folder::new();
    for (format, name, bytes) in &seeds {
        let kept = try_import(&folder, *format, name, bytes);
        assert!(kept.is_ok(), "{format}: {kept:?}");
    }
    let share = 0.9 / seeds.len() as f64;
    for (format, name, bytes) in seeds {
        run(200, share, proptest::collection::vec(change(), 1..5), |changes| {
            let mut bytes = bytes.clone();
            changes.iter().for_each(|c| apply(&mut bytes, c));
            try_import(&folder, format, name, &bytes)
        });
    }
}

#[test]
fn random_bytes() {
    let folder = Folder::new();
    let format = proptest::sample::select(ImportFormat::ALL.to_vec());
    run(400, 0.08, (format, proptest::collection::vec(any::<u8>(), 0..300)), |(format, bytes)| {
        try_import(&folder, format, "random.bin", &bytes)
    });
}

/// The profile itself is an input of later commands.
#[test]
fn mutated_profiles() {
    let folder = Folder::new();
    let (_, name, bytes) = &seeds()[0];
    let input = folder.file(name, bytes);
    folder.import(&[input], &ImportOptions::default()).unwrap();
    let bytes = std::fs::read(folder.output()).unwrap();
    run(400, 0.02, proptest::collection::vec(change(), 1..4), |changes| {
        let mut bytes = bytes.clone();
        changes.iter().for_each(|c| apply(&mut bytes, c));
        if let Ok(profile) = Profile::open(&folder.file("p.safetensors", &bytes)) {
            for layer in 0..profile.num_layers() {
                let _ =
                    (profile.counts(layer), profile.coactivation(layer), profile.collaborator_order(layer));
                let _ = profile.read_rows(layer, Columns::ALL, 2);
                let _ = profile.for_each_chunk(layer, Columns::ALL, 2, &mut |chunk| {
                    assert!(chunk.routing.num_tokens() <= 2);
                    Ok(())
                });
            }
        }
        Ok(())
    });
}
