//! Attention masks: causal, sliding windows, left padding.

use candle_core::{Device, Tensor};

use crate::error::Result;
use crate::spec::ModelSpec;

/// One mask per window that the model uses.
pub(crate) struct Masks(Vec<(Option<usize>, Option<Tensor>)>);

impl Masks {
    pub(crate) fn get(&self, window: Option<usize>) -> Option<&Tensor> {
        self.0.iter().find(|(w, _)| *w == window).and_then(|(_, mask)| mask.as_ref())
    }
}

/// Masks for `t` queries after `past` positions; `None` where every query sees everything.
pub(crate) fn masks(spec: &ModelSpec, past: usize, t: usize, padding: &[usize]) -> Result<Masks> {
    let mut windows: Vec<Option<usize>> = spec.layers.iter().map(|l| l.sliding_window).collect();
    windows.sort_unstable();
    windows.dedup();
    let one = |w: Option<usize>| Ok((w, mask(w, past, t, padding)?));
    Ok(Masks(windows.into_iter().map(one).collect::<Result<_>>()?))
}

/// `[B or 1, 1, T, S]` with 0 where query `past + i` sees key `j` and minus infinity elsewhere. A padding position sees
/// itself, so that its row stays a number.
fn mask(window: Option<usize>, past: usize, t: usize, padding: &[usize]) -> Result<Option<Tensor>> {
    let s = past + t;
    let padded = padding.iter().any(|&p| p > 0);
    if t == 1 && !padded && window.is_none_or(|w| w >= s) {
        return Ok(None);
    }
    let rows = if padded { padding } else { &[0] };
    let mut values = Vec::with_capacity(rows.len() * t * s);
    for &pad in rows {
        for i in past..s {
            let first = pad.max(window.map_or(0, |w| (i + 1).saturating_sub(w)));
            let sees = |j: usize| j == i || (j >= first && j < i);
            values.extend((0..s).map(|j| if sees(j) { 0.0 } else { f32::NEG_INFINITY }));
        }
    }
    Ok(Some(Tensor::from_vec(values, (rows.len(), 1, t, s), &Device::Cpu)?))
}
