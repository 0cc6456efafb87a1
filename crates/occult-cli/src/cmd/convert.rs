//! `occult convert`

use anyhow::Result;
use occult_formats::LimitFile;
use occult_model::{ConvertOptions, LoadOptions, ModelFiles, Progress, QuantisedClass, Threads};

use crate::model_args::ConvertArgs;
use crate::output::{Table, print};
use crate::progress;

pub(super) fn run(args: &ConvertArgs) -> Result<()> {
    let bar = progress::bytes(&format!("writing {}", args.output.display()));
    let result = write(args, &mut progress::follow(&bar));
    bar.finish_and_clear();
    if let Some(classes) = result? {
        print(&errors(&classes))?;
    }
    // What no checkpoint format holds; a limit belongs to the placement beside it and stays behind.
    if let Some(bias) = LimitFile::read_bias(&args.model)? {
        LimitFile::of_bias(bias).write(&args.output)?;
    }
    written(args)
}

fn write(args: &ConvertArgs, progress: &mut Progress<'_>) -> Result<Option<Vec<QuantisedClass>>> {
    let (from, to) = (&args.model, &args.output);
    if let Some(quantize) = args.quantize {
        let threads = Threads::new(std::thread::available_parallelism().map_or(1, usize::from));
        return Ok(Some(occult_model::quantise(from, to, quantize.format(), &threads, progress)?));
    }
    let files = ModelFiles::open(from, LoadOptions::default())?;
    let layout = args.layout.map_or(files.names().layout, |l| l.expert_layout());
    let options = ConvertOptions { layout, dtype: args.dtype.map(|d| d.stored()) };
    occult_model::convert(from, to, &options, progress)?;
    Ok(None)
}

/// How far the quantised weights are from the original ones.
fn errors(classes: &[QuantisedClass]) -> String {
    let percent = |share: f64| format!("{:.3}%", 100.0 * share);
    let mut table =
        Table::new(["weights", "format", "matrices", "rms error", "max error", "worst matrix", ""]);
    for c in classes {
        table.row([
            c.class.to_owned(),
            c.format.name().to_owned(),
            c.num_tensors.to_string(),
            percent(c.error.relative_rms()),
            format!("{:.2e}", c.error.max_error),
            percent(c.worst_relative_rms),
            c.worst.clone(),
        ]);
    }
    table.render() + "\n"
}

fn written(args: &ConvertArgs) -> Result<()> {
    let written = ModelFiles::open(&args.output, LoadOptions::default())?;
    let (bytes, shards) = (written.checkpoint().total_bytes(), written.checkpoint().num_shards());
    let plural = if shards == 1 { "" } else { "s" };
    print(&format!(
        "{}: {} in {shards} file{plural}\n",
        args.output.display(),
        crate::output::bytes(bytes as f64)
    ))
}
