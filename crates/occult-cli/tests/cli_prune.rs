//! `prune`: what each rule keeps, against the rules computed here token by token.

mod common;

use common::{Lab, Rows, Table, close, list, number, says};
use serde_json::Value;

const RULES: [&str; 4] = ["router-score", "similarity", "best-mass", "least-error"];
const TOKENS: usize = 250;
const EXPERTS: usize = 24;
const K: usize = 4;
const RANKS: usize = 6;

fn setup() -> (Rows, Lab, Table) {
    let rows = Rows::new(31, TOKENS, 2, EXPERTS, K);
    let lab = Lab::with(&rows);
    lab.ok(&format!("place profile.safetensors --ranks {RANKS} --method random -o placement.json"));
    let table = Table::of(&lab.json("placement.json"));
    (rows, lab, table)
}

fn prune(lab: &Lab, options: &str) -> Value {
    lab.figures(&format!("prune profile.safetensors placement.json {options}"))
}

fn distinct(set: impl IntoIterator<Item = usize>) -> Vec<usize> {
    Vec::from_iter(std::collections::BTreeSet::from_iter(set))
}

/// One token: its experts by descending score, the score of every expert, its ranks.
struct Token {
    ids: Vec<usize>,
    p: Vec<f64>,
    ranks: Vec<usize>,
}

fn tokens(rows: &Rows, table: &Table, layer: usize) -> Vec<Token> {
    let rank_of = table.rank_of(layer);
    let of_row = |(ids, logits): (Vec<usize>, &[f32])| {
        let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        let p = logits.iter().map(|&l| f64::from(l).exp() / sum).collect();
        let ranks = distinct(ids.iter().map(|&e| rank_of[e]));
        Token { ids, p, ranks }
    };
    rows.sets(layer).into_iter().zip(rows.layer_logits(layer)).map(of_row).collect()
}

/// Best of `among` by score.
fn best(p: &[f64], among: impl Iterator<Item = usize>, n: usize) -> Vec<usize> {
    let mut all = Vec::from_iter(among);
    all.sort_by(|&a, &b| p[b].total_cmp(&p[a]).then(a.cmp(&b)));
    all.truncate(n);
    all
}

/// Ranks collected from the experts in descending score.
fn walk(token: &Token, rank_of: &[usize], max_ranks: usize) -> Vec<usize> {
    let mut allowed = Vec::new();
    for &e in &token.ids {
        if !allowed.contains(&rank_of[e]) && allowed.len() < max_ranks {
            allowed.push(rank_of[e]);
        }
    }
    allowed
}

/// Of all sets of ranks the one on which the token's experts have most score.
fn heaviest(token: &Token, rank_of: &[usize], max_ranks: usize) -> Vec<usize> {
    let mass = |set: u32| -> f64 {
        token.ids.iter().filter(|&&e| set >> rank_of[e] & 1 == 1).map(|&e| token.p[e]).sum()
    };
    let sets = (0..1_u32 << RANKS).filter(|s| s.count_ones() as usize == max_ranks);
    let set = sets.max_by(|&a, &b| mass(a).total_cmp(&mass(b))).unwrap();
    (0..RANKS).filter(|r| set >> r & 1 == 1).collect()
}

/// The experts of a token after pruning.
fn pruned(rule: &str, token: &Token, rank_of: &[usize], max_ranks: usize) -> Vec<usize> {
    if token.ranks.len() <= max_ranks {
        return token.ids.clone();
    }
    if rule == "router-score" {
        let allowed = walk(token, rank_of, max_ranks);
        return best(&token.p, (0..EXPERTS).filter(|&e| allowed.contains(&rank_of[e])), K);
    }
    let allowed = heaviest(token, rank_of, max_ranks);
    let is_allowed = |e: &usize| allowed.contains(&rank_of[*e]);
    let mut chosen = Vec::from_iter(token.ids.iter().copied().filter(is_allowed));
    let others = (0..EXPERTS).filter(|e| is_allowed(e) && !chosen.contains(e));
    chosen.extend(best(&token.p, others, K - chosen.len()));
    chosen
}

#[derive(Default)]
struct Sums {
    copies: f64,
    kept: f64,
    original: f64,
    replaced: f64,
    touched: f64,
    load: Vec<f64>,
}

impl Sums {
    fn add(&mut self, token: &Token, chosen: &[usize], rank_of: &[usize]) {
        self.load.resize(RANKS, 0.0);
        chosen.iter().for_each(|&e| self.load[rank_of[e]] += 1.0);
        self.copies += distinct(chosen.iter().map(|&e| rank_of[e])).len() as f64;
        self.original += token.ids.iter().map(|&e| token.p[e]).sum::<f64>();
        self.kept += token.ids.iter().filter(|e| chosen.contains(e)).map(|&e| token.p[e]).sum::<f64>();
        let replaced = chosen.iter().filter(|e| !token.ids.contains(e)).count();
        self.replaced += replaced as f64;
        self.touched += f64::from(u8::from(replaced > 0));
    }

    #[track_caller]
    fn check(&self, found: &Value) {
        close(number(found, "copies_per_token"), self.copies / TOKENS as f64, "copies after");
        // Scores are f32 in the file and in the program's input.
        let mass = self.kept / self.original;
        assert!((number(found, "retained_mass") - mass).abs() < 1e-6, "{found} expected {mass}");
        close(number(found, "replaced_experts"), self.replaced, "replaced experts");
        close(number(found, "replaced_fraction"), self.replaced / (TOKENS * K) as f64, "replaced share");
        close(number(found, "touched_tokens"), self.touched, "touched tokens");
        let max = self.load.iter().copied().fold(0.0, f64::max);
        close(number(found, "load_max_over_mean"), max * RANKS as f64 / (TOKENS * K) as f64, "load");
    }
}

#[test]
fn router_score_and_best_mass_are_their_definitions() {
    let (rows, lab, table) = setup();
    for rule in ["router-score", "best-mass"] {
        for max_ranks in 1..=RANKS {
            let figures = prune(&lab, &format!("--rule {rule} --max-ranks {max_ranks}"));
            assert_eq!(figures["rule"], rule);
            for (layer, found) in list(&figures, "layers").iter().enumerate() {
                let rank_of = table.rank_of(layer);
                let mut sums = Sums::default();
                for token in tokens(&rows, &table, layer) {
                    sums.add(&token, &pruned(rule, &token, &rank_of, max_ranks), &rank_of);
                }
                sums.check(found);
                let before = table.measure_sets(layer, &rows.sets(layer)).copies;
                close(number(found, "copies_per_token_before"), before, "copies before");
            }
        }
    }
}

/// The experts on the ranks of the best ones stay; each other one is replaced by the most similar expert there.
#[test]
fn similarity_is_its_definition() {
    let (rows, lab, table) = setup();
    for max_ranks in 1..RANKS {
        let figures = prune(&lab, &format!("--rule similarity --max-ranks {max_ranks}"));
        for (layer, found) in list(&figures, "layers").iter().enumerate() {
            let rank_of = table.rank_of(layer);
            let logits = rows.layer_logits(layer);
            let dot = |a: usize, b: usize| -> f64 {
                logits.iter().map(|l| f64::from(l[a]) * f64::from(l[b])).sum()
            };
            let cosine2 = |a, b| dot(a, b) * dot(a, b) / (dot(a, a) * dot(b, b));
            let similarity: Vec<Vec<f64>> =
                (0..EXPERTS).map(|a| (0..EXPERTS).map(|b| cosine2(a, b)).collect()).collect();
            let mut sums = Sums::default();
            for token in tokens(&rows, &table, layer) {
                let mut chosen = token.ids.clone();
                if token.ranks.len() > max_ranks {
                    let allowed = walk(&token, &rank_of, max_ranks);
                    chosen.retain(|&e| allowed.contains(&rank_of[e]));
                    for &e in token.ids.iter().filter(|&&e| !allowed.contains(&rank_of[e])) {
                        let free =
                            (0..EXPERTS).filter(|c| allowed.contains(&rank_of[*c]) && !chosen.contains(c));
                        chosen.extend(best(&similarity[e], free, 1));
                    }
                }
                sums.add(&token, &chosen, &rank_of);
            }
            sums.check(found);
        }
    }
}

#[test]
fn as_many_ranks_as_there_are_change_nothing() {
    let (rows, lab, table) = setup();
    for rule in RULES {
        for max_ranks in [RANKS, RANKS + 1, 1000] {
            for (layer, found) in
                list(&prune(&lab, &format!("--rule {rule} --max-ranks {max_ranks}")), "layers")
                    .iter()
                    .enumerate()
            {
                assert_eq!(number(found, "retained_mass"), 1.0);
                assert_eq!((&found["replaced_experts"], &found["touched_tokens"]), (&0.into(), &0.into()));
                let measured = table.measure_sets(layer, &rows.sets(layer));
                close(number(found, "copies_per_token"), measured.copies, "copies");
                close(number(found, "load_max_over_mean"), measured.load_ratio, "load");
            }
        }
    }
}

#[test]
fn copies_stay_in_the_budget_and_best_mass_keeps_most() {
    let (_, lab, _) = setup();
    for max_ranks in 1..RANKS {
        let mass = RULES.map(|rule| {
            let figures = prune(&lab, &format!("--rule {rule} --max-ranks {max_ranks}"));
            let mean = &figures["mean"];
            assert!(number(mean, "copies_per_token") <= max_ranks as f64);
            assert!(number(mean, "copies_per_token") <= number(mean, "copies_per_token_before"));
            number(mean, "retained_mass")
        });
        assert!(mass[2] >= mass[0] && mass[2] >= mass[1], "{mass:?}");
        assert!(max_ranks > 2 || mass[2] > mass[0], "{mass:?}");
    }
}

/// Per token the fewest ranks that keep the share.
#[test]
fn an_adaptive_budget_gives_easy_tokens_fewer_ranks() {
    let (rows, lab, table) = setup();
    let mut before = 0.0;
    for share in [0.3, 0.6, 0.8, 0.95] {
        let figures = prune(&lab, &format!("--max-ranks {RANKS} --keep-mass {share}"));
        for (layer, found) in list(&figures, "layers").iter().enumerate() {
            let rank_of = table.rank_of(layer);
            let mut sums = Sums::default();
            for token in tokens(&rows, &table, layer) {
                let total: f64 = token.ids.iter().map(|&e| token.p[e]).sum();
                let fits = |m: &usize| {
                    let allowed = heaviest(&token, &rank_of, *m);
                    let kept = token.ids.iter().filter(|&&e| allowed.contains(&rank_of[e]));
                    kept.map(|&e| token.p[e]).sum::<f64>() >= share * total
                };
                let m = (1..RANKS).find(fits).unwrap_or(RANKS);
                sums.add(&token, &pruned("best-mass", &token, &rank_of, m), &rank_of);
            }
            sums.check(found);
            assert!(number(found, "retained_mass") >= share);
            let copies = number(found, "copies_per_token");
            assert!(copies.fract() != 0.0, "not the same budget for all: {copies}");
        }
        let copies = number(&figures["mean"], "copies_per_token");
        assert!(copies > before, "a larger share takes more ranks");
        before = copies;
    }
    for rule in RULES {
        let figures = prune(&lab, &format!("--max-ranks 3 --keep-mass 0.6 --rule {rule}"));
        assert!(number(&figures["mean"], "copies_per_token") < 3.0);
        // The limit comes first.
        let figures = prune(&lab, &format!("--max-ranks 1 --keep-mass 0.99 --rule {rule}"));
        assert_eq!(number(&figures["mean"], "copies_per_token"), 1.0);
    }
}

#[test]
fn a_smaller_error_takes_more_ranks() {
    let (_, lab, _) = setup();
    let copies = |error: f64| {
        let limit = format!("--rule least-error --max-ranks {RANKS} --max-error {error}");
        number(&prune(&lab, &limit)["mean"], "copies_per_token")
    };
    let found = [1e3, 0.2, 0.1, 0.02, 1e-9].map(copies);
    assert!(found.is_sorted() && found[0] == 1.0 && found[1] < found[3], "{found:?}");
    let all = &prune(&lab, &format!("--max-ranks {RANKS}"))["mean"];
    close(found[4], number(all, "copies_per_token"), "nothing lost");
}

#[test]
fn without_all_scores_the_missing_array_is_named() {
    let rows = Rows::new(32, 100, 2, 16, 4);
    for rows in [rows.clone().weights_only(), rows.ids_only()] {
        let lab = Lab::with(&rows);
        lab.ok("place profile.safetensors --method greedy -o placement.json");
        for rule in RULES {
            let message = lab
                .refused(1, &format!("prune profile.safetensors placement.json --max-ranks 2 --rule {rule}"));
            says(&message, &["profile.safetensors", rule, "router_logits"]);
        }
    }
}

/// Which ranks best-mass would keep is known from the weights of the chosen experts. Weights that a router made sum to one
/// do not say how much of all probability a token's experts had, so every token counts the same here.
#[test]
fn ranks_only_needs_no_more_than_weights() {
    let rows = Rows::new(31, TOKENS, 2, EXPERTS, K);
    let (_, with_scores, table) = setup();
    let lab = Lab::with(&rows.clone().weights_only());
    lab.write("placement.json", with_scores.read("placement.json"));
    for max_ranks in 1..=RANKS {
        let options = format!("--max-ranks {max_ranks}");
        let ranks_only = prune(&lab, &format!("{options} --ranks-only"));
        let full = prune(&with_scores, &options);
        for (layer, found) in list(&ranks_only, "layers").iter().enumerate() {
            for key in ["copies_per_token", "copies_per_token_before", "replaced_experts"] {
                close(number(found, key), number(&full["layers"][layer], key), key);
            }
            let rank_of = table.rank_of(layer);
            let share = |token: Token| {
                let allowed = heaviest(&token, &rank_of, max_ranks);
                let mass = |on: &dyn Fn(&usize) -> bool| -> f64 {
                    token.ids.iter().filter(|e| on(e)).map(|&e| token.p[e]).sum()
                };
                mass(&|&e| allowed.contains(&rank_of[e])) / mass(&|_| true)
            };
            let sum: f64 = tokens(&rows, &table, layer).into_iter().map(share).sum();
            let retained = number(found, "retained_mass");
            assert!((retained - sum / TOKENS as f64).abs() < 1e-6, "{retained} {sum}");
        }
    }
    let adaptive = prune(&lab, "--max-ranks 4 --keep-mass 0.7 --ranks-only");
    let full = prune(&with_scores, "--max-ranks 4 --keep-mass 0.7");
    close(
        number(&adaptive["mean"], "copies_per_token"),
        number(&full["mean"], "copies_per_token"),
        "adaptive",
    );
    says(
        &lab.ok("prune profile.safetensors placement.json --max-ranks 2 --ranks-only").stdout,
        &["retained mass"],
    );
    let lab = Lab::with(&rows.ids_only());
    lab.write("placement.json", with_scores.read("placement.json"));
    let message = lab.refused(1, "prune profile.safetensors placement.json --max-ranks 2 --ranks-only");
    says(&message, &["profile.safetensors", "weights"]);
}

#[test]
fn balance_writes_a_placement_under_which_pruning_loads_ranks_evenly() {
    let (_, lab, _) = setup();
    let load = |figures: &Value| number(figures, "load_max_over_mean");
    for options in ["--max-ranks 1", "--max-ranks 2 --rule least-error", "--max-ranks 3 --keep-mass 0.8"] {
        let plain = prune(&lab, options);
        let balanced = prune(&lab, &format!("{options} --balance 1.05 -o balanced.json"));
        assert_eq!(balanced["without_balance"], plain["mean"], "{options}");
        assert!(load(&balanced["mean"]) < load(&plain["mean"]), "{options}: {balanced}");
        assert!(number(&balanced["mean"], "retained_mass") <= number(&plain["mean"], "retained_mass"));
        // The file says it all: whoever prunes with it gets the same.
        let again = lab.figures(&format!("prune profile.safetensors balanced.json {options}"));
        assert_eq!(again["layers"], balanced["layers"], "{options}");
        let file = lab.json("balanced.json");
        for layer in list(&file, "layers") {
            assert_eq!(list(layer, "rank_weights").len(), RANKS);
        }
        assert_eq!(Table::of(&file).rank_of(0), Table::of(&lab.json("placement.json")).rank_of(0));
    }
    let text =
        lab.ok("prune profile.safetensors placement.json --max-ranks 1 --balance 1.05 -o b.json").stdout;
    says(&text, &["Written to b.json, with weights of the ranks. Without them: load "]);
    // Over its own input.
    lab.ok("prune profile.safetensors b.json --max-ranks 1 --balance 1.05 -o b.json");
    says(&lab.ok("export b.json --format vllm").stderr, &["weights of the ranks", "are left out"]);
    for (options, complaint) in [
        ("--balance 1.1", "--output"),
        ("-o x.json", "--balance"),
        ("--balance 0.5 -o x.json", "a finite number from 1"),
        ("--balance 1.1 -o x.json --rule similarity", "best-mass and least-error"),
        ("--balance 1.1 -o x.json --ranks-only", "--ranks-only"),
    ] {
        let message =
            lab.refused(2, &format!("prune profile.safetensors placement.json --max-ranks 1 {options}"));
        says(&message, &[complaint]);
    }
}

#[test]
fn the_table_says_what_was_done() {
    let (_, lab, _) = setup();
    let text = lab.ok("prune profile.safetensors placement.json --max-ranks 2 --rule similarity").stdout;
    says(&text, &["similarity", "at most 2 ranks", "retained mass", "replaced experts", "\nmean "]);
    assert_eq!(text.lines().filter(|l| l.starts_with("0 ") || l.starts_with("1 ")).count(), 2, "{text}");
}

/// Real routing: on two of four ranks most of the weight stays.
#[test]
fn bundled_routing_is_pruned_by_ranks() {
    let lab = Lab::with_bundled();
    lab.ok("place profile.safetensors --restarts 1 --max-tokens 1000 -o placement.json");
    let mass = [1, 2, 3].map(|m| {
        let figures = prune(&lab, &format!("--max-ranks {m} --ranks-only"));
        number(&figures["mean"], "retained_mass")
    });
    assert!(0.5 < mass[0] && mass[0] < mass[1] && 0.9 < mass[1] && mass[1] < mass[2], "{mass:?}");
}
