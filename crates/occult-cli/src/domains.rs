//! Whether one placement serves all text domains of a profile.

use anyhow::Result;
use occult_plan::{HomeRanks, LayerPlacement, LayerTraffic, PlanError, RoutingBuf, Topology};
use serde_json::{Value, json};

use crate::tokens;

/// A domain whose copies per token are this much above those of all rows is named in a warning.
const COPIES_MARGIN: f64 = 1.10;
/// Likewise for its max/mean load.
const LOAD_MARGIN: f64 = 1.40;

/// One domain in one layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DomainFigures {
    pub(crate) domain: u16,
    pub(crate) copies_per_token: f64,
    pub(crate) load_max_over_mean: f64,
}

/// Measures the rows of each domain by themselves; a domain whose rows stand for no token is left out.
pub(crate) fn measure(
    rows: &RoutingBuf,
    domain_of_row: &[u16],
    placement: &LayerPlacement,
    topology: Topology,
) -> Result<Vec<DomainFigures>> {
    let mut domains = domain_of_row.to_vec();
    domains.sort_unstable();
    domains.dedup();
    let measure_one = |domain| {
        let rows = tokens::select(rows, |i| domain_of_row[i] == domain);
        let summary = match LayerTraffic::measure(placement, topology, HomeRanks::Uniform, &rows.view()?) {
            Ok(traffic) => traffic.summary(),
            Err(PlanError::NoTokens) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok(Some(DomainFigures {
            domain,
            copies_per_token: summary.copies_per_token,
            load_max_over_mean: summary.load_max_over_mean,
        }))
    };
    domains.into_iter().filter_map(|domain| measure_one(domain).transpose()).collect()
}

/// Means over the layers a domain appears in, by domain.
fn means<'a>(layers: impl Iterator<Item = &'a [DomainFigures]>) -> Vec<DomainFigures> {
    let mut all: Vec<DomainFigures> = layers.flatten().copied().collect();
    all.sort_by_key(|f| f.domain);
    all.chunk_by(|a, b| a.domain == b.domain)
        .map(|of_domain| {
            let n = of_domain.len() as f64;
            DomainFigures {
                domain: of_domain[0].domain,
                copies_per_token: of_domain.iter().map(|f| f.copies_per_token).sum::<f64>() / n,
                load_max_over_mean: of_domain.iter().map(|f| f.load_max_over_mean).sum::<f64>() / n,
            }
        })
        .collect()
}

fn name(names: &[String], domain: u16) -> String {
    names.get(usize::from(domain)).cloned().unwrap_or_else(|| format!("domain {domain}"))
}

/// Means of each domain as JSON.
pub(crate) fn mean_json<'a>(names: &[String], layers: impl Iterator<Item = &'a [DomainFigures]>) -> Value {
    let figures = means(layers).into_iter().map(|f| {
        json!({
            "domain": name(names, f.domain),
            "copies_per_token": f.copies_per_token,
            "load_max_over_mean": f.load_max_over_mean,
        })
    });
    Value::Array(figures.collect())
}

/// A sentence for every domain that the placement serves clearly worse than all rows together, which have `copies` per
/// token at max/mean `load`.
pub(crate) fn disagreement<'a>(
    names: &[String],
    layers: impl Iterator<Item = &'a [DomainFigures]>,
    (copies, load): (f64, f64),
) -> Vec<String> {
    let worse = |f: &DomainFigures| {
        f.copies_per_token > COPIES_MARGIN * copies || f.load_max_over_mean > LOAD_MARGIN * load
    };
    let sentence = |f: DomainFigures| {
        format!(
            "the domains disagree: {} alone has {:.3} copies per token at load {:.3}, all rows together {copies:.3} at {load:.3}",
            name(names, f.domain),
            f.copies_per_token,
            f.load_max_over_mean
        )
    };
    means(layers).into_iter().filter(worse).map(sentence).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_that_does_not_fit_is_named() {
        // Domain 0 keeps to one rank, domain 1 visits both.
        let rows = RoutingBuf {
            num_experts: 4,
            top_k: 2,
            expert_ids: vec![0, 1, 2, 3, 0, 2, 1, 3],
            ..RoutingBuf::default()
        };
        let placement = LayerPlacement::from_rank_experts(4, &[[0, 1], [2, 3]]).unwrap();
        let figures = measure(&rows, &[0, 0, 1, 1], &placement, Topology::flat(2).unwrap()).unwrap();
        assert_eq!((figures[0].copies_per_token, figures[1].copies_per_token), (1.0, 2.0));
        let silent = RoutingBuf { occurrences: Some(vec![1, 1, 0, 0]), ..rows };
        let spoken = measure(&silent, &[0, 0, 1, 1], &placement, Topology::flat(2).unwrap()).unwrap();
        assert_eq!(spoken.iter().map(|f| f.domain).collect::<Vec<_>>(), [0]);
        let names = ["prose".to_owned(), "code".to_owned()];
        let warnings = disagreement(&names, [figures.as_slice(), &figures].into_iter(), (1.5, 1.0));
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("code alone has 2.000 copies"), "{warnings:?}");
        assert!(disagreement(&names, [&figures[..1]].into_iter(), (1.0, 2.0)).is_empty());
    }
}
