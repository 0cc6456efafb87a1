//! `occult eval`

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use occult_model::eval::{ChoiceItem, ChoiceScores, Perplexity, perplexity, read_items, score_item};
use occult_model::hf::GenerationDefaults;
use occult_model::{Decoder, Pass, PassObserver, RoutingRecord, TextTokenizer};
use occult_plan::TrafficSummary;
use serde_json::{Value, json};

use crate::model_args::EvalArgs;
use crate::output::{Table, bytes, print, print_json};
use crate::sent::Sent;
use crate::spreading::with_spread_model;
use crate::visits::Visits;
use crate::{inputs, model, progress};

/// What was measured.
pub(super) struct Evaluation {
    window: usize,
    texts: Vec<(PathBuf, Perplexity)>,
    /// All texts together.
    pub(super) total: Perplexity,
    tasks: Vec<(PathBuf, ChoiceScores)>,
    /// With experts over ranks: while the texts were read.
    pub(super) sent: Option<Sent>,
    /// The ranks that tokens visited meanwhile, mean over layers.
    pub(super) visits: Option<TrafficSummary>,
    /// For the texts.
    pub(super) seconds: f64,
}

impl Evaluation {
    /// A figure of [`Sent`] per token that went through the model.
    pub(super) fn per_token(&self, figure: impl Fn(&Sent) -> f64) -> Option<f64> {
        let tokens = (self.total.inputs > 0).then_some(self.total.inputs as f64)?;
        Some(figure(self.sent.as_ref()?) / tokens)
    }
}

pub(super) fn run(args: &EvalArgs) -> Result<()> {
    match measure(args)? {
        Some(found) if args.json => print_json(&as_json(&found, &args.load.model)),
        Some(found) => print(&as_text(&found)),
        None => Ok(()),
    }
}

/// Measures; `None` in other processes of an MPI program than the first.
pub(super) fn measure(args: &EvalArgs) -> Result<Option<Evaluation>> {
    let dir = &args.load.model;
    // What can be wrong without the weights is found before they are read.
    let spec = occult_model::hf::read_spec(dir)?;
    let window = model::window(args.context, &spec)?;
    let needs_text = !args.text.is_empty() || !args.tasks.is_empty();
    let tokenizer = if needs_text { Some(model::tokenizer(dir, &spec)?) } else { None };
    let defaults = GenerationDefaults::read(dir)?;
    // As lm-evaluation-harness: what a text without a beginning is conditioned on.
    let prefix = defaults.bos_id.or(defaults.eos_ids.first().copied());
    let questions = args.tasks.iter().map(|path| Ok((path.as_path(), read_items(path)?)));
    let questions = questions.collect::<Result<Vec<_>>>()?;
    let mut sequences = Vec::with_capacity(args.ids.len());
    for path in &args.ids {
        let ids = inputs::ids(path)?;
        model::check_ids(&ids, &spec, usize::MAX).with_context(|| path.display().to_string())?;
        sequences.push((path.as_path(), ids));
    }
    with_spread_model(&args.load, &args.spread, |decoder, spreading| {
        let start = Instant::now();
        let mut texts: Vec<(PathBuf, Perplexity)> = Vec::new();
        let mut total = Perplexity::default();
        let mut visits = spreading.map(|s| Visits::new(s.placement)).transpose()?;
        let mut record = |_: &Pass, r: &RoutingRecord<'_>| visits.as_mut().map_or(Ok(()), |v| v.record(r));
        // Nothing is observed, and nothing gathered, where there are no ranks.
        let mut observer = spreading.map(|_| &mut record as &mut PassObserver<'_>);
        let bar = bar_of(decoder, args.text.len() + args.ids.len(), "texts");
        for path in &args.text {
            let Some(tokenizer) = &tokenizer else { continue };
            let ids = inputs::text(path, tokenizer, args.max_tokens)?;
            let score = perplexity(decoder, &ids, prefix, window, observer.as_deref_mut())
                .with_context(|| path.display().to_string())?;
            scored(path, &score)?;
            total.add(&score);
            texts.push((path.clone(), score));
            bar.inc(1);
        }
        for (path, sequences) in &sequences {
            let mut score = Perplexity::default();
            let mut left = args.max_tokens.unwrap_or(usize::MAX);
            for ids in sequences {
                let ids = &ids[..ids.len().min(left)];
                left -= ids.len();
                let part = perplexity(decoder, ids, None, window, observer.as_deref_mut())
                    .with_context(|| path.display().to_string())?;
                score.add(&part);
            }
            scored(path, &score)?;
            total.add(&score);
            texts.push((path.to_path_buf(), score));
            bar.inc(1);
        }
        bar.finish_and_clear();
        let (seconds, sent) =
            (start.elapsed().as_secs_f64(), Sent::take(decoder, spreading.map(|s| s.meter))?);
        let visits = visits.and_then(Visits::finish);

        let mut tasks = Vec::new();
        for (path, items) in &questions {
            let Some(tokenizer) = &tokenizer else { continue };
            tasks.push((path.to_path_buf(), choices(path, items, decoder, tokenizer, prefix)?));
        }
        Ok(Evaluation { window, texts, total, tasks, sent, visits, seconds })
    })
}

fn as_json(found: &Evaluation, dir: &Path) -> Value {
    let text = |path: Value, p: &Perplexity| json!({ "file": path, "perplexity": p.value(), "nll": p.nll, "tokens": p.tokens });
    let task = |(path, s): &(PathBuf, ChoiceScores)| json!({ "file": path, "items": s.items, "acc": s.acc(), "acc_norm": s.acc_norm() });
    json!({
        "model": dir,
        "window": found.window,
        "texts": found.texts.iter().map(|(path, p)| text(json!(path), p)).collect::<Vec<_>>(),
        "total": if found.texts.is_empty() { Value::Null } else { text(Value::Null, &found.total) },
        "tasks": found.tasks.iter().map(task).collect::<Vec<_>>(),
        "seconds": found.seconds,
        "copies_per_token": found.visits.map(|v| v.copies_per_token),
        "load_max_over_mean": found.visits.map(|v| v.load_max_over_mean),
        "sent_rows_per_token": found.per_token(|s| s.rows),
        "sent_bytes_per_token": found.per_token(|s| s.bytes),
    })
}

fn as_text(found: &Evaluation) -> String {
    let Evaluation { texts, total, tasks, .. } = found;
    let mut out = String::new();
    if !texts.is_empty() {
        let mut table = Table::new(["text", "tokens", "perplexity"]);
        let mut row = |name: String, p: &Perplexity| {
            table.row([name, p.tokens.to_string(), format!("{:.4}", p.value())])
        };
        texts.iter().for_each(|(path, p)| row(path.display().to_string(), p));
        if texts.len() > 1 {
            row("all".to_owned(), total);
        }
        out.push_str(&table.render());
        if let Some(visits) = found.visits {
            let (copies, load) = (visits.copies_per_token, visits.load_max_over_mean);
            out.push_str(&format!(
                "\na token visits {copies:.2} ranks per layer; the busiest has {load:.2} of the mean load\n"
            ));
        }
        if let (Some(rows), Some(sent)) = (found.per_token(|s| s.rows), found.per_token(|s| s.bytes)) {
            let sent = bytes(sent);
            out.push_str(&format!(
                "a token in all MoE layers: {rows:.2} rows to other ranks, {sent} there and back\n"
            ));
        }
    }
    if !tasks.is_empty() {
        let mut table = Table::new(["task", "items", "acc", "acc_norm"]);
        for (path, s) in tasks {
            let (acc, norm) = (format!("{:.4}", s.acc()), format!("{:.4}", s.acc_norm()));
            table.row([path.display().to_string(), s.items.to_string(), acc, norm]);
        }
        out.push_str(&table.render());
    }
    out
}

/// A text of one token, with nothing before it, has no perplexity.
fn scored(path: &Path, score: &Perplexity) -> Result<()> {
    if score.tokens == 0 {
        bail!("{}: has no token with another one before it: there is nothing to score", path.display());
    }
    Ok(())
}

/// A bar that the first rank shows.
fn bar_of(decoder: &Decoder, items: usize, what: &str) -> indicatif::ProgressBar {
    match decoder.is_first_rank() {
        true => progress::bar(items as u64, what),
        false => indicatif::ProgressBar::hidden(),
    }
}

fn choices(
    path: &Path,
    items: &[ChoiceItem],
    decoder: &Decoder,
    tokenizer: &TextTokenizer,
    prefix: Option<u32>,
) -> Result<ChoiceScores> {
    let encode = |text: &str, special: bool| tokenizer.encode(text, special);
    let mut scores = ChoiceScores::default();
    let bar = bar_of(decoder, items.len(), "questions");
    let (rank, num_ranks) =
        decoder.ranks().map_or((0, 1), |ranks| (ranks.comm().rank(), ranks.comm().world_size()));
    for (i, item) in items.iter().enumerate().skip(rank).step_by(num_ranks) {
        let score = score_item(decoder, &encode, prefix, item);
        scores.add(&score.with_context(|| format!("{}: question {}", path.display(), i + 1))?);
        bar.inc(num_ranks as u64);
    }
    bar.finish_and_clear();
    decoder.attend()?;
    if let Some(ranks) = decoder.ranks() {
        let mut sums = [scores.items, scores.correct, scores.correct_norm].map(|n| n as f64);
        ranks.comm().all_reduce_sum_f64("answers", &mut sums)?;
        let [items, correct, correct_norm] = sums.map(|n| n as u64);
        scores = ChoiceScores { items, correct, correct_norm };
    }
    Ok(scores)
}
