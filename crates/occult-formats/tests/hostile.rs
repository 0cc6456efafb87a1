//! Bad input: each case is refused with an error that names the file, and the layer and row where they exist, and leaves
//! neither an output nor a temporary file ([`Folder::refused`] looks).

mod common;

use common::{Array, Folder, experts, npz, safetensors};
use occult_formats::{ImportFormat, ImportOptions};
use zip::CompressionMethod::{Deflated, Stored};

/// Every part must be in the message.
#[track_caller]
fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "expected {part:?} in: {message}");
    }
}

fn none() -> ImportOptions {
    ImportOptions::default()
}

fn of(format: ImportFormat) -> ImportOptions {
    ImportOptions { format: Some(format), num_experts: Some(8), ..none() }
}

/// 2 tokens, 2 layers, top 2.
fn good_ids() -> Array {
    Array::i32("expert_ids", &[2, 2, 2], &[0, 1, 2, 3, 4, 5, 6, 7])
}

fn with_ids(values: &[i32]) -> Vec<u8> {
    safetensors(&[Array::i32("expert_ids", &[2, 2, 2], values)], &[("num_experts", "8")])
}

#[test]
fn an_empty_list_of_inputs() {
    says(&Folder::new().refused(&[], &none()), &["nothing to import"]);
}

#[test]
fn a_file_that_does_not_exist() {
    let folder = Folder::new();
    says(&folder.refused(&[folder.path().join("no.npz")], &none()), &["open", "no.npz"]);
}

#[test]
fn an_empty_file() {
    let folder = Folder::new();
    let input = folder.file("a.npz", b"");
    says(&folder.refused(&[input], &none()), &["a.npz", "is empty"]);
}

#[test]
fn an_unknown_format() {
    let folder = Folder::new();
    let input = folder.file("a.bin", b"\x00\x01\x02hello");
    says(&folder.refused(&[input], &none()), &["a.bin", "not recognised", "safetensors", "megatron"]);
}

#[test]
fn an_output_folder_that_does_not_exist() {
    let folder = Folder::new();
    let input = folder.file("a.safetensors", with_ids(&[0, 1, 2, 3, 4, 5, 6, 7]));
    let output = folder.path().join("nowhere/p.safetensors");
    let error = occult_formats::import(&[input], &none(), &output, &mut |_, _| {}).unwrap_err();
    says(&error.to_string(), &["temporary file", "nowhere"]);
}

#[test]
fn truncated_safetensors() {
    let folder = Folder::new();
    let whole = with_ids(&[0, 1, 2, 3, 4, 5, 6, 7]);
    for cut in [4, 20, whole.len() - 1] {
        let input = folder.file("cut.safetensors", &whole[..cut]);
        let options = of(ImportFormat::Safetensors);
        says(&folder.refused(&[input], &options), &["cut.safetensors", "header"]);
    }
}

#[test]
fn truncated_npz() {
    let folder = Folder::new();
    for method in [Stored, Deflated] {
        let whole = npz(&[good_ids()], method);
        for cut in [10, whole.len() / 2, whole.len() - 3] {
            let input = folder.file("cut.npz", &whole[..cut]);
            says(&folder.refused(&[input], &of(ImportFormat::Npz)), &["cut.npz"]);
        }
    }
}

#[test]
fn truncated_npy() {
    let folder = Folder::new();
    let whole = good_ids().npy();
    let input = folder.file("cut.npy", &whole[..whole.len() - 4]);
    says(&folder.refused(&[input], &experts(8)), &["cut.npy", "[2, 2, 2]", "32 bytes", "28"]);
    let input = folder.file("cut.npy", &whole[..30]);
    says(&folder.refused(&[input], &experts(8)), &["cut.npy", "truncated", "header"]);
}

#[test]
fn npz_with_a_wrong_checksum() {
    let folder = Folder::new();
    let mut bytes = npz(&[good_ids()], Stored);
    let data = good_ids().npy();
    let at = bytes.windows(data.len()).position(|w| w == data).unwrap();
    // The last id of the last token: 7 becomes 1, in range and no duplicate, but not what was written.
    bytes[at + data.len() - 4] = 1;
    let input = folder.file("a.npz", bytes);
    says(&folder.refused(&[input], &experts(8)), &["a.npz", "expert_ids", "checksum"]);
}

#[test]
fn a_header_longer_than_the_file() {
    let folder = Folder::new();
    let mut bytes = with_ids(&[0, 1, 2, 3, 4, 5, 6, 7]);
    bytes[..8].copy_from_slice(&(1_u64 << 62).to_le_bytes());
    let input = folder.file("a.safetensors", bytes);
    says(&folder.refused(&[input], &of(ImportFormat::Safetensors)), &["a.safetensors", "header", "bytes"]);
}

#[test]
fn a_header_that_lies_about_sizes() {
    let folder = Folder::new();
    // Offsets beyond the file, and a shape that does not fit the offsets.
    for (shape, bytes) in [(vec![2, 2, 2], 64), (vec![200, 2, 2], 32), (vec![usize::MAX, usize::MAX, 2], 32)]
    {
        let header = serde_json::json!({
            "expert_ids": {"dtype": "I32", "shape": shape, "data_offsets": [0, bytes]}
        });
        let header = serde_json::to_vec(&header).unwrap();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header);
        file.extend([0; 32]);
        let input = folder.file("lies.safetensors", file);
        says(&folder.refused(&[input], &experts(8)), &["lies.safetensors", "header"]);
    }
}

#[test]
fn huge_declared_sizes_allocate_nothing() {
    let folder = Folder::new();
    for shape in [[1 << 40, 16, 8], [usize::MAX, usize::MAX, usize::MAX], [2, 1 << 40, 1 << 20]] {
        let array = Array { shape: shape.to_vec(), ..good_ids() };
        let input = folder.file("huge.npy", array.npy());
        says(
            &folder.refused(std::slice::from_ref(&input), &experts(8)),
            &["huge.npy", "needs", "there are 32"],
        );
        let input = folder.file("huge.npz", npz(&[array], Deflated));
        says(&folder.refused(&[input], &experts(8)), &["huge.npz", "needs", "there are 32"]);
    }
    let input = folder.file("rows.mbolt", [0x544C_424D, 1, 8, 0, 2, i32::MAX].map(i32::to_le_bytes).concat());
    says(&folder.refused(&[input], &none()), &["rows.mbolt", "more than the file holds"]);
}

#[test]
fn more_experts_than_can_be() {
    let folder = Folder::new();
    let input = folder.file("a.safetensors", safetensors(&[good_ids()], &[("num_experts", "4000000000")]));
    says(&folder.refused(&[input], &none()), &["a.safetensors", "num_experts", "4000000000"]);
}

#[test]
fn ids_out_of_range_and_negative() {
    let folder = Folder::new();
    let input = folder.file("a.safetensors", with_ids(&[0, 1, 2, 3, 4, 5, 6, 8]));
    says(&folder.refused(&[input], &none()), &["a.safetensors", "layer 1", "row 1", "id 8", "8 experts"]);
    let input = folder.file("a.safetensors", with_ids(&[0, 1, 2, 3, 4, -1, 6, 7]));
    says(&folder.refused(&[input], &none()), &["a.safetensors", "layer 0", "row 1", "id -1"]);
    let ids = Array::i64("", &[1, 1, 2], &[3, i64::MAX]);
    let input = folder.file("a.npy", ids.npy());
    says(&folder.refused(&[input], &experts(8)), &["a.npy", "layer 0", "row 0", "9223372036854775807"]);
}

#[test]
fn an_id_out_of_range_in_a_later_block() {
    let folder = Folder::new();
    let tokens = 40_000;
    let mut values: Vec<u8> = (0..tokens).flat_map(|t| [(t % 7) as u8, 7]).collect();
    values[2 * 31_234] = 99;
    let input =
        folder.file("a.safetensors", safetensors(&[Array::u8("expert_ids", &[tokens, 2], &values)], &[]));
    says(&folder.refused(&[input], &experts(8)), &["layer 0", "row 31234", "99"]);
}

#[test]
fn a_duplicate_expert_in_a_row() {
    let folder = Folder::new();
    let input = folder.file("a.safetensors", with_ids(&[0, 1, 2, 3, 4, 5, 6, 6]));
    says(
        &folder.refused(&[input], &none()),
        &["a.safetensors", "layer 1", "row 1", "expert 6 appears twice"],
    );
}

#[test]
fn weights_and_logits_that_are_not_numbers() {
    let folder = Folder::new();
    let mut values = [0.5; 8];
    values[6] = f32::NAN;
    let arrays = [good_ids(), Array::f16("weights", &[2, 2, 2], &values)];
    let input = folder.file("a.npz", npz(&arrays, Deflated));
    says(&folder.refused(&[input], &experts(8)), &["a.npz", "layer 1", "row 1", "weights", "NaN"]);
    let mut values = [0.5; 32];
    values[8] = f32::INFINITY;
    let arrays = [good_ids(), Array::f32("router_logits", &[2, 2, 8], &values)];
    let input = folder.file("a.safetensors", safetensors(&arrays, &[]));
    says(&folder.refused(&[input], &none()), &["a.safetensors", "layer 1", "row 0", "scores", "inf"]);
}

#[test]
fn zero_tokens() {
    let folder = Folder::new();
    let array = Array::i32("expert_ids", &[0, 2, 2], &[]);
    let input = folder.file("a.safetensors", safetensors(std::slice::from_ref(&array), &[]));
    says(&folder.refused(&[input], &experts(8)), &["a.safetensors", "no tokens"]);
    let input = folder.file("a.npy", array.npy());
    says(&folder.refused(&[input], &experts(8)), &["a.npy", "no tokens"]);
    let input = folder.file("a.csv", "domain,layer,e0,e1,occurrences\n");
    says(&folder.refused(&[input], &none()), &["a.csv", "no rows"]);
    let input = folder.file("a.jsonl", "{\"layer\":3,\"topk\":2,\"num_tokens\":0,\"top_indices\":[]}\n");
    says(&folder.refused(&[input], &experts(8)), &["a.jsonl", "layer 0", "no tokens"]);
    let input = folder.file("routes_u8.bin", "");
    says(&folder.refused(&[input], &of(ImportFormat::GptOssTrace)), &["routes_u8.bin", "0 bytes"]);
}

#[test]
fn layer_counts_that_differ_between_inputs() {
    let folder = Folder::new();
    let a = folder.file("a.npz", npz(&[good_ids()], Stored));
    let b =
        folder.file("b.npz", npz(&[Array::i32("expert_ids", &[1, 4, 2], &[0, 1, 2, 3, 4, 5, 6, 7])], Stored));
    let message = folder.refused(&[a, b], &experts(8));
    says(&message, &["layer counts differ: a.npz has 2, b.npz has 4"]);
    let a = folder.file("a.json", "[[1, 2], [3, 4]]");
    let b = folder.file("b.json", "[[1, 2]]");
    says(&folder.refused(&[a, b], &none()), &["layer or expert counts differ", "a.json", "b.json"]);
}

#[test]
fn inputs_of_different_kinds() {
    let folder = Folder::new();
    let a = folder.file("a.npz", npz(&[good_ids()], Stored));
    let b = folder.file("b.safetensors", safetensors(&[good_ids()], &[]));
    says(&folder.refused(&[a, b], &experts(8)), &["b.safetensors", "is safetensors", "a.npz is npz"]);
}

#[test]
fn inputs_of_which_only_one_has_weights() {
    let folder = Folder::new();
    let a = folder.file("a.npz", npz(&[good_ids(), Array::f32("weights", &[2, 2, 2], &[0.5; 8])], Stored));
    let b = folder.file("b.npz", npz(&[good_ids()], Stored));
    says(
        &folder.refused(&[a, b], &experts(8)),
        &["arrays differ", "a.npz has weights", "b.npz has no weights"],
    );
}

#[test]
fn the_number_of_experts_is_missing() {
    let folder = Folder::new();
    let inputs = [
        folder.file("a.safetensors", safetensors(&[good_ids()], &[])),
        folder.file("a.npz", npz(&[good_ids()], Stored)),
        folder.file("a.npy", good_ids().npy()),
        folder.file("a.jsonl", "{\"layer\":3,\"topk\":2,\"top_indices\":[[0,1]]}\n"),
        folder.file(
            "rank0.safetensors",
            safetensors(&[Array { name: "1_0", ..Array::i64("", &[4], &[1; 4]) }], &[]),
        ),
    ];
    for input in inputs {
        let name = input.file_name().unwrap().to_str().unwrap().to_owned();
        let message = folder.refused(&[input], &none());
        says(&message, &["experts", "--experts N"]);
        assert!(message.contains(&name) || message.contains("meta_info.json"), "{message}");
    }
}

#[test]
fn an_option_that_contradicts_the_file() {
    let folder = Folder::new();
    let input = folder.file("a.safetensors", with_ids(&[0, 1, 2, 3, 4, 5, 6, 7]));
    says(&folder.refused(&[input], &experts(64)), &["a.safetensors", "experts", "8", "64"]);
}

#[test]
fn a_wrong_element_type() {
    let folder = Folder::new();
    let ids = Array::f32("expert_ids", &[2, 2, 2], &[0.0; 8]);
    let input = folder.file("a.safetensors", safetensors(&[ids], &[]));
    says(&folder.refused(&[input], &experts(8)), &["a.safetensors", "expert_ids", "F32", "integer"]);
    let weights = Array::i32("weights", &[2, 2, 2], &[1; 8]);
    let input = folder.file("a.npz", npz(&[good_ids(), weights], Stored));
    says(&folder.refused(&[input], &experts(8)), &["a.npz", "weights", "I32", "f16"]);
    let input = folder.file("a.npy", common::npy("<c8", &[1, 2, 2], &[0; 32]));
    says(&folder.refused(&[input], &experts(8)), &["a.npy", "integer"]);
}

#[test]
fn a_wrong_number_of_dimensions() {
    let folder = Folder::new();
    for shape in [vec![8], vec![1, 2, 2, 2], vec![]] {
        let ids = Array { shape, bytes: vec![0; 32], ..good_ids() };
        if ids.shape.is_empty() {
            continue;
        }
        let input = folder.file("a.safetensors", safetensors(&[ids], &[]));
        says(
            &folder.refused(&[input], &experts(8)),
            &["a.safetensors", "expert_ids", "[tokens, layers, top_k]"],
        );
    }
}

#[test]
fn weights_logits_and_domains_of_another_shape() {
    let folder = Folder::new();
    let others = [
        Array::f32("weights", &[2, 2, 3], &[0.0; 12]),
        Array::f32("router_logits", &[2, 3, 8], &[0.0; 48]),
        Array::i32("domains", &[3], &[0; 3]),
    ];
    for other in others {
        let name = other.name;
        let input = folder.file("a.safetensors", safetensors(&[good_ids(), other], &[]));
        says(&folder.refused(&[input], &experts(8)), &["a.safetensors", name, "expected"]);
    }
}

#[test]
fn a_domain_without_a_name() {
    let folder = Folder::new();
    let arrays = [good_ids(), Array::i32("domains", &[2], &[0, 2])];
    let input = folder.file("a.safetensors", safetensors(&arrays, &[("domains", "[\"a\", \"b\"]")]));
    says(&folder.refused(&[input], &experts(8)), &["domain 2", "there are 2"]);
    let arrays = [good_ids(), Array::i32("domains", &[2], &[0, -2])];
    let input = folder.file("a.safetensors", safetensors(&arrays, &[]));
    says(&folder.refused(&[input], &experts(8)), &["a.safetensors", "domains", "row 1", "-2"]);
}

#[test]
fn broken_json_lines() {
    let folder = Folder::new();
    let good = "{\"layer\":3,\"topk\":2,\"top_indices\":[[0,1]]}\n";
    let cases = [
        (format!("{good}{good}{{\"layer\":3,\"topk\":2,"), &["line 3", "broken JSON"][..]),
        (format!("{good}\n[1, 2]\n"), &["line 3", "broken JSON"]),
        (format!("{good}{{\"layer\":3,\"topk\":3,\"top_indices\":[[0,1,2]]}}"), &["line 2", "topk is 3"]),
        (
            format!("{good}{{\"layer\":3,\"topk\":2,\"top_indices\":[[0,1],[2]]}}"),
            &["line 2", "row 1", "1 experts"],
        ),
        (
            format!("{good}{{\"layer\":3,\"topk\":2,\"num_tokens\":9,\"top_indices\":[[0,1]]}}"),
            &["line 2", "num_tokens is 9"],
        ),
        (
            format!("{good}{{\"layer\":3,\"topk\":2,\"top_indices\":[[0,9]]}}"),
            &["line 2", "layer 0", "row 1", "id 9"],
        ),
        (
            format!("{good}{{\"layer\":3,\"topk\":2,\"top_indices\":[[4,4]]}}"),
            &["line 2", "layer 0", "row 1", "twice"],
        ),
    ];
    for (text, parts) in cases {
        let input = folder.file("trace.jsonl", text);
        let message = folder.refused(&[input], &of(ImportFormat::MegatronTrace));
        says(&message, &["trace.jsonl"]);
        says(&message, parts);
    }
}

#[test]
fn logits_that_lie_outside_their_file() {
    let folder = Folder::new();
    let text = "{\"layer\":0,\"topk\":2,\"top_indices\":[[1,2]],\"logit_offset\":18446744073709551615,\"logit_shape\":[1,8]}\n";
    let input = folder.file("router_trace_rank0.jsonl", text);
    folder.file("logits_rank0.bin", [0; 16]);
    says(&folder.refused(&[input], &none()), &["router_trace_rank0.jsonl", "line 1", "logits_rank0.bin"]);
}

#[test]
fn broken_csv() {
    let folder = Folder::new();
    let cases = [
        ("x,0,1,2,zz\n", &["line 2", "occurrences"][..]),
        ("x,0,1,-2,5\n", &["layer 0", "row 0", "id -2"]),
        ("x,0,1,9,5\n", &["layer 0", "row 0", "id 9"]),
        ("x,0,1,2,5\nx,0,3,3,5\n", &["layer 0", "row 1", "twice"]),
        ("x,0,1,2,0\n", &["line 2", "zero times"]),
        ("x,0,1\n", &["line: 2"]),
        ("x,eleven,1,2,5\n", &["line 2", "layer"]),
    ];
    for (rows, parts) in cases {
        let input = folder.file("p.csv", format!("domain,layer,e0,e1,occurrences\n{rows}"));
        let message = folder.refused(&[input], &none());
        says(&message, &["p.csv"]);
        says(&message, parts);
    }
}

#[test]
fn broken_json_files() {
    let folder = Folder::new();
    let cases = [
        ("c2r.json", ImportFormat::C2rJson, "{\"base\": [[[0, 1], [2, 0]]]}", "symmetric"),
        ("c2r.json", ImportFormat::C2rJson, "{\"base\": [[[0, 1], [1]]]}", "layer 0"),
        ("c2r.json", ImportFormat::C2rJson, "{\"base\": [[[0, -4], [-4, 0]]]}", "negative"),
        (
            "c2r.json",
            ImportFormat::C2rJson,
            "{\"layers\": 2, \"experts\": 2, \"rank\": [[[1], [0]]]}",
            "2 layers",
        ),
        (
            "c2r.json",
            ImportFormat::C2rJson,
            "{\"layers\": 1, \"experts\": 3, \"rank\": [[[1, 1], [0, 2], [0, 1]]]}",
            "twice",
        ),
        ("load.json", ImportFormat::EplbLoad, "[[1, 2], [3]]", "layer 1"),
        ("load.json", ImportFormat::EplbLoad, "[[1, 2], [3, -4]]", "layer 1: expert 1"),
        ("load.json", ImportFormat::EplbLoad, "[[0, 0]]", "all loads are zero"),
        ("load.json", ImportFormat::EplbLoad, "[[1, 2], [3", "broken JSON"),
        ("load.json", ImportFormat::EplbLoad, "[[1e300, 2]]", "more than"),
        ("counts.json", ImportFormat::ExpertCountsJson, "{\"m\": {\"d\": {\"0\": [1, -2]}}}", "broken JSON"),
        (
            "counts.json",
            ImportFormat::ExpertCountsJson,
            "{\"m\": {\"d\": {\"0\": [1, 2], \"1\": [1]}}}",
            "layer 1",
        ),
        ("counts.json", ImportFormat::ExpertCountsJson, "{\"m\": {\"d\": {\"zero\": [1, 2]}}}", "layer zero"),
        ("counts.json", ImportFormat::ExpertCountsJson, "{}", "no model"),
    ];
    for (name, format, text, part) in cases {
        let input = folder.file(name, text);
        let options = ImportOptions { format: Some(format), ..none() };
        says(&folder.refused(&[input], &options), &[name, part]);
    }
}

#[test]
fn statistics_of_another_shape() {
    let folder = Folder::new();
    folder.file("s/meta_info.json", "{\"num_experts\": 4, \"num_experts_per_token\": 2}");
    let wide = Array { name: "1_3", ..Array::i64("", &[5], &[1; 5]) };
    folder.file("s/rank0.safetensors", safetensors(&[wide], &[]));
    let input = folder.path().join("s");
    says(&folder.refused(std::slice::from_ref(&input), &none()), &["rank0.safetensors", "1_3", "[5]", "[4]"]);
    let negative = Array { name: "1_3", ..Array::i64("", &[4], &[1, -1, 1, 1]) };
    folder.file("s/rank0.safetensors", safetensors(&[negative], &[]));
    says(&folder.refused(std::slice::from_ref(&input), &none()), &["rank0.safetensors", "expert 1", "-1"]);
    let raw = Array { name: "1_3", ..Array::i32("", &[2, 2], &[0, 1, 2, 4]) };
    folder.file("s/rank0_raw.safetensors", safetensors(&[raw], &[]));
    says(&folder.refused(&[input], &none()), &["rank0_raw.safetensors", "layer 0", "row 1", "id 4"]);
}

#[test]
fn segments_that_do_not_cover_the_tokens() {
    let folder = Folder::new();
    folder.file("t/routes_u8.bin", [0, 1, 2, 3, 4, 5, 6, 7]);
    let options = ImportOptions { num_hidden_layers: Some(1), ..of(ImportFormat::GptOssTrace) };
    let input = folder.path().join("t");
    for (text, part) in [("0,1,a\n", "end at token 1"), ("1,1,a\n", "line 2"), ("0,x,a\n", "\"x\"")] {
        folder.file("t/segments.csv", format!("token_offset,tokens,dataset\n{text}"));
        says(&folder.refused(std::slice::from_ref(&input), &options), &["segments.csv", part]);
    }
}

#[test]
fn a_dense_layer_that_is_none() {
    let folder = Folder::new();
    let array = Array::i32("", &[2, 2, 2], &[0, 0, 1, 2, 3, 4, 1, 2]);
    let input = folder.file("a.npy", array.npy());
    says(&folder.refused(&[input], &experts(8)), &["a.npy", "layer 0", "row 1", "different experts"]);
}
