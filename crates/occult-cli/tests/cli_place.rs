//! `place`: every method keeps its limits, figures are those of the file it wrote, and the same seed gives the same bytes.

mod common;

use common::{Lab, Rows, Table, close, ints, list, number, says};

/// `place profile.safetensors OPTIONS -o placement.json`: what it printed and what it wrote.
fn place(lab: &Lab, options: &str) -> (serde_json::Value, Table) {
    let figures = lab.figures(&format!("place profile.safetensors {options} -o placement.json"));
    assert_eq!(figures["output"], "placement.json");
    (figures, Table::of(&lab.json("placement.json")))
}

#[test]
fn every_method_places_every_expert_and_reports_what_it_wrote() {
    let rows = Rows::new(11, 600, 3, 24, 4);
    let lab = Lab::with(&rows);
    for method in ["contiguous", "random", "greedy", "eplb", "search", "apart"] {
        for (ranks, nodes) in [(1, 1), (4, 1), (8, 2), (24, 3)] {
            let options = format!("--method {method} --ranks {ranks} --nodes {nodes} --restarts 2");
            let (figures, table) = place(&lab, &options);
            assert_eq!((table.experts, table.ranks, table.nodes), (24, ranks, nodes));
            assert_eq!(table.layer_ids, [0, 1, 2]);
            assert_eq!(figures["method"], method);
            for (layer, found) in list(&figures, "layers").iter().enumerate() {
                table.measure_sets(layer, &rows.sets(layer)).check(found, ranks);
                let sizes: Vec<usize> = table.layers[layer].iter().map(Vec::len).collect();
                assert_eq!(ints(&found["experts_per_rank"]), sizes);
                assert!(sizes.iter().all(|&n| n > 0), "{method} left a rank empty: {sizes:?}");
                if method != "search" {
                    assert!(sizes.iter().all(|&n| n == 24 / ranks), "{method}: {sizes:?}");
                }
            }
            for key in ["copies_per_token", "remote_copies_per_token", "load_max_over_mean", "intra_fraction"]
            {
                let layers = list(&figures, "layers");
                let mean = layers.iter().map(|l| number(l, key)).sum::<f64>() / 3.0;
                close(number(&figures["mean"], key), mean, key);
            }
            // `traffic` agrees.
            let traffic = lab.figures("traffic profile.safetensors placement.json");
            close(
                number(&traffic["mean"], "copies_per_token"),
                number(&figures["mean"], "copies_per_token"),
                method,
            );
            assert_eq!(traffic["layers"][2]["load_per_rank"], figures["layers"][2]["load_per_rank"]);
        }
    }
}

#[test]
fn without_an_output_nothing_is_written() {
    let lab = Lab::with(&Rows::new(11, 64, 1, 8, 2));
    let before = lab.names();
    let text = lab.ok("place profile.safetensors --method greedy").stdout;
    says(&text, &["greedy on 4 ranks", "copies/token", "Not saved"]);
    assert_eq!(lab.names(), before);
}

/// On routing with topics: fewer copies than blocks of experts, and than Algorithm 1 where loads are the same.
#[test]
fn search_beats_the_others_on_real_routing() {
    let lab = Lab::with_bundled();
    let mean = |options: &str| {
        let figures = lab.figures(&format!("place profile.safetensors --max-tokens 2000 {options}"));
        (number(&figures["mean"], "copies_per_token"), number(&figures["mean"], "load_max_over_mean"))
    };
    let contiguous = mean("--method contiguous");
    let greedy = mean("--method greedy");
    let search = mean("--restarts 2 --load-cap 1.25");
    let capped = mean("--restarts 2 --load-cap 1.1");
    assert!(greedy.0 < contiguous.0 - 0.5 && greedy.1 > 1.5, "{greedy:?} {contiguous:?}");
    assert!(search.0 < greedy.0 && search.1 < 1.2501, "{search:?} {greedy:?}");
    assert!(search.0 < capped.0 && capped.0 < contiguous.0 && capped.1 < 1.1001, "{capped:?}");
}

/// Algorithm 1 of the paper, by hand: rank 0 starts with the strongest pair; each later rank with the unused expert of
/// smallest mean P to the used ones; then rank after rank is filled with the unused expert of highest mean P to it.
#[test]
fn greedy_is_algorithm_1() {
    let rows = Rows::new(12, 700, 2, 12, 3);
    let lab = Lab::with(&rows);
    let (_, table) = place(&lab, "--method greedy --ranks 3");
    for layer in 0..2 {
        let mut pairs = vec![vec![0_u32; 12]; 12];
        for set in rows.sets(layer) {
            set.iter().for_each(|&a| set.iter().filter(|&&b| b != a).for_each(|&b| pairs[a][b] += 1));
        }
        let weight = |e: usize, group: &[usize]| {
            f64::from(group.iter().map(|&g| pairs[e][g]).sum::<u32>()) / group.len() as f64
        };
        let all = || (0..12).flat_map(|a| (a + 1..12).map(move |b| (a, b)));
        // The first of equals, as everywhere.
        let strongest = all().map(|(a, b)| pairs[a][b]).max().unwrap();
        let (a, b) = all().find(|&(a, b)| pairs[a][b] == strongest).unwrap();
        let mut ranks = vec![vec![a, b]];
        let unused = |ranks: &[Vec<usize>]| Vec::from_iter((0..12).filter(|e| !ranks.concat().contains(e)));
        for _ in 1..3 {
            let used = ranks.concat();
            let candidates = unused(&ranks);
            let least =
                candidates.iter().copied().min_by(|&x, &y| weight(x, &used).total_cmp(&weight(y, &used)));
            ranks.push(vec![least.unwrap()]);
        }
        for rank in 0..3 {
            while ranks[rank].len() < 4 {
                let candidates = unused(&ranks).into_iter().rev();
                let group = ranks[rank].clone();
                let most = candidates.max_by(|&x, &y| weight(x, &group).total_cmp(&weight(y, &group)));
                ranks[rank].push(most.unwrap());
            }
            ranks[rank].sort_unstable();
        }
        assert_eq!(table.layers[layer], ranks, "layer {layer}");
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_on_any_number_of_threads() {
    let lab = Lab::with(&Rows::new(13, 500, 4, 24, 4));
    let file = |options: &str| {
        lab.ok(&format!("place profile.safetensors --restarts 2 {options} -o placement.json"));
        lab.read("placement.json")
    };
    for options in ["--method search", "--method random", "--method greedy", "--replicas 4", "--nodes 2"] {
        let first = file(&format!("{options} --seed 7 --threads 1"));
        assert!(first == file(&format!("{options} --seed 7 --threads 1")), "{options}: another run");
        assert!(first == file(&format!("{options} --seed 7 --threads 2")), "{options}: two threads");
        assert!(first == file(&format!("{options} --seed 7 --threads 9")), "{options}: nine threads");
    }
    let tables = [7, 8].map(|seed| {
        file(&format!("--method random --seed {seed}"));
        Table::of(&lab.json("placement.json"))
    });
    assert_ne!(tables[0], tables[1], "a seed is used");
}

#[test]
fn the_load_cap_is_kept_on_the_rows_that_were_searched() {
    let rows = Rows::new(14, 800, 2, 24, 4);
    let lab = Lab::with(&rows);
    let mut before = 0.0;
    for cap in [1.5, 1.2, 1.05] {
        let (figures, table) = place(&lab, &format!("--ranks 6 --load-cap {cap} --restarts 3"));
        assert_eq!(number(&figures, "load_cap"), cap);
        for layer in 0..2 {
            let measured = table.measure_sets(layer, &rows.sets(layer));
            assert!(measured.load_ratio <= cap + 1e-12, "{} over {cap}", measured.load_ratio);
        }
        let copies = number(&figures["mean"], "copies_per_token");
        assert!(copies > before - 0.05, "a lower cap does not give clearly fewer copies: {copies} {before}");
        before = copies;
        let search = &figures["layers"][0]["search"];
        let bound = number(search, "copies_lower_bound");
        assert!(1.0 <= bound && bound <= number(search, "copies_per_token"), "{search}");
    }
}

/// One expert with a quarter of all load on eight ranks: at least 2 x the mean wherever it is.
#[test]
fn a_cap_that_cannot_be_met_is_exit_code_3() {
    let mut rows = Rows::new(15, 400, 1, 16, 4).ids_only();
    for row in rows.ids.chunks_mut(4) {
        if !row.contains(&5) {
            row[0] = 5;
        }
    }
    let lab = Lab::with(&rows);
    let message = lab.refused(3, "place profile.safetensors --ranks 8 --load-cap 1.25 -o placement.json");
    says(&message, &["profile.safetensors", "layer 0", "1.25", "expert 5", "2.000", "replicas"]);
    says(
        &lab.refused(3, "report profile.safetensors --ranks 8 --load-cap 1.25 -o page.html"),
        &["layer 0", "1.25"],
    );
    // The default cap gives way, with a warning, and replicas bring the cap back into reach.
    let (figures, table) = place(&lab, "--ranks 8 --restarts 2");
    close(table.measure_sets(0, &rows.sets(0)).load_ratio, 2.0, "the hot expert alone");
    let warnings = list(&figures, "warnings");
    assert!(warnings.iter().any(|w| w.as_str().unwrap().contains("cannot be met")), "{warnings:?}");
    let (figures, _) = place(&lab, "--ranks 8 --load-cap 1.25 --replicas 8 --restarts 2");
    assert!(number(&figures["mean"], "load_max_over_mean") <= 1.25 + 1e-12, "{}", figures["mean"]);
}

#[test]
fn sixty_experts_on_eight_ranks() {
    let rows = Rows::new(16, 600, 1, 60, 4);
    let lab = Lab::with(&rows);
    for method in ["contiguous", "random", "greedy", "search", "apart"] {
        let (figures, table) = place(&lab, &format!("--method {method} --ranks 8 --restarts 2"));
        table.measure_sets(0, &rows.sets(0)).check(&figures["layers"][0], 8);
    }
    // 60 cannot be shared out equally, 60 and four replicas can.
    let message = lab.refused(1, "place profile.safetensors --ranks 8 --equal -o new.json");
    says(&message, &["60 experts", "8 ranks", "equal"]);
    let (_, table) = place(&lab, "--ranks 8 --equal --replicas 4 --restarts 2");
    assert!(table.layers[0].iter().all(|r| r.len() <= 8), "{table:?}");
    // EPLB packs the same number of slots on every rank: 64.
    let (_, table) = place(&lab, "--method eplb --ranks 8");
    assert!(table.layers[0].iter().all(|r| r.len() == 8), "{table:?}");
}

#[test]
fn more_ranks_than_experts_is_refused_by_every_method() {
    let lab = Lab::with(&Rows::new(16, 64, 1, 8, 2));
    for method in ["contiguous", "random", "greedy", "eplb", "search", "apart"] {
        let command = format!("place profile.safetensors --method {method} --ranks 9 -o placement.json");
        says(&lab.refused(1, &command), &["profile.safetensors", "ranks is 9", "8", "number of experts"]);
    }
    says(&lab.refused(1, "stats profile.safetensors --ranks 9"), &["ranks is 9", "8"]);
    says(&lab.refused(1, "report profile.safetensors --ranks 9"), &["ranks is 9", "8"]);
}

#[test]
fn equal_and_experts_per_rank_are_kept() {
    let lab = Lab::with(&Rows::new(17, 500, 2, 24, 4));
    let sizes = |options: &str| {
        let (_, table) = place(&lab, &format!("--ranks 4 --restarts 2 {options}"));
        Vec::from_iter(table.layers.iter().flatten().map(Vec::len))
    };
    assert_eq!(sizes("--equal"), [6; 8]);
    assert!(sizes("--max-experts-per-rank 7").iter().all(|&n| n <= 7));
    assert_eq!(sizes("--equal --replicas 4"), [7; 8]);
    let command = "place profile.safetensors --ranks 4 --max-experts-per-rank 5 -o placement.json";
    says(&lab.refused(1, command), &["5", "6", "24 experts"]);
}

/// The fewest ranks that hold all experts of a set between them.
fn fewest_ranks(set: &[usize], ranks: &[Vec<usize>]) -> u32 {
    let covers = |chosen: u32| {
        let held = |e: &usize| (0..ranks.len()).any(|r| chosen >> r & 1 == 1 && ranks[r].contains(e));
        set.iter().all(held)
    };
    (0..1_u32 << ranks.len()).filter(|&c| covers(c)).map(u32::count_ones).min().unwrap()
}

/// A token goes to as few ranks as its experts' replicas allow.
#[test]
fn replicas_stay_in_the_budget_and_copies_are_the_fewest_ranks() {
    let rows = Rows::new(18, 300, 2, 16, 4);
    let lab = Lab::with(&rows);
    let (plain, _) = place(&lab, "--ranks 4 --restarts 2");
    let (figures, table) = place(&lab, "--ranks 4 --replicas 6 --restarts 2");
    for (layer, found) in list(&figures, "layers").iter().enumerate() {
        assert!((17..=22).contains(&table.slots(layer)), "{} slots", table.slots(layer));
        let sets = rows.sets(layer);
        let copies: u32 = sets.iter().map(|s| fewest_ranks(s, &table.layers[layer])).sum();
        close(number(found, "copies_per_token"), f64::from(copies) / 300.0, "copies");
        // No more than the load of all tokens, and each pair on one rank.
        assert_eq!(ints(&found["load_per_rank"]).iter().sum::<usize>(), 300 * 4);
    }
    let copies = |f: &serde_json::Value| number(&f["mean"], "copies_per_token");
    assert!(copies(&figures) < copies(&plain));
    // The bound is one for placements without replicas, so it makes no gap here.
    assert!(figures["layers"][0]["search"]["gap"].is_null(), "{}", figures["layers"][0]["search"]);
    let text = lab.ok("place profile.safetensors --ranks 4 --replicas 6 --restarts 2").stdout;
    assert!(!text.contains("gap at most"), "{text}");

    let (_, table) = place(&lab, "--ranks 4 --replicas 4 --method eplb");
    assert_eq!((table.slots(0), table.slots(1)), (20, 20));
}

#[test]
fn groups_stay_whole() {
    let lab = Lab::with(&Rows::new(19, 400, 2, 24, 4));
    let (_, table) = place(&lab, "--ranks 4 --keep-groups 8 --restarts 2 --load-cap 3");
    for layer in 0..2 {
        let rank_of = table.rank_of(layer);
        for group in rank_of.chunks(3) {
            assert!(group.iter().all(|r| *r == group[0]), "a group on several ranks: {rank_of:?}");
        }
    }
    let command = "place profile.safetensors --ranks 4 --keep-groups 7 -o placement.json";
    says(&lab.refused(1, command), &["7", "24 experts"]);
}

/// Node copies cost more than rank copies, so two levels trade ranks for nodes.
#[test]
fn nodes_are_kept_apart_when_they_cost_more() {
    let rows = Rows::new(20, 800, 1, 32, 4);
    let lab = Lab::with(&rows);
    let copies = |options: &str| {
        let (figures, table) =
            place(&lab, &format!("--ranks 8 --nodes 4 --restarts 3 --load-cap 1.3 {options}"));
        table.measure_sets(0, &rows.sets(0)).check(&figures["layers"][0], 8);
        [number(&figures["mean"], "node_copies_per_token"), number(&figures["mean"], "copies_per_token")]
    };
    let flat = copies("--rank-cost 1 --node-cost 0");
    let nodes = copies("--rank-cost 1 --node-cost 50");
    assert!(nodes[0] < flat[0], "{nodes:?} {flat:?}");
    assert!(flat[1] <= nodes[1] + 1e-12, "{nodes:?} {flat:?}");
    // Costs from a cluster's links.
    place(&lab, "--ranks 8 --nodes 2 --cluster 16x8xh100-400g --restarts 1");
}

#[test]
fn held_out_rows_are_others_than_those_searched() {
    let rows = Rows::new(21, 1280, 2, 16, 4);
    let lab = Lab::with(&rows);
    let (all, _) = place(&lab, "--restarts 2");
    let (held, table) = place(&lab, "--restarts 2 --holdout 0.5");
    assert_eq!(number(&held, "holdout"), 0.5);
    let found = &held["layers"][0];
    let tokens = number(found, "tokens");
    assert!((300.0..1000.0).contains(&tokens) && tokens < number(&all["layers"][0], "tokens"), "{tokens}");
    // The other part and this one make the whole: measured on all rows by `traffic`.
    let whole = table.measure_sets(0, &rows.sets(0)).copies * 1280.0;
    let part = number(found, "copies_per_token") * tokens;
    let searched = number(&found["search"], "copies_per_token") * (1280.0 - tokens);
    close(part + searched, whole, "copies of both parts");
    let warns =
        |f: &serde_json::Value| list(f, "warnings").iter().any(|w| w.as_str().unwrap().contains("--holdout"));
    assert!(warns(&all) && !warns(&held));
    let other_seed = lab.figures("place profile.safetensors --restarts 2 --holdout 0.5 --seed 5");
    assert_ne!(other_seed["layers"][0]["load_per_rank"], found["load_per_rank"]);
    let lab = Lab::with(&Rows::new(21, 10, 1, 16, 4));
    let command = "place profile.safetensors --holdout 0.5 -o placement.json";
    says(&lab.refused(1, command), &["profile.safetensors", "10 rows", "too few"]);
}

#[test]
fn domains_that_disagree_are_named() {
    // One domain keeps to experts that go together, the other needs every rank.
    let (mut ids, mut domains) = (Vec::new(), Vec::new());
    for t in 0..256_i32 {
        let prose = t % 4 != 0;
        domains.push(i32::from(!prose));
        ids.extend(if prose { [t / 8 % 2 * 2, t / 8 % 2 * 2 + 1] } else { [t / 4 % 2, 2 + t / 8 % 2] });
    }
    let arrays =
        [common::Array::i32("expert_ids", &[256, 1, 2], ids), common::Array::i32("domains", &[256], domains)];
    let lab = Lab::new();
    let metadata = [("num_experts", "4"), ("domains", "[\"prose\",\"code\"]")];
    lab.write("rows.safetensors", common::safetensors(&arrays, &metadata));
    lab.ok("import rows.safetensors -o profile.safetensors");
    let (figures, _) = place(&lab, "--ranks 2");
    let copies = Vec::from_iter(list(&figures, "domains").iter().map(|d| number(d, "copies_per_token")));
    assert_eq!(copies, [1.0, 2.0], "{}", figures["domains"]);
    let warned = lab.ok("place profile.safetensors --ranks 2").stderr;
    says(&warned, &["warning", "domains disagree", "code"]);
}

#[test]
fn a_time_limit_is_accepted_and_keeps_the_limits() {
    let rows = Rows::new(22, 300, 2, 16, 4);
    let lab = Lab::with(&rows);
    let (_, table) = place(&lab, "--time-limit 0.2 --load-cap 1.2 --equal");
    for layer in 0..2 {
        assert!(table.measure_sets(layer, &rows.sets(layer)).load_ratio <= 1.2 + 1e-12);
    }
}

#[test]
fn explain_shows_the_formula_with_the_numbers_of_the_file() {
    let rows = Rows::new(23, 400, 1, 16, 4);
    let lab = Lab::with(&rows);
    let command = "place profile.safetensors --restarts 2 --load-cap 1.2 -o placement.json --explain";
    let text = lab.ok(command).stdout;
    let measured = Table::of(&lab.json("placement.json")).measure_sets(0, &rows.sets(0));
    says(
        &text,
        &[
            "cost per token = ranks visited",
            &format!("= {:.3}", measured.copies),
            &format!("{} x 4 / 1600 = {:.3}", measured.load.iter().max().unwrap(), measured.load_ratio),
            "1.2 x 400 x 4 / 4 = 480",
            "lower bound",
            &format!("{:.3} x 3 / 4 = {:.3}", measured.copies, measured.copies * 0.75),
        ],
    );
    says(&lab.ok(&format!("{command} --ranks 4 --nodes 2")).stdout, &["rank_cost", "node_cost", "8 x "]);
    says(&lab.ok("place profile.safetensors --method greedy --explain").stdout, &["greedy", "max/mean"]);
}
