//! `occult profile`

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use occult_formats::{FormatError, ProfileMeta, ProfileWriter, Source};
use occult_model::{Decoder, Logits, ModelError, Pass, PassObserver, RoutingRecord, for_each_pass};
use serde_json::json;

use crate::model_args::ProfileArgs;
use crate::output::{print, print_json};
use crate::spreading::with_model;
use crate::{inputs, model, progress};

pub(super) fn run(args: &ProfileArgs) -> Result<()> {
    match record(args)? {
        Some(recorded) => show(args, &recorded),
        None => Ok(()),
    }
}

/// What was recorded, and how long it took.
pub(super) struct Recorded {
    /// `None` without recording.
    meta: Option<ProfileMeta>,
    recording_seconds: f64,
    tokens: usize,
    seconds: f64,
}

/// Writes the profile; `None` in other processes of an MPI program than the first.
pub(super) fn record(args: &ProfileArgs) -> Result<Option<Recorded>> {
    // What can be wrong without the weights is found before they are read.
    let spec = &occult_model::hf::read_spec(&args.load.model)?;
    let window = model::window(args.context, spec)?;
    let max = args.max_tokens.unwrap_or(usize::MAX);
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
    let create = || Ok::<_, FormatError>(Recorder::new(ProfileWriter::create(&args.output, meta.clone())?));
    // A file that cannot be written is found before the weights are read, unless other processes must not write it, too.
    let early = !args.no_record && !args.spread.world.is_mpi();
    let recorder = Mutex::new(early.then(create).transpose()?);
    with_model(&args.load, &args.spread, |decoder| {
        let first = decoder.is_first_rank();
        let mut recorder = match first && !args.no_record {
            true => match recorder.lock().unwrap_or_else(PoisonError::into_inner).take() {
                Some(recorder) => Some(recorder),
                None => Some(create()?),
            },
            false => None,
        };
        let bar = if first { progress::bar(0, "tokens") } else { indicatif::ProgressBar::hidden() };
        let (start, mut tokens) = (Instant::now(), 0);
        for (path, is_text) in args.text.iter().map(|p| (p, true)).chain(args.ids.iter().map(|p| (p, false)))
        {
            let sequences = match &tokenizer {
                Some(tokenizer) if is_text => vec![inputs::text(path, tokenizer, args.max_tokens)?],
                _ => inputs::ids(path)?,
            };
            let mut left = max;
            let mut windows: Vec<&[u32]> = Vec::new();
            for sequence in &sequences {
                let sequence = &sequence[..sequence.len().min(left)];
                left -= sequence.len();
                windows.extend(sequence.chunks(window));
            }
            bar.inc_length(windows.iter().map(|w| w.len() as u64).sum());
            let domain = domains.iter().position(|d| *d == stem(path)).unwrap_or(0) as u16;
            let mut done = |n: usize| {
                tokens += n;
                bar.inc(n as u64);
            };
            let record = !args.no_record;
            let recorder = recorder.as_mut().map(|r| (r, domain));
            run_windows(decoder, &windows, args.batch_tokens, record, recorder, &mut done)
                .with_context(|| path.display().to_string())?;
        }
        let (meta, recording_seconds) = match recorder {
            Some(recorder) => recorder.finish().map(|(meta, spent)| (Some(meta), spent.as_secs_f64()))?,
            None => (None, 0.0),
        };
        bar.finish_and_clear();
        Ok(Recorded { meta, recording_seconds, tokens, seconds: start.elapsed().as_secs_f64() })
    })
}

fn show(args: &ProfileArgs, recorded: &Recorded) -> Result<()> {
    let Recorded { meta, recording_seconds, tokens, seconds } = recorded;
    let rate = *tokens as f64 / seconds.max(1e-9);
    if args.json {
        return print_json(&json!({
            "output": args.output, "meta": meta, "tokens": tokens, "seconds": seconds,
            "recording_seconds": recording_seconds, "tokens_per_second": rate,
        }));
    }
    let Some(meta) = meta else {
        return print(&format!("{tokens} tokens without recording ({rate:.0} tokens/s)\n"));
    };
    print(&format!(
        "{}: {tokens} tokens of {} domain{} through {} MoE layers of {} experts{}, with weights and router logits \
         ({rate:.0} tokens/s)\n",
        args.output.display(),
        meta.domains.len(),
        if meta.domains.len() == 1 { "" } else { "s" },
        meta.num_layers(),
        meta.num_experts,
        meta.top_k.map_or(String::new(), |k| format!(", top-{k}")),
    ))
}

/// Feeds windows of one file, tokens that see each other, in passes of at most `rows` rows.
fn run_windows(
    decoder: &Decoder,
    windows: &[&[u32]],
    rows: usize,
    record: bool,
    recorder: Option<(&mut Recorder, u16)>,
    done: &mut dyn FnMut(usize),
) -> Result<()> {
    let mut each = |pass: &Pass, _: &[f32]| {
        let fed = |w: &&[u32]| w.len().min(pass.positions.end) - pass.positions.start;
        done(windows[pass.sequences.clone()].iter().map(fed).sum());
        Ok(())
    };
    let Some((recorder, domain)) = recorder else {
        // On other ranks than the first, what is observed is not shown, but is computed.
        let mut observe = |_: &Pass, _: &RoutingRecord<'_>| Ok(());
        let observe = record.then_some(&mut observe as &mut PassObserver<'_>);
        return Ok(for_each_pass(decoder, windows, rows, Logits::Last, observe, &mut each)?);
    };
    let mut observe = |_: &Pass, r: &RoutingRecord<'_>| recorder.record(r, domain);
    let result = for_each_pass(decoder, windows, rows, Logits::Last, Some(&mut observe), &mut each);
    match recorder.error.take() {
        Some(error) => Err(error.into()),
        None => Ok(result?),
    }
}

/// Name of the domain of a file.
fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Writes what the routers decide to the profile, while the model runs.
struct Recorder {
    writer: ProfileWriter,
    /// The domain of every row of a pass, the same number over and over.
    domains: Vec<u16>,
    /// Time that went into recording.
    spent: Duration,
    /// What went wrong in the writer, which the model cannot carry.
    error: Option<FormatError>,
}

impl Recorder {
    fn new(writer: ProfileWriter) -> Self {
        Self { writer, domains: Vec::new(), spent: Duration::ZERO, error: None }
    }

    /// One layer of one pass.
    fn record(&mut self, r: &RoutingRecord<'_>, domain: u16) -> occult_model::Result<()> {
        let start = Instant::now();
        let routing = r.tokens();
        self.domains.clear();
        self.domains.resize(routing.num_tokens(), domain);
        self.writer.append(r.moe_layer, &routing.view()?, Some(&self.domains)).map_err(|e| {
            self.error = Some(e);
            ModelError::request("recording failed")
        })?;
        self.spent += start.elapsed();
        Ok(())
    }

    /// The file under its name, and the time that recording took in all.
    fn finish(self) -> Result<(ProfileMeta, Duration)> {
        let start = Instant::now();
        let meta = self.writer.finish()?;
        Ok((meta, self.spent + start.elapsed()))
    }
}
