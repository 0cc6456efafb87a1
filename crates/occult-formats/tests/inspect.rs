//! `describe` says what a file is.

use std::path::{Path, PathBuf};

use occult_formats::{
    ExportFormat, ExportOptions, FileKind, ImportFormat, ImportOptions, PlacementFile, describe, export,
    import,
};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/engines").join(name)
}

const PLACEMENT: &str = r#"{"format": "occult.placement.v1", "num_experts": 4, "num_ranks": 2, "num_nodes": 1,
"layer_ids": [1], "method": "search", "layers": [{"layer": 1, "ranks": [[0, 2, 1], [1, 3]]}]}"#;

#[test]
fn profiles_and_recordings() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("p.safetensors");
    import(&[fixture("sglang_per_token_0.pt")], &ImportOptions::default(), &output, &mut |_, _| {}).unwrap();
    let found = describe(&output).unwrap();
    assert_eq!(found.kind, FileKind::Profile);
    assert_eq!(found.fact("layers").unwrap(), 2);
    assert_eq!(found.fact("experts").unwrap(), 6);
    assert_eq!(found.fact("top_k").unwrap(), 2);
    assert_eq!(found.fact("rows").unwrap(), 8);
    assert_eq!(found.fact("columns").unwrap(), "expert_ids, counts, coactivation");
    assert_eq!(found.fact("source").unwrap(), "sglang (sglang_per_token_0.pt)");

    let found = describe(&fixture("sglang_per_token_0.pt")).unwrap();
    assert_eq!(found.kind, FileKind::Importable(ImportFormat::SglangRecorder));
    assert_eq!(found.fact("mode").unwrap(), "per_token");
    assert_eq!(found.fact("first_topk_ids_of_layer").unwrap(), "[3, 5, 8]");
    let found = describe(&fixture("c2r_counts.pkl")).unwrap();
    assert_eq!(found.fact("array").unwrap(), "int64 [2, 4, 4]");
    let found = describe(&fixture("evil.pkl")).unwrap();
    assert!(found.fact("problem").unwrap().as_str().unwrap().contains("posix.system"));
}

#[test]
fn placements_and_maps() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.json");
    std::fs::write(&path, PLACEMENT).unwrap();
    let found = describe(&path).unwrap();
    assert_eq!(found.kind, FileKind::Placement);
    assert_eq!(found.fact("experts_per_rank").unwrap(), "2 to 3");
    assert_eq!(found.fact("replicas_per_layer").unwrap(), 1);
    std::fs::write(&path, PLACEMENT.replace("[1, 3]", "[1]")).unwrap();
    assert!(describe(&path).unwrap_err().to_string().contains("no rank holds expert 3"), "ours and broken");

    let even = PLACEMENT.replace("[0, 2, 1]", "[0, 2]");
    let file = PlacementFile::parse(&path, even.as_bytes()).unwrap();
    for format in ExportFormat::ALL {
        std::fs::write(&path, export(&file, format, &ExportOptions::default()).unwrap().text).unwrap();
        let found = describe(&path).unwrap();
        assert_eq!(found.kind, FileKind::ExpertMap(format));
        assert_eq!(found.fact("experts").unwrap(), 4, "{format}");
        assert_eq!(found.fact("problem"), None);
    }
    assert_eq!(describe(&fixture("sglang_map.pt")).unwrap().kind, FileKind::ExpertMap(ExportFormat::Sglang));
}

#[test]
fn the_rest_text_and_json() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.bin");
    std::fs::write(&path, b"\x01\x02 nothing").unwrap();
    let found = describe(&path).unwrap();
    assert_eq!(found.kind, FileKind::Unknown);
    let json = serde_json::to_value(&found).unwrap();
    assert_eq!(json, serde_json::json!({"file": "a.bin", "kind": "unknown", "format": null, "bytes": 10}));
    assert!(found.to_string().starts_with("a.bin: not a file that is known here\n  bytes  10\n"));
    std::fs::write(&path, b"").unwrap();
    assert_eq!(describe(&path).unwrap().kind, FileKind::Unknown);
    assert!(describe(&folder.path().join("absent")).unwrap_err().to_string().contains("cannot open"));
    let tensors = br#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    let mut bytes = (tensors.len() as u64).to_le_bytes().to_vec();
    bytes.extend(tensors);
    bytes.extend([0; 4]);
    std::fs::write(&path, bytes).unwrap();
    let found = describe(&path).unwrap();
    assert_eq!(found.kind, FileKind::Safetensors);
    assert_eq!(found.fact("first_tensors").unwrap()[0], "w F32 [1]");
}
