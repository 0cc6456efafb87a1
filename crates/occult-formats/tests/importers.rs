//! Every importer on a small file whose content is known.

mod common;

use common::{Array, Folder, experts, ids, npz, safetensors};
use occult_formats::{Columns, ImportFormat, ImportOptions, detect};
use zip::CompressionMethod::{Deflated, Stored};

/// 3 tokens, 2 layers, top 2.
const IDS: [i32; 12] = [0, 1, 5, 4, 2, 3, 1, 0, 4, 5, 3, 2];

fn layer_ids(layer: usize) -> Vec<u16> {
    IDS.chunks(4).flat_map(|t| t[2 * layer..2 * layer + 2].iter().map(|&i| i as u16)).collect()
}

fn token_arrays() -> Vec<Array> {
    let weights: Vec<f32> = (0..12).map(|i| 1.0 - i as f32 / 16.0).collect();
    let logits: Vec<f32> = (0..36).map(|i| i as f32 / 4.0).collect();
    vec![
        Array::i32("expert_ids", &[3, 2, 2], &IDS),
        Array::f16("weights", &[3, 2, 2], &weights),
        Array::f32("router_logits", &[3, 2, 6], &logits),
        Array::u8("domains", &[3], &[1, 0, 1]),
    ]
}

fn check_token_arrays(profile: &occult_formats::Profile) {
    assert_eq!(profile.num_layers(), 2);
    for layer in 0..2 {
        let rows = profile.read_rows(layer, Columns::ALL, 9).unwrap();
        assert_eq!(rows.routing.expert_ids, layer_ids(layer));
        let weight = |t: usize, i: usize| 1.0 - (t * 4 + layer * 2 + i) as f32 / 16.0;
        let weights: Vec<f32> = (0..3).flat_map(|t| [weight(t, 0), weight(t, 1)]).collect();
        assert_eq!(rows.routing.weights, Some(weights));
        let scores: Vec<f32> =
            (0..3).flat_map(|t| (0..6).map(move |e| (t * 12 + layer * 6 + e) as f32 / 4.0)).collect();
        assert_eq!(rows.routing.scores, Some(scores));
        assert_eq!(rows.domains, Some(vec![1, 0, 1]));
    }
}

#[test]
fn safetensors_with_everything() {
    let folder = Folder::new();
    let metadata = [
        ("num_experts", "6"),
        ("model", "tiny"),
        ("domains", "[\"code\", \"prose\"]"),
        ("layer_ids", "[1, 3]"),
    ];
    let input = folder.file("a.safetensors", safetensors(&token_arrays(), &metadata));
    assert_eq!(detect(&input).unwrap(), Some(ImportFormat::Safetensors));
    let (summary, profile) = folder.profile(&[input], &ImportOptions::default());
    check_token_arrays(&profile);
    assert_eq!(profile.meta().layer_ids, [1, 3]);
    assert_eq!(profile.meta().domains, ["code", "prose"]);
    assert_eq!(profile.meta().model.as_deref(), Some("tiny"));
    assert_eq!(profile.meta().source.files, ["a.safetensors"]);
    assert_eq!(summary.rows, [Some(3), Some(3)]);
    assert!(summary.warnings.is_empty(), "{:?}", summary.warnings);
}

#[test]
fn npz_stored_and_deflated() {
    for method in [Stored, Deflated] {
        let folder = Folder::new();
        let mut arrays = token_arrays();
        arrays.push(Array::i64("num_experts", &[], &[6]));
        arrays.push(Array::i64("layer_ids", &[2], &[4, 9]));
        let input = folder.file("a.npz", npz(&arrays, method));
        assert_eq!(detect(&input).unwrap(), Some(ImportFormat::Npz));
        let (_, profile) = folder.profile(&[input], &ImportOptions::default());
        check_token_arrays(&profile);
        assert_eq!(profile.meta().layer_ids, [4, 9]);
    }
}

#[test]
fn every_integer_type_gives_the_same_ids() {
    fn bytes<const N: usize>(of: impl Fn(i32) -> [u8; N]) -> Vec<u8> {
        IDS.iter().flat_map(|&i| of(i)).collect()
    }
    let types: [(&str, Vec<u8>); 8] = [
        ("U8", bytes(|i| (i as u8).to_le_bytes())),
        ("I8", bytes(|i| (i as i8).to_le_bytes())),
        ("U16", bytes(|i| (i as u16).to_le_bytes())),
        ("I16", bytes(|i| (i as i16).to_le_bytes())),
        ("U32", bytes(|i| (i as u32).to_le_bytes())),
        ("I32", bytes(|i| i.to_le_bytes())),
        ("U64", bytes(|i| (i as u64).to_le_bytes())),
        ("I64", bytes(|i| i64::from(i).to_le_bytes())),
    ];
    for (dtype, bytes) in types {
        let folder = Folder::new();
        let array = Array { name: "expert_ids", dtype, shape: vec![3, 2, 2], bytes };
        let input = folder.file("a.safetensors", safetensors(&[array], &[]));
        let (_, profile) = folder.profile(&[input], &experts(6));
        assert_eq!(ids(&profile, 1), layer_ids(1), "{dtype}");
    }
}

#[test]
fn big_endian_npy_and_two_dimensional_ids() {
    let folder = Folder::new();
    let bytes: Vec<u8> = IDS.iter().flat_map(|i| i.to_be_bytes()).collect();
    let input = folder.file("a.npy", common::npy(">i4", &[3, 2, 2], &bytes));
    let (_, profile) = folder.profile(&[input], &experts(6));
    assert_eq!(ids(&profile, 0), layer_ids(0));
    let folder = Folder::new();
    let one = Array::i32("expert_ids", &[6, 2], &IDS);
    let input = folder.file("a.safetensors", safetensors(&[one], &[("num_experts", "6")]));
    let (summary, profile) = folder.profile(&[input], &ImportOptions::default());
    assert_eq!((profile.num_layers(), profile.num_rows(0)), (1, Some(6)));
    assert!(summary.warnings.iter().any(|w| w.contains("no routing weights")));
    assert!(summary.warnings.iter().any(|w| w.contains("no router logits")));
}

#[test]
fn many_tokens_stream_in_blocks() {
    let folder = Folder::new();
    let tokens = 50_000;
    let values: Vec<u8> = (0..tokens)
        .flat_map(|t| [0, 1, 2].map(|l| [(t + l) % 7, 7 + (t * l) % 9]))
        .flatten()
        .map(|v| v as u8)
        .collect();
    let input = folder.file("a.npz", npz(&[Array::u8("expert_ids", &[tokens, 3, 2], &values)], Deflated));
    let (_, profile) = folder.profile(&[input], &experts(16));
    for layer in 0..3 {
        let expected: Vec<u16> =
            values.chunks(6).flat_map(|t| [t[2 * layer], t[2 * layer + 1]]).map(u16::from).collect();
        assert_eq!(ids(&profile, layer), expected);
    }
}

#[test]
fn vllm_arrays_of_several_requests_without_their_dense_layer() {
    let folder = Folder::new();
    let a = Array::i32("", &[2, 3, 2], &[0, 0, 1, 2, 3, 4, 0, 0, 5, 4, 3, 2]);
    let b = Array::i32("", &[1, 3, 2], &[0, 0, 2, 1, 0, 5]);
    let inputs = [folder.file("a.npy", a.npy()), folder.file("b.npy", b.npy())];
    assert_eq!(detect(&inputs[0]).unwrap(), Some(ImportFormat::VllmRouted));
    let (_, profile) = folder.profile(&inputs, &experts(6));
    assert_eq!(profile.meta().layer_ids, [1, 2]);
    assert_eq!(profile.meta().num_hidden_layers, Some(3));
    assert!(profile.meta().source.notes[0].contains("[0]"));
    assert_eq!(ids(&profile, 0), [1, 2, 5, 4, 2, 1]);
    assert_eq!(ids(&profile, 1), [3, 4, 3, 2, 0, 5]);
}

#[test]
fn megatron_trace_of_two_ranks() {
    let folder = Folder::new();
    let line = |step: u32, layer: u32, rank: u32, ids: &str, n: u32| {
        format!(
            "{{\"step\":{step},\"stage\":\"pre_dispatch\",\"block\":\"decoder\",\"layer\":{layer},\"rank\":{rank},\
             \"num_tokens\":{n},\"topk\":2,\"top_indices\":{ids}}}\n"
        )
    };
    let mut zero = line(0, 5, 0, "[[1,7],[0,3]]", 2) + &line(0, 3, 0, "[[2,1],[4,3]]", 2);
    zero += "{\"step\":0,\"block\":\"mtp\",\"mtp_idx\":0,\"layer\":3,\"topk\":2,\"top_indices\":[[9,9]]}\n\n";
    zero += &line(1, 5, 0, "[[6,5]]", 1);
    let one = line(0, 3, 1, "[[0,7]]", 1) + &line(0, 5, 1, "[[2,4]]", 1);
    folder.file("trace/router_trace_rank0.jsonl", zero);
    folder.file("trace/router_trace_rank1.jsonl", one);
    let input = folder.path().join("trace");
    assert_eq!(detect(&input).unwrap(), Some(ImportFormat::MegatronTrace));
    assert_eq!(detect(&input.join("router_trace_rank0.jsonl")).unwrap(), Some(ImportFormat::MegatronTrace));
    let (summary, profile) = folder.profile(&[input], &experts(8));
    assert_eq!(profile.meta().layer_ids, [3, 5]);
    assert_eq!(ids(&profile, 0), [2, 1, 4, 3, 0, 7]);
    assert_eq!(ids(&profile, 1), [1, 7, 0, 3, 6, 5, 2, 4]);
    assert_eq!(summary.rows, [Some(3), Some(4)]);
    assert!(summary.warnings.iter().any(|w| w.contains("1 records of multi-token prediction")));
}

#[test]
fn megatron_trace_with_logits_beside_it() {
    let folder = Folder::new();
    let text = "{\"step\":0,\"layer\":0,\"topk\":2,\"top_indices\":[[1,2]],\"logit_offset\":0,\"logit_shape\":[1,4]}\n\
                {\"step\":1,\"layer\":0,\"topk\":2,\"top_indices\":[[3,0]],\"logit_offset\":8,\"logit_shape\":[1,4]}\n";
    let values = [0.5, 2.0, 1.5, -1.0, 3.0, 0.0, 0.25, 4.0_f32];
    let logits: Vec<u8> = values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
    let input = folder.file("router_trace_rank0.jsonl", text);
    folder.file("logits_rank0.bin", logits);
    let (_, profile) = folder.profile(&[input], &ImportOptions::default());
    assert_eq!(profile.meta().num_experts, 4);
    let rows = profile.read_rows(0, Columns::ALL, 9).unwrap();
    assert_eq!(rows.routing.scores, Some(values.to_vec()));
}

#[test]
fn megatron_tokens_per_expert_of_an_expert_parallel_group() {
    let folder = Folder::new();
    folder.file(
        "tpe/rank0.jsonl",
        "{\"iter\":100,\"block\":\"decoder\",\"layer\":3,\"tpe\":[[1,2],[10,20]]}\n",
    );
    folder.file("tpe/rank1.jsonl", "{\"iter\":100,\"block\":\"decoder\",\"layer\":3,\"tpe\":[[3,4]]}\n");
    let input = folder.path().join("tpe");
    assert_eq!(detect(&input).unwrap(), Some(ImportFormat::MegatronCounts));
    let (summary, profile) = folder.profile(std::slice::from_ref(&input), &experts(4));
    assert_eq!(profile.counts(0).unwrap(), [11, 22, 3, 4]);
    assert_eq!(summary.rows, [None]);
    let folder_two = Folder::new();
    assert!(folder_two.refused(&[input], &experts(8)).contains("4 local experts"));
}

#[test]
fn tensorrt_llm_counts_and_raw_choices() {
    let counts = |values: &[i64]| Array::i64("1_3", &[4], values);
    let folder = Folder::new();
    folder.file("stat/meta_info.json", "{\"num_experts\": 4, \"num_experts_per_token\": 2}");
    let later = Array { name: "2_3", ..counts(&[1, 1, 1, 1]) };
    folder.file("stat/rank0.safetensors", safetensors(&[counts(&[5, 0, 2, 1]), later], &[]));
    folder.file("stat/rank1.safetensors", safetensors(&[counts(&[0, 3, 0, 1])], &[]));
    let input = folder.path().join("stat");
    assert_eq!(detect(&input).unwrap(), Some(ImportFormat::TensorrtLlm));
    let (summary, profile) = folder.profile(std::slice::from_ref(&input), &ImportOptions::default());
    assert_eq!(profile.counts(0).unwrap(), [6, 4, 3, 3]);
    assert_eq!((profile.meta().layer_ids.as_slice(), profile.meta().top_k), (&[3][..], Some(2)));
    assert!(summary.warnings.iter().any(|w| w.contains("only counts")), "{:?}", summary.warnings);
    // With the raw choices, iterations in numerical order.
    let raw = |name, values: &[i32]| Array::i32(name, &[values.len() / 2, 2], values);
    let both = [raw("10_3", &[3, 2]), raw("9_3", &[0, 1, 1, 0])];
    folder.file("stat/rank0_raw.safetensors", safetensors(&both, &[]));
    let (summary, profile) = folder.profile(&[input], &ImportOptions::default());
    assert_eq!(ids(&profile, 0), [0, 1, 1, 0, 3, 2]);
    assert_eq!(summary.rows, [Some(3)]);
}

#[test]
fn eplb_loads_in_every_container() {
    let inputs: Vec<(&str, Vec<u8>)> = vec![
        ("a.json", b"[[1, 2, 3], [4, 5, 6]]".to_vec()),
        ("b.json", b"{\"logical_count\": [[[1, 1, 1], [4, 5, 6]], [[0, 1, 2], [0, 0, 0]]]}".to_vec()),
        ("c.csv", b"# loads\n1,2,3\n4,5,6\n".to_vec()),
        ("d.txt", b"1 2 3\n4 5 6".to_vec()),
        ("e.npy", Array::f32("", &[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).npy()),
        ("f.safetensors", safetensors(&[Array::i64("load", &[2, 3], &[1, 2, 3, 4, 5, 6])], &[])),
    ];
    for (name, bytes) in inputs {
        let folder = Folder::new();
        let input = folder.file(name, bytes);
        let options = ImportOptions { format: Some(ImportFormat::EplbLoad), ..ImportOptions::default() };
        let (_, profile) = folder.profile(std::slice::from_ref(&input), &options);
        assert_eq!(profile.counts(0).unwrap(), [1, 2, 3], "{name}");
        assert_eq!(profile.counts(1).unwrap(), [4, 5, 6], "{name}");
        assert!(!profile.has_coactivation(0));
        assert_eq!(detect(&input).unwrap(), Some(ImportFormat::EplbLoad), "{name}");
    }
}

#[test]
fn eplb_loads_without_dense_layers_and_with_fractions() {
    let folder = Folder::new();
    let input = folder.file("a.json", "[[0, 0], [0.5, 0.25]]");
    let (summary, profile) = folder.profile(&[input], &ImportOptions::default());
    assert_eq!((profile.meta().layer_ids.as_slice(), profile.meta().num_hidden_layers), (&[1][..], Some(2)));
    assert_eq!(profile.counts(0).unwrap(), [500_000, 250_000]);
    assert!(summary.warnings.iter().any(|w| w.contains("fractions")));
}

#[test]
fn gpt_oss_trace_keeps_order_weights_and_domains() {
    let folder = Folder::new();
    // 3 tokens, 2 layers, top 4.
    let routes: Vec<u8> = (0..6_u8).flat_map(|i| [i + 3, i, i + 2, i + 1]).collect();
    let gates: Vec<u8> = (0..6).flat_map(|_| [102, 76, 51, 26]).collect();
    folder.file("t/routes_u8.bin", &routes);
    folder.file("t/gates_u8.bin", gates);
    let segments = "token_offset,tokens,dataset,category,row_index\n0,1,exam,\"a, b\",7\n1,2,web,c,8\n";
    folder.file("t/segments.csv", segments);
    let input = folder.path().join("t");
    assert_eq!(detect(&input).unwrap(), Some(ImportFormat::GptOssTrace));
    let options = ImportOptions { num_hidden_layers: Some(2), ..ImportOptions::default() };
    let (_, profile) = folder.profile(&[input], &options);
    let rows = profile.read_rows(1, Columns::ALL, 9).unwrap();
    assert_eq!(rows.routing.expert_ids, [4, 1, 3, 2, 6, 3, 5, 4, 8, 5, 7, 6]);
    assert_eq!(rows.routing.weights.unwrap()[..2], [102.0 / 255.0, 76.0 / 255.0]);
    assert_eq!(
        (rows.domains, &profile.meta().domains[..]),
        (Some(vec![0, 1, 1]), &["exam".into(), "web".into()][..])
    );
}

#[test]
fn expert_sets_with_occurrences() {
    let folder = Folder::new();
    let text = "domain,layer,token_id,occurrences,e0,e1,e2\nx,7,1,3,0,2,5\ny,0,2,1,1,2,3\nx,7,9,2,4,5,6\n";
    let input = folder.file("sets.csv", text);
    assert_eq!(detect(&input).unwrap(), Some(ImportFormat::OlmoeTrace));
    let (summary, profile) = folder.profile(&[input], &ImportOptions::default());
    assert_eq!((summary.rows, profile.meta().num_experts), (vec![Some(1), Some(2)], 64));
    let rows = profile.read_rows(1, Columns::ALL, 9).unwrap();
    assert_eq!((rows.routing.occurrences, rows.domains), (Some(vec![3, 2]), Some(vec![0, 0])));
    assert_eq!(profile.counts(1).unwrap()[..7], [3, 0, 3, 0, 2, 5, 2]);
    let folder = Folder::new();
    let input = folder.file("pairs.csv", "domain,layer,e0,e1,occurrences\nx,15,0,7,228\n");
    assert_eq!(detect(&input).unwrap(), Some(ImportFormat::MixtralTrace));
    let (_, profile) = folder.profile(&[input], &ImportOptions::default());
    assert_eq!(profile.counts(0).unwrap(), [228, 0, 0, 0, 0, 0, 0, 228]);
    assert_eq!(profile.meta().layer_ids, [15]);
}

#[test]
fn expert_counts_of_the_first_or_the_named_model() {
    let text = r#"{"zeta": {"a": {"0": [1, 2], "7": [3, 4]}, "b": {"0": [10, 20], "7": [5, 5]}}, "alpha": {"a": {"0": [9, 9]}}}"#;
    let folder = Folder::new();
    let input = folder.file("counts.json", text);
    assert_eq!(detect(&input).unwrap(), Some(ImportFormat::ExpertCountsJson));
    let (summary, profile) = folder.profile(std::slice::from_ref(&input), &ImportOptions::default());
    assert_eq!(profile.counts(0).unwrap(), [11, 22]);
    assert_eq!(profile.counts(1).unwrap(), [8, 9]);
    assert!(summary.warnings[0].contains("zeta was read"));
    let options = ImportOptions { section: Some("alpha".to_owned()), ..ImportOptions::default() };
    let (_, profile) = folder.profile(&[input], &options);
    assert_eq!(profile.counts(0).unwrap(), [9, 9]);
}

#[test]
fn c2r_counts_and_order() {
    let folder = Folder::new();
    let text =
        r#"{"base": [[[-1, 4, 2], [4, -1, 6], [2, 6, -1]]], "topt_1": [[[0, 0, 0], [0, 0, 0], [0, 0, 0]]]}"#;
    let input = folder.file("co.json", text);
    assert_eq!(detect(&input).unwrap(), Some(ImportFormat::C2rJson));
    let options = ImportOptions { top_k: Some(3), ..ImportOptions::default() };
    let (summary, profile) = folder.profile(&[input], &options);
    assert_eq!(profile.counts(0).unwrap(), [3, 5, 4]);
    assert_eq!(profile.coactivation(0).unwrap().unwrap().row(1), [4, 0, 6]);
    assert!(
        summary.warnings.iter().any(|w| w.contains("only counts") && w.contains("intra/inter ratio can"))
    );
    let folder = Folder::new();
    let input = folder
        .file("rank.json", r#"{"layers": 1, "experts": 3, "rank": [[[2, 1, 0], [0, 2, 1], [1, 0, 2]]]}"#);
    assert_eq!(detect(&input).unwrap(), Some(ImportFormat::C2rJson));
    let (summary, profile) = folder.profile(&[input], &ImportOptions::default());
    assert_eq!(profile.collaborator_order(0).unwrap().unwrap(), [2, 1, 0, 2, 1, 0]);
    assert!(summary.warnings.iter().any(|w| w.contains("only the order")));
}

#[test]
fn count_lines_and_mbolt_streams() {
    let folder = Folder::new();
    let input = folder.file("a.csv", "layer_id,expert_id,count\n1,0,5\n1,2,1\n3,1,4\n1,0,2\n");
    assert_eq!(detect(&input).unwrap(), Some(ImportFormat::SglangCsv));
    let (_, profile) = folder.profile(&[input], &ImportOptions::default());
    assert_eq!((profile.counts(0).unwrap(), profile.counts(1).unwrap()), (vec![7, 0, 1], vec![0, 4, 0]));
    let folder = Folder::new();
    let words = [0x544C_424D, 1, 8, 2, 2, 2, 0, 1, 2, 3, 0, 2, 1, 7, 6, 2, 2, 1, 5, 4_i32];
    let input = folder.file("a.mbolt", words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>());
    assert_eq!(detect(&input).unwrap(), Some(ImportFormat::Mbolt));
    let (_, profile) = folder.profile(&[input], &ImportOptions::default());
    assert_eq!(profile.meta().layer_ids, [0, 2]);
    assert_eq!((ids(&profile, 0), ids(&profile, 1)), (vec![7, 6], vec![0, 1, 2, 3, 5, 4]));
}

#[test]
fn options_complete_the_description() {
    let folder = Folder::new();
    let input = folder.file("a.safetensors", safetensors(&token_arrays()[..1], &[]));
    let options = ImportOptions {
        num_experts: Some(8),
        model: Some("mine".to_owned()),
        layer_ids: Some(vec![2, 5]),
        num_hidden_layers: Some(7),
        num_groups: Some(4),
        norm_topk_prob: Some(true),
        ..ImportOptions::default()
    };
    let (_, profile) = folder.profile(&[input], &options);
    let meta = profile.meta();
    assert_eq!((meta.model.as_deref(), meta.num_hidden_layers), (Some("mine"), Some(7)));
    assert_eq!(meta.layer_ids, [2, 5]);
    let router = meta.router.as_ref().unwrap();
    assert_eq!((router.norm_topk_prob, router.num_groups), (true, Some(4)));
}
