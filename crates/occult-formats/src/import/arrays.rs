//! Inputs that hold `expert_ids` `[tokens, layers, top_k]` as an array, in whatever container: safetensors, npz, npy.
//!
//! Rows are read in blocks, split by layer and appended, so memory does not depend on the number of tokens. Files are
//! looked at first (shapes only), so that a file that does not fit the others is found before anything is written.

use std::path::{Path, PathBuf};

use super::{At, ImportOptions, Layout, RowBlock, Sink};
use crate::array::{ArrayStream, to_expert_ids};
use crate::error::{FormatError, Result};
use crate::{MAX_EXPERTS, MAX_LAYERS};

/// Bytes that a block of rows may take in the file.
const BLOCK_BYTES: usize = 4 << 20;

/// The arrays of one file and what it says about them.
pub(super) struct TokenArrays {
    pub(super) expert_ids: ArrayStream,
    pub(super) weights: Option<ArrayStream>,
    pub(super) router_logits: Option<ArrayStream>,
    pub(super) domains: Option<ArrayStream>,
    pub(super) about: About,
}

/// What a file says about its arrays.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct About {
    pub(super) num_experts: Option<usize>,
    pub(super) layer_ids: Option<Vec<u32>>,
    pub(super) num_hidden_layers: Option<u32>,
    pub(super) model: Option<String>,
    pub(super) domain_names: Vec<String>,
}

/// Shape of one input, checked.
#[derive(Debug, Clone, PartialEq)]
struct Shape {
    tokens: usize,
    layers: usize,
    top_k: usize,
    /// Last dimension of the router logits.
    logits: Option<usize>,
    weights: bool,
    domains: bool,
    /// Bytes of one token, all arrays together.
    token_bytes: usize,
}

/// Opens one input.
pub(super) type Open<'a> = &'a dyn Fn(&Path) -> Result<TokenArrays>;

/// Reads all inputs. `dense_layers`: the arrays may hold layers without experts (all their ids are equal), to be dropped.
pub(super) fn read(
    inputs: &[PathBuf],
    options: &ImportOptions,
    sink: &mut Sink<'_>,
    open: Open<'_>,
    dense_layers: bool,
) -> Result<()> {
    let mut first: Option<(Shape, About, &Path)> = None;
    let mut total_bytes = 0_u64;
    for path in inputs {
        let arrays = open(path)?;
        let shape = shape(&arrays)?;
        total_bytes = total_bytes.saturating_add(shape.tokens as u64 * shape.token_bytes as u64);
        match &first {
            None => first = Some((shape, arrays.about, path)),
            Some(first) => same(first, (&shape, &arrays.about, path))?,
        }
    }
    let Some((shape, about, first_path)) = first else {
        return Ok(());
    };
    let num_experts = num_experts(first_path, &shape, &about, options)?;
    let moe =
        if dense_layers { find_moe_layers(first_path, &shape, open)? } else { (0..shape.layers).collect() };
    if moe.is_empty() {
        return Err(FormatError::bad(
            first_path,
            "row 0",
            "all layers repeat one expert id: no layer has experts",
        ));
    }
    if moe.len() < shape.layers {
        let dropped: Vec<usize> = (0..shape.layers).filter(|l| !moe.contains(l)).collect();
        sink.note(format!(
            "layers {dropped:?} of the array are dense (their rows repeat one id) and were left out"
        ));
    }
    let layer_ids = match about.layer_ids {
        Some(ids) if ids.len() == moe.len() => ids,
        Some(ids) => {
            let message = format!("{} layer_ids for {} layers", ids.len(), moe.len());
            return Err(FormatError::bad(first_path, "layer_ids", message));
        }
        None => moe.iter().map(|&l| l as u32).collect(),
    };
    sink.begin(Layout {
        num_experts,
        top_k: Some(shape.top_k),
        layer_ids,
        num_hidden_layers: about.num_hidden_layers.or(dense_layers.then_some(shape.layers as u32)),
        model: about.model,
        domains: about.domain_names,
        router: None,
    })?;
    let mut done = 0_u64;
    for path in inputs {
        stream(path, open(path)?, num_experts, &moe, (&mut done, total_bytes), sink)?;
    }
    Ok(())
}

/// Checks the shapes of one file's arrays against each other.
fn shape(arrays: &TokenArrays) -> Result<Shape> {
    let ids = &arrays.expert_ids;
    if !ids.dtype.is_integer() {
        return Err(ids.bad(format!("has element type {:?}, expected an integer type", ids.dtype)));
    }
    let (tokens, layers, top_k) = match ids.shape[..] {
        [tokens, layers, top_k] => (tokens, layers, top_k),
        [tokens, top_k] => (tokens, 1, top_k),
        _ => {
            let message =
                format!("has shape {:?}, expected [tokens, layers, top_k] or [tokens, top_k]", ids.shape);
            return Err(ids.bad(message));
        }
    };
    if tokens == 0 {
        return Err(ids.bad("has no tokens"));
    }
    if layers == 0 || layers > MAX_LAYERS || top_k == 0 || top_k > MAX_EXPERTS {
        let message = format!(
            "has shape {:?}, expected 1 to {MAX_LAYERS} layers and top_k of 1 to {MAX_EXPERTS}",
            ids.shape
        );
        return Err(ids.bad(message));
    }
    let mut token_bytes = layers * top_k * ids.dtype.size();
    if let Some(weights) = &arrays.weights {
        if !weights.dtype.is_float() {
            let message = format!("has element type {:?}, expected f16, bf16, f32 or f64", weights.dtype);
            return Err(weights.bad(message));
        }
        if weights.shape != ids.shape {
            let message = format!("has shape {:?}, expected {:?} as expert_ids", weights.shape, ids.shape);
            return Err(weights.bad(message));
        }
        token_bytes += layers * top_k * weights.dtype.size();
    }
    let mut logits_width = None;
    if let Some(logits) = &arrays.router_logits {
        if !logits.dtype.is_float() {
            let message = format!("has element type {:?}, expected f16, bf16, f32 or f64", logits.dtype);
            return Err(logits.bad(message));
        }
        let expected = &ids.shape[..ids.shape.len() - 1];
        match logits.shape.split_last() {
            Some((&experts, rest)) if rest == expected && (1..=MAX_EXPERTS).contains(&experts) => {
                logits_width = Some(experts);
                token_bytes += layers * experts * logits.dtype.size();
            }
            _ => {
                let message = format!(
                    "has shape {:?}, expected {expected:?} as expert_ids and then the number of experts",
                    logits.shape
                );
                return Err(logits.bad(message));
            }
        }
    }
    if let Some(domains) = &arrays.domains {
        if !domains.dtype.is_integer() || domains.shape != [tokens] {
            let message = format!(
                "is {:?} {:?}, expected integers [{tokens}], one for each token",
                domains.dtype, domains.shape
            );
            return Err(domains.bad(message));
        }
        token_bytes += domains.dtype.size();
    }
    Ok(Shape {
        tokens,
        layers,
        top_k,
        logits: logits_width,
        weights: arrays.weights.is_some(),
        domains: arrays.domains.is_some(),
        token_bytes,
    })
}

/// Several inputs must agree on everything but the number of tokens.
fn same(a: &(Shape, About, &Path), b: (&Shape, &About, &Path)) -> Result<()> {
    let ((sa, aa, pa), (sb, ab, pb)) = (a, b);
    let differ = |what: &str, x: String, y: String| {
        let (na, nb) = (crate::io::file_name(pa), crate::io::file_name(pb));
        Err(FormatError::bad(pb, "", format!("{what}: {na} has {x}, {nb} has {y}")))
    };
    if sa.layers != sb.layers {
        return differ("layer counts differ", sa.layers.to_string(), sb.layers.to_string());
    }
    if sa.top_k != sb.top_k {
        return differ("top_k differs", sa.top_k.to_string(), sb.top_k.to_string());
    }
    if sa.logits != sb.logits {
        return differ(
            "router_logits differ",
            format!("width {:?}", sa.logits),
            format!("width {:?}", sb.logits),
        );
    }
    if sa.weights != sb.weights || sa.domains != sb.domains {
        let say = |s: &Shape| {
            let yes = |b: bool| if b { "" } else { "no " };
            format!("{}weights and {}domains", yes(s.weights), yes(s.domains))
        };
        return differ("arrays differ", say(sa), say(sb));
    }
    if aa != ab {
        return differ("descriptions differ", format!("{aa:?}"), format!("{ab:?}"));
    }
    Ok(())
}

fn num_experts(path: &Path, shape: &Shape, about: &About, options: &ImportOptions) -> Result<usize> {
    if let (Some(said), Some(width)) = (about.num_experts, shape.logits)
        && said != width
    {
        let message = format!("num_experts is {said}, but router_logits have a width of {width}");
        return Err(FormatError::bad(path, "", message));
    }
    about.num_experts.or(shape.logits).or(options.num_experts).ok_or_else(|| {
        let message = "the number of experts is not in the file: give it (`--experts N`), or store it as `num_experts` \
                       (safetensors metadata, or a scalar array in the npz)";
        FormatError::bad(path, "", message)
    })
}

/// Layers whose first row names different experts. Engines that store a row for every hidden layer leave dense layers at
/// one constant id; with top-1 that cannot be told from routing, so nothing is dropped then.
fn find_moe_layers(path: &Path, shape: &Shape, open: Open<'_>) -> Result<Vec<usize>> {
    let mut ids = Vec::new();
    open(path)?.expert_ids.read_ints(1, &mut ids)?;
    let mixed = |l: &usize| {
        let row = ids.get(l * shape.top_k..(l + 1) * shape.top_k).unwrap_or_default();
        shape.top_k == 1 || row.windows(2).any(|w| w[0] != w[1])
    };
    Ok((0..shape.layers).filter(mixed).collect())
}

/// Reads one file block by block.
fn stream(
    path: &Path,
    mut arrays: TokenArrays,
    num_experts: usize,
    moe: &[usize],
    progress: (&mut u64, u64),
    sink: &mut Sink<'_>,
) -> Result<()> {
    let shape = shape(&arrays)?;
    let (layers, k) = (shape.layers, shape.top_k);
    let block = (BLOCK_BYTES / shape.token_bytes.max(1)).clamp(1, 16384);
    let (mut raw, mut weights, mut logits, mut raw_domains) = (vec![], vec![], vec![], vec![]);
    let (mut ids, mut layer_weights, mut layer_logits, mut domains) = (vec![], vec![], vec![], vec![]);
    let (done, total) = progress;
    let mut first_row = 0;
    while first_row < shape.tokens {
        let n = block.min(shape.tokens - first_row);
        arrays.expert_ids.read_ints(n, &mut raw)?;
        if let Some(stream) = &mut arrays.weights {
            stream.read_floats(n, &mut weights)?;
        }
        if let Some(stream) = &mut arrays.router_logits {
            stream.read_floats(n, &mut logits)?;
        }
        if let Some(stream) = &mut arrays.domains {
            stream.read_ints(n, &mut raw_domains)?;
            domains.clear();
            for (i, &d) in raw_domains.iter().enumerate() {
                domains.push(u16::try_from(d).map_err(|_| {
                    stream.bad(format!("row {}: domain {d}, expected 0 to 65535", first_row + i))
                })?);
            }
        }
        for (layer, &l) in moe.iter().enumerate() {
            let rows = raw.chunks_exact(layers * k).flat_map(|token| token.iter().skip(l * k).take(k));
            to_expert_ids(rows.copied(), k, num_experts, (path, layer, first_row), &mut ids)?;
            gather(&weights, layers, l, k, &mut layer_weights);
            gather(&logits, layers, l, shape.logits.unwrap_or(0), &mut layer_logits);
            let rows = RowBlock {
                expert_ids: &ids,
                weights: shape.weights.then_some(&layer_weights),
                scores: shape.logits.is_some().then_some(&layer_logits),
                occurrences: None,
                domains: shape.domains.then_some(&domains),
            };
            sink.append(At { file: path, layer, first_row }, rows)?;
        }
        check_dense(path, &raw, (layers, k), moe, first_row)?;
        first_row += n;
        *done += (n * shape.token_bytes) as u64;
        sink.progress(*done, total);
    }
    for stream in
        [Some(arrays.expert_ids), arrays.weights, arrays.router_logits, arrays.domains].into_iter().flatten()
    {
        stream.finish()?;
    }
    Ok(())
}

/// The part of layer `l` of `[rows, layers, width]`.
fn gather(all: &[f32], layers: usize, l: usize, width: usize, out: &mut Vec<f32>) {
    out.clear();
    if width > 0 {
        out.extend(
            all.chunks_exact(layers * width).flat_map(|token| token.iter().skip(l * width).take(width)),
        );
    }
}

/// A layer that was taken for dense stays so in every row.
fn check_dense(
    path: &Path,
    raw: &[i64],
    (layers, k): (usize, usize),
    moe: &[usize],
    first_row: usize,
) -> Result<()> {
    if moe.len() == layers {
        return Ok(());
    }
    for (row, token) in raw.chunks_exact(layers * k).enumerate() {
        for (l, ids) in token.chunks_exact(k).enumerate() {
            if moe.binary_search(&l).is_err() && ids.windows(2).any(|w| w[0] != w[1]) {
                let message = format!(
                    "row {}: names different experts, but the first row of this layer repeats one id",
                    first_row + row
                );
                return Err(FormatError::bad(path, format!("layer {l} of the array"), message));
            }
        }
    }
    Ok(())
}
