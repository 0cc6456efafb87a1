//! `occult profile`

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use occult_formats::{FormatError, ProfileMeta, ProfileWriter, Source};
use occult_model::{Decoder, ModelError, RoutingRecord, prefill};
use serde_json::json;

use crate::model_args::ProfileArgs;
use crate::output::{print, print_json};
use crate::{inputs, model, progress};

pub(super) fn run(args: &ProfileArgs) -> Result<()> {
    // What can be wrong without the weights is found before they are read.
    let spec = &occult_model::hf::read_spec(&args.load.model)?;
    let window = model::window(args.context, spec)?;
    let max = args.max_tokens.unwrap_or(usize::MAX);
    if max == 0 {
        bail!("--max-tokens is 0: there would be nothing to record");
    }
    let tokenizer = match args.text[..] {
        [] => None,
        _ => Some(model::tokenizer(&args.load.model, spec)?),
    };
    let name = args.model_name.clone().unwrap_or_else(|| model::name(&args.load.model));
    let files = || args.text.iter().chain(&args.ids);
    let mut domains: Vec<String> = Vec::new();
    for domain in files().map(|f| stem(f)) {
        if !domains.contains(&domain) {
            domains.push(domain);
        }
    }
    if domains.len() > usize::from(u16::MAX) {
        bail!("{} files: a profile has at most {} domains", domains.len(), u16::MAX);
    }
    let mut notes = vec![format!("windows of {window} tokens")];
    notes.extend(args.max_tokens.map(|n| format!("at most {n} tokens of every file")));
    let source = Source {
        format: "occult-profile".to_owned(),
        files: files()
            .map(|f| f.file_name().unwrap_or(f.as_os_str()).to_string_lossy().into_owned())
            .collect(),
        notes,
    };
    let meta = ProfileMeta { source, domains: domains.clone(), ..model::profile_meta(spec, name) };
    let mut recorder =
        Recorder { writer: ProfileWriter::create(&args.output, meta)?, domain: 0, error: None };
    let decoder = model::load(&args.load)?;

    let bar = progress::bar(0, "tokens");
    let (start, mut tokens) = (Instant::now(), 0);
    for (path, is_text) in args.text.iter().map(|p| (p, true)).chain(args.ids.iter().map(|p| (p, false))) {
        let sequences = match &tokenizer {
            Some(tokenizer) if is_text => vec![inputs::text(path, tokenizer, args.max_tokens)?],
            _ => inputs::ids(path)?,
        };
        recorder.domain = domains.iter().position(|d| *d == stem(path)).unwrap_or(0) as u16;
        let mut left = max;
        bar.inc_length(sequences.iter().map(Vec::len).sum::<usize>().min(left) as u64);
        for sequence in &sequences {
            let sequence = &sequence[..sequence.len().min(left)];
            left -= sequence.len();
            for ids in sequence.chunks(window) {
                recorder.run(&decoder, ids).with_context(|| path.display().to_string())?;
                tokens += ids.len();
                bar.inc(ids.len() as u64);
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let meta = recorder.writer.finish()?;
    bar.finish_and_clear();
    let rate = tokens as f64 / seconds.max(1e-9);
    if args.json {
        return print_json(&json!({
            "output": args.output, "meta": meta, "tokens": tokens, "seconds": seconds, "tokens_per_second": rate,
        }));
    }
    print(&format!(
        "{}: {tokens} tokens of {} domain{} through {} MoE layers of {} experts, top-{}, with weights and router logits \
         ({rate:.0} tokens/s)\n",
        args.output.display(),
        meta.domains.len(),
        if meta.domains.len() == 1 { "" } else { "s" },
        meta.num_layers(),
        meta.num_experts,
        spec.moe.router.top_k,
    ))
}

/// Name of the domain of a file.
fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Writes what the routers decide to the profile, while the model runs.
struct Recorder {
    writer: ProfileWriter,
    domain: u16,
    /// What went wrong in the writer, which the model cannot carry.
    error: Option<FormatError>,
}

impl Recorder {
    /// One window: tokens that see each other.
    fn run(&mut self, decoder: &Decoder, ids: &[u32]) -> Result<()> {
        let mut observe = |r: &RoutingRecord<'_>| {
            let routing = r.tokens();
            let domains = vec![self.domain; routing.num_tokens()];
            self.writer.append(r.moe_layer, &routing.view()?, Some(&domains)).map_err(|e| {
                self.error = Some(e);
                ModelError::request("recording failed")
            })
        };
        let result = prefill(decoder, ids, &mut decoder.new_cache(), Some(&mut observe));
        if let Some(error) = self.error.take() {
            return Err(error.into());
        }
        result?;
        Ok(())
    }
}
