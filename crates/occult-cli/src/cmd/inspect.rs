//! tmp
pub(super) fn run(_: &crate::args::InspectArgs) -> anyhow::Result<()> { anyhow::bail!("tmp") }
