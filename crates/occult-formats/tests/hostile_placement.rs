//! Placement files that are broken or lie: each is an error that says where.

use std::path::Path;

use occult_formats::PlacementFile;

const GOOD: &str = r#"{
  "format": "occult.placement.v1", "num_experts": 4, "num_ranks": 2, "num_nodes": 1, "layer_ids": [1, 2],
  "num_hidden_layers": 3, "method": "search",
  "layers": [
    {"layer": 1, "ranks": [[0, 2], [1, 3]]},
    {"layer": 2, "ranks": [[0, 1], [2, 3]]}
  ]
}"#;

fn parse(text: &str) -> Result<PlacementFile, String> {
    PlacementFile::parse(Path::new("p.json"), text.as_bytes()).map_err(|e| e.to_string())
}

/// The good file with one thing changed must be refused with these words and the file's name.
#[track_caller]
fn refused(from: &str, to: &str, words: &str) {
    assert!(GOOD.contains(from), "{from:?} is not in the file");
    let message = parse(&GOOD.replacen(from, to, 1)).expect_err(words);
    assert!(message.starts_with("p.json: ") && message.contains(words), "{message}");
}

#[test]
fn good() {
    let file = parse(GOOD).unwrap();
    assert_eq!(file.placement.layers()[0].experts_of(1), [1, 3]);
    assert_eq!(file.meta.num_hidden_layers, Some(3));
}

#[test]
fn truncated() {
    let whole = GOOD.len();
    for end in 0..whole {
        let message = parse(&GOOD[..end]).expect_err("a part of the file");
        assert!(message.contains("broken JSON"), "{end}: {message}");
    }
}

#[test]
fn missing_expert() {
    refused("[1, 3]", "[1]", "layer 0: placement: no rank holds expert 3");
}

#[test]
fn expert_twice_on_a_rank() {
    refused("[[0, 1], [2, 3]]", "[[0, 1, 0], [2, 3]]", "layer 1: placement: rank 0 holds expert 0 twice");
}

#[test]
fn expert_out_of_range() {
    refused("[1, 3]", "[1, 3, 4]", "layer 0: placement: rank 1 holds expert 4, there are 4 experts");
    refused("[1, 3]", "[1, 3, -1]", "layer 0: rank 1: -1 is not an expert id");
    refused("[1, 3]", "[1, 3, 65536]", "layer 0: rank 1: 65536 is not an expert id");
    refused("[1, 3]", "[1, 3.5]", "expected i64");
}

#[test]
fn wrong_counts() {
    refused("\"num_experts\": 4", "\"num_experts\": 5", "layer 0: placement: no rank holds expert 4");
    refused("\"num_experts\": 4", "\"num_experts\": 3", "there are 3 experts");
    refused("\"num_ranks\": 2", "\"num_ranks\": 3", "layer 0: has 2 ranks, num_ranks is 3");
    refused("\"num_nodes\": 1", "\"num_nodes\": 3", "number of nodes is 3");
}

#[test]
fn weights_of_ranks() {
    let with = |weights: &str| {
        let line = format!("[[0, 2], [1, 3]], \"rank_weights\": {weights}");
        parse(&GOOD.replacen("[[0, 2], [1, 3]]", &line, 1))
    };
    let file = with("[1, 0.8]").unwrap();
    assert_eq!(file.placement.layers()[0].rank_weights(), Some(&[1.0, 0.8][..]));
    assert_eq!(file.placement.layers()[1].rank_weights(), None);
    assert_eq!(parse(&file.to_json().unwrap()).unwrap(), file);
    // Experts that get other numbers stay where they are, and so do the weights.
    let renumbered = file.placement.layers()[0].renumbered(&[3, 2, 1, 0]).unwrap();
    assert_eq!((renumbered.experts_of(0), renumbered.rank_weights()), (&[1, 3][..], Some(&[1.0, 0.8][..])));
    for (weights, words) in [
        ("[1]", "layer 0: weights of the ranks [W]: expected 2 values, found 1"),
        ("[1, 0]", "layer 0: weights of the ranks is 0 of rank 1, expected above 0, finite"),
        ("[1, -1]", "is -1 of rank 1"),
        ("[1, 1e99]", "is inf of rank 1"),
        ("[1, \"a\"]", "expected f32"),
    ] {
        let message = with(weights).expect_err(words);
        assert!(message.starts_with("p.json: ") && message.contains(words), "{message}");
    }
}

#[test]
fn other_format() {
    refused("occult.placement.v1", "occult.placement.v9", "its format is \"occult.placement.v9\"");
    refused("\"format\"", "\"fmt\"", "its format is none");
    assert!(parse("[1, 2]").unwrap_err().contains("its format is none"));
    assert!(parse("{}").unwrap_err().contains("expected \"occult.placement.v1\""));
}

#[test]
fn layer_counts_that_differ() {
    refused("\"layer_ids\": [1, 2]", "\"layer_ids\": [1]", "layer_ids has 1 entries, there are 2 layers");
    refused("\"layer_ids\": [1, 2]", "\"layer_ids\": [2, 1]", "do not ascend");
    refused("\"layer\": 2", "\"layer\": 7", "layer 1: says it is layer 7, layer_ids says 2");
    refused(
        "\"num_hidden_layers\": 3",
        "\"num_hidden_layers\": 2",
        "there is a layer 2, but num_hidden_layers is 2",
    );
    let none = "{\"format\":\"occult.placement.v1\",\"num_experts\":1,\"num_ranks\":1,\"num_nodes\":1,\"layer_ids\":[],\"method\":\"x\",\"layers\":[]}";
    assert!(parse(none).unwrap_err().contains("there are 0 layers"));
}

#[test]
fn numbers_that_lie() {
    refused("\"num_experts\": 4", "\"num_experts\": 0", "num_experts is 0");
    refused("\"num_experts\": 4", "\"num_experts\": 1000000000000", "expected 1 to 4096");
    refused("\"num_experts\": 4", "\"num_experts\": -4", "invalid value");
    refused("\"num_experts\": 4", "\"num_experts\": \"4\"", "invalid type");
    refused("\"num_ranks\": 2", "\"num_ranks\": 1000000", "number of ranks is 1000000");
    refused("\"num_ranks\": 2", "\"num_ranks\": 0", "number of ranks is 0");
    refused(
        "\"num_hidden_layers\": 3",
        "\"num_hidden_layers\": 4000000000",
        "num_hidden_layers is 4000000000",
    );
    refused("[[0, 2], [1, 3]]", "{}", "expected a sequence");
}
