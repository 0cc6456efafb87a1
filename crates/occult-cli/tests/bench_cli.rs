//! `occult bench exchange|layer|step` at tiny sizes: what their JSON says, and that the bytes on the wire are those of the
//! definition. No test looks at a time.

mod common;

use common::Lab;
use serde_json::Value;

const MODES: [&str; 5] = ["conventional", "dedup", "dedup-search", "prune-2", "prune-1"];

fn bench(command: &str) -> Value {
    serde_json::from_str(&Lab::new().ok(&format!("bench {command} --json")).stdout).unwrap()
}

fn modes(json: &Value) -> &[Value] {
    json["modes"].as_array().unwrap()
}

fn mode<'a>(json: &'a Value, name: &str) -> &'a Value {
    modes(json).iter().find(|m| m["mode"] == name).unwrap_or_else(|| panic!("no {name} in {json}"))
}

fn positive(value: &Value) {
    assert!(value.as_f64().is_some_and(|v| v > 0.0 && v.is_finite()), "{value}");
}

/// Bytes of all ranks' tokens when every token has all `e` experts, `d` wide: (forward, with backward).
fn everything(ranks: usize, tokens: usize, e: usize, d: usize, conventional: bool) -> (u64, u64) {
    let away = e - e / ranks;
    let rows = if conventional { away } else { ranks - 1 };
    // Rows there and back; an id of 2 bytes and a weight of 4 for each expert; two counts of 4 from each rank to each other.
    let forward = tokens * (2 * rows * d * 4 + away * 6) + ranks * (ranks - 1) * 8;
    // Rows there and back, and a gradient for each weight.
    let backward = tokens * (2 * rows * d * 4 + away * 4);
    (forward as u64, (forward + backward) as u64)
}

#[test]
fn a_layer_sends_the_bytes_of_the_definition() {
    for ranks in [1, 2, 4] {
        let size = "--tokens 12 --hidden 16 --ffn 8 --experts 8 --top-k 8 --reps 1 --overlap off --backward";
        let json = bench(&format!("layer --ranks {ranks} {size} --threads-per-rank 1"));
        for (name, conventional) in [("conventional", true), ("dedup", false), ("dedup-search", false)] {
            let m = mode(&json, name);
            let (forward, both) = everything(ranks, 12, 8, 16, conventional);
            assert_eq!(m["forward_wire_bytes"], forward, "{ranks} ranks, {name}");
            assert_eq!(m["wire_bytes"], both, "{ranks} ranks, {name}");
            assert_eq!(m["predicted_wire_bytes"], both, "{ranks} ranks, {name}");
        }
    }
}

#[test]
fn a_layer_tells_all_figures_of_all_modes() {
    for (ranks, dtype, tokens) in [(1, "f32", "40"), (2, "bf16", "41"), (4, "f16", "30,0,5,90")] {
        let size = "--hidden 16 --ffn 8 --experts 16 --top-k 4 --reps 2 --overlap on --chunks 2 --backward";
        let json = bench(&format!(
            "layer --ranks {ranks} --tokens {tokens} --dtype {dtype} {size} --threads-per-rank 1"
        ));
        positive(&json["peak_gflops"]);
        assert_eq!(json["ranks"], ranks);
        assert_eq!(modes(&json).iter().map(|m| m["mode"].as_str().unwrap()).collect::<Vec<_>>(), MODES);
        for m in modes(&json) {
            for key in
                ["forward_seconds", "forward_gflops", "forward_backward_seconds", "forward_backward_gflops"]
            {
                positive(&m[key]);
            }
            for pass in ["forward", "forward_backward"] {
                positive(&m[pass]["compute_seconds"]);
                positive(&m[pass]["predicted_seconds"]);
                positive(&m[pass]["planning_share"]);
                assert!(m[pass]["exposed_wire_seconds"].is_number(), "{m}");
                assert_eq!(m[pass]["steps"].as_array().unwrap().len(), 2);
            }
            assert!(m["wire_bytes"].is_u64() && m["wire_bytes"] == m["predicted_wire_bytes"], "{m}");
            assert_eq!(m["wire_bytes"] == 0, ranks == 1, "{m}");
        }
        let copies = |name| mode(&json, name)["copies_per_token"].as_f64().unwrap();
        assert!(copies("prune-1") == 1.0 && copies("prune-2") <= 2.0, "{json}");
        assert!(copies("dedup-search") <= copies("dedup") + 0.5, "{json}");
    }
}

#[test]
fn without_backward_its_figures_are_null() {
    let json = bench("layer --ranks 2 --tokens 9 --hidden 8 --ffn 8 --reps 1 --modes conventional,dedup");
    assert_eq!(modes(&json).len(), 2);
    for m in modes(&json) {
        assert!(m["forward_backward_seconds"].is_null() && m["forward_backward_gflops"].is_null(), "{m}");
        assert_eq!(m["wire_bytes"], m["forward_wire_bytes"]);
    }
}

#[test]
fn real_routing_is_there_without_files() {
    let json = bench("layer --ranks 4 --tokens 64 --hidden 8 --ffn 8 --reps 1 --routing bundled --layer 3");
    assert_eq!((&json["experts"], &json["top_k"]), (&32.into(), &4.into()));
    let copies = |name| mode(&json, name)["copies_per_token"].as_f64().unwrap();
    assert!(copies("dedup-search") < copies("dedup"), "{json}");
}

#[test]
fn balanced_pruning_loads_ranks_more_evenly() {
    let modes = "prune-1,prune-1-balanced,prune-2,prune-2-balanced";
    let json = bench(&format!(
        "layer --ranks 4 --tokens 256 --hidden 8 --ffn 8 --reps 1 --routing bundled --load-cap 1.05 --modes {modes}"
    ));
    for limit in [1, 2] {
        let [plain, balanced] = ["", "-balanced"].map(|how| mode(&json, &format!("prune-{limit}{how}")));
        let figure = |of: &Value, key: &str| of[key].as_f64().unwrap();
        assert!(figure(balanced, "copies_per_token") <= f64::from(limit), "{json}");
        let [plain, balanced] = [plain, balanced].map(|of| figure(of, "load_max_over_mean"));
        assert!(balanced < plain && balanced < 1.3, "at most {limit}: {plain}, balanced {balanced}");
    }
}

#[test]
fn two_levels_send_less_between_nodes_and_as_predicted() {
    let size = "--tokens 96 --hidden 16 --ffn 8 --experts 16 --top-k 4 --reps 1 --small-batch 0 --backward";
    let json = bench(&format!("layer --ranks 4 --nodes 2 {size} --overlap on --chunks 3"));
    for m in modes(&json) {
        assert_eq!(m["wire_bytes"], m["predicted_wire_bytes"]);
    }
}

#[test]
fn an_exchange_is_timed_alone_and_with_rows() {
    for ranks in [1, 2, 4] {
        let json = bench(&format!(
            "exchange --ranks {ranks} --tokens 12 --hidden 16 --ffn 8 --experts 8 --top-k 8 --reps 1 --bytes 8,4096"
        ));
        let sizes =
            json["all_to_all"].as_array().unwrap().iter().map(|r| r["bytes_per_peer"].as_u64().unwrap());
        assert_eq!(sizes.collect::<Vec<_>>(), [8, 4096]);
        for (name, conventional) in [("conventional", true), ("dedup", false)] {
            let m = mode(&json, name);
            assert_eq!(
                m["wire_bytes"],
                everything(ranks, 12, 8, 16, conventional).0,
                "{ranks} ranks, {name}"
            );
            assert_eq!(m["wire_bytes"], m["predicted_wire_bytes"]);
            positive(&m["seconds"]);
        }
    }
}

#[test]
fn a_step_has_the_bytes_of_its_layers() {
    for ranks in [1, 2, 4] {
        let json = bench(&format!(
            "step --ranks {ranks} --layers 3 --tokens 12 --hidden 16 --ffn 8 --experts 8 --top-k 8 --reps 1 --backward \
             --overlap off"
        ));
        for (name, conventional) in [("conventional", true), ("dedup", false)] {
            let m = mode(&json, name);
            assert_eq!(
                m["wire_bytes"],
                3 * everything(ranks, 12, 8, 16, conventional).1,
                "{ranks} ranks, {name}"
            );
            positive(&m["forward_backward_seconds"]);
        }
    }
}

#[test]
fn wrong_numbers_are_refused() {
    let lab = Lab::new();
    for (wrong, says) in [
        ("--tokens 0", "at least 1"),
        ("--ranks 3 --tokens 1,2", "2 numbers for 3 ranks"),
        ("--experts 4 --top-k 5", "--top-k 5"),
        ("--ranks 9 --experts 8 --top-k 2", "9 ranks for 8 experts"),
        ("--routing bundled --experts 64", "--experts"),
        ("--ranks 4 --nodes 3", "nodes"),
    ] {
        let error = lab.refused(2, &format!("bench layer {wrong}"));
        assert!(error.contains(says), "{wrong}: {error}");
    }
}
