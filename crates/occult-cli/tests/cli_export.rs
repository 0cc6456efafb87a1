//! `export`: maps of other engines, parsed and compared with the placement they are made from.

mod common;

use common::{Lab, Rows, Table, ints, list, says};
use serde_json::Value;

const FORMATS: [&str; 6] = ["sglang", "vllm", "vllm-ascend", "tensorrt-llm", "eplb", "permutation"];
const RANKS: usize = 4;
const EXPERTS: usize = 12;

/// Layers 1 and 3 of a model of 5 layers, equal experts per rank.
fn setup() -> (Lab, Table) {
    let lab = Lab::new();
    lab.write("rows.safetensors", Rows::new(41, 300, 2, EXPERTS, 3).safetensors());
    lab.ok("import rows.safetensors -o profile.safetensors --layer-ids 1,3 --hidden-layers 5");
    lab.ok("place profile.safetensors --ranks 4 --method random -o placement.json");
    let table = Table::of(&lab.json("placement.json"));
    assert_eq!(table.layer_ids, [1, 3]);
    (lab, table)
}

fn export(lab: &Lab, options: &str) -> Value {
    lab.ok(&format!("export placement.json -o map.json {options}"));
    lab.json("map.json")
}

/// Experts of each rank of a row of slots, `R / W` slots to a rank.
fn ranks_of(row: &[usize]) -> Vec<Vec<usize>> {
    assert_eq!(row.len() % RANKS, 0, "{row:?}");
    let sorted = |slots: &[usize]| {
        let mut experts = slots.to_vec();
        experts.sort_unstable();
        experts
    };
    row.chunks(row.len() / RANKS).map(sorted).collect()
}

/// Every rank has at least the experts of the placement; other slots hold other experts, and none twice.
#[track_caller]
fn check_padded(row: &[usize], ranks: &[Vec<usize>]) {
    for (slots, own) in ranks_of(row).iter().zip(ranks) {
        assert!(own.iter().all(|e| slots.contains(e)), "{slots:?} lacks some of {own:?}");
        assert!(slots.windows(2).all(|w| w[0] < w[1]), "twice on a rank: {slots:?}");
        assert!(slots.iter().all(|&e| e < EXPERTS), "{slots:?}");
    }
}

#[test]
fn sglang_has_a_row_for_every_hidden_layer() {
    let (lab, table) = setup();
    let map = export(&lab, "--format sglang");
    let keys: Vec<&String> = map.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["physical_to_logical_map"], "SGLang takes exactly one key");
    let rows = list(&map, "physical_to_logical_map");
    assert_eq!(rows.len(), 5);
    for (layer, row) in rows.iter().map(ints).enumerate() {
        assert_eq!(row.len(), EXPERTS);
        match table.layer_ids.iter().position(|&id| id == layer) {
            Some(i) => assert_eq!(ranks_of(&row), table.layers[i]),
            // Dense layers: any row of experts.
            None => assert!(row.iter().all(|&e| e < EXPERTS)),
        }
    }
}

#[test]
fn vllm_has_the_moe_layers_only() {
    let (lab, table) = setup();
    let map = export(&lab, "--format vllm");
    let rows: Vec<Vec<usize>> = map.as_array().unwrap().iter().map(ints).collect();
    assert_eq!(rows.iter().map(|r| ranks_of(r)).collect::<Vec<_>>(), table.layers);
}

#[test]
fn vllm_ascend_lists_devices() {
    let (lab, table) = setup();
    let map = export(&lab, "--format vllm-ascend");
    assert_eq!(map["moe_layer_count"], 2);
    let layers = list(&map, "layer_list");
    assert_eq!(layers.len(), 2);
    for (i, layer) in layers.iter().enumerate() {
        assert_eq!((&layer["layer_id"], &layer["device_count"]), (&i.into(), &RANKS.into()));
        let devices = list(layer, "device_list");
        assert_eq!(devices.len(), RANKS);
        for (rank, device) in devices.iter().enumerate() {
            assert_eq!(device["device_id"], rank);
            let mut experts = ints(&device["device_expert"]);
            experts.sort_unstable();
            assert_eq!(experts, table.layers[i][rank]);
        }
    }
}

#[test]
fn tensorrt_llm_is_a_load_balancer_yaml() {
    let (lab, table) = setup();
    let text = lab.ok("export placement.json --format tensorrt-llm").stdout;
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "num_slots: 12");
    assert_eq!(lines[1], "initial_global_assignments:");
    for (i, id) in table.layer_ids.iter().enumerate() {
        let (key, row) = lines[2 + i].split_once(": ").unwrap();
        assert_eq!(key, format!("  {id}"), "the model's layer number");
        assert_eq!(ranks_of(&ints(&serde_json::from_str(row).unwrap())), table.layers[i]);
    }
    assert_eq!(lines[4..], ["layer_updates_per_iter: 0"], "static");
}

#[track_caller]
fn check_eplb(map: &Value, table: &Table) {
    assert_eq!((&map["num_gpus"], &map["num_nodes"]), (&RANKS.into(), &table.nodes.into()));
    for (i, row) in list(map, "phy2log").iter().map(ints).enumerate() {
        check_padded(&row, &table.layers[i]);
        let counts = ints(&map["logcnt"][i]);
        assert_eq!(counts.iter().sum::<usize>(), row.len());
        for (expert, &count) in counts.iter().enumerate() {
            let slots: Vec<i64> =
                map["log2phy"][i][expert].as_array().unwrap().iter().map(|v| v.as_i64().unwrap()).collect();
            let real: Vec<usize> = slots.iter().filter(|&&p| p >= 0).map(|&p| p as usize).collect();
            assert_eq!(real.len(), count);
            assert!(real.iter().all(|&p| row[p] == expert), "expert {expert} of {row:?} is not at {real:?}");
            assert!(slots[count..].iter().all(|&p| p == -1), "{slots:?}");
        }
    }
}

#[test]
fn eplb_tables_agree_with_each_other() {
    let (lab, table) = setup();
    check_eplb(&export(&lab, "--format eplb"), &table);
    // With replicas the tables get wider.
    lab.ok("place profile.safetensors --ranks 4 --nodes 2 --method eplb --replicas 4 -o placement.json");
    let table = Table::of(&lab.json("placement.json"));
    let map = export(&lab, "--format eplb");
    check_eplb(&map, &table);
    assert!(ints(&map["logcnt"][0]).iter().any(|&n| n > 1));
}

#[test]
fn permutation_gives_blocks_of_experts_to_ranks() {
    let (lab, table) = setup();
    let map = export(&lab, "--format permutation");
    for (i, layer) in list(&map, "layers").iter().enumerate() {
        assert_eq!(layer["layer"], table.layer_ids[i]);
        let order = ints(&layer["new_to_old"]);
        let mut all = order.clone();
        all.sort_unstable();
        assert_eq!(all, Vec::from_iter(0..EXPERTS), "a permutation");
        assert_eq!(ranks_of(&order), table.layers[i], "what contiguous blocks then hold");
    }
    // A checkpoint permuted so, placed contiguously, has the traffic of the placement: permute the routing and see.
    let rows = Rows::new(41, 300, 2, EXPERTS, 3).ids_only();
    let mut permuted = rows.clone();
    for (i, id) in permuted.ids.iter_mut().enumerate() {
        let order = ints(&list(&map, "layers")[i / rows.k % rows.layers]["new_to_old"]);
        *id = order.iter().position(|&old| old == usize::from(*id)).unwrap() as u16;
    }
    lab.write("permuted.safetensors", permuted.safetensors());
    lab.ok("import permuted.safetensors -o permuted_profile.safetensors");
    let stats = lab.figures("stats permuted_profile.safetensors --ranks 4");
    let traffic = lab.figures("traffic profile.safetensors placement.json");
    for key in ["copies_per_token", "load_max_over_mean", "intra_fraction"] {
        assert_eq!(stats["mean"][key], traffic["mean"][key], "{key}");
    }
}

#[test]
fn permutations_of_group_limited_routers_keep_groups_whole() {
    let (lab, _) = setup();
    says(&lab.refused(1, "export placement.json --format permutation --groups 6"), &["layer 0", "group"]);
    lab.ok("place profile.safetensors --ranks 4 --equal --keep-groups 4 --load-cap 4 -o placement.json");
    let map = export(&lab, "--format permutation --groups 4");
    for layer in list(&map, "layers") {
        let order = ints(&layer["new_to_old"]);
        assert!(order.chunks(3).all(|g| g.iter().all(|e| e / 3 == g[0] / 3)), "{order:?}");
    }
    says(&lab.refused(1, "export placement.json --format permutation --groups 5"), &["5", "12 experts"]);
}

#[test]
fn engines_need_equal_slots_so_free_ones_hold_replicas_of_hot_experts() {
    // Every token uses expert 5, so its rank has room for little else.
    let mut rows = Rows::new(41, 300, 2, EXPERTS, 3).ids_only();
    rows.ids.chunks_mut(3).filter(|row| !row.contains(&5)).for_each(|row| row[0] = 5);
    let lab = Lab::with(&rows);
    lab.ok("place profile.safetensors --ranks 4 --load-cap 1.4 --restarts 4 -o placement.json");
    let table = Table::of(&lab.json("placement.json"));
    let sizes: Vec<usize> = table.layers.iter().flatten().map(Vec::len).collect();
    assert!(sizes.iter().any(|&n| n != 3), "this test needs an uneven placement: {sizes:?}");
    for format in FORMATS {
        let message = lab.refused(1, &format!("export placement.json --format {format} -o map.json"));
        says(&message, &["placement.json", format, "layer"]);
    }
    let most = *sizes.iter().max().unwrap();
    for (options, per_rank) in [("", most), ("--slots-per-rank 8", 8)] {
        let map = export(&lab, &format!("--format vllm --profile profile.safetensors {options}"));
        for (row, ranks) in map.as_array().unwrap().iter().zip(&table.layers) {
            assert_eq!(ints(row).len(), per_rank * RANKS);
            check_padded(&ints(row), ranks);
        }
    }
    check_eplb(&export(&lab, "--format eplb --profile profile.safetensors"), &table);
    let yaml = lab.ok("export placement.json --format tensorrt-llm --profile profile.safetensors").stdout;
    assert_eq!(yaml.lines().next().unwrap(), format!("num_slots: {}", most * RANKS));
    // The engine is started with that many redundant experts.
    let notes = lab.ok("export placement.json --format sglang --profile profile.safetensors").stderr;
    let redundant = most * RANKS - EXPERTS;
    says(&notes, &[&format!("--ep-num-redundant-experts {redundant}"), "--ep-size 4"]);
    says(&lab.refused(1, "export placement.json --format vllm --slots-per-rank 1"), &["slots per rank"]);
}

#[test]
fn hidden_layers_are_known_or_given() {
    let lab = Lab::with(&Rows::new(42, 64, 2, EXPERTS, 3));
    lab.ok("place profile.safetensors --method contiguous -o placement.json");
    let unknown = lab.ok("export placement.json --format sglang -o map.json");
    assert_eq!(list(&lab.json("map.json"), "physical_to_logical_map").len(), 2);
    says(&unknown.stderr, &["hidden layers is not known"]);
    let map = export(&lab, "--format sglang --hidden-layers 7");
    assert_eq!(list(&map, "physical_to_logical_map").len(), 7);
    says(&lab.refused(1, "export placement.json --format sglang --hidden-layers 1"), &["1", "layer 1"]);
}

#[test]
fn every_export_is_recognised_by_inspect() {
    let (lab, _) = setup();
    for format in FORMATS {
        lab.ok(&format!("export placement.json --format {format} -o map"));
        let facts = lab.figures("inspect map");
        assert_eq!((facts["kind"].as_str(), facts["format"].as_str()), (Some("expert-map"), Some(format)));
    }
}
