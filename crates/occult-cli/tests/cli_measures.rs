//! `stats` and `traffic`: every figure against its definition, computed here from the rows.

mod common;

use common::{Lab, Rows, Table, close, ints, list, number, says};
use serde_json::Value;

fn matrix(value: &Value) -> Vec<Vec<f64>> {
    let row = |row: &Value| row.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    value.as_array().unwrap().iter().map(row).collect()
}

/// `n` choose `k`.
fn choose(n: usize, k: usize) -> f64 {
    (0..k).map(|i| (n - i) as f64 / (i + 1) as f64).product()
}

/// `mean` has the mean over layers of what every layer has.
#[track_caller]
fn check_mean(figures: &Value) {
    let layers = list(figures, "layers");
    for key in ["copies_per_token", "remote_copies_per_token", "load_max_over_mean", "intra_fraction"] {
        let sum: f64 = layers.iter().map(|l| number(l, key)).sum();
        close(number(&figures["mean"], key), sum / layers.len() as f64, key);
    }
}

#[test]
fn stats_are_those_of_experts_in_blocks() {
    let rows = Rows::new(5, 500, 3, 16, 4);
    let lab = Lab::with(&rows);
    for ranks in [1, 2, 4, 8, 16] {
        let figures = lab.figures(&format!("stats profile.safetensors --ranks {ranks}"));
        let table = Table::contiguous(16, ranks, 3);
        assert_eq!(list(&figures, "layers").len(), 3);
        for (layer, found) in list(&figures, "layers").iter().enumerate() {
            let expected = table.measure_sets(layer, &rows.sets(layer));
            expected.check(found, ranks);
            assert_eq!(
                ints(&found["load_per_rank"]),
                Vec::from_iter(expected.load.iter().map(|&n| n as usize))
            );
            let (w, k) = (ranks as f64, 4.0_f64);
            close(number(found, "copies_optimum"), (k * w / 16.0).ceil(), "optimum");
            close(number(found, "copies_upper_bound"), k.min(w), "upper bound");
            let missed = if 16 - 16 / ranks < 4 { 0.0 } else { choose(16 - 16 / ranks, 4) / choose(16, 4) };
            close(number(found, "copies_uniform"), w * (1.0 - missed), "uniform");
            close(number(found, "conventional_copies_per_token"), 4.0, "conventional");
            let touched: std::collections::BTreeSet<usize> = rows.sets(layer).into_iter().flatten().collect();
            close(number(found, "experts_touched"), touched.len() as f64, "experts touched");
        }
        check_mean(&figures);
    }
}

/// 64 experts, top-8, 4 ranks: the paper's 3.66.
#[test]
fn uniform_routing_of_olmoe_on_four_ranks() {
    let lab = Lab::with(&Rows::new(5, 64, 1, 64, 8).ids_only());
    let uniform = number(&lab.figures("stats profile.safetensors --ranks 4")["mean"], "copies_uniform");
    assert!((uniform - 3.66).abs() < 0.005, "{uniform}");
}

#[test]
fn experts_that_do_not_divide_ranks_are_measured_too() {
    let rows = Rows::new(5, 300, 1, 60, 4);
    let lab = Lab::with(&rows);
    lab.ok("place profile.safetensors --ranks 8 --method contiguous -o placement.json");
    let table = Table::of(&lab.json("placement.json"));
    let mut sizes: Vec<usize> = table.layers[0].iter().map(Vec::len).collect();
    assert_eq!(table.layers[0].concat(), Vec::from_iter(0..60), "blocks of consecutive experts");
    sizes.sort_unstable();
    assert_eq!(sizes, [7, 7, 7, 7, 8, 8, 8, 8]);
    let expected = table.measure_sets(0, &rows.sets(0));
    for command in ["stats profile.safetensors --ranks 8", "traffic profile.safetensors placement.json"] {
        expected.check(&lab.figures(command)["layers"][0], 8);
    }
}

#[test]
fn nodes_count_their_own_copies() {
    let rows = Rows::new(6, 400, 2, 16, 4);
    let lab = Lab::with(&rows);
    let figures = lab.figures("stats profile.safetensors --ranks 8 --nodes 2");
    let mut table = Table::contiguous(16, 8, 2);
    table.nodes = 2;
    for (layer, found) in list(&figures, "layers").iter().enumerate() {
        let expected = table.measure_sets(layer, &rows.sets(layer));
        expected.check(found, 8);
        assert!(expected.node_copies < expected.copies);
        close(number(found, "remote_node_copies_per_token"), expected.node_copies / 2.0, "remote nodes");
        let uniform = 2.0 * (1.0 - choose(8, 4) / choose(16, 4));
        close(number(found, "node_copies_uniform"), uniform, "uniform nodes");
    }
    says(&lab.ok("stats profile.safetensors --ranks 8 --nodes 2").stdout, &["node copies"]);
}

#[test]
fn rows_that_stand_for_many_tokens_count_that_often() {
    let lab = Lab::new();
    let rows = [(vec![0, 1], 10_u64), (vec![2, 7], 1), (vec![3, 4], 5), (vec![0, 6], 4)];
    let mut csv = "domain,layer,e0,e1,occurrences\n".to_owned();
    for (set, n) in &rows {
        csv.push_str(&format!("prose,7,{},{},{n}\n", set[0], set[1]));
    }
    lab.write("pairs.csv", csv);
    lab.ok("import pairs.csv -o profile.safetensors");
    let figures = lab.figures("stats profile.safetensors --ranks 4");
    let found = &figures["layers"][0];
    assert_eq!(found["layer"], 7);
    close(number(found, "tokens"), 20.0, "tokens");
    Table::contiguous(8, 4, 1).measure(0, &rows).check(found, 4);
}

/// Experts are connected at threshold t when they were chosen together at least t times as often as the strongest pair.
#[test]
fn the_connected_subgraph_curve_is_that_of_the_definition() {
    let rows = Rows::new(7, 200, 1, 12, 3);
    let lab = Lab::with(&rows);
    let figures = lab.figures("stats profile.safetensors --ranks 4 --subgraph-points 11");
    let mut pairs = vec![[0_u32; 12]; 12];
    for set in rows.sets(0) {
        set.iter().for_each(|&a| set.iter().filter(|&&b| b != a).for_each(|&b| pairs[a][b] += 1));
    }
    let max = f64::from(*pairs.iter().flatten().max().unwrap());
    let points = list(&figures["layers"][0], "connected_subgraphs");
    assert_eq!(points.len(), 11);
    let mut before = 0;
    for (i, point) in points.iter().enumerate() {
        let threshold = i as f64 / 10.0;
        close(number(point, "threshold"), threshold, "threshold");
        // Merge labels until nothing changes.
        let mut label = Vec::from_iter(0..12);
        for _ in 0..12 {
            for a in 0..12 {
                for b in 0..12 {
                    if pairs[a][b] > 0 && f64::from(pairs[a][b]) / max >= threshold {
                        label[a] = label[a].min(label[b]);
                    }
                }
            }
        }
        let sizes = Vec::from_iter((0..12).map(|l| label.iter().filter(|&&x| x == l).count()));
        let found = [point["num_subgraphs"].clone(), point["largest"].clone(), point["num_alone"].clone()];
        let num = sizes.iter().filter(|&&n| n > 0).count();
        let alone = sizes.iter().filter(|&&n| n == 1).count();
        assert_eq!(found.map(|v| v.as_u64().unwrap() as usize), [num, *sizes.iter().max().unwrap(), alone]);
        assert!(num >= before);
        before = num;
    }
}

#[test]
fn traffic_of_a_placement_is_that_of_the_definition() {
    let rows = Rows::new(8, 480, 2, 16, 4);
    let lab = Lab::with(&rows);
    lab.ok("place profile.safetensors --ranks 4 --method random --seed 3 -o placement.json");
    let table = Table::of(&lab.json("placement.json"));
    let figures = lab.figures("traffic profile.safetensors placement.json --hidden 100 --dtype f32");
    for (layer, found) in list(&figures, "layers").iter().enumerate() {
        let expected = table.measure_sets(layer, &rows.sets(layer));
        expected.check(found, 4);
        // Rows that rank `from` sends to `to`: a quarter of the tokens that visit `to`, wherever they live.
        let visits = |to: usize| {
            let rank_of = table.rank_of(layer);
            rows.sets(layer).iter().filter(|s| s.iter().any(|&e| rank_of[e] == to)).count() as f64
        };
        let sent = matrix(&found["rows_per_rank_pair"]);
        let bytes = matrix(&found["bytes_per_rank_pair"]);
        for from in 0..4 {
            for to in 0..4 {
                close(sent[from][to], visits(to) / 4.0, "rows");
                close(bytes[from][to], sent[from][to] * 100.0 * 4.0, "bytes");
            }
        }
        let total: f64 = sent.iter().flatten().sum();
        close(total, 480.0 * number(found, "copies_per_token"), "rows add up to copies");
        let off_diagonal = total - (0..4).map(|r| sent[r][r]).sum::<f64>();
        close(off_diagonal, 480.0 * number(found, "remote_copies_per_token"), "remote rows");
        let b = &found["bytes"];
        close(number(b, "dispatch_row_bytes"), off_diagonal * 400.0, "dispatch bytes");
        close(number(b, "combine_row_bytes"), off_diagonal * 400.0, "combine bytes");
        // The conventional exchange: a row for every expert, three of four on other ranks.
        close(number(b, "conventional_dispatch_row_bytes"), 480.0 * 4.0 * 0.75 * 400.0, "conventional");
        let histogram = ints(&found["ranks_per_token_histogram"]);
        assert_eq!(histogram.iter().sum::<usize>(), 480);
        let weighted: usize = histogram.iter().enumerate().map(|(ranks, n)| ranks * n).sum();
        assert_eq!(weighted, (480.0 * expected.copies).round() as usize, "entry n: tokens on n ranks");
    }
    check_mean(&figures);
}

#[test]
fn bytes_follow_hidden_size_and_type() {
    let lab = Lab::with(&Rows::new(8, 64, 1, 8, 2));
    lab.ok("place profile.safetensors --ranks 4 --method contiguous -o placement.json");
    let bytes = |options: &str| {
        let figures = lab.figures(&format!("traffic profile.safetensors placement.json {options}"));
        number(&figures["layers"][0]["bytes"], "dispatch_row_bytes")
    };
    let base = bytes("--hidden 1024 --dtype f32");
    for (options, factor) in [
        ("--hidden 1024 --dtype bf16", 0.5),
        ("--hidden 1024 --dtype f16", 0.5),
        ("--hidden 1024 --dtype fp8", 0.25),
        ("--hidden 1024 --dtype int8", 0.25),
        ("--hidden 3072 --dtype f32", 3.0),
    ] {
        close(bytes(options), factor * base, options);
    }
}

/// With home ranks known, rows are counted exactly: token `t` of `T` lives on rank `t W / T`.
#[test]
fn tokens_in_blocks_are_counted_exactly() {
    let rows = Rows::new(9, 120, 1, 8, 2);
    let lab = Lab::with(&rows);
    lab.ok("place profile.safetensors --ranks 4 --method random -o placement.json");
    let rank_of = Table::of(&lab.json("placement.json")).rank_of(0);
    let mut expected = vec![vec![0.0; 4]; 4];
    for (t, set) in rows.sets(0).iter().enumerate() {
        for (to, rows) in expected[t / 30].iter_mut().enumerate() {
            *rows += f64::from(u8::from(set.iter().any(|&e| rank_of[e] == to)));
        }
    }
    let figures = lab.figures("traffic profile.safetensors placement.json --home blocks");
    assert_eq!(matrix(&figures["layers"][0]["rows_per_rank_pair"]), expected);
    let home: f64 = (0..4).map(|r| expected[r][r]).sum();
    let total: f64 = expected.iter().flatten().sum();
    close(number(&figures["mean"], "remote_copies_per_token"), (total - home) / 120.0, "remote");
}

const CLUSTER: &str = "\
nodes = 1
ranks_per_node = 4
[intra]
bandwidth_gb_per_s = 10
latency_us = 0
[compute]
tflops = 1e-3
memory_bandwidth_gb_per_s = 1e6
";

#[test]
fn times_are_predicted_for_presets_and_cluster_files() {
    let rows = Rows::new(8, 256, 1, 16, 4);
    let lab = Lab::with(&rows);
    lab.ok("place profile.safetensors --ranks 4 --method contiguous -o placement.json");
    lab.ok("place profile.safetensors --ranks 16 --nodes 2 --method contiguous -o two.json");
    let time = |options: &str| {
        let figures = lab.figures(&format!("traffic profile.safetensors {options}"));
        let predicted = list(&figures, "predicted");
        assert!(!predicted.is_empty(), "{options}");
        predicted.iter().map(|p| number(p, "forward_seconds")).fold(f64::INFINITY, f64::min)
    };
    let pcie = time("placement.json --cluster 8xa6000-pcie");
    let nvlink = time("placement.json --cluster 8xh100-nvlink");
    assert!(0.0 < nvlink && nvlink < pcie, "{nvlink} {pcie}");
    assert!(time("two.json --cluster 16x8xh100-400g") > 0.0);
    // Products are all that takes time here: three matrices of hidden x ffn, two operations per element, busiest rank.
    lab.write("slow.toml", CLUSTER);
    let load = *Table::contiguous(16, 4, 1).measure_sets(0, &rows.sets(0)).load.iter().max().unwrap();
    let options = "placement.json --cluster slow.toml --hidden 64 --ffn 32 --step-tokens 256";
    let figures = lab.figures(&format!("traffic profile.safetensors {options}"));
    let compute = number(&list(&figures, "predicted")[0], "forward_compute_seconds");
    close(compute, load as f64 * 2.0 * 3.0 * 64.0 * 32.0 / 1e9, "seconds of the products");
    let text = lab.ok(&format!("traffic profile.safetensors {options} --explain")).stdout;
    says(&text, &["Predicted time", "slow.toml", "How the time of layer 0 comes about"]);
}

#[test]
fn bad_cluster_files_are_named_with_line_or_key() {
    let lab = Lab::with(&Rows::new(8, 64, 1, 16, 4));
    lab.ok("place profile.safetensors --ranks 4 --method contiguous -o placement.json");
    for (from, to, says_what) in [
        ("nodes = 1", "nodes = = 1", "line 1"),
        ("latency_us", "latency_ms", "latency_ms"),
        ("= 10", "= -10", "intra.bandwidth_gb_per_s"),
        ("tflops = 1e-3\n", "", "tflops"),
        ("nodes = 1", "nodes = 2", "inter"),
    ] {
        assert!(CLUSTER.contains(from));
        lab.write("bad.toml", CLUSTER.replacen(from, to, 1));
        let message = lab.refused(1, "traffic profile.safetensors placement.json --cluster bad.toml");
        says(&message, &["bad.toml", says_what]);
    }
    let message = lab.refused(2, "traffic profile.safetensors placement.json --cluster 8xa100");
    says(&message, &["8xa100", "8xa6000-pcie", "8xh100-nvlink", "16x8xh100-400g"]);
}

#[test]
fn a_placement_for_another_model_is_refused_everywhere() {
    let lab = Lab::with(&Rows::new(8, 64, 2, 16, 4));
    for (name, rows, differs) in [
        ("experts", Rows::new(8, 64, 2, 8, 4), ["8 experts", "16"]),
        ("layers", Rows::new(8, 64, 3, 16, 4), ["3 layers", "2"]),
        ("ids", Rows::new(8, 64, 2, 16, 4).with("layer_ids", "[0,5]"), ["layer 5", "layer 1"]),
    ] {
        lab.write("other.safetensors", rows.safetensors());
        lab.ok("import other.safetensors -o other_profile.safetensors");
        let file = format!("{name}.json");
        lab.ok(&format!("place other_profile.safetensors --method contiguous -o {file}"));
        for command in [
            format!("traffic profile.safetensors {file}"),
            format!("prune profile.safetensors {file} --max-ranks 2"),
            format!("report profile.safetensors {file} --restarts 1"),
            format!("export {file} --format vllm --profile profile.safetensors"),
        ] {
            let message = lab.refused(1, &command);
            says(&message, &[&file, "another model", differs[0], differs[1]]);
        }
    }
}

/// Loads of two layers of eight experts.
const LOADS: &str = "[[90,132,40,61,104,165,39,4],[20,107,104,64,19,197,187,157]]";

#[test]
fn counts_only_profiles_say_what_cannot_be_computed() {
    let lab = Lab::new();
    lab.write("loads.json", LOADS);
    let made = lab.ok("import loads.json --format eplb -o profile.safetensors");
    says(&made.stdout, &["counts only"]);
    let figures = lab.figures("stats profile.safetensors --ranks 4");
    for found in list(&figures, "layers").iter().chain([&figures["mean"]]) {
        for key in ["copies_per_token", "remote_copies_per_token", "intra_fraction"] {
            assert!(found.as_object().unwrap().contains_key(key), "{key} is there");
            assert!(found[key].is_null(), "{key} cannot be known: {found}");
        }
    }
    close(number(&figures["layers"][0], "load_max_over_mean"), (104.0 + 165.0) * 4.0 / 635.0, "load");
    close(number(&figures["layers"][1], "load_max_over_mean"), (187.0 + 157.0) * 4.0 / 855.0, "load");
    says(list(&figures, "warnings")[0].as_str().unwrap(), &["counts only", "copies per token"]);
    let text = lab.ok("stats profile.safetensors --ranks 4");
    says(&text.stderr, &["warning", "counts only"]);
    assert!(!text.stdout.contains("NaN") && !text.stdout.contains("null"), "{text:?}");

    for method in ["search", "greedy", "apart"] {
        let message =
            lab.refused(1, &format!("place profile.safetensors --method {method} -o placement.json"));
        says(&message, &["profile.safetensors", method, "counts"]);
    }
    for method in ["contiguous", "random", "eplb"] {
        lab.ok(&format!("place profile.safetensors --method {method} -o placement.json"));
        let table = Table::of(&lab.json("placement.json"));
        let figures = lab.figures("traffic profile.safetensors placement.json");
        let rank_of = table.rank_of(0);
        let mut load = [0; 4];
        let counts = [90, 132, 40, 61, 104, 165, 39, 4];
        counts.iter().zip(rank_of).for_each(|(n, r)| load[r] += n);
        assert_eq!(ints(&figures["layers"][0]["load_per_rank"]), load);
        assert!(figures["mean"]["copies_per_token"].is_null());
        assert!(figures["layers"][0]["rows_per_rank_pair"].is_null());
    }
    // EPLB looks at load alone, so it must beat blocks here.
    let load = |method: &str| {
        let figures = lab.figures(&format!("place profile.safetensors --method {method}"));
        number(&figures["mean"], "load_max_over_mean")
    };
    assert!(load("eplb") < load("contiguous"));
    let message = lab.refused(1, "prune profile.safetensors placement.json --max-ranks 2");
    says(&message, &["profile.safetensors"]);
}
