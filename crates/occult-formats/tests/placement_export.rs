//! Placement files and expert maps of other engines: what is written is read back.

use std::path::{Path, PathBuf};

use occult_formats::export::{detect_map, import_placement};
use occult_formats::{
    ExportFormat, ExportOptions, Exported, MapOptions, PlacementFile, PlacementMeta, ProfileMeta, export,
};
use occult_plan::{LayerPlacement, Placement, Topology};
use proptest::prelude::*;

fn file(nodes: usize, layer_ids: &[u32], layers: &[&[&[u16]]]) -> PlacementFile {
    let experts = layers[0].iter().flat_map(|r| r.iter()).max().unwrap() + 1;
    let tables: Vec<_> =
        layers.iter().map(|l| LayerPlacement::from_rank_experts(experts.into(), l).unwrap()).collect();
    let topology = Topology::new(layers[0].len(), nodes).unwrap();
    let meta =
        PlacementMeta { layer_ids: layer_ids.to_vec(), method: "search".into(), ..PlacementMeta::default() };
    PlacementFile::new(meta, Placement::new(topology, tables).unwrap()).unwrap()
}

fn even() -> PlacementFile {
    file(1, &[1, 3], &[&[&[0, 3], &[1, 2]], &[&[0, 1], &[2, 3]]])
}

fn uneven() -> PlacementFile {
    file(1, &[0], &[&[&[0, 1, 2], &[3]]])
}

fn write(file: &PlacementFile, format: ExportFormat) -> Exported {
    export(file, format, &ExportOptions::default()).unwrap()
}

fn refusal(file: &PlacementFile, format: ExportFormat, options: &ExportOptions) -> String {
    export(file, format, options).unwrap_err().to_string()
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn placement_files_keep_everything() {
    let mut file = even();
    file.meta.num_hidden_layers = Some(5);
    file.meta.model = Some("a \"quoted\" name".into());
    file.meta.seed = Some(u64::MAX);
    file.meta.load_cap = Some(1.25);
    file.meta.profile = Some("p.safetensors".into());
    file.meta.figures = Some(json("{\"copies_per_token\": 2.5}").as_object().unwrap().clone());
    file.meta.notes = vec!["by hand".into()];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.json");
    file.write(&path).unwrap();
    assert_eq!(PlacementFile::read(&path).unwrap(), file);
    file.meta.method = "greedy".into();
    file.write(&path).unwrap();
    assert_eq!(PlacementFile::read(&path).unwrap().meta.method, "greedy", "a file that exists is replaced");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
    assert!(file.write(folder.path()).unwrap_err().to_string().contains("is a directory"));
}

#[test]
fn placements_of_another_model_are_refused() {
    let file = even();
    let fits = ProfileMeta { num_experts: 4, layer_ids: vec![1, 3], ..ProfileMeta::default() };
    file.check_against(&fits).unwrap();
    for (profile, words) in [
        (ProfileMeta { num_experts: 8, ..fits.clone() }, "it places 4 experts, the profile has 8"),
        (ProfileMeta { layer_ids: vec![1, 2, 3], ..fits.clone() }, "it has 2 layers, the profile has 3"),
        (
            ProfileMeta { layer_ids: vec![1, 4], ..fits.clone() },
            "layer 1 is the model's layer 3, in the profile it is layer 4",
        ),
    ] {
        let message = file.check_against(&profile).unwrap_err().to_string();
        assert!(message.contains("another model") && message.contains(words), "{message}");
    }
    let mut own = file.clone();
    own.meta.num_hidden_layers = Some(4);
    let other = ProfileMeta { num_hidden_layers: Some(6), ..fits };
    assert!(
        own.check_against(&other).unwrap_err().to_string().contains("4 hidden layers, the profile has 6")
    );
}

#[test]
fn golden_maps_of_every_engine() {
    let mut file = even();
    file.meta.num_hidden_layers = Some(5);
    let sglang = write(&file, ExportFormat::Sglang);
    let rows = json("[[0,1,2,3],[0,3,1,2],[0,1,2,3],[0,1,2,3],[0,1,2,3]]");
    assert_eq!(json(&sglang.text)["physical_to_logical_map"], rows, "dense rows are trivial");
    assert!(sglang.notes.iter().any(|n| n.contains("--ep-num-redundant-experts 0")));
    assert_eq!(json(&write(&file, ExportFormat::Vllm).text), json("[[0,3,1,2],[0,1,2,3]]"));
    let ascend = json(&write(&file, ExportFormat::VllmAscend).text);
    let wanted = r#"{"moe_layer_count":2,"layer_list":[
        {"layer_id":0,"device_count":2,"device_list":[{"device_id":0,"device_expert":[0,3]},{"device_id":1,"device_expert":[1,2]}]},
        {"layer_id":1,"device_count":2,"device_list":[{"device_id":0,"device_expert":[0,1]},{"device_id":1,"device_expert":[2,3]}]}]}"#;
    assert_eq!(ascend, json(wanted));
    assert_eq!(
        write(&file, ExportFormat::TensorrtLlm).text,
        "num_slots: 4\ninitial_global_assignments:\n  1: [0, 3, 1, 2]\n  3: [0, 1, 2, 3]\nlayer_updates_per_iter: 0\n"
    );
    let replicated = file_with_replica();
    let eplb = json(&write(&replicated, ExportFormat::Eplb).text);
    assert_eq!(eplb["phy2log"], json("[[0,1,0,2]]"));
    assert_eq!(eplb["log2phy"], json("[[[0,2],[1,-1],[3,-1]]]"));
    assert_eq!(eplb["logcnt"], json("[[2,1,1]]"));
    let order = json(&write(&file, ExportFormat::Permutation).text);
    assert_eq!(order["layers"][0], json("{\"layer\":1,\"new_to_old\":[0,3,1,2]}"));
}

fn file_with_replica() -> PlacementFile {
    file(1, &[0], &[&[&[0, 1], &[0, 2]]])
}

#[test]
fn uneven_ranks_are_filled_with_the_hottest_experts() {
    for format in
        [ExportFormat::Sglang, ExportFormat::Vllm, ExportFormat::VllmAscend, ExportFormat::TensorrtLlm]
    {
        let message = refusal(&uneven(), format, &ExportOptions::default());
        assert!(message.contains("layer 0") && message.contains("3, 1 experts"), "{message}");
        assert!(message.contains("give the profile"), "says what to do: {message}");
    }
    // Loads per replica: 9, 5, 6, 1. Rank 1 holds 3; the hottest is 0, then 2 (0 has 4.5 with two replicas).
    let options = ExportOptions { counts: Some(vec![vec![9, 5, 6, 1]]), ..ExportOptions::default() };
    let filled = export(&uneven(), ExportFormat::Vllm, &options).unwrap();
    assert_eq!(json(&filled.text), json("[[0,1,2,3,0,2]]"));
    assert!(filled.notes[0].contains("2 slots"), "{:?}", filled.notes);
    let four = ExportOptions { slots_per_rank: Some(4), ..options.clone() };
    assert_eq!(
        json(&export(&uneven(), ExportFormat::Vllm, &four).unwrap().text),
        json("[[0,1,2,3,3,0,2,1]]")
    );
    let many = ExportOptions { slots_per_rank: Some(5), ..options.clone() };
    assert!(refusal(&uneven(), ExportFormat::Vllm, &many).contains("at most 4"));
    let few = ExportOptions { slots_per_rank: Some(2), ..options };
    assert!(refusal(&uneven(), ExportFormat::Vllm, &few).contains("needs 3"));
    let other = ExportOptions { counts: Some(vec![vec![1; 8]]), ..ExportOptions::default() };
    assert!(refusal(&uneven(), ExportFormat::Vllm, &other).contains("another model"));
}

#[test]
fn permutations_need_equal_ranks_without_replicas_and_whole_groups() {
    let none = ExportOptions::default();
    let message = refusal(&uneven(), ExportFormat::Permutation, &none);
    assert!(message.contains("rank 0 has 3 of 4 experts"), "{message}");
    assert!(
        refusal(&file_with_replica(), ExportFormat::Permutation, &none).contains("expert 0 has 2 replicas")
    );

    // 8 experts in 4 groups of 2 on 2 ranks: whole groups may go anywhere.
    let groups = ExportOptions { num_groups: Some(4), ..none };
    let whole = file(1, &[5], &[&[&[0, 1, 6, 7], &[2, 3, 4, 5]]]);
    let order = json(&export(&whole, ExportFormat::Permutation, &groups).unwrap().text);
    assert_eq!(order["layers"][0]["new_to_old"], json("[0,1,6,7,2,3,4,5]"));
    let torn = file(1, &[5], &[&[&[0, 1, 3, 7], &[2, 4, 5, 6]]]);
    let message = refusal(&torn, ExportFormat::Permutation, &groups);
    assert!(
        message.contains("layer 5 of the model") && message.contains("routing group 1 is torn"),
        "{message}"
    );
    // A group larger than a rank spreads over neighbours.
    let halves = ExportOptions { num_groups: Some(2), ..ExportOptions::default() };
    let spread = file(1, &[5], &[&[&[4, 7], &[5, 6], &[1, 2], &[0, 3]]]);
    assert!(export(&spread, ExportFormat::Permutation, &halves).is_ok());
    let apart = file(1, &[5], &[&[&[4, 7], &[1, 2], &[5, 6], &[0, 3]]]);
    assert!(refusal(&apart, ExportFormat::Permutation, &halves).contains("routing group 1 is torn"));
    let odd = ExportOptions { num_groups: Some(3), ..ExportOptions::default() };
    assert!(refusal(&whole, ExportFormat::Permutation, &odd).contains("do not divide 8"));
}

fn save(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join("map");
    std::fs::write(&path, text).unwrap();
    path
}

/// Everything that a format can carry comes back.
fn round_trip(file: &PlacementFile, format: ExportFormat) {
    let folder = tempfile::tempdir().unwrap();
    let path = save(folder.path(), &write(file, format).text);
    assert_eq!(detect_map(&path).unwrap(), Some(format));
    let options = MapOptions {
        num_ranks: Some(file.placement.topology().num_ranks()),
        num_nodes: Some(file.placement.topology().num_nodes()),
        layer_ids: Some(file.meta.layer_ids.clone()),
        ..MapOptions::default()
    };
    for format in [Some(format), None] {
        let back = import_placement(&path, format, &options).unwrap();
        assert_eq!(back.placement, file.placement, "{format:?}");
        assert_eq!(back.meta.layer_ids, file.meta.layer_ids, "{format:?}");
    }
}

const MAPS: [ExportFormat; 5] = [
    ExportFormat::Sglang,
    ExportFormat::Vllm,
    ExportFormat::VllmAscend,
    ExportFormat::TensorrtLlm,
    ExportFormat::Eplb,
];

proptest! {
    #[test]
    fn maps_come_back(
        seed in any::<u64>(), ranks in 1_usize..5, per_rank in 1_usize..4, layers in 1_usize..4, two_nodes in any::<bool>(),
        replicas in any::<bool>(),
    ) {
        let experts = if replicas { (ranks - 1) * per_rank + 1 } else { ranks * per_rank };
        prop_assume!(experts > 1);
        let mut state = seed;
        let mut next = |n: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % n
        };
        let mut tables = Vec::new();
        for _ in 0..layers {
            let mut order: Vec<u16> = (0..experts as u16).collect();
            for i in (1..experts).rev() {
                order.swap(i, next(i + 1));
            }
            let mut lists: Vec<Vec<u16>> = order.chunks(per_rank).map(<[u16]>::to_vec).collect();
            lists.resize(ranks, Vec::new());
            for list in &mut lists {
                while list.len() < per_rank {
                    let e = next(experts) as u16;
                    if !list.contains(&e) {
                        list.push(e);
                    }
                }
            }
            tables.push(LayerPlacement::from_rank_experts(experts, &lists).unwrap());
        }
        let nodes = if two_nodes && ranks % 2 == 0 { 2 } else { 1 };
        let placement = Placement::new(Topology::new(ranks, nodes).unwrap(), tables).unwrap();
        let meta = PlacementMeta {
            layer_ids: (0..layers as u32).map(|l| 2 * l + 1).collect(), method: "random".into(), ..PlacementMeta::default()
        };
        let file = PlacementFile::new(meta, placement).unwrap();
        for format in MAPS {
            round_trip(&file, format);
        }
        let text = file.to_json().unwrap();
        prop_assert_eq!(PlacementFile::parse(Path::new("x"), text.as_bytes()).unwrap(), file);
    }
}

#[test]
fn maps_that_engines_wrote_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let two = MapOptions { num_ranks: Some(2), ..MapOptions::default() };
    let path = save(folder.path(), "{\"expert_to_ep_rank\": [0, 1, 1, 0]}");
    let file = import_placement(&path, None, &MapOptions::default()).unwrap();
    assert_eq!(file.placement.layers()[0].experts_of(0), [0, 3]);
    let path = save(folder.path(), "[0, 3, 1, 2]");
    let file = import_placement(&path, None, &two).unwrap();
    assert_eq!(file.placement.layers()[0].experts_of(1), [1, 2]);
    // Two copies of expert 0 on rank 0, as a load balancer may do it.
    let path = save(folder.path(), "[[0, 0, 1], [0, 1, 1]]");
    let message = import_placement(&path, None, &two).unwrap_err().to_string();
    assert!(message.contains("3 slots cannot be divided over 2 ranks"), "{message}");
    let path = save(folder.path(), "[[0, 0, 1, 2, 3, 1]]");
    let file = import_placement(&path, None, &two).unwrap();
    assert_eq!(file.placement.layers()[0].experts_of(0), [0, 1]);
    assert!(file.meta.notes[0].contains("1 slots held a second copy"), "{:?}", file.meta.notes);
}

#[test]
fn maps_of_torch_files_are_read() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/engines/sglang_map.pt");
    assert_eq!(detect_map(&path).unwrap(), Some(ExportFormat::Sglang));
    let options = MapOptions { num_ranks: Some(4), layer_ids: Some(vec![1, 2]), ..MapOptions::default() };
    let file = import_placement(&path, None, &options).unwrap();
    assert_eq!(file.placement.layers()[0].experts_of(0), [1, 3]);
    assert_eq!(file.placement.layers()[1].experts_of(3), [2, 5]);
    assert_eq!((file.meta.num_hidden_layers, file.placement.num_experts()), (Some(3), 6));
}

#[test]
fn maps_that_lie_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let two = MapOptions { num_ranks: Some(2), ..MapOptions::default() };
    for (text, words) in [
        (
            "{\"physical_to_logical_map\": [[0,1,2,3],[0,1,2,2]]}",
            "layer 1: placement: no rank holds expert 3",
        ),
        ("{\"physical_to_logical_map\": [[0,1],[0,1,1]]}", "layer 1: 3 slots cannot be divided"),
        ("{\"physical_to_logical_map\": [[0,-1]]}", "-1 is not an expert id"),
        ("{\"physical_to_logical_map\": [[0,99999]]}", "the largest expert id is 99999"),
        ("{\"physical_to_logical_map\": [\"x\"]}", "layer 0: expected a list of expert ids"),
        ("{\"physical_to_logical_map\": []}", "has 0 layers"),
        ("{\"moe_layer_count\":2,\"layer_list\":[]}", "moe_layer_count is 2, layer_list has 0"),
        ("{\"phy2log\":[[0,1]],\"logcnt\":[[1,2]]}", "layer 0: logcnt disagrees"),
        ("{\"phy2log\":[[0,1]],\"log2phy\":[[[0],[0]]]}", "log2phy of expert 1 disagrees"),
        ("{\"phy2log\":[[0,1]],\"num_gpus\":4}", "num_gpus is 4, the option says 2"),
        ("num_slots: 4\ninitial_global_assignments:\n  0: [0, 1]\n", "num_slots is 4"),
        ("initial_global_assignments:\n  0: [0, 1]\n", "num_slots is missing"),
        ("num_slots: 2\ninitial_global_assignments:\n  0: [0, 1\n", "line 3: a list does not end"),
        ("{\"what\": 1}", "not an expert map"),
        ("[[0,1", "not an expert map"),
        ("", "not an expert map"),
    ] {
        let path = save(folder.path(), text);
        let message = import_placement(&path, None, &two).unwrap_err().to_string();
        assert!(message.contains(words), "{text}: {message}");
    }
    let path = save(folder.path(), "[[0,1,2,3]]");
    let message = import_placement(&path, None, &MapOptions::default()).unwrap_err().to_string();
    assert!(message.contains("give their number"), "{message}");
    let path = save(folder.path(), "{\"logical_count\": [[0,1]]}");
    let message = import_placement(&path, Some(ExportFormat::Sglang), &two).unwrap_err().to_string();
    assert!(message.contains("these are counts"), "{message}");
}
