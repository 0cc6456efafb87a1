//! Importers of pickled and HTTP recordings: what they must find, and what they must refuse.

use std::path::{Path, PathBuf};

use occult_formats::{
    Columns, FormatError, ImportFormat, ImportOptions, ImportSummary, Profile, detect, import,
};
use serde_json::{Value as Json, json};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/engines").join(name)
}

fn expected(part: &str) -> Json {
    let all: Json = serde_json::from_slice(&std::fs::read(fixture("expected.json")).unwrap()).unwrap();
    all[part].clone()
}

struct Imported {
    summary: ImportSummary,
    profile: Profile,
    _folder: tempfile::TempDir,
}

fn run(inputs: &[PathBuf], options: &ImportOptions) -> Result<Imported, FormatError> {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("profile.safetensors");
    let result = import(inputs, options, &output, &mut |_, _| {});
    if let Err(error) = &result {
        let left = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(left, 0, "an error leaves nothing behind, after: {error}");
    }
    let summary = result?;
    Ok(Imported { summary, profile: Profile::open(&output)?, _folder: folder })
}

fn refusal(inputs: &[PathBuf], options: &ImportOptions) -> String {
    match run(inputs, options) {
        Ok(imported) => panic!("expected an error, found {:?}", imported.summary),
        Err(error) => error.to_string(),
    }
}

fn rows(profile: &Profile, layer: usize) -> Vec<Vec<u64>> {
    let rows = profile.read_rows(layer, Columns::default(), usize::MAX).unwrap();
    rows.routing
        .expert_ids
        .chunks(rows.routing.top_k)
        .map(|r| r.iter().map(|&i| i.into()).collect())
        .collect()
}

fn matrix(json: &Json) -> Vec<Vec<u64>> {
    serde_json::from_value(json.clone()).unwrap()
}

#[test]
fn sglang_per_token_maps_physical_ids_back_and_drops_padding() {
    let inputs = [fixture("sglang_per_token_0.pt"), fixture("sglang_per_token_1.pt")];
    let got = run(&inputs, &ImportOptions::default()).unwrap();
    let meta = &got.summary.meta;
    assert_eq!(got.summary.format, ImportFormat::SglangRecorder);
    assert_eq!((meta.num_experts, meta.top_k, meta.num_hidden_layers), (6, Some(2), Some(3)));
    assert_eq!(meta.layer_ids, [1, 2], "layer 0 is dense");
    let wanted = expected("sglang");
    for (layer, id) in [(0, 1), (1, 2)] {
        assert_eq!(rows(&got.profile, layer), matrix(&wanted["rows"][id]), "layer {id}");
        assert_eq!(got.profile.counts(layer).unwrap(), matrix(&wanted["counts"])[id]);
        assert!(got.profile.coactivation(layer).unwrap().is_some());
    }
    let notes = meta.source.notes.join("\n");
    assert!(notes.contains("mapped back") && notes.contains("4 rows of padding"), "{notes}");
}

#[test]
fn sglang_counts_of_all_three_modes_agree() {
    let wanted = matrix(&expected("sglang")["counts"]);
    let per_pass = [fixture("sglang_per_pass_0.pt"), fixture("sglang_per_pass_1.pt")];
    for inputs in [&per_pass[..], &[fixture("sglang_stat.pt")]] {
        let got = run(inputs, &ImportOptions::default()).unwrap();
        assert_eq!(got.summary.meta.layer_ids, [1, 2]);
        assert_eq!(got.summary.rows, [None, None], "counts only");
        for layer in 0..2 {
            assert_eq!(got.profile.counts(layer).unwrap(), wanted[layer + 1]);
            assert!(got.profile.coactivation(layer).unwrap().is_none());
        }
        let warnings = got.summary.warnings.join("\n");
        assert!(
            warnings.contains("copies per token") && warnings.contains("cannot be computed"),
            "{warnings}"
        );
    }
}

#[test]
fn sglang_folder_and_repeated_records() {
    let folder = tempfile::tempdir().unwrap();
    for rank in 0..2 {
        let name = format!("expert_distribution_recorder_1700000000.5_{rank}.pt");
        std::fs::copy(fixture("sglang_per_token_0.pt"), folder.path().join(name)).unwrap();
    }
    let got = run(&[folder.path().to_path_buf()], &ImportOptions::default()).unwrap();
    assert_eq!(got.summary.rows, [Some(16), Some(16)]);
    assert!(
        got.summary.warnings.iter().any(|w| w.contains("2 records are equal")),
        "{:?}",
        got.summary.warnings
    );
}

#[test]
fn sglang_mixed_kinds_and_wrong_options_are_refused() {
    let inputs = [fixture("sglang_per_token_0.pt"), fixture("sglang_stat.pt")];
    let message = refusal(&inputs, &ImportOptions::default());
    assert!(message.contains("sglang_stat.pt") && message.contains("one by one"), "{message}");
    let options = ImportOptions { num_experts: Some(64), ..ImportOptions::default() };
    let message = refusal(&[fixture("sglang_stat.pt")], &options);
    assert!(message.contains("the file says 6, the option says 64"), "{message}");
    let message = refusal(&[fixture("tensors_old_format.pt")], &ImportOptions::default());
    assert!(message.contains("old format"), "{message}");
    let message = refusal(&[fixture("tensors.pt")], &ImportOptions::default());
    assert!(message.contains("logical_count"), "{message}");
}

#[test]
fn pickles_that_want_to_run_code_are_refused() {
    for name in ["evil.pkl", "evil.pt"] {
        let message = refusal(&[fixture(name)], &ImportOptions::default());
        assert!(message.contains(name) && message.contains("posix.system, refused"), "{message}");
    }
}

#[test]
fn truncated_recordings_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["sglang_per_token_0.pt", "c2r_counts.pkl"] {
        let bytes = std::fs::read(fixture(name)).unwrap();
        for part in [1, 3, 7] {
            let path = folder.path().join(name);
            std::fs::write(&path, &bytes[..bytes.len() * part / 8]).unwrap();
            assert!(refusal(&[path], &ImportOptions::default()).contains(name));
        }
    }
}

#[test]
fn c2r_counts_and_lists() {
    let options = ImportOptions { top_k: Some(2), ..ImportOptions::default() };
    let got = run(&[fixture("c2r_counts.pkl")], &options).unwrap();
    assert_eq!(got.summary.format, ImportFormat::C2rPickle);
    assert_eq!(got.profile.counts(0).unwrap(), [6, 10, 12, 12]);
    let pairs = got.profile.coactivation(1).unwrap().unwrap();
    assert_eq!(pairs.row(2), [2, 4, 0, 6], "the -1 of the diagonal is dropped");

    let got = run(&[fixture("c2r_order.pkl")], &ImportOptions::default()).unwrap();
    let order = got.profile.collaborator_order(0).unwrap().unwrap();
    assert_eq!(order, [1, 2, 3, 0, 3, 2, 3, 1, 0, 2, 1, 0]);
    assert!(!got.profile.has_counts(0));
    assert!(got.summary.warnings.iter().any(|w| w.contains("order of collaborators")));
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |b: &[u8]| {
        let bits = u32::from_be_bytes([0, b[0], *b.get(1).unwrap_or(&0), *b.get(2).unwrap_or(&0)]);
        let digit = |i: usize| DIGITS[(bits >> (18 - 6 * i)) as usize & 63] as char;
        (0..4).map(|i| if i <= b.len() { digit(i) } else { '=' }).collect::<String>()
    };
    bytes.chunks(3).map(group).collect()
}

/// Two responses of 3 layers (the first dense), top-2: 1 and 2 tokens.
fn responses() -> [Json; 2] {
    let encode = |ids: &[i32]| base64(&ids.iter().flat_map(|i| i.to_le_bytes()).collect::<Vec<_>>());
    let one = encode(&[0, 0, 3, 1, 0, 2]);
    let two = encode(&[0, 0, 5, 4, 1, 2, 0, 0, 0, 5, 4, 3]);
    [
        json!({ "text": "a", "meta_info": { "id": "x", "routed_experts": one, "completion_tokens": 1 } }),
        json!({ "text": "b", "meta_info": { "routed_experts": two } }),
    ]
}

fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn sglang_http_as_object_list_and_lines() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b] = responses();
    let options = ImportOptions {
        num_hidden_layers: Some(3),
        top_k: Some(2),
        num_experts: Some(6),
        ..ImportOptions::default()
    };
    let list = write(folder.path(), "list.json", &json!([a, b]).to_string());
    let lines = write(folder.path(), "lines.jsonl", &format!("{a}\n{b}\n{}\n", json!({ "meta_info": {} })));
    let (one, two) =
        (write(folder.path(), "1.json", &a.to_string()), write(folder.path(), "2.json", &b.to_string()));
    for inputs in [vec![list], vec![lines], vec![one, two]] {
        assert_eq!(detect(&inputs[0]).unwrap(), Some(ImportFormat::SglangHttp));
        let got = run(&inputs, &options).unwrap();
        assert_eq!(got.summary.meta.layer_ids, [1, 2], "layer 0 holds zeros only");
        assert_eq!(rows(&got.profile, 0), [[3, 1], [5, 4], [0, 5]]);
        assert_eq!(rows(&got.profile, 1), [[0, 2], [1, 2], [4, 3]]);
    }
}

#[test]
fn sglang_http_says_what_is_missing_or_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let [a, _] = responses();
    let path = [write(folder.path(), "a.json", &a.to_string())];
    let message = refusal(&path, &ImportOptions { top_k: Some(2), ..ImportOptions::default() });
    assert!(message.contains("give the number of hidden layers, the number of experts"), "{message}");
    let full = |layers, top_k, experts| ImportOptions {
        num_hidden_layers: Some(layers),
        top_k: Some(top_k),
        num_experts: Some(experts),
        ..ImportOptions::default()
    };
    let message = refusal(&path, &full(4, 2, 6));
    assert!(message.contains("response 0") && message.contains("24 bytes"), "{message}");
    let message = refusal(&path, &full(3, 2, 3));
    assert!(message.contains("a.json: layer 0: row 0: expert id 3 is out of range"), "{message}");
    let bad = json!({ "meta_info": { "routed_experts": "no base64!" } });
    let path = [write(folder.path(), "b.json", &bad.to_string())];
    assert!(refusal(&path, &full(3, 2, 6)).contains("not base64"));
    let path = [write(folder.path(), "c.json", "{\"meta_info\": {\"routed_experts\": \"AAAA")];
    assert!(refusal(&path, &full(3, 2, 6)).contains("broken JSON"));
}

/// A copy of the per_token dump of rank 0 in which some ids of its first record are other numbers.
fn with_ids(folder: &Path, index: usize, ids: &[i32]) -> PathBuf {
    use std::io::{Cursor, Read as _, Write as _};
    let mut from =
        zip::ZipArchive::new(std::fs::File::open(fixture("sglang_per_token_0.pt")).unwrap()).unwrap();
    let mut to = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for i in 0..from.len() {
        let mut entry = from.by_index(i).unwrap();
        let name = entry.name().unwrap().into_owned();
        let mut data = Vec::new();
        entry.read_to_end(&mut data).unwrap();
        // The ids [3 layers, 5 tokens, 8] are the only storage of this size.
        if data.len() == 3 * 5 * 8 * 4 {
            let new: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            data[index * 4..index * 4 + new.len()].copy_from_slice(&new);
        }
        to.start_file(name, stored).unwrap();
        to.write_all(&data).unwrap();
    }
    let path = folder.join("changed.pt");
    std::fs::write(&path, to.finish().unwrap().into_inner()).unwrap();
    path
}

/// Where layer 1 (the first MoE layer), token 2, column 0 lies.
const TOKEN_2: usize = (5 + 2) * 8;

#[test]
fn sglang_physical_id_out_of_range() {
    let folder = tempfile::tempdir().unwrap();
    for id in [8, -2, i32::MAX] {
        let message = refusal(&[with_ids(folder.path(), TOKEN_2, &[id])], &ImportOptions::default());
        assert!(
            message.contains("changed.pt: layer 0: row 2: physical expert")
                && message.contains("there are 8"),
            "{message}"
        );
    }
}

#[test]
fn sglang_token_with_too_few_experts() {
    let folder = tempfile::tempdir().unwrap();
    let message = refusal(&[with_ids(folder.path(), TOKEN_2, &[-1])], &ImportOptions::default());
    assert!(message.contains("layer 0: row 2 (record 0, token 2) has 1 experts, others have 2"), "{message}");
}

#[test]
fn sglang_two_replicas_of_one_expert_in_a_row() {
    let folder = tempfile::tempdir().unwrap();
    // In layer 1 slots 0 and 6 both hold expert 3: different physical ids, the same expert twice.
    let path = with_ids(folder.path(), TOKEN_2, &[0, 6]);
    let message = refusal(&[path], &ImportOptions::default());
    assert!(message.contains("changed.pt: layer 0: row 2: expert 3 appears twice"), "{message}");
}
