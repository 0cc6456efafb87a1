//! Where importers put what they read.

use std::path::{Path, PathBuf};

use occult_plan::{CoActivation, Routing};

use super::{ImportFormat, ImportOptions, ImportSummary, warnings};
use crate::error::{FormatError, Result};
use crate::io;
use crate::profile::{ProfileMeta, ProfileWriter, RouterInfo, Source};

/// What an importer knows before the first row. `options` fill what is left open.
#[derive(Debug, Clone, Default)]
pub(crate) struct Layout {
    /// `E`.
    pub(crate) num_experts: usize,
    /// `K`; `None` if the source has only counts and does not say it.
    pub(crate) top_k: Option<usize>,
    /// The model's layer numbers, ascending; one for each layer that will be filled.
    pub(crate) layer_ids: Vec<u32>,
    pub(crate) num_hidden_layers: Option<u32>,
    pub(crate) model: Option<String>,
    pub(crate) domains: Vec<String>,
    pub(crate) router: Option<RouterInfo>,
}

/// Where rows come from: for errors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct At<'a> {
    pub(crate) file: &'a Path,
    /// Index of the layer in the profile.
    pub(crate) layer: usize,
    /// Row of that layer in that file which the block starts with.
    pub(crate) first_row: usize,
}

/// Rows of one layer that are not checked yet.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RowBlock<'a> {
    /// `[T, K]`.
    pub(crate) expert_ids: &'a [u16],
    /// `[T, K]`.
    pub(crate) weights: Option<&'a [f32]>,
    /// `[T, E]`.
    pub(crate) scores: Option<&'a [f32]>,
    /// `[T]`.
    pub(crate) occurrences: Option<&'a [u32]>,
    /// `[T]`.
    pub(crate) domains: Option<&'a [u16]>,
}

/// Collects one import: checks values, writes the profile, gathers warnings.
pub(crate) struct Sink<'p> {
    format: ImportFormat,
    inputs: &'p [PathBuf],
    options: &'p ImportOptions,
    output: &'p Path,
    progress: &'p mut dyn FnMut(u64, u64),
    writer: Option<ProfileWriter>,
    notes: Vec<String>,
    warnings: Vec<String>,
}

impl<'p> Sink<'p> {
    pub(crate) fn new(
        format: ImportFormat,
        inputs: &'p [PathBuf],
        options: &'p ImportOptions,
        output: &'p Path,
        progress: &'p mut dyn FnMut(u64, u64),
    ) -> Self {
        Self {
            format,
            inputs,
            options,
            output,
            progress,
            writer: None,
            notes: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Starts the profile. Options that contradict the files are an error; options for what the files leave open are
    /// taken. Call once, before any rows.
    pub(crate) fn begin(&mut self, layout: Layout) -> Result<()> {
        let file = self.first_input().to_path_buf();
        let options = self.options;
        let bad = |message: String| FormatError::bad(&file, "", message);
        agree("number of experts", options.num_experts, Some(layout.num_experts)).map_err(bad)?;
        let top_k = agree("top_k", options.top_k, layout.top_k).map_err(bad)?;
        let hidden =
            agree("num_hidden_layers", options.num_hidden_layers, layout.num_hidden_layers).map_err(bad)?;
        let layer_ids = match &options.layer_ids {
            Some(ids) if ids.len() != layout.layer_ids.len() => {
                let (found, given) = (layout.layer_ids.len(), ids.len());
                return Err(bad(format!("has {found} MoE layers, but {given} layer ids were given")));
            }
            Some(ids) => ids.clone(),
            None => layout.layer_ids,
        };
        let meta = ProfileMeta {
            num_experts: layout.num_experts,
            top_k,
            layer_ids,
            num_hidden_layers: hidden,
            model: options.model.clone().or(layout.model),
            source: Source {
                format: self.format.to_string(),
                files: self.inputs.iter().map(|p| io::file_name(p)).collect(),
                notes: Vec::new(),
            },
            domains: layout.domains,
            router: router(options, layout.router),
        };
        if let Some(problem) = meta.problem() {
            return Err(bad(problem));
        }
        self.writer = Some(ProfileWriter::create(self.output, meta)?);
        Ok(())
    }

    /// Checks rows and appends them.
    pub(crate) fn append(&mut self, at: At<'_>, rows: RowBlock<'_>) -> Result<()> {
        let writer = writer(&mut self.writer)?;
        let meta = writer.meta();
        let routing = || {
            let mut routing =
                Routing::new(meta.num_experts, meta.top_k.unwrap_or_default(), rows.expert_ids)?;
            if let Some(weights) = rows.weights {
                routing = routing.with_weights(weights)?;
            }
            if let Some(scores) = rows.scores {
                routing = routing.with_scores(scores)?;
            }
            if let Some(occurrences) = rows.occurrences {
                routing = routing.with_occurrences(occurrences)?;
            }
            Ok(routing)
        };
        let routing = routing().map_err(|e| FormatError::plan(at.file, at.layer, at.first_row, e))?;
        writer.append(at.layer, &routing, rows.domains)
    }

    /// Fills a layer with counts only. `file` is where they come from.
    pub(crate) fn set_counts(
        &mut self,
        file: &Path,
        layer: usize,
        counts: Vec<u64>,
        coactivation: Option<CoActivation>,
    ) -> Result<()> {
        if counts.iter().all(|&c| c == 0) {
            return Err(FormatError::bad(file, format!("layer {layer}"), "all counts are zero"));
        }
        writer(&mut self.writer)?.set_counts(layer, counts, coactivation).map_err(|e| name_input(e, file))
    }

    /// Fills a layer with an order of collaborators only.
    pub(crate) fn set_order(&mut self, file: &Path, layer: usize, order: Vec<u16>) -> Result<()> {
        writer(&mut self.writer)?.set_order(layer, order).map_err(|e| name_input(e, file))
    }

    /// Records in the profile what was done to the data.
    pub(crate) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Tells the user something that is not an error; recorded in the profile as well.
    pub(crate) fn warn(&mut self, warning: impl Into<String>) {
        let warning = warning.into();
        self.notes.push(warning.clone());
        self.warnings.push(warning);
    }

    /// Bytes of input read, of how many.
    pub(crate) fn progress(&mut self, done: u64, total: u64) {
        (self.progress)(done.min(total), total);
    }

    fn first_input(&self) -> &Path {
        self.inputs.first().map_or(self.output, PathBuf::as_path)
    }

    /// Completes the profile.
    pub(crate) fn finish(mut self) -> Result<ImportSummary> {
        let file = self.first_input().to_path_buf();
        let mut writer =
            self.writer.take().ok_or_else(|| FormatError::bad(&file, "", "holds nothing to import"))?;
        for note in &self.notes {
            writer.note(note);
        }
        let rows: Vec<Option<u64>> =
            (0..writer.meta().num_layers()).map(|l| Some(writer.num_rows(l)).filter(|&n| n > 0)).collect();
        let meta = writer.finish().map_err(|e| name_input(e, &file))?;
        let profile = crate::Profile::open(self.output)?;
        self.warnings.extend(warnings::not_computable(&profile));
        Ok(ImportSummary { format: self.format, meta, rows, warnings: self.warnings })
    }
}

fn writer(writer: &mut Option<ProfileWriter>) -> Result<&mut ProfileWriter> {
    writer.as_mut().ok_or_else(|| FormatError::Request("rows came before their layout".to_owned()))
}

/// What the writer finds wrong with values is the input's fault: names the input instead of the output.
fn name_input(error: FormatError, input: &Path) -> FormatError {
    match error {
        FormatError::Bad { place, message, .. } => {
            FormatError::bad(input, place.strip_prefix("writing ").unwrap_or(&place), message)
        }
        other => other,
    }
}

/// The value that option and file agree on, or what they disagree on.
fn agree<T: PartialEq + ToString>(
    what: &str,
    option: Option<T>,
    file: Option<T>,
) -> std::result::Result<Option<T>, String> {
    match (option, file) {
        (Some(given), Some(found)) if given != found => {
            Err(format!("{what}: the file says {}, the option says {}", found.to_string(), given.to_string()))
        }
        (given, found) => Ok(found.or(given)),
    }
}

fn router(options: &ImportOptions, file: Option<RouterInfo>) -> Option<RouterInfo> {
    let told = options.norm_topk_prob.is_some()
        || options.num_groups.is_some()
        || options.topk_groups.is_some()
        || options.scoring.is_some();
    if !told {
        return file;
    }
    let file = file.unwrap_or_default();
    Some(RouterInfo {
        norm_topk_prob: options.norm_topk_prob.unwrap_or(file.norm_topk_prob),
        num_groups: options.num_groups.or(file.num_groups),
        topk_groups: options.topk_groups.or(file.topk_groups),
        scoring: options.scoring.unwrap_or(file.scoring),
    })
}
