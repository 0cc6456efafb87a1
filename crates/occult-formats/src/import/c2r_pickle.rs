//! C2R pickles: co-activation counts `[L, E, E]` with -1 on the diagonal, or for every expert the list of all experts by
//! descending count `[L][E][E]` (the expert itself last). Either is an integer array or nested lists.

use std::path::{Path, PathBuf};

use super::{ImportOptions, Sink, c2r_json};
use crate::error::{FormatError, Result};
use crate::pickle::{Item, MAX_VALUES, Pickle};
use crate::{MAX_EXPERTS, MAX_LAYERS, io};

/// Reads one pickle, never running anything in it.
pub(crate) fn read(inputs: &[PathBuf], options: &ImportOptions, sink: &mut Sink<'_>) -> Result<()> {
    let [path] = inputs else {
        return Err(FormatError::Request(format!("expected one C2R file, found {}", inputs.len())));
    };
    let cube = read_cube(path)?;
    if is_order(&cube) {
        c2r_json::write_order(path, cube, options, sink)
    } else {
        c2r_json::write_counts(path, cube, options, sink)
    }
}

/// `[L][E][E or E - 1]`.
type Cube = Vec<Vec<Vec<i64>>>;

fn read_cube(path: &Path) -> Result<Cube> {
    let bad = |message: String| FormatError::bad(path, "", message);
    let pickle = Pickle::parse(&io::read_whole(path)?).map_err(|e| bad(e.to_string()))?;
    let Some(array) = pickle.root().array() else {
        return nested(pickle.root()).map_err(bad);
    };
    let &[layers, experts, width] = array.shape() else {
        return Err(bad(format!("an array of shape {:?}, expected [L, E, E]", array.shape())));
    };
    if layers > MAX_LAYERS || experts > MAX_EXPERTS || layers * experts * width == 0 {
        return Err(bad(format!("shape {:?} is not that of a model", array.shape())));
    }
    let values = array.to_i64().map_err(bad)?;
    Ok(values
        .chunks_exact(experts * width)
        .map(|table| table.chunks_exact(width).map(<[i64]>::to_vec).collect())
        .collect())
}

/// Whether every row lists each expert once, with or without the expert itself. Counts with their -1 are no such lists.
fn is_order(cube: &Cube) -> bool {
    let lists_all = |own: usize, row: &Vec<i64>, experts: usize| {
        let mut seen = vec![false; experts];
        let fresh = |&id: &i64| {
            let slot = usize::try_from(id).ok().and_then(|id| seen.get_mut(id));
            slot.is_some_and(|seen| !std::mem::replace(seen, true))
        };
        let all_fresh = row.iter().all(fresh);
        let others = seen.iter().enumerate().all(|(id, &seen)| seen || id == own);
        all_fresh && others
    };
    cube.iter().all(|rows| rows.iter().enumerate().all(|(own, row)| lists_all(own, row, rows.len())))
}

fn list<'a>(item: Item<'a>, place: &str) -> std::result::Result<Vec<Item<'a>>, String> {
    match item.items() {
        Some(items) => Ok(items.collect()),
        None => Err(format!("{place} is {}, expected a list or an integer array [L, E, E]", item.kind())),
    }
}

fn nested(root: Item<'_>) -> std::result::Result<Cube, String> {
    let layers = list(root, "the pickle")?;
    if layers.len() > MAX_LAYERS {
        return Err(format!("there are {} layers, at most {MAX_LAYERS} are read", layers.len()));
    }
    let mut total = 0;
    let mut cube = Vec::with_capacity(layers.len());
    for (l, &layer) in layers.iter().enumerate() {
        let rows = list(layer, &format!("layer {l}"))?;
        if rows.len() > MAX_EXPERTS {
            return Err(format!("layer {l} has {} experts, at most {MAX_EXPERTS} are read", rows.len()));
        }
        let mut table = Vec::with_capacity(rows.len());
        for (e, &row) in rows.iter().enumerate() {
            let place = format!("layer {l}, expert {e}");
            let items = list(row, &place)?;
            // One list may be referred to from everywhere: few bytes can stand for many values.
            total += items.len();
            if total > MAX_VALUES {
                return Err(format!("there are more than {MAX_VALUES} values"));
            }
            let value =
                |i: Item<'_>| i.as_i64().ok_or_else(|| format!("{place}: {}, expected an integer", i.kind()));
            table.push(items.into_iter().map(value).collect::<std::result::Result<Vec<_>, _>>()?);
        }
        cube.push(table);
    }
    Ok(cube)
}
