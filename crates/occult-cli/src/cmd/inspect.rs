//! `occult inspect`

use anyhow::Result;

use crate::args::InspectArgs;
use crate::output::{object, print, print_json};

pub(super) fn run(args: &InspectArgs) -> Result<()> {
    let description = occult_formats::describe(&args.file)?;
    if args.json {
        return print_json(&object(&description, serde_json::json!({ "file": args.file }))?);
    }
    print(&description.to_string())
}
