//! `occult export`

use anyhow::{Context, Result};
use occult_formats::{ExportOptions, PlacementFile, write_atomic};

use crate::args::ExportArgs;
use crate::output::print;
use crate::setup;

pub(super) fn run(args: &ExportArgs) -> Result<()> {
    let file = PlacementFile::read(&args.placement)?;
    let (counts, num_groups) = match &args.profile {
        Some(path) => {
            let profile = setup::profile(path)?;
            file.check_against(profile.meta()).with_context(|| args.placement.display().to_string())?;
            let counts =
                (0..profile.num_layers()).map(|l| profile.counts(l)).collect::<Result<Vec<_>, _>>()?;
            (Some(counts), profile.meta().router.as_ref().and_then(|r| r.num_groups))
        }
        None => (None, None),
    };
    let options = ExportOptions {
        counts,
        slots_per_rank: args.slots_per_rank,
        num_hidden_layers: args.hidden_layers,
        num_groups: args.groups.or(num_groups),
        ..ExportOptions::default()
    };
    let exported = occult_formats::export(&file, args.format, &options)
        .with_context(|| format!("cannot export {} as {}", args.placement.display(), args.format.name()))?;
    match &args.output {
        Some(path) => {
            write_atomic(path, exported.text.as_bytes())?;
            eprintln!("{}: {}", path.display(), args.format.name());
        }
        None => print(&exported.text)?,
    }
    exported.notes.iter().for_each(|note| eprintln!("note: {note}"));
    Ok(())
}
