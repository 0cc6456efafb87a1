//! Writes a profile as a stream.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use occult_plan::{CoActivation, Routing};
use serde_json::json;

use super::spool::{Spool, Track};
use super::{Column, FORMAT, ProfileMeta};
use crate::error::{FormatError, Result};
use crate::io::{link_target, put_f32, put_u16, put_u32, put_u64};
use crate::{MAX_COUNT, MAX_EXPERTS};

/// Writes one profile. Rows go to an unnamed temporary file in the output's folder; [`finish`](Self::finish) puts the
/// tensors in order, syncs and renames. Until then nothing exists under the output's name, and an error or a drop leaves
/// nothing behind. Memory: one co-activation table per layer and a few buffers, whatever the number of rows.
#[derive(Debug)]
pub struct ProfileWriter {
    path: PathBuf,
    meta: ProfileMeta,
    spool: Spool,
    layers: Vec<LayerTracks>,
}

#[derive(Debug, Default)]
struct LayerTracks {
    rows: u64,
    ids: Track,
    weights: Option<Track>,
    scores: Option<Track>,
    occurrences: Option<Track>,
    domains: Option<Track>,
    counts: Option<Vec<u64>>,
    coactivation: Option<CoActivation>,
    order: Option<Vec<u16>>,
}

impl ProfileWriter {
    /// Starts a profile that will appear at `path`. The folder must exist; a file already there is replaced at the end.
    pub fn create(path: &Path, meta: ProfileMeta) -> Result<Self> {
        if let Some(problem) = meta.problem() {
            return Err(FormatError::bad(path, "profile description", problem));
        }
        if path.is_dir() {
            return Err(FormatError::bad(path, "", "is a directory, expected the name of a file to write"));
        }
        if path.exists() && !path.is_file() {
            let message = "is not a regular file: a profile is renamed to its name when it is complete";
            return Err(FormatError::bad(path, "", message));
        }
        let path = &link_target(path)?;
        let spool = tempfile::tempfile_in(folder(path))
            .map_err(|e| FormatError::io("make a temporary file beside", path, e))?;
        let layers = meta.layer_ids.iter().map(|_| LayerTracks::default()).collect();
        Ok(Self { path: path.to_path_buf(), meta, spool: Spool::new(spool), layers })
    }

    /// The description as it stands.
    pub fn meta(&self) -> &ProfileMeta {
        &self.meta
    }

    /// Records in the profile what was done to the data.
    pub fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        if !self.meta.source.notes.contains(&note) {
            self.meta.source.notes.push(note);
        }
    }

    /// Rows of one layer so far.
    pub fn num_rows(&self, layer: usize) -> u64 {
        self.layers.get(layer).map_or(0, |l| l.rows)
    }

    /// Appends rows to one layer and adds them to its counts and co-activation. `domains` is `[T]`. A column that some
    /// rows of a layer have, all its rows must have.
    pub fn append(&mut self, layer: usize, rows: &Routing<'_>, domains: Option<&[u16]>) -> Result<()> {
        let bad = |message: String| FormatError::bad(&self.path, format!("writing layer {layer}"), message);
        let (e, k, t) = (rows.num_experts(), rows.top_k(), rows.num_tokens());
        if e != self.meta.num_experts || Some(k) != self.meta.top_k {
            let (want_e, want_k) = (self.meta.num_experts, self.meta.top_k);
            return Err(bad(format!(
                "rows of {e} experts, top {k}; the profile has {want_e}, top {want_k:?}"
            )));
        }
        if let Some(domains) = domains {
            if domains.len() != t {
                return Err(bad(format!("{} domains for {t} rows", domains.len())));
            }
            let names = self.meta.domains.len();
            if let Some(d) = domains.iter().find(|&&d| names > 0 && usize::from(d) >= names) {
                return Err(bad(format!("domain {d} has no name, there are {names}")));
            }
        }
        let occurrences = rows.occurrences_slice();
        let count = self.layers.len();
        let tracks =
            self.layers.get_mut(layer).ok_or_else(|| bad(format!("the profile has {count} layers")))?;
        if tracks.order.is_some() || (tracks.rows == 0 && tracks.counts.is_some()) {
            return Err(bad("has counts without rows already".to_owned()));
        }
        if t == 0 {
            return Ok(());
        }
        let first = tracks.rows == 0;
        for (what, track, given) in [
            ("weights", &mut tracks.weights, rows.weights().is_some()),
            ("router_logits", &mut tracks.scores, rows.scores().is_some()),
            ("occurrences", &mut tracks.occurrences, occurrences.is_some()),
            ("domains", &mut tracks.domains, domains.is_some()),
        ] {
            if first && given {
                *track = Some(Track::default());
            }
            if track.is_some() != given {
                let (some, none) = if given { ("later", "earlier") } else { ("earlier", "later") };
                return Err(bad(format!("{what} exist for {some} rows and are missing for {none} ones")));
            }
        }
        let spool = &mut self.spool;
        let write = |e| FormatError::io("write a temporary file beside", &self.path, e);
        spool.append(&mut tracks.ids, |out| put_u16(rows.expert_ids(), out)).map_err(write)?;
        if let (Some(track), Some(values)) = (&mut tracks.weights, rows.weights()) {
            spool.append(track, |out| put_f32(values, out)).map_err(write)?;
        }
        if let (Some(track), Some(values)) = (&mut tracks.scores, rows.scores()) {
            spool.append(track, |out| put_f32(values, out)).map_err(write)?;
        }
        if let (Some(track), Some(values)) = (&mut tracks.occurrences, occurrences) {
            spool.append(track, |out| put_u32(values, out)).map_err(write)?;
        }
        if let (Some(track), Some(values)) = (&mut tracks.domains, domains) {
            spool.append(track, |out| put_u16(values, out)).map_err(write)?;
        }
        let counts = tracks.counts.get_or_insert_with(|| vec![0; e]);
        for (ids, n) in rows.weighted_rows() {
            for &id in ids {
                if let Some(count) = counts.get_mut(usize::from(id)) {
                    *count += n;
                }
            }
        }
        tracks.coactivation.get_or_insert_with(|| CoActivation::new(e)).add(rows);
        tracks.rows += t as u64;
        Ok(())
    }

    /// Fills a layer of which only counts are known: tokens per expert `[E]`, and per pair if the source has them.
    pub fn set_counts(
        &mut self,
        layer: usize,
        counts: Vec<u64>,
        coactivation: Option<CoActivation>,
    ) -> Result<()> {
        let e = self.meta.num_experts;
        if counts.len() != e {
            return Err(self.bad(layer, format!("{} counts, expected {e}", counts.len())));
        }
        check_total("counts", &counts).map_err(|m| self.bad(layer, m))?;
        if let Some(pairs) = &coactivation {
            if pairs.num_experts() != e {
                let found = pairs.num_experts();
                return Err(self.bad(layer, format!("co-activation of {found} experts, expected {e}")));
            }
            check_total("co-activation counts", pairs.as_slice()).map_err(|m| self.bad(layer, m))?;
        }
        let tracks = self.empty_layer(layer)?;
        tracks.counts = Some(counts);
        tracks.coactivation = coactivation;
        Ok(())
    }

    /// Fills a layer of which only an order is known: for every expert the other experts by descending co-activation,
    /// `[E, E-1]`.
    pub fn set_order(&mut self, layer: usize, order: Vec<u16>) -> Result<()> {
        check_order(self.meta.num_experts, &order).map_err(|m| self.bad(layer, m))?;
        self.empty_layer(layer)?.order = Some(order);
        Ok(())
    }

    fn empty_layer(&mut self, layer: usize) -> Result<&mut LayerTracks> {
        let count = self.layers.len();
        match self.layers.get(layer) {
            None => return Err(self.bad(layer, format!("the profile has {count} layers"))),
            Some(l) if l.rows > 0 || l.counts.is_some() || l.order.is_some() => {
                return Err(self.bad(layer, "is filled already"));
            }
            Some(_) => {}
        }
        Ok(&mut self.layers[layer])
    }

    fn bad(&self, layer: usize, message: impl Into<String>) -> FormatError {
        FormatError::bad(&self.path, format!("writing layer {layer}"), message)
    }

    /// Assembles the file and gives it its name. Every layer must have been filled.
    pub fn finish(self) -> Result<ProfileMeta> {
        let write = |e| FormatError::io("write", &self.path, e);
        for (i, layer) in self.layers.iter().enumerate() {
            if layer.counts.is_none() && layer.order.is_none() {
                let id = self.meta.layer_ids.get(i).copied().unwrap_or_default();
                return Err(
                    self.bad(i, format!("there are no tokens of this layer (layer {id} of the model)"))
                );
            }
        }
        let header = self.header()?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(".occult-");
        #[cfg(unix)]
        {
            // As an ordinary file would be: what the umask leaves of rw-rw-rw-.
            use std::os::unix::fs::PermissionsExt as _;
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let temp = builder.tempfile_in(folder(&self.path)).map_err(write)?;
        let mut out = std::io::BufWriter::with_capacity(1 << 20, temp.as_file());
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(write)?;
        out.write_all(&header).map_err(write)?;
        let mut bytes = Vec::new();
        for column in Column::ALL {
            for layer in &self.layers {
                bytes.clear();
                match (column, column.track(layer)) {
                    (_, Some(track)) => self.spool.copy(track, &mut out).map_err(write)?,
                    (Column::Counts, None) => {
                        put_u64(layer.counts.as_deref().unwrap_or_default(), &mut bytes)
                    }
                    (Column::CoActivation, None) => {
                        put_u64(layer.coactivation.as_ref().map_or(&[], CoActivation::as_slice), &mut bytes);
                    }
                    (Column::Order, None) => put_u16(layer.order.as_deref().unwrap_or_default(), &mut bytes),
                    (_, None) => {}
                }
                out.write_all(&bytes).map_err(write)?;
            }
        }
        out.flush().map_err(write)?;
        drop(out);
        temp.as_file().sync_all().map_err(write)?;
        temp.persist(&self.path)
            .map_err(|e| FormatError::io("rename a temporary file to", &self.path, e.error))?;
        Ok(self.meta)
    }

    fn header(&self) -> Result<Vec<u8>> {
        let json_error = |e: serde_json::Error| self.bad(0, format!("profile description: {e}"));
        let (e, k) = (self.meta.num_experts, self.meta.top_k.unwrap_or(0));
        let mut header = serde_json::Map::new();
        let meta = serde_json::to_string(&self.meta).map_err(json_error)?;
        header.insert("__metadata__".to_owned(), json!({ "format": FORMAT, "meta": meta }));
        let mut offset = 0_u64;
        for column in Column::ALL {
            for (i, layer) in self.layers.iter().enumerate() {
                let rows = layer.rows;
                let (shape, bytes) = match column {
                    Column::Counts if layer.counts.is_some() => (json!([e]), 8 * e as u64),
                    Column::CoActivation if layer.coactivation.is_some() => {
                        (json!([e, e]), 8 * (e * e) as u64)
                    }
                    Column::Order if layer.order.is_some() => (json!([e, e - 1]), 2 * (e * (e - 1)) as u64),
                    _ => match (column, column.track(layer)) {
                        (Column::Weights | Column::ExpertIds, Some(t)) => (json!([rows, k]), t.bytes()),
                        (Column::RouterLogits, Some(t)) => (json!([rows, e]), t.bytes()),
                        (_, Some(t)) => (json!([rows]), t.bytes()),
                        (_, None) => continue,
                    },
                };
                let entry = json!({
                    "dtype": column.dtype(), "shape": shape, "data_offsets": [offset, offset + bytes],
                });
                header.insert(column.tensor(i), entry);
                offset += bytes;
            }
        }
        let mut bytes = serde_json::to_vec(&header).map_err(json_error)?;
        bytes.resize(bytes.len().next_multiple_of(8), b' ');
        Ok(bytes)
    }
}

impl Column {
    fn track(self, layer: &LayerTracks) -> Option<&Track> {
        match self {
            Column::ExpertIds => (layer.rows > 0).then_some(&layer.ids),
            Column::Weights => layer.weights.as_ref(),
            Column::RouterLogits => layer.scores.as_ref(),
            Column::Occurrences => layer.occurrences.as_ref(),
            Column::Domains => layer.domains.as_ref(),
            Column::Counts | Column::CoActivation | Column::Order => None,
        }
    }
}

/// Refuses totals that later sums could not hold exactly.
pub(super) fn check_total(what: &str, counts: &[u64]) -> std::result::Result<(), String> {
    let total = counts.iter().try_fold(0_u64, |sum, &c| sum.checked_add(c));
    match total {
        Some(total) if total <= MAX_COUNT => Ok(()),
        _ => Err(format!("the {what} add up to more than {MAX_COUNT}")),
    }
}

/// A collaborator order `[E, E-1]` names, for every expert, every other expert once.
pub(super) fn check_order(num_experts: usize, order: &[u16]) -> std::result::Result<(), String> {
    let e = num_experts.clamp(1, MAX_EXPERTS);
    if order.len() != e * (e - 1) {
        return Err(format!("the order has {} entries, expected {}", order.len(), e * (e - 1)));
    }
    let mut seen = vec![usize::MAX; e];
    for (expert, others) in order.chunks_exact((e - 1).max(1)).enumerate() {
        for &other in others {
            let o = usize::from(other);
            match seen.get_mut(o) {
                Some(last) if *last != expert && o != expert => *last = expert,
                Some(_) => return Err(format!("expert {expert}: {other} appears twice, or is itself")),
                None => return Err(format!("expert {expert}: id {other}, there are {e} experts")),
            }
        }
    }
    Ok(())
}

/// The folder a file is in; `.` for a bare name.
fn folder(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
