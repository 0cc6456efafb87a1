//! What the routers of a benchmark decide: real routing, or made up with co-activation.

use std::path::Path;

use anyhow::{Result, bail};
use occult_formats::Columns;
use occult_moe::RouterSpec;
use occult_plan::{CoActivation, ExpertId, Routing, RoutingBuf};

use super::args::ShapeArgs;
use super::random::Random;
use crate::exit::Usage;
use crate::{bundled, setup};

/// Tokens that a placement is made from, at most.
const PROFILED: usize = 16_384;
/// Dimensions in which made-up experts and tokens lie: fewer make more co-activation. With this many 64 experts, top-8 have
/// about the copies of OLMoE's layers (4 ranks: 3.7 as numbered, 2.6 searched).
const DIMENSIONS: usize = 7;

/// Routing for one benchmark.
pub(crate) struct BenchRouting {
    /// For people.
    pub(crate) name: String,
    pub(crate) router: RouterSpec,
    /// Tokens that placements are made from, with router logits.
    pub(crate) profiled: RoutingBuf,
    /// Router logits `[T, E]` of the measured tokens.
    pub(crate) logits: Vec<f32>,
    /// Router logits of as many tokens that placements are made from: what machines are measured with before.
    pub(crate) probe_logits: Vec<f32>,
}

/// Routing of `tokens` tokens as the arguments want it.
pub(crate) fn routing(args: &ShapeArgs, tokens: usize) -> Result<BenchRouting> {
    let (name, mut profiled, measured) = match args.routing.as_str() {
        "synthetic" => {
            let (e, k) = (args.experts.unwrap_or(64), args.top_k.unwrap_or(8));
            if k == 0 || k > e || e > usize::from(ExpertId::MAX) {
                return Err(Usage(format!("--top-k {k} of --experts {e}")).into());
            }
            let all = synthetic(e, k, PROFILED.min(4096.max(tokens)) + tokens, args.seed)?;
            let (measured, profiled) = split_at(all, tokens);
            ("synthetic".to_owned(), profiled, measured)
        }
        what => {
            let (name, rows) = match what {
                "bundled" => {
                    let layer = args.layer.unwrap_or(bundled::LAYERS / 2);
                    (format!("gpt-oss-20b layer {layer} (bundled)"), bundled::layer(layer)?)
                }
                path => from_profile(Path::new(path), args.layer)?,
            };
            for (option, asked, found) in
                [("--experts", args.experts, rows.num_experts), ("--top-k", args.top_k, rows.top_k)]
            {
                if asked.is_some_and(|asked| asked != found) {
                    return Err(Usage(format!("{option}: the routing has {found}")).into());
                }
            }
            let (profiled, measured) = halves(&rows, tokens, args.seed)?;
            (name, profiled, measured)
        }
    };
    let router = RouterSpec::softmax(measured.num_experts, measured.top_k, true);
    if profiled.scores.is_none() {
        profiled.scores = Some(logits(&profiled, &profiled.view()?));
    }
    let logits = match measured.scores {
        Some(scores) => scores,
        None => logits(&measured, &profiled.view()?),
    };
    let n = profiled.num_tokens();
    let probe = pick(&profiled, &(0..tokens).map(|i| i % n).collect::<Vec<_>>());
    let probe_logits = probe.scores.unwrap_or_default();
    Ok(BenchRouting { name, router, profiled, logits, probe_logits })
}

fn from_profile(path: &Path, layer: Option<usize>) -> Result<(String, RoutingBuf)> {
    let profile = setup::profile(path)?;
    let layer = layer.unwrap_or(profile.num_layers() / 2);
    let columns = Columns { weights: true, scores: true, domains: false };
    let rows = profile.read_rows(layer, columns, 200_000)?.routing;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Ok((format!("{name} layer {layer}"), rows))
}

/// Experts and tokens at random places on a sphere; a token chooses the nearest experts.
fn synthetic(num_experts: usize, top_k: usize, tokens: usize, seed: u64) -> Result<RoutingBuf> {
    let mut random = Random::new(seed, 1);
    let place = |random: &mut Random| {
        let place = random.normals(DIMENSIONS, 1.0);
        let length = place.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-6);
        place.into_iter().map(|v| v / length).collect::<Vec<f32>>()
    };
    let experts: Vec<Vec<f32>> = (0..num_experts).map(|_| place(&mut random)).collect();
    let mut scores = Vec::with_capacity(tokens * num_experts);
    for _ in 0..tokens {
        let token = place(&mut random);
        for expert in &experts {
            let near: f32 = token.iter().zip(expert).map(|(a, b)| a * b).sum();
            scores.push(4.0 * near + 0.2 * random.normal());
        }
    }
    Ok(RouterSpec::softmax(num_experts, top_k, true).select(&scores)?)
}

/// The first `n` rows, and the others.
fn split_at(mut rows: RoutingBuf, n: usize) -> (RoutingBuf, RoutingBuf) {
    let (e, k) = (rows.num_experts, rows.top_k);
    let rest = RoutingBuf {
        num_experts: e,
        top_k: k,
        expert_ids: rows.expert_ids.split_off(n * k),
        weights: rows.weights.as_mut().map(|w| w.split_off(n * k)),
        scores: rows.scores.as_mut().map(|s| s.split_off(n * e)),
        occurrences: None,
    };
    (rows, rest)
}

/// Deals the rows into two halves at random: one to place by (all of it, up to a limit), `tokens` drawn evenly from the
/// other (over and over where it has fewer). A row that stands for many tokens is drawn as often as it deserves.
fn halves(rows: &RoutingBuf, tokens: usize, seed: u64) -> Result<(RoutingBuf, RoutingBuf)> {
    let n = rows.num_tokens();
    if n < 2 {
        bail!("the routing has {n} tokens, expected at least 2");
    }
    let mut random = Random::new(seed, 2);
    let mut order: Vec<usize> = (0..n).collect();
    random.shuffle(&mut order);
    let (placed, measured) = order.split_at(n / 2);
    let profiled = pick(rows, &draw(rows, placed, PROFILED.min(placed.len() * 4)));
    let mut drawn = draw(rows, measured, tokens);
    random.shuffle(&mut drawn);
    Ok((profiled, pick(rows, &drawn)))
}

/// `count` of the rows at even distances of the tokens they stand for.
fn draw(rows: &RoutingBuf, from: &[usize], count: usize) -> Vec<usize> {
    let times = |&row: &usize| rows.occurrences.as_ref().map_or(1, |o| u64::from(o[row]));
    let total: u64 = from.iter().map(times).sum();
    let (mut drawn, mut passed, mut at) = (Vec::with_capacity(count), 0, from.iter());
    let mut current = at.next();
    for i in 0..count {
        let wanted = ((i as f64 + 0.5) * total as f64 / count as f64) as u64;
        while let Some(row) = current.filter(|row| passed + times(row) <= wanted) {
            passed += times(row);
            current = at.next();
        }
        drawn.push(*current.unwrap_or(&from[from.len() - 1]));
    }
    drawn
}

fn pick(rows: &RoutingBuf, which: &[usize]) -> RoutingBuf {
    fn of<T: Copy>(values: &[T], width: usize, which: &[usize]) -> Vec<T> {
        which.iter().flat_map(|&row| values[row * width..(row + 1) * width].iter().copied()).collect()
    }
    let (e, k) = (rows.num_experts, rows.top_k);
    RoutingBuf {
        num_experts: e,
        top_k: k,
        expert_ids: of(&rows.expert_ids, k, which),
        weights: rows.weights.as_ref().map(|w| of(w, k, which)),
        scores: rows.scores.as_ref().map(|s| of(s, e, which)),
        occurrences: None,
    }
}

/// Logits that choose the experts of a routing without scores, with its weights where it has them. The experts that were
/// not chosen follow in the order in which they are chosen together with those that were, so that pruning has something
/// to go by.
fn logits(rows: &RoutingBuf, profiled: &Routing<'_>) -> Vec<f32> {
    let (e, k) = (rows.num_experts, rows.top_k);
    let pairs = CoActivation::of(profiled);
    let mut logits = Vec::with_capacity(rows.num_tokens() * e);
    let mut order: Vec<usize> = Vec::with_capacity(e);
    for (row, ids) in rows.expert_ids.chunks_exact(k).enumerate() {
        let together = |other: usize| -> u64 { ids.iter().map(|&id| pairs.get(id.into(), other)).sum() };
        let chosen = |expert: usize| ids.iter().position(|&id| usize::from(id) == expert);
        order.clear();
        order.extend((0..e).filter(|&expert| chosen(expert).is_none()));
        order.sort_by_cached_key(|&expert| std::cmp::Reverse(together(expert)));
        let mut of = vec![0.0; e];
        // Falls from one chosen expert to the next by at least a little: equal weights stay in the router's order.
        let mut last = f32::INFINITY;
        for (i, &id) in ids.iter().enumerate() {
            let weight = rows.weights.as_ref().map_or(-0.2 * i as f32, |w| w[row * k + i].max(1e-3).ln());
            last = weight.min(last - 1e-3);
            of[usize::from(id)] = last;
        }
        for (i, &expert) in order.iter().enumerate() {
            of[expert] = last - 0.2 - 0.05 * i as f32;
        }
        logits.extend_from_slice(&of);
    }
    logits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(ids: &[ExpertId], k: usize) -> Vec<Vec<ExpertId>> {
        let rows = ids.chunks_exact(k).map(|row| {
            let mut row = row.to_vec();
            row.sort_unstable();
            row
        });
        rows.collect()
    }

    #[test]
    fn made_up_logits_choose_what_was_recorded() {
        let rows = bundled::layer(3).unwrap();
        let (profiled, measured) = halves(&rows, 500, 7).unwrap();
        let logits = logits(&measured, &profiled.view().unwrap());
        let chosen = RouterSpec::softmax(32, 4, true).select(&logits).unwrap();
        assert_eq!(sorted(&chosen.expert_ids, 4), sorted(&measured.expert_ids, 4));
    }

    #[test]
    fn rows_are_drawn_as_often_as_they_stand_for_tokens() {
        let rows = RoutingBuf {
            num_experts: 4,
            top_k: 1,
            expert_ids: vec![0, 1, 2],
            occurrences: Some(vec![6, 1, 3]),
            ..RoutingBuf::default()
        };
        let drawn = draw(&rows, &[0, 1, 2], 20);
        let count = |row: usize| drawn.iter().filter(|&&d| d == row).count();
        assert_eq!([count(0), count(1), count(2)], [12, 2, 6]);
        assert_eq!(draw(&rows, &[2], 3), [2, 2, 2]);
    }

    #[test]
    fn halves_share_no_row() {
        let n = 40;
        let rows = RoutingBuf {
            num_experts: n,
            top_k: 1,
            expert_ids: (0..n as ExpertId).collect(),
            ..RoutingBuf::default()
        };
        let (profiled, measured) = halves(&rows, 100, 1).unwrap();
        assert!(profiled.expert_ids.iter().all(|id| !measured.expert_ids.contains(id)));
        assert_eq!(measured.num_tokens(), 100);
    }
}
