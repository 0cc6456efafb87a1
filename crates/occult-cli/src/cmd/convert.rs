//! `occult convert`

use anyhow::Result;
use occult_model::{ConvertOptions, LoadOptions, ModelFiles};

use crate::model_args::ConvertArgs;
use crate::output::print;
use crate::progress;

pub(super) fn run(args: &ConvertArgs) -> Result<()> {
    let files = ModelFiles::open(&args.model, LoadOptions::default())?;
    let layout = args.layout.map_or(files.names().layout, |l| l.expert_layout());
    let options = ConvertOptions { layout, dtype: args.dtype.map(|d| d.stored()) };
    let bar = progress::bytes(&format!("writing {}", args.output.display()));
    let result = occult_model::convert(&args.model, &args.output, &options, &mut progress::follow(&bar));
    bar.finish_and_clear();
    result?;
    let written = ModelFiles::open(&args.output, LoadOptions::default())?;
    let (bytes, shards) = (written.checkpoint().total_bytes(), written.checkpoint().num_shards());
    let plural = if shards == 1 { "" } else { "s" };
    print(&format!(
        "{}: {} in {shards} file{plural}\n",
        args.output.display(),
        crate::output::bytes(bytes as f64)
    ))
}
