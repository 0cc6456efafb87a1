//! Profiles that are not what they say: refused with an error that names file, layer and row.

mod common;

use common::{Array, Folder, safetensors};
use occult_formats::{ImportOptions, Profile};

/// Every part must be in the message.
#[track_caller]
fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "expected {part:?} in: {message}");
    }
}

/// A profile with some of its bytes exchanged is refused when opened or when read.
#[test]
fn profiles_that_lie() {
    let folder = Folder::new();
    let ids = Array::i32("expert_ids", &[2, 2, 2], &[0, 1, 2, 3, 4, 5, 6, 7]);
    let input = folder.file("a.safetensors", safetensors(&[ids], &[("num_experts", "8")]));
    folder.import(&[input], &ImportOptions::default()).unwrap();
    let bytes = std::fs::read(folder.output()).unwrap();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    assert!(text.contains("occult.profile.v1"));
    let swap = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect(from);
        let mut changed = bytes.clone();
        changed[at..at + to.len()].copy_from_slice(to.as_bytes());
        folder.file("p.safetensors", changed)
    };
    let cases = [
        ("occult.profile.v1", "occult.profile.v9", "not a routing profile"),
        ("\\\"num_experts\\\":8", "\\\"num_experts\\\":9", "expected"),
        ("\\\"num_experts\\\":8", "\\\"num_experts\\\":0", "num_experts is 0"),
        ("\\\"top_k\\\":2", "\\\"top_k\\\":3", "expected"),
        ("\\\"layer_ids\\\":[0,1]", "\\\"layer_ids\\\":[1,1]", "ascend"),
        ("layers.1.counts", "layers.1.countz", "layers.1.counts"),
    ];
    for (from, to, part) in cases {
        says(&Profile::open(&swap(from, to)).unwrap_err().to_string(), &["p.safetensors", part]);
    }
    // The ids are the last tensor here: make the last one the same as the one before it, then out of range.
    for (id, part) in [(6_u16, "twice"), (700, "700")] {
        let mut changed = bytes.clone();
        let end = changed.len();
        changed[end - 2..].copy_from_slice(&id.to_le_bytes());
        let profile = Profile::open(&folder.file("p.safetensors", changed)).unwrap();
        let error = profile.read_rows(1, occult_formats::Columns::IDS, 9).unwrap_err().to_string();
        says(&error, &["p.safetensors", "layer 1", "row 1", part]);
    }
    let again = folder.file("q.safetensors", &bytes);
    let options = ImportOptions::default();
    let error =
        occult_formats::import(&[again], &options, &folder.path().join("r"), &mut |_, _| {}).unwrap_err();
    says(&error.to_string(), &["q.safetensors", "routing profile already"]);
}
