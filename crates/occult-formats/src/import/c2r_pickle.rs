//! C2R pickles: co-activation counts `[L, E, E]` with -1 on the diagonal, or for every expert the list of all experts by
//! descending count `[L][E][E]` (the expert itself last). The first is an array or nested lists; so is the second.

use std::path::{Path, PathBuf};

use occult_plan::CoActivation;

use super::{ImportOptions, Layout, Sink};
use crate::error::{FormatError, Result};
use crate::pickle::{Item, MAX_VALUES, Pickle};
use crate::{MAX_EXPERTS, MAX_LAYERS, io};

/// Reads the pickles: counts of several files are added, a ranked list stands alone.
pub(crate) fn read(inputs: &[PathBuf], options: &ImportOptions, sink: &mut Sink<'_>) -> Result<()> {
    let mut tables: Option<Cube> = None;
    let first = inputs.first().map_or(Path::new(""), PathBuf::as_path);
    for (i, path) in inputs.iter().enumerate() {
        let cube = Cube::read(path)?;
        match &mut tables {
            None => tables = Some(cube),
            Some(sum) => sum.add(path, &cube)?,
        }
        sink.progress(i as u64 + 1, inputs.len() as u64);
    }
    let Some(cube) = tables else {
        return Err(FormatError::Request("there is nothing to import".to_owned()));
    };
    let top_k = match (cube.is_order, options.top_k) {
        (false, None) => {
            let message = "pairs of experts alone do not tell how many tokens chose each expert: give top_k";
            return Err(FormatError::bad(first, "", message));
        }
        (_, top_k) => top_k,
    };
    sink.begin(Layout {
        num_experts: cube.experts,
        top_k,
        layer_ids: (0..cube.layers as u32).collect(),
        ..Layout::default()
    })?;
    let e = cube.experts;
    for (layer, table) in cube.values.chunks_exact(e * cube.width).enumerate() {
        if cube.is_order {
            let rows = table.chunks_exact(cube.width).enumerate();
            let others = rows.flat_map(|(own, row)| row.iter().filter(move |&&id| id != own as i64));
            sink.set_order(first, layer, others.map(|&id| id as u16).collect())?;
            continue;
        }
        let bad = |message: String| FormatError::bad(first, format!("layer {layer}"), message);
        let pairs: Vec<u64> = (0..)
            .zip(table)
            .map(|(i, &n)| if i / e == i % e { Ok(0) } else { u64::try_from(n).map_err(|_| (i, n)) })
            .collect::<std::result::Result<_, _>>()
            .map_err(|(i, n)| bad(format!("the count of experts {} and {} is {n}", i / e, i % e)))?;
        let pairs =
            CoActivation::from_counts(e, pairs).map_err(|error| FormatError::plan(first, layer, 0, error))?;
        let counts = tokens_from_pairs(&pairs, top_k.unwrap_or_default()).map_err(bad)?;
        sink.set_counts(first, layer, counts, Some(pairs))?;
    }
    sink.note(if cube.is_order {
        "ranked lists of collaborators: the order is known, the counts are not"
    } else {
        "tokens per expert were worked out from the pair counts: every token of top k adds k - 1 pairs to each of its experts"
    });
    Ok(())
}

/// Tokens per expert from the pairs of a top-k router: a token adds `k - 1` pairs to each of its experts.
pub(crate) fn tokens_from_pairs(pairs: &CoActivation, top_k: usize) -> std::result::Result<Vec<u64>, String> {
    let others = match top_k {
        0 | 1 => return Err("a token of top 1 makes no pairs: top_k must be 2 or more".to_owned()),
        k => k as u64 - 1,
    };
    (0..pairs.num_experts())
        .map(|expert| {
            let sum = pairs.row(expert).iter().try_fold(0_u64, |sum, &n| sum.checked_add(n));
            let sum = sum.ok_or_else(|| format!("the pairs of expert {expert} overflow"))?;
            if !sum.is_multiple_of(others) {
                return Err(format!(
                    "expert {expert} is in {sum} pairs, which is no multiple of {others}: top_k is not {top_k}"
                ));
            }
            Ok(sum / others)
        })
        .collect()
}

/// `[layers, experts, width]`.
struct Cube {
    layers: usize,
    experts: usize,
    width: usize,
    values: Vec<i64>,
    is_order: bool,
}

impl Cube {
    fn read(path: &Path) -> Result<Self> {
        let bad = |message: String| FormatError::bad(path, "", message);
        let pickle = Pickle::parse(&io::read_whole(path)?).map_err(|e| bad(e.to_string()))?;
        let (shape, values) = match pickle.root().array() {
            Some(array) => match *array.shape() {
                [a, b, c] => ([a, b, c], array.to_i64().map_err(bad)?),
                _ => return Err(bad(format!("an array of shape {:?}, expected [L, E, E]", array.shape()))),
            },
            None => nested(pickle.root()).map_err(bad)?,
        };
        let [layers, experts, width] = shape;
        if layers == 0 || layers > MAX_LAYERS || experts < 2 || experts > MAX_EXPERTS {
            return Err(bad(format!("{layers} layers of {experts} experts are not a model")));
        }
        let diagonal = |value: i64| {
            let tables = values.chunks_exact(experts * width);
            tables.into_iter().all(|t| (0..experts).all(|i| t.get(i * width + i) == Some(&value)))
        };
        let order = is_order(&values, experts, width);
        let is_order = order && !(width == experts && diagonal(-1));
        if !is_order && width != experts {
            return Err(bad(format!("rows of {width} values for {experts} experts, expected {experts}")));
        }
        Ok(Self { layers, experts, width, values, is_order })
    }

    fn add(&mut self, path: &Path, other: &Cube) -> Result<()> {
        let bad = |message: String| FormatError::bad(path, "", message);
        if self.is_order || other.is_order {
            return Err(bad("ranked lists cannot be added to another file: import them one by one".into()));
        }
        if (self.layers, self.experts) != (other.layers, other.experts) {
            return Err(bad(format!(
                "has {} layers of {} experts, the first file has {} of {}",
                other.layers, other.experts, self.layers, self.experts
            )));
        }
        for (a, &b) in self.values.iter_mut().zip(&other.values) {
            // -1 marks the diagonal in each file; a negative count elsewhere stays negative and is refused.
            *a = if *a < 0 || b < 0 { (*a).min(b) } else { a.saturating_add(b) };
        }
        Ok(())
    }
}

/// Whether every row lists each expert once, with or without the expert itself.
fn is_order(values: &[i64], experts: usize, width: usize) -> bool {
    if width != experts && width + 1 != experts {
        return false;
    }
    let mut seen = vec![usize::MAX; experts];
    values.chunks_exact(width).enumerate().all(|(row, ids)| {
        ids.iter().all(|&id| {
            let fresh = usize::try_from(id).ok().and_then(|id| seen.get_mut(id)).is_some_and(|seen| {
                let fresh = *seen != row;
                *seen = row;
                fresh
            });
            fresh && (width == experts || id != (row % experts) as i64)
        })
    })
}

fn list<'a>(item: Item<'a>, what: &str) -> std::result::Result<Vec<Item<'a>>, String> {
    match item.items() {
        Some(items) => Ok(items.collect()),
        None => Err(format!("{what} is {}, expected a list or an integer array [L, E, E]", item.kind())),
    }
}

type Nested = ([usize; 3], Vec<i64>);

/// Three levels of lists, all rows equally long.
fn nested(root: Item<'_>) -> std::result::Result<Nested, String> {
    let mut values = Vec::new();
    let mut shape: Option<(usize, usize)> = None;
    let layers = list(root, "the pickle")?;
    if layers.len() > MAX_LAYERS {
        return Err(format!("{} layers, at most {MAX_LAYERS} are read", layers.len()));
    }
    for (l, &layer) in layers.iter().enumerate() {
        let rows = list(layer, &format!("layer {l}"))?;
        if rows.len() > MAX_EXPERTS {
            return Err(format!("layer {l} has {} experts, at most {MAX_EXPERTS} are read", rows.len()));
        }
        for (e, &row) in rows.iter().enumerate() {
            let items = list(row, &format!("layer {l}, expert {e}"))?;
            let own = (rows.len(), items.len());
            if own != *shape.get_or_insert(own) || items.len() > MAX_EXPERTS {
                return Err(format!("layer {l}, expert {e}: {} values, other rows have others", items.len()));
            }
            // One list may be referred to from everywhere: few bytes can stand for many values.
            if values.len() + items.len() > MAX_VALUES {
                return Err(format!("there are more than {MAX_VALUES} values"));
            }
            for item in items {
                values.push(
                    item.as_i64().ok_or_else(|| {
                        format!("layer {l}, expert {e}: {}, expected an integer", item.kind())
                    })?,
                );
            }
        }
        if rows.is_empty() {
            return Err(format!("layer {l} is empty"));
        }
    }
    let (experts, width) = shape.unwrap_or_default();
    Ok(([layers.len(), experts, width], values))
}
